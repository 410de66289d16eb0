"""Nothing that is read from disk runs code, and ids of data sets name no files."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from meds_megatron.data.problems import load_problems
from meds_megatron.data.tokenizer import load_tokenizer

SOURCE = Path(__file__).parents[1] / "meds_megatron"
MAY_UNPICKLE = {
    "weights/conversion/checkpoint.py",  # the description of a checkpoint, known classes only
    "bench/reshard.py",  # messages between processes of one benchmark
}
FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load"}
FORBIDDEN |= {"cloudpickle.loads", "dill.load", "joblib.load", "marshal.load", "marshal.loads", "os.system"}
UNPICKLES_PEERS = (
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "recv_object_list",
)
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "LLM": ("trust_remote_code", False)}
"""Keywords without which a call is not safe, or not surely so."""


def calls() -> list[tuple[str, str, dict[str, object]]]:
    """File, dotted name and constant keywords of every call in the package."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                found.append((str(path.relative_to(SOURCE)), ast.unparse(node.func), keywords))
    return found


def test_no_call_runs_what_it_reads():
    assert len(calls()) > 3000
    for file, name, keywords in calls():
        assert name not in FORBIDDEN or file in MAY_UNPICKLE, f"{file} calls {name}"
        assert not name.endswith(UNPICKLES_PEERS), f"{file} calls {name}"
        keyword, value = NEEDED.get(name, (None, None))
        if name.endswith(".from_pretrained"):
            keyword, value = "trust_remote_code", False
        assert keyword is None or keywords.get(keyword, "missing") is value, f"{file}: {name} without {keyword}={value}"


def test_the_code_of_a_model_directory_is_not_run(shared_data, tmp_path):
    from meds_megatron.weights.conversion.verify import token_logprobs

    directory = shutil.copytree(shared_data / "qwen2-tokenizer", tmp_path / "model")
    marker = tmp_path / "ran"
    for module in ("tokenization_evil", "modeling_evil", "configuration_evil"):
        (directory / f"{module}.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    classes = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", None],
    }
    for name, settings in (("config.json", {"model_type": "evil"}), ("tokenizer_config.json", {})):
        path = directory / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | settings | {"auto_map": classes, "tokenizer_class": "Evil"}))
    for load in (load_tokenizer, lambda directory: token_logprobs(directory, [1, 2, 3])):
        with pytest.raises(Exception, match=r"trust_remote_code|cannot be read|evil"):
            load(directory)
    assert not marker.exists()


def test_ids_of_problems_name_no_files(tmp_path):
    """Ids and answers of data sets are values in rows: no path is made of them."""
    ids = ["../../x", "/etc/passwd", "a\0b", "..", "~root", "C:\\x"]
    file = tmp_path / "..data.jsonl"
    file.write_text("".join(json.dumps({"id": name, "question": "?", "answer": "1"}) + "\n" for name in ids))
    problems = load_problems([str(file)])
    assert [problem.id for problem in problems] == ids
    assert {problem.dataset for problem in problems} == {"..data"}

"""Mistakes of a user: one clear sentence each, before anything is started, and nothing is left half-written."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from meds_megatron.cli import main
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.table import build_table
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SHAPE = dict(
    model_type="qwen3",
    transformers_version="5.19.0",
    architectures=["Qwen3ForCausalLM"],
    hidden_size=8,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=8,
    vocab_size=260,
    tie_word_embeddings=True,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)
ROW = {"question": "What is 1 + 1?", "answer": "2"}


class Place:
    """A directory with a model, in which a case spoils something."""

    def __init__(self, path: Path):
        self.path, self.model = path, path / "model"

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # The model's files are links to those of the other cases.
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(self, *rows: object) -> Path:
        """A jsonl file; a row that is a text is a line as it is."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        return self.file("problems.jsonl", "".join(f"{line}\n" for line in lines))

    def parquet(self, **columns: list) -> Path:
        pq.write_table(pa.table(columns), self.path / "problems.parquet")
        return self.path / "problems.parquet"

    def cut(self, path: Path, bytes_less: int) -> Path:
        return self.file(str(path.relative_to(self.path)), path.read_bytes()[:-bytes_less])

    def without(self, *names: str) -> None:
        for name in names:
            (self.model / name).unlink()

    def shape(self, **changes: object) -> None:
        self.file("model/config.json", json.dumps(SHAPE | changes))

    def tensors(self, changes: dict[str, torch.Tensor | None]) -> None:
        tensors = load_file(self.model / "model.safetensors") | changes
        self.without("model.safetensors")
        save_file({name: t for name, t in tensors.items() if t is not None}, self.model / "model.safetensors")

    def train(self, data: Path | None = None, *, config: str | Path = QUICKSTART, **settings: object) -> list[str]:
        """Arguments of `meds train`; `__` in the name of a setting is a dot."""
        settings = {
            "run_dir": self.path / "run",
            "model__make": "no",
            "model__path": self.model,
            "data__train": f"[{data or self.rows(ROW)}]",
            "data__validation": "[]",
            "rollout__max_prompt_tokens": 200,
        } | settings
        return ["train", str(config), *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]

    def earlier_run(self) -> None:
        self.file("run/config.yaml", "penalty:\n  alpha: 0.5\n")
        self.file("run/metrics.jsonl", '{"step": 1}\n')

    def yaml(self, text: str | bytes) -> list[str]:
        return ["train", str(self.file("mine.yaml", text))]


def setting(expected: str, **settings: object):
    return lambda at: at.train(**settings), expected


def yaml(expected: str, text: str | bytes):
    return lambda at: at.yaml(text), expected


def rows(expected: str, *lines: object, **settings: object):
    return lambda at: at.train(at.rows(*lines), **settings), expected


def model(expected: str, spoil: Callable[[Place], object], **settings: object):
    def prepare(at: Place) -> list[str]:
        spoil(at)
        return at.train(**settings)

    return prepare, expected


def command(expected: str, *arguments: str):
    """`{}` is the place's directory."""
    return lambda at: [argument.replace("{}", str(at.path)) for argument in arguments], expected


# A case: what prepares it and returns the arguments of `meds`, and a part of the sentence.
CONFIGS = {
    "no such file": command("missing.yaml: there is no such config file", "train", "{}/missing.yaml"),
    "a directory": command("there is no such config file", "train", "{}"),
    "not YAML": yaml("mine.yaml line 3: not readable as YAML", "train:\n  steps: [1, 2\n"),
    "a list": yaml("expected `key: value` lines at the top level, found a list", "- train\n- steps\n"),
    "an empty value": yaml("mine.yaml: train.steps is None, expected a whole number", "train:\n  steps:\n"),
    "nested too deep": yaml("mine.yaml line 1: not readable as YAML", "a: " + "[" * 10**5),
    "nested too deep for OmegaConf": yaml("mine.yaml: not readable as YAML", "a: " + "[" * 500 + "]" * 500),
    "an override that is nested too deep": setting(
        "the value is not readable as YAML", data__train="[" * 500 + "]" * 500
    ),
    "bytes": yaml("mine.yaml: not readable as YAML", b"\xff\xfe\x00\x01"),
    "a key twice": yaml(
        "mine.yaml line 3: not readable as YAML: found duplicate key", "train:\n  steps: 1\ntrain: 2\n"
    ),
    "its own base": yaml("`base` is circular", "base: mine.yaml\n"),
    "a base that is missing": yaml("no such config file, named as `base` in", "base: other.yaml\n"),
    "an object with code": yaml("mine.yaml line 1: not readable as YAML", "name: !!python/object/apply:os.getcwd []\n"),
    "a reference to nothing": yaml("name cannot be resolved", "name: ${train.stepz}\n"),
    "an unknown key": setting("unknown key `train.stepz`; did you mean `train.steps`?", train__stepz=3),
    "a key of another section": setting("did you mean `rollout.max_response_tokens`?", train__max_response_tokens=3),
    "a section for a value": setting("is 3, expected a section with the keys", train=3),
    "a text for a number": setting("train.steps is 'many', expected a whole number", train__steps="many"),
    "a fraction for a count": setting("train.steps is 2.5, expected a whole number", train__steps=2.5),
    "a number for true or false": setting("wandb.enabled is 2, expected true or false", wandb__enabled=2),
    "a list of lists": setting("expected a list, each item a text", data__train="[[a.jsonl]]"),
    "not a number": setting("optimizer.lr is nan, expected", optimizer__lr=".nan"),
    "infinity": setting("penalty.alpha is inf, expected", penalty__alpha=".inf"),
    "below its range": setting("rollout.responses_per_prompt is 0, expected", rollout__responses_per_prompt=0),
    "a choice that there is not": setting("policy.loss is 'grpo', expected one of ppo", policy__loss="grpo"),
    "an override without a value": command("expected key=value", "train", QUICKSTART, "train.steps"),
    "an override that is not YAML": setting("the value is not readable as YAML", data__train="[a"),
    "no training data": setting("data.train is empty", data__train="[]"),
    "a name that leaves the directory": setting("name is '../../x'", name="../../x"),
    "a name with a null byte": setting("name is", name='"a\\0b"'),
    "an empty name": setting("name is ''", name='""'),
    "layers over stages": setting(
        "4 layers are fewer than the model chunks of", parallel__pipeline=5, cluster__ranks_per_node=5
    ),
    "heads over ranks": setting(
        "2 key/value heads cannot be divided over", parallel__tensor=4, cluster__ranks_per_node=8
    ),
    "too many virtual stages": setting("4 layers are fewer than the model chunks", parallel__virtual_pipeline=4),
    "ranks over a layout": setting("make the number of ranks a multiple of 2", cluster__ranks_per_node=3),
    "a micro-batch too small": setting("train.micro_batch_tokens = 50 has no room for", train__micro_batch_tokens=50),
}

DATA = {
    "a line that is not JSON": rows("problems.jsonl, row 2: not valid JSON", ROW, "{not json"),
    "a line cut off": rows("problems.jsonl, row 2: not valid JSON", ROW, '{"question": "What is'),
    "a line of another encoding": (
        lambda at: at.train(
            at.file("problems.jsonl", json.dumps(ROW).encode() + b'\n{"question": "\xe9", "answer": "1"}\n')
        ),
        "problems.jsonl, row 2: not valid JSON",
    ),
    "a list as a row": rows("problems.jsonl, row 1: expected a JSON object", [1, 2]),
    "a row that is nested too deep": rows("row 2: not valid JSON (nested too deep)", ROW, "[" * 10**5),
    "an empty answer": rows("the answer in `answer` is empty", {"question": "?", "answer": ""}),
    "no question": rows("problems.jsonl, row 1: no question", {"answer": "3"}),
    "no answer": rows("problems.jsonl, row 1: no answer", {"question": "?"}),
    "an answer of a wrong type": rows("or a list of these, found a list", {"question": "?", "answer": [["3"]]}),
    "an answer that is no number": rows("found nan", '{"question": "?", "answer": NaN}'),
    "a question of a wrong type": rows("the question in `question` must be a text", {"question": 3, "answer": "3"}),
    "an id of a wrong type": rows("`id` must be a text or a whole number", ROW | {"id": [1]}),
    "the same id twice": rows("row 2 has the problem id 'a' that", ROW | {"id": "a"}, ROW | {"id": "a"}),
    "an empty file": rows("No problems found in"),
    "a question that is half a character": rows("row 1: ", '{"question": "\\ud800", "answer": "1"}'),
    "no file": setting("nowhere.jsonl is no file", data__train="[nowhere.jsonl]"),
    "no validation file": setting("nowhere.jsonl is no file", data__validation="[nowhere.jsonl]"),
    "a directory": (
        lambda at: at.train((at.path / "a.jsonl").mkdir() or at.path / "a.jsonl"),
        "a.jsonl is no file",
    ),
    "another format": (
        lambda at: at.train(at.file("a.csv", "question,answer\n")),
        "a.csv is neither a .jsonl nor a .parquet file",
    ),
    "no parquet": (
        lambda at: at.train(at.file("a.parquet", b"PAR1 but not really")),
        "a.parquet cannot be read as parquet",
    ),
    "an empty parquet file": (lambda at: at.train(at.file("a.parquet", b"")), "a.parquet cannot be read as parquet"),
    "a parquet file cut off": (
        lambda at: at.train(at.cut(at.parquet(question=["?"] * 99, answer=["1"] * 99), 100)),
        "problems.parquet cannot be read as parquet",
    ),
    "damaged pages of a parquet file": (
        lambda at: at.train(
            at.file(
                "problems.parquet",
                (raw := at.parquet(question=[str(n) for n in range(99)], answer=["1"] * 99).read_bytes())[:20]
                + bytes(200)
                + raw[220:],
            )
        ),
        "problems.parquet cannot be read as parquet",
    ),
    "a column of a wrong type": (
        lambda at: at.train(at.parquet(question=[1.5], answer=["1"])),
        "problems.parquet, row 1: the question in `question` must be a text",
    ),
    "other columns": (
        lambda at: at.train(at.parquet(text=["?"], label=["1"])),
        "problems.parquet, row 1: no question",
    ),
    "prompts that are too long": rows("None of 1 prompts fits", {"question": "one " * 500, "answer": "1"}),
    "a prompt that may not be too long": rows(
        "Problem 'problems:2' has", ROW, {"question": "one " * 500, "answer": "1"}, data__overlong_prompts="error"
    ),
}

MODELS = {
    "no directory": setting("/no/such/model does not exist", model__path="/no/such/model"),
    "a file": (lambda at: at.train(model__path=at.file("weights.bin", "x")), "weights.bin does not exist"),
    "a name of the hub": setting("model directory Qwen/Qwen3-8B does not exist", model__path="Qwen/Qwen3-8B"),
    "no config.json": model("config.json does not exist", lambda at: at.without("config.json")),
    "a config.json cut off": model("config.json is not JSON", lambda at: at.cut(at.model / "config.json", 20)),
    "a config.json that is a list": model("contains a list", lambda at: at.file("model/config.json", "[]")),
    "a config.json of another encoding": model(
        "config.json is not JSON", lambda at: at.file("model/config.json", b'{"architectures": "\xff"}')
    ),
    "another architecture": model(
        "describes LlamaForCausalLM: only Qwen2ForCausalLM and Qwen3ForCausalLM",
        lambda at: at.shape(architectures=["LlamaForCausalLM"]),
    ),
    "architectures that are no list": model("config.json", lambda at: at.shape(architectures=5)),
    "a config.json that is nested too deep": model(
        "config.json is not JSON (nested too deep)", lambda at: at.file("model/config.json", "[" * 10**5)
    ),
    "an index that is nested too deep": model(
        "is not a safetensors index (nested too deep)",
        lambda at: at.file("model/model.safetensors.index.json", '{"weight_map":' * 10**5),
    ),
    "a tokenizer that is nested too deep": model(
        "the tokenizer in", lambda at: at.file("model/tokenizer_config.json", '{"a":' * 10**5)
    ),
    "a template that reaches for classes": model(
        "fails (access to attribute '__class__' of 'str' object is unsafe.): correct it, or set data.chat_template",
        lambda at: at.file("model/chat_template.jinja", "{{ ''.__class__.__mro__ }}"),
    ),
    "a template that computes for ever": model(
        "The chat template of the tokenizer in",
        lambda at: at.file("model/chat_template.jinja", "{% for i in range(10 ** 9) %}{% endfor %}"),
    ),
    "a template that divides by zero": model(
        "fails (division by zero)", lambda at: at.file("model/chat_template.jinja", "{{ 1 / 0 }}")
    ),
    **{
        f"{key} of 10^9": model(
            f"{key} is 1000000000, expected a whole number above 0 and at most",
            lambda at, key=key: at.shape(**{key: 10**9}),
        )
        for key in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        )
    },
    "a size that is missing": model(
        "config.json has no key 'hidden_size'",
        lambda at: at.file("model/config.json", json.dumps({k: v for k, v in SHAPE.items() if k != "hidden_size"})),
    ),
    "a size that is a text": model("hidden_size is '8', expected", lambda at: at.shape(hidden_size="8")),
    "a size of zero": model("num_hidden_layers is 0, expected", lambda at: at.shape(num_hidden_layers=0)),
    "no heads": model("num_attention_heads is 0, expected", lambda at: at.shape(num_attention_heads=0)),
    "a window": model("use_sliding_window", lambda at: at.shape(use_sliding_window=True)),
    "scaled positions": model("rope_scaling", lambda at: at.shape(rope_scaling={"type": "yarn", "factor": 4.0})),
    "no tokenizer": model(
        "has no tokenizer",
        lambda at: at.without(
            *(
                p.name
                for p in at.model.iterdir()
                if "token" in p.name or p.suffix == ".txt" or p.name in ("vocab.json",)
            )
        ),
    ),
    "a tokenizer cut off": model("the tokenizer in", lambda at: at.cut(at.model / "tokenizer.json", 1000)),
    "a tokenizer with more tokens than the model": model(
        "tokens",
        lambda at: (at.shape(vocab_size=100), at.tensors({"model.embed_tokens.weight": torch.zeros(100, 8)})),
    ),
    "a broken generation_config.json": model(
        "generation_config.json is not JSON", lambda at: at.file("model/generation_config.json", "{")
    ),
    "no weights": model("has neither model.safetensors nor", lambda at: at.without("model.safetensors")),
    "pickled weights": model(
        "has neither model.safetensors nor",
        lambda at: (at.without("model.safetensors"), at.file("model/pytorch_model.bin", "x")),
    ),
    "weights cut off": model(
        "model.safetensors is not a whole safetensors file", lambda at: at.cut(at.model / "model.safetensors", 1000)
    ),
    "empty weights": model(
        "model.safetensors is not a whole safetensors file", lambda at: at.file("model/model.safetensors", "")
    ),
    "a missing tensor": model("has no tensor model.norm.weight", lambda at: at.tensors({"model.norm.weight": None})),
    "a tensor of another shape": model(
        "tensor model.norm.weight is [9], config.json asks for [8]",
        lambda at: at.tensors({"model.norm.weight": torch.zeros(9)}),
    ),
    "quantized weights": model(
        "quantized weights cannot be trained",
        lambda at: at.tensors({"model.norm.weight": torch.zeros(8, dtype=torch.int8)}),
    ),
    "an index that is none": model(
        "is not a safetensors index", lambda at: at.file("model/model.safetensors.index.json", "[]")
    ),
    "an index of a missing file": model(
        "model-00001-of-00002.safetensors is named by",
        lambda at: at.file(
            "model/model.safetensors.index.json",
            json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}),
        ),
    ),
    "a tokenizer for a random model that there is not": (
        lambda at: at.train(
            model__make="random", model__path="null", model__random__tokenizer="/nowhere", cache_dir=at.path
        ),
        "/nowhere",
    ),
    "a cache that cannot be made": (
        lambda at: at.train(
            model__make="random", model__path="null", model__random__tokenizer=at.model, cache_dir=at.file("file", "")
        ),
        "cache_dir",
    ),
}

RUNS = {
    "a run with other settings": model("run: there is a run with other settings", lambda at: at.earlier_run()),
    "a run without checkpoints": model(
        "run: there already is a run, without checkpoints", lambda at: at.earlier_run(), checkpoint__every=0
    ),
    "a line of metrics that is a list": model(
        "run/metrics.jsonl line 1: expected a JSON object with a `step` and numbers; remove the line",
        lambda at: (at.earlier_run(), at.file("run/metrics.jsonl", '[1]\n{"step": 2}\n')),
    ),
    "a file in its place": (lambda at: at.train(run_dir=at.file("taken", "x")), "the run directory cannot be written"),
    "a file above it": (
        lambda at: at.train(run_dir=at.file("taken", "x") / "run"),
        "the run directory cannot be written",
    ),
    "a place that cannot be written": setting("the run directory cannot be written", run_dir="/proc/meds/run"),
    "a name that is too long": setting("the run directory cannot be written", run_dir="/tmp/" + "x" * 300),
}

COMMANDS = {
    "no such command": command("No such command 'trian'", "trian"),
    "no argument": command("Missing argument 'CONFIG'", "train"),
    "no such option": command("No such option '--stpes'", "bench", "phases", QUICKSTART, "--stpes", "3"),
    "an option out of range": command("--steps", "bench", "phases", QUICKSTART, "--steps", "0"),
    "an option that is no number": command("--keys", "bench", "memory", "--keys", "many"),
    "a dtype that there is not": command("--dtype", "convert", "to-hf", "{}/model", "{}/out", "--dtype", "int8"),
    "a text that there is not": command("--text", "convert", "verify", "{}/model", "{}/model", "--text", "{}/no.txt"),
    "a model to convert that there is not": command(
        "nowhere does not exist", "convert", "to-mcore", "{}/nowhere", "{}/out"
    ),
    "a model for a checkpoint": command("is not a checkpoint", "convert", "to-hf", "{}/model", "{}/out"),
    "a target that is there": command("model exists already", "convert", "to-mcore", "{}/model", "{}/model"),
    "a target below a file": command(
        "cannot be written", "convert", "to-mcore", "{}/model", "{}/model/config.json/out"
    ),
    "a model to compare that there is not": command("nowhere", "convert", "verify", "{}/model", "{}/nowhere"),
}

CASES = {
    f"{kind}: {name}": case
    for kind, cases in {"config": CONFIGS, "data": DATA, "model": MODELS, "run": RUNS, "command": COMMANDS}.items()
    for name, case in cases.items()
}


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory) -> Path:
    """A directory as `meds train` wants it, with a tokenizer of bytes."""
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("bad_input") / "model"
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: place for place, token in enumerate([*alphabet, "<end>"])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=template).save_pretrained(
        directory
    )
    (directory / "config.json").write_text(json.dumps(SHAPE))
    shapes = build_table(ModelShape.from_hf(directory)).hf_shapes
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, directory / "model.safetensors")
    return directory


@pytest.fixture
def place(whole_model, tmp_path, monkeypatch, without_fork_servers) -> Place:
    def start(*_, **__):
        raise AssertionError("something was started")

    monkeypatch.setattr("ray.init", start)
    shutil.copytree(whole_model, tmp_path / "model", copy_function=os.link)
    return Place(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(name, place, capsys):
    prepare, expected = CASES[name]
    arguments = prepare(place)
    before = listing(place.path)
    status = main(arguments)
    shown = capsys.readouterr()
    assert status == 2
    assert expected in shown.err
    assert shown.out == ""
    assert listing(place.path) == before
    if name.startswith("command: ") and shown.err.startswith("Usage: "):
        assert shown.err.splitlines()[-1].startswith("Error: ")
    else:
        assert len(shown.err.strip().splitlines()) == 1 and shown.err.startswith("meds: ")


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_a_command_and_leaves_nothing(place, number, status):
    """While it reads a text, from a pipe: the pipe opens when the command does."""
    os.mkfifo(place.path / "text")
    before = {path.name for path in place.path.iterdir()}
    arguments = ["convert", "verify", place.model, place.model, "--text", place.path / "text"]
    # A shell without job control starts background commands with SIGINT ignored, and children inherit that.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = subprocess.Popen(
        [sys.executable, "-c", f"{code}; from meds_megatron.cli import main; sys.exit(main())", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with open(place.path / "text", "w"):
        command.send_signal(number)
        _, errors = command.communicate(timeout=HANG_SECONDS)
    assert command.returncode == status
    assert errors.strip() == ("meds: interrupted" if number == signal.SIGINT else "")
    assert {path.name for path in place.path.iterdir()} == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing(place, capsys):
    arguments = place.train()
    before = listing(place.path)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    try:
        status = main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    shown = capsys.readouterr().err.strip()
    assert status == 2 and len(shown.splitlines()) == 1
    assert shown.startswith(f"meds: {place.path / 'run'}: the run directory cannot be written (File too large)")
    assert listing(place.path) == before


def listing(directory: Path) -> dict[str, str]:
    """Digest of every file, and every directory, below `directory`."""
    paths = sorted(directory.rglob("*"))
    return {str(p): hashlib.blake2b(p.read_bytes()).hexdigest() if p.is_file() else "directory" for p in paths}

"""`meds eval` with real engines: repeatable, also across an interruption, and in LIMO's format."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meds_megatron.cli import main
from meds_megatron.data.problems import load_problems
from meds_megatron.errors import UserError
from meds_megatron.evaluation import evaluate
from meds_megatron.evaluation.models import find_model
from meds_megatron.evaluation.settings import dataset_name, request_seed
from meds_megatron.run.checkpoint_files import mark_complete
from meds_megatron.toy_tasks.arithmetic import arithmetic_problems

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = 24
SAMPLES = 3


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "sums" / "test.jsonl"
    path.parent.mkdir()
    rows = [
        {"id": p.id, "question": p.question, "answer": p.answer} for p in arithmetic_problems("validation", "shared")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:PROBLEMS]))
    return str(path)


def arguments(model: Path, problems: str, output: Path, *more: str) -> list[str]:
    sizes = ["--n-sampling", str(SAMPLES), "--k", "1,3", "--max-tokens", "40", "--max-num-seqs", "6"]
    fast = ["--prompt-type", "question", "--enforce-eager", "--kv-cache-gib", "0.1", "--workers", "1"]
    return ["eval", str(model), "--data", problems, "--output-dir", str(output), *sizes, *fast, *more]


def outputs(output: Path, suffix: str = "jsonl") -> list[Path]:
    return sorted(output.rglob(f"sums/*.{suffix}"))


def killed(command: list[str], output: Path) -> int:
    """Starts an evaluation and kills it when a third of the problems is finished; number of rows that it leaves."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from meds_megatron.cli import main; main({command!r})"], cwd=ROOT
    )
    while process.poll() is None:
        rows = sum(path.read_bytes().count(b"\n") - 1 for path in outputs(output, "partial"))
        if rows >= PROBLEMS // 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    (partial,) = outputs(output, "partial")
    with open(partial, "ab") as file:
        file.write(b'{"place": 23, "row": {"torn')
    return partial.read_bytes().count(b"\n") - 1


def test_an_evaluation_is_repeatable_also_across_an_interruption(
    cpu_engines, run_meds, own_ray, small_model, problems, tmp_path, capsys, monkeypatch
):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert main(arguments(small_model, problems, whole)) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    (output,) = outputs(whole)
    check_output(output, problems, last)

    left = killed(arguments(small_model, problems, torn), torn)
    assert PROBLEMS // 3 <= left < PROBLEMS
    assert main(arguments(small_model, problems, torn)) == 0
    assert f"{left} problems are finished, {PROBLEMS - left} are left" in capsys.readouterr().err
    assert outputs(torn)[0].read_bytes() == output.read_bytes()
    assert not outputs(torn, "partial")

    def start(*_):
        raise AssertionError("engines were started")

    monkeypatch.setattr(evaluate, "started_engines", start)
    before = output.read_bytes()
    assert main(arguments(small_model, problems, whole)) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == last and output.read_bytes() == before
    Path(problems).write_text(Path(problems).read_text() + "\n")
    assert main(arguments(small_model, problems, whole)) == 2
    assert "was made with another data_digest" in capsys.readouterr().err


def check_output(output: Path, problems: str, last: dict) -> None:
    """Rows in LIMO's fields and in the order of the data, settings in name and header, csv and plot next to it."""
    header, *rows = [json.loads(line) for line in output.read_bytes().split(b"\n") if line]
    assert header["settings"]["sampling"]["seed"] == 0 and "_n3_max40_seed0_" in output.name
    given = load_problems([problems])
    assert [(row["question"], row["gold_answer"]) for row in rows] == [(p.question, p.answer) for p in given]
    for row in rows:
        assert len(row["generated_responses"]) == len(row["generated_answers"]) == SAMPLES
        assert row["is_correct"] == any(row["answers_correctness"])
        assert len(set(row["generated_responses"])) > 1 or row["finish_reasons"] == ["stop"] * SAMPLES
    shares = [sum(row["answers_correctness"]) / SAMPLES for row in rows]
    assert (last["n"], last["errors"]) == (PROBLEMS, 0)
    assert last["accuracy"] == pytest.approx(sum(shares) / PROBLEMS)
    assert last["metrics"]["sums"]["math_verify"]["pass@3"] == sum(row["is_correct"] for row in rows) / PROBLEMS
    lines = list(csv.DictReader(output.with_suffix(".csv").open()))
    assert {line["metric"] for line in lines} == {"mean@3", "maj@3", "distinct", "pass@1", "pass@3"}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_several_data_sets_graders_and_fingerprints(own_ray, published_run, problems, tmp_path, capsys):
    """Evaluation of a run's export."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(problems).read_text().splitlines(keepends=True)[:4]))
    more = ["--data", str(other), "--end-idx", "4", "--grader", "limo", "--grader", "strict", "--fingerprints"]
    assert main(arguments(published_run, problems, tmp_path / "out", *more)) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["n"] == 8 and set(last["metrics"]) == {"sums", "other"}
    assert set(last["metrics"]["other"]) == {"limo", "strict"}
    rows = [json.loads(line) for line in outputs(tmp_path / "out")[0].read_text().splitlines()[1:]]
    ratios = [row["top1_eigenvalue_ratio"] for row in rows]
    assert any(ratios) and all(ratio is None or 0 < ratio <= 1 + 1e-6 for ratio in ratios)
    assert "tokens" not in rows[0]
    assert len([path for path in last["files"] if path.endswith(".csv")]) == 1


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory) -> Path:
    """A random model with a tokenizer."""
    from tests.rollout.engine_cases import make_model

    return make_model(tmp_path_factory.mktemp("plain"), "qwen3 tied", seed=0)


def test_a_run_is_evaluated_at_its_newest_export_or_complete_checkpoint(plain_model, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoints/step_000010", "checkpoints/step_000020", "checkpoints/step_000030", "hf/step_000020"):
        (run / name).mkdir(parents=True)
        (run / name / "config.json").write_text("{}")
    (run / "config.yaml").write_text("data: {system_prompt: null}\nmodel: {setting_of_another_release: 1}\n")
    for step in ("000010", "000020"):
        mark_complete(run / f"checkpoints/step_{step}")
    model = find_model(str(run))
    assert model.path == run / "hf/step_000020" and model.trained_on.system_prompt is None
    assert model.name == "run/hf/step_000020"
    assert find_model(str(run / "checkpoints/step_000010")).trained_on is not None
    assert find_model(str(plain_model)).trained_on is None


def test_a_checkpoint_is_converted_once(plain_model, tmp_path):
    from meds_megatron.weights.conversion.convert import to_mcore

    to_mcore(plain_model, tmp_path / "checkpoint")
    model = find_model(str(tmp_path / "checkpoint"))
    directory = model.hf_directory(tmp_path / "cache")
    made = os.stat(directory / "model.safetensors").st_mtime_ns
    assert model.hf_directory(tmp_path / "cache") == directory
    assert os.stat(directory / "model.safetensors").st_mtime_ns == made


def test_limos_command_line_works_as_it_is(monkeypatch):
    """Command line of LIMO's eval.sh."""
    requests = []

    def run(request):
        requests.append(request)
        raise UserError("far enough")

    monkeypatch.setattr(evaluate, "evaluate", run)
    line = (
        "--model_name_or_path Qwen/Qwen2.5-32B-Instruct --data_name math --prompt_type qwen-instruct --temperature 0.0 "
        "--start_idx 0 --end_idx -1 --n_sampling 1 --k 1 --split test --max_tokens 32768 --seed 0 --top_p 1 "
        "--surround_with_messages"
    )
    assert main(["eval", *line.split()]) == 2
    (request,) = requests
    assert (request.model, request.data) == ("Qwen/Qwen2.5-32B-Instruct", ("data/math/test.jsonl",))
    assert (request.max_tokens, request.ks, request.prompt_type) == (32768, (1,), "qwen-instruct")
    assert (request.sampling.temperature, request.sampling.n_sampling, request.sampling.seed) == (0.0, 1, 0)


def test_names_and_seeds():
    assert dataset_name("/data/aime/test.jsonl") == "aime" and dataset_name("math500.jsonl") == "math500"
    seeds = {request_seed(seed, name, problem) for seed in (0, 1) for name in ("a", "b") for problem in ("1", "2")}
    assert len(seeds) == 8 and max(seeds) < 2**62


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--temperature", "0"], "--temperature 0 gives 3 equal responses"),
        (["--k", "4"], "--k 4 needs as many responses"),
        (["--start-idx", "24"], "has 24 problems, and none in [24:-1]"),
        (["--max-tokens", "100000"], "of the model's positions, fewer than --max-tokens 100000"),
        (["--regrade", "x.jsonl"], "--regrade takes neither a model nor --data"),
    ],
)
def test_a_mistake_is_one_sentence(plain_model, problems, tmp_path, capsys, more, expected):
    assert main(arguments(plain_model, problems, tmp_path / "out", *more)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("meds: ") and expected in shown and len(shown.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_model_is_named(problems, tmp_path, capsys):
    assert main(arguments(tmp_path, problems, tmp_path / "out")) == 2
    assert f"{tmp_path} has no model" in capsys.readouterr().err

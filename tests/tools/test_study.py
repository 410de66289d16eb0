"""The study's plans and records, and its measures on runs that are written by hand."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats

from meds_megatron.config import load_config, save_config
from meds_megatron.config.changes import changes
from meds_megatron.run.rollout_files import ROLLOUT_SCHEMA
from meds_megatron.sweeps.config import expand, load_sweep
from meds_megatron.toy_tasks.arithmetic import RULES, Expression
from meds_megatron.toy_tasks.remainder import DIVISOR, SLIP, response

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools" / "study"))
import study  # noqa: E402
import study_measures  # noqa: E402
import study_plan  # noqa: E402
import study_records  # noqa: E402
import study_results  # noqa: E402

pytestmark = pytest.mark.usefixtures("processes")
"""Records name the commit, which git knows."""

EXPRESSION = Expression(7, 6, 4, 5)


@pytest.mark.parametrize("method", study_plan.METHODS)
def test_a_methods_settings_make_its_config_of_the_base(method):
    name = study_plan.METHODS[method]
    base = [] if name == study_plan.BASE.name else [f"base={study_plan.BASE}"]
    expected = load_config(study_plan.CONFIGS / name, base)
    overrides = [f"{key}={json.dumps(value)}" for key, value in study_plan.method_settings(method).items()]
    free, other = changes(expected, load_config(study_plan.BASE, overrides))
    assert other == [] and {line.partition(":")[0] for line in free} <= {"name", "run_dir"}


METHODS = ("dapo", "meds_recommended")


def plan(directory: Path, *settings: str, steps: int = 4) -> Path:
    arguments = ["plan", str(directory), "--runs", str(directory / "runs"), "--steps", str(steps), "--seeds", "2"]
    assert study.main([*arguments, "--methods", *METHODS, "--set", "rollout.validation_responses=8", *settings]) == 0
    return directory


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    return plan(tmp_path_factory.mktemp("study"))


def runs_of(directory: Path, sweep: str) -> list:
    file = directory / f"{sweep}.yaml"
    return expand(load_sweep(file), file)


def test_the_recommended_config_has_two_of_the_departures():
    departures = study_plan.DEPARTURES
    assert study_plan.method_settings("meds_recommended") == departures["noise"] | departures["rare"]


def test_the_runs_of_a_plan_draw_equally_many_responses(planned):
    confirmed = list(study_plan.CONFIRMED)
    expected = {
        "per_kind": ("per_kind", METHODS, (0, 1)),
        "remainder": ("remainder", METHODS, (0, 1)),
        "confirmation": ("remainder", confirmed, (5, 6)),
        "departures": ("remainder", study_plan.departure_settings(), (0, 1)),
    }
    assert set(expected) == set(study_plan.SWEEPS)
    for name, (task, methods, seeds) in expected.items():
        runs = runs_of(planned, name)
        assert [run.name for run in runs] == [f"{method},seed={seed}" for method in methods for seed in seeds]
        configs = [run.config for run in runs]
        drawn = {(c.train.prompts_per_step, c.rollout.responses_per_prompt, c.filter.max_batches) for c in configs}
        assert len(drawn) == 1 and {c.filter.generation_prompts for c in configs} == {None}
        assert {c.data.arithmetic_rules for c in configs} == {task}
        assert {c.rollout.validation_responses for c in configs} == {8}
        validated = {(c.data.limit_validation, c.train.validate_every) for c in configs}
        assert validated == {(112, 4) if name == "confirmation" else (96, 2)}


def test_a_setting_that_no_run_can_use_is_refused(tmp_path, capsys):
    plan(tmp_path)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    assert study.main(["plan", str(tmp_path), "--set", "train.stepz=3"]) == 1
    assert f"{tmp_path}/per_kind.yaml: unknown key `train.stepz`" in capsys.readouterr().err
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before
    assert study.main(["plan", str(tmp_path), "--set", "train.steps=[3"]) == 1
    assert "train.steps=[3: the value is not readable as YAML" in capsys.readouterr().err


def write_step(directory: Path, step: int, groups: list[list[tuple[int | None, int, list[float]]]]) -> None:
    """Rollouts of a step: each response is (number of its rule or None, divisor, fingerprint); rule 0 is right."""
    rows = [(number, *made) for number, group in enumerate(groups) for made in group]
    columns: dict[str, list] = {name: [None] * len(rows) for name in ROLLOUT_SCHEMA.names}
    columns["step"] = [step] * len(rows)
    columns["group"] = [group for group, *_ in rows]
    columns["key"] = [f"p{group}|{'right' if rule == 0 else 'wrong'}" for group, rule, *_ in rows]
    columns["prompt"] = [f"coins {EXPRESSION}"] * len(rows)
    columns["response"] = [
        "6*4=25 \\boxed{5}" if rule is None else response(EXPRESSION, RULES[rule], divisor)
        for _, rule, divisor, _ in rows
    ]
    columns["correct"] = [rule == 0 for _, rule, *_ in rows]
    columns["outcome"] = ["graded"] * len(rows)
    columns["fingerprint"] = [fingerprint for *_, fingerprint in rows]
    (directory / "rollouts").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=ROLLOUT_SCHEMA), directory / "rollouts" / f"step_{step:06d}.parquet")


def finish(run, pass_1: float, steps: int) -> None:
    """Writes a run directory in which rules are the clusters of fingerprints, and answers are something else."""
    run.directory.mkdir(parents=True)
    save_config(run.config, run.directory / "config.yaml")

    def shown(rule: int, divisor: int) -> tuple[int, int, list[float]]:
        return rule, divisor, np.eye(4)[rule % 4].tolist()

    group = [shown(0, DIVISOR)] + [
        shown(rule, divisor) for rule in (1, 2) for divisor in (DIVISOR, SLIP) for _ in "abc"
    ]
    lines = []
    for step in range(1, steps + 1):
        write_step(run.directory, step, [group, [shown(0, DIVISOR)] * 13])
        line = {"step": step, "time/step": 90.0, "time/validation": 30.0, "response/count": 26}
        lines.append(line | {"memory/saturated_share": step / 8, "memory/clusters": 6, "memory/keys": 2})
    lines[-1] |= {"validation/pass@1": pass_1, "validation/pass@8": 2 * pass_1}
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def recorded_once(planned) -> Path:
    """A study whose runs of DAPO are finished, recorded and gone."""
    for task in study_plan.TASKS:
        runs = runs_of(planned, task)
        finish(runs[0], 0.2, steps=4)
        finish(runs[1], 0.3, steps=4)
        finish(runs[2], 0.3, steps=3)  # of 4
    assert study.main(["run", str(planned), "--sweeps", *study_plan.TASKS, "--methods", "dapo"]) == 0
    shutil.rmtree(planned / "runs")
    return planned


@pytest.fixture
def recorded(recorded_once, tmp_path) -> Path:
    """A copy of that study."""
    return Path(shutil.copytree(recorded_once, tmp_path, dirs_exist_ok=True))


def test_results_of_recorded_runs(recorded, capsys):
    results = study_results.collect_results(recorded)
    missing = results["missing"]
    assert [missing[task] for task in study_plan.TASKS] == [{"meds_recommended": 2}] * 2
    assert missing["departures"].total() == 8 * 2 and set(results["departures"]["effects"]) == {"pass@1", "pass@n"}
    found = results["comparisons"]["remainder"]["dapo"]
    run = found["runs"][0]["measures"]
    assert (run["minutes"], run["responses"], run["pass@n"]) == (4.0, 104, 0.4)
    assert (run["saturated"], run["clusters"]) == (7 / 16, 3.0)
    # Of two rules by two divisors; the other group is all right.
    answers = {response(EXPRESSION, RULES[rule], divisor)[-2] for rule in (1, 2) for divisor in (DIVISOR, SLIP)}
    assert run["wrong_answers"] == len(answers) / 2
    assert run["ari_fingerprint"] == 1.0 and run["ari_answer"] < 1.0
    # Two points lie on a line.
    assert run["eigenvalue_ratio"] > 0.99
    mean, half = found["summary"]["pass@1"]
    low, high = stats.t.interval(0.95, 1, loc=0.25, scale=stats.sem([0.2, 0.3]))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert study.main(["results", str(recorded)]) == 0
    assert (recorded / "results.png").read_bytes().startswith(b"\x89PNG")
    table = (recorded / "results.md").read_text()
    assert "| dapo | 2 | – | 0.250 ± 0.635 |" in table and "Not run yet: meds_recommended (2)." in table
    assert table in capsys.readouterr().out


def test_methods_are_compared_with_dapo_run_by_run_of_the_same_seed_and_start(planned, tmp_path):
    directory = Path(shutil.copytree(planned, tmp_path, dirs_exist_ok=True))
    reached = {("dapo", 0): 0.2, ("dapo", 1): 0.4, ("meds_recommended", 0): 0.3, ("meds_recommended", 1): 0.6}

    def line_of(run, start: float) -> str:
        seed = run.differences["train.seed"]
        measures = dict.fromkeys((*study_results.MEASURES, "responses"), 0.5)
        measures["pass@1"] = reached[study_records.method_of(run), seed]
        line = {"settings": study_records.digest(run), "seed": seed, "steps": 4, "measures": measures}
        return json.dumps(line | {"validation": {"0": [start, 0.5]}}) + "\n"

    def summary_of(lines: list[str]) -> dict:
        (directory / study_records.RECORDS).write_text("".join(lines))
        return study_results.collect_results(directory)["comparisons"]["per_kind"]["meds_recommended"]["summary"]

    runs = runs_of(directory, "per_kind")
    lines = [line_of(run, start=0.1) for run in runs]
    assert summary_of(lines[:3])["pass@1 − dapo"] == [pytest.approx(0.1), None]
    # Differences 0.1 and 0.2; the half-width of a mean of two is t(0.975, 1) * 0.1 / 2.
    summary = summary_of(lines)
    assert summary["pass@1 − dapo"] == [pytest.approx(0.15), pytest.approx(12.7062 * 0.05, rel=1e-4)]
    assert summary["pass@n − dapo"] == [0.0, 0.0]
    assert summary_of([*lines, *lines]) == summary  # The same runs on a machine of the same type.
    # A second machine's run, which started from another model, has no run to be compared with, but counts.
    summary = summary_of([*lines[:3], line_of(runs[3], start=0.2)])
    assert summary["pass@1 − dapo"] == [pytest.approx(0.1), None] and summary["pass@1"][0] == pytest.approx(0.45)
    # Where both ran there too, a seed's runs count as one: 0.1 and 0.2 for seed 1, 0.1 for seed 0.
    reached["dapo", 1] = 0.5
    summary = summary_of([*lines, line_of(runs[1], start=0.2), line_of(runs[3], start=0.2)])
    assert summary["pass@1 − dapo"] == [pytest.approx(0.125), pytest.approx(12.7062 * 0.025, rel=1e-4)]


def test_the_confirmation_compares_its_own_runs(planned, tmp_path):
    directory = Path(shutil.copytree(planned, tmp_path, dirs_exist_ok=True))
    lines = []
    for run in runs_of(directory, "confirmation"):
        method, seed = study_records.method_of(run), run.differences["train.seed"]
        measures = dict.fromkeys(study_results.MEASURES, 0.5) | {"pass@n": 0.75 if method == "meds_published" else 0.5}
        line = {"settings": study_records.digest(run), "seed": seed, "measures": measures}
        lines.append(json.dumps(line | {"validation": {"0": [seed, 0.5]}}) + "\n")
    (directory / study_records.RECORDS).write_text("".join(lines))
    results = study_results.collect_results(directory)
    compared = results["comparisons"]["confirmation"]
    assert {name: method["summary"]["pass@n − dapo"] for name, method in compared.items()} == {
        "dapo": [None, None],
        "meds_published": [0.25, 0.0],
        "meds_recommended": [0.0, 0.0],
    }
    title = study_results.title_of("confirmation")
    section = study_results.table_of(results).partition(f"### {title}\n")[2].partition("###")[0]
    assert "| meds_published | 2 | 2 | 0.500 ± 0.000 | 0.750 ± 0.000 |" in section and "Not run yet" not in section


def test_the_picture_has_intervals_of_differences_that_are_enough():
    def summary(pairs: int) -> dict:
        return {"pairs": pairs, "summary": {"pass@1 − dapo": [0.1, 0.2], "pass@n − dapo": [0.3, 0.4]}}

    without = {"pairs": 0, "summary": {"pass@1 − dapo": [None, None], "pass@n − dapo": [None, None]}}
    methods = {"dapo": without, "edas": summary(2), "f_grpo": summary(3), "grpo": without}
    assert study_results.points_of(methods) == [
        ("edas", "edas (2 pairs)", (0.1, 0.3), (None, None)),
        ("f_grpo", "f_grpo (3 pairs)", (0.1, 0.3), (0.2, 0.4)),
    ]
    effects = {"noise": (0.1, 0.2), "rare": None, "filtered": None, "half_life": None}
    assert study_results.points_of_effects({"pass@1": effects, "pass@n": effects | {"noise": (0.3, 0.4)}}) == [
        ("noise", "noise", (0.1, 0.3), (0.2, 0.4))
    ]


@pytest.mark.parametrize("setting", ["optimizer.lr=1e-3", "data.limit_validation=8"])
def test_a_finished_run_of_another_plan_is_not_recorded(tmp_path, capsys, setting):
    directory = plan(tmp_path)
    run = runs_of(directory, "per_kind")[0]
    finish(run, 0.2, steps=4)
    plan(directory, setting)
    assert study.main(["run", str(directory), "--sweeps", "per_kind", "--methods", "dapo"]) == 1
    key, _, value = setting.partition("=")
    error = capsys.readouterr().err
    assert f"{run.directory}: this finished run has other settings than the plan ({key}: " in error
    assert f" -> {float(value):g}" in error and not (directory / study_records.RECORDS).exists()


def test_a_run_that_cannot_be_measured_is_an_error(tmp_path, capsys):
    directory = plan(tmp_path, "train.validate_every=0")
    for run in runs_of(directory, "per_kind")[:2]:
        finish(run, 0.2, steps=4)
        lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        shown = [{key: value for key, value in line.items() if "pass@" not in key} for line in lines]
        (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shown))
    assert study.main(["run", str(directory), "--sweeps", "per_kind", "--methods", "dapo"]) == 1
    assert "the run dapo,seed=0 ended without a validation after its last step" in capsys.readouterr().err


def test_what_is_recorded_is_not_run_again_and_the_file_is_enough_for_that(recorded):
    lines = (recorded / study_records.RECORDS).read_text()
    assert study.main(["run", str(recorded), "--sweeps", *study_plan.TASKS, "--methods", "dapo"]) == 0
    assert (recorded / study_records.RECORDS).read_text() == lines and not (recorded / "runs").exists()
    record = json.loads(lines.splitlines()[0])
    assert (record["task"], record["method"], record["seed"], record["steps"]) == ("per_kind", "dapo", 0, 4)
    assert record["validation"] == {"4": [0.2, 0.4]}
    assert len(record["code"].removesuffix("-dirty")) == 40


@pytest.mark.parametrize(
    ("setting", "counts"),
    [
        ("cluster.threads_per_rank=2", True),
        ("checkpoint.every=7", True),
        ("optimizer.lr=1e-3", False),
        ("data.limit_validation=8", False),
    ],
)
def test_records_count_where_the_settings_that_decide_a_run_are_the_same(recorded, setting, counts):
    plan(recorded, setting)
    found = {
        method for methods in study_results.collect_results(recorded)["comparisons"].values() for method in methods
    }
    assert found == ({"dapo"} if counts else set())


def test_effects_of_the_departures_are_of_the_runs_that_have_half_of_them(planned, tmp_path):
    directory = Path(shutil.copytree(planned, tmp_path, dirs_exist_ok=True))
    runs = runs_of(directory, "departures")
    assert {run.config.data.arithmetic_rules for run in runs} == {"remainder"}
    lines = []
    for run in runs:
        seed = run.differences["train.seed"]
        on = {name for name, settings in study_plan.DEPARTURES.items() if settings.items() <= run.differences.items()}
        measures = dict.fromkeys((*study_results.MEASURES, "responses"), 0.5)
        measures["pass@1"] += seed / 10
        measures["pass@n"] += 0.125 * ("half_life" in on) - 0.25 * ("noise" in on)
        line = {
            "settings": study_records.digest(run),
            "seed": seed,
            "measures": measures,
            "validation": {"0": [seed, 0.5]},
        }
        lines.append(json.dumps(line) + "\n")
    (directory / study_records.RECORDS).write_text("".join(lines))
    found = study_results.collect_results(directory)
    assert found["departures"]["runs"] == 16 and "departures" not in found["missing"]
    expected = {"noise": -0.25, "rare": 0.0, "filtered": 0.0, "half_life": 0.125}
    effects = found["departures"]["effects"]
    assert {name: effect for name, (effect, _) in effects["pass@n"].items()} == pytest.approx(expected)
    assert [effect for effect, _ in effects["pass@1"].values()] == pytest.approx([0.0] * 4)
    assert study.main(["results", str(directory)]) == 0
    assert "| noise | 0.000 ± 0.000 | -0.250 ± 0.000 |" in (directory / "results.md").read_text()


def test_a_run_that_no_sweep_has_is_named_before_any_is_trained(planned, capsys):
    assert study.main(["run", str(planned), "--methods", "dapo", "nois"]) == 1
    assert (
        f"{planned}: no sweep has runs of nois; expected some of dapo, filtered+half_life," in capsys.readouterr().err
    )


def test_a_study_that_is_not_planned_says_what_to_do(tmp_path, capsys):
    for command in ("run", "results"):
        assert study.main([command, str(tmp_path)]) == 1
        plan = f"python tools/study/study.py plan {tmp_path}"
        assert f"{tmp_path}/per_kind.yaml: this sweep is not planned; run `{plan}`" in capsys.readouterr().err


def test_a_damaged_record_is_named(recorded, capsys):
    with open(recorded / study_records.RECORDS, "a") as file:
        file.write('{"task": "per_kind"\n')
    assert study.main(["results", str(recorded)]) == 1
    assert f"{study_records.RECORDS} line 5: expected a JSON object of a run" in capsys.readouterr().err


def test_the_repositorys_study_has_the_methods_configs_as_they_are():
    """`results` leaves out records of other settings, so a changed config needs a new plan."""
    directory = ROOT / "docs" / "study"
    for name in study_plan.SWEEPS:
        assert yaml.safe_load((directory / f"{name}.yaml").read_text()) == study_plan.planned_sweep(name, directory)


def test_the_committed_table_is_that_of_the_records():
    directory = ROOT / "docs" / "study"
    assert study_results.table_of(study_results.collect_results(directory)) == (directory / "results.md").read_text()


def test_the_document_shows_the_committed_table():
    readme = (ROOT / "docs/study/README.md").read_text()
    study_section = readme[readme.index("First task, a different answer") : readme.index("What they show")]
    shown, made = (
        [line for line in text.splitlines() if line.startswith("|")]
        for text in (study_section, (ROOT / "docs/study/results.md").read_text())
    )
    assert made and shown == made


def test_noise_is_a_cluster_or_no_cluster_as_the_runs_memory_has_it():
    config = load_config(study_plan.BASE).memory
    angles = np.radians([0, 1, 2.5, 88, 90, 176, 267])
    fingerprints = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    config.noise = "cluster"
    assert study_measures.clusters_of(fingerprints, config)[-2:] == [-1, -1]
    config.noise = "ignore"
    labels = study_measures.clusters_of(fingerprints, config)
    assert labels[:5] == [labels[0]] * 3 + [labels[3]] * 2 and len(set(labels)) == 4


def test_measures_that_nothing_counts_in_are_left_out_of_means():
    assert study_results.over_seeds([(0, None), (1, None)]) == [None, None]
    assert study_results.over_seeds([(0, None), (1, 2.0)]) == [2.0, None]
    assert study_measures.WrongResponses().agreement(load_config(study_plan.BASE)) == {
        "ari_fingerprint": None,
        "ari_answer": None,
    }

"""`meds plan` as a whole: every config of the repository, refusals and what they suggest, and calibration."""

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from meds_megatron.cli import main
from meds_megatron.config import QWEN, Config, load_config, save_config, validate_model
from meds_megatron.errors import UserError
from meds_megatron.plan.duration import TIMED
from meds_megatron.plan.fit import MOST_SUGGESTIONS, changed_config, check_fit, problem, suggest
from meds_megatron.plan.hardware import GIB, H100
from meds_megatron.plan.memory import PHASES
from meds_megatron.plan.model import planned_shape
from meds_megatron.plan.plan import make_plan
from meds_megatron.plan.render import show_plan
from tests.limits import HANG_SECONDS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASELINES = sorted((CONFIGS / "baselines").glob("*.yaml"))
QWEN_72B = CONFIGS / "meds_qwen2.5_72b.yaml"
ON_FOUR_NODES = ["cluster.nodes=4", "rollout.engines=4", "rollout.kv_cache_gib=40", "train.offload_optimizer=false"]
TOO_LARGE = {
    "72B on four nodes": (QWEN_72B, ON_FOUR_NODES),
    "72B on one node": (QWEN_72B, ["cluster.nodes=1", "rollout.engines=1", "parallel.pipeline=1"]),
    "activations": (CONFIGS / "meds_qwen3_8b.yaml", ["train.micro_batch_tokens=65536", "parallel.sequence=false"]),
    "KV cache": (CONFIGS / "meds_qwen2.5_32b.yaml", ["rollout.tensor=1"]),
    "KV cache of the config": (QWEN_72B, ["rollout.kv_cache_gib=0.1"]),
}


@pytest.mark.parametrize("path", [*CONFIGS.glob("*.yaml"), *BASELINES], ids=lambda path: path.stem)
def test_every_config_of_the_repository_fits(path):
    plan = make_plan(load_config(path))
    assert plan.refusal is None
    assert plan.on_gpu or not path.stem.startswith("meds_q")


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_fits_on_a_model_of_gpus(path):
    plan = make_plan(load_config(path, [f"base={CONFIGS / 'meds_qwen3_8b.yaml'}"]))
    assert plan.on_gpu and plan.refusal is None


def test_72b_on_four_nodes_with_its_optimizer_beside_engines_is_refused():
    plan = make_plan(load_config(QWEN_72B, ON_FOUR_NODES))
    parts = plan.memory.peak("generate").parts
    trainer = sum(parts[name] for name in ("weights", "optimizer")) / GIB
    engine = sum(parts[name] for name in ("engine weights", "engine work", "KV cache")) / GIB
    # 72.7e9 parameters of 14 bytes over 32 GPUs are 29.6 GiB; the stages at the ends have an embedding more.
    assert 29.6 < trainer < 31
    assert 40 + 72.7e9 * 2 / 8 / GIB < engine < 61
    assert "gradients" not in parts
    assert parts["contexts"] / GIB == 4
    assert (
        "(trainer) + 60.7 (engine) + 0.3 (resharding) + 4.0 (contexts and NCCL) = 95.7 GiB of cluster.gpu_memory_gib"
        in plan.refusal
    )
    assert plan.refusal.endswith("fits with rollout.kv_cache_gib=null.")
    assert "\n" not in plan.refusal


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_is_suggested_fits(case):
    path, overrides = TOO_LARGE[case]
    config = load_config(path, overrides)
    plan = make_plan(config)
    assert 1 <= len(plan.suggestions) <= MOST_SUGGESTIONS
    for suggestion in plan.suggestions:
        assert str(suggestion) in plan.refusal
        changed = make_plan(load_config(path, [*overrides, *str(suggestion).split()]))
        assert asdict(changed.config) == asdict(make_plan(changed_config(config, suggestion.changes)).config)
        assert changed.refusal is None


def test_no_suggestion_is_found_for_a_model_that_fits_nowhere():
    config = load_config(QWEN_72B, ["cluster.gpu_memory_gib=5"])
    assert suggest(config, QWEN["Qwen2.5-72B"], H100) == []
    assert "more nodes or a smaller model" in make_plan(config).refusal


def test_training_is_refused_in_the_words_of_the_plan(tmp_path, capsys):
    from meds_megatron.trainer.main import train

    model = tmp_path / "Qwen2.5-72B"
    model.mkdir()
    shape = QWEN["Qwen2.5-72B"]
    (model / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "hidden_size": shape.hidden_size,
                "num_hidden_layers": shape.num_layers,
                "num_attention_heads": shape.num_heads,
                "num_key_value_heads": shape.num_kv_heads,
                "intermediate_size": shape.ffn_size,
                "vocab_size": shape.vocab_size,
                "max_position_embeddings": shape.max_positions,
                "rope_theta": shape.rope_theta,
            }
        )
    )
    overrides = [*ON_FOUR_NODES, f"model.path={model}", "cluster.address=auto", f"run_dir={tmp_path / 'run'}"]
    assert main(["plan", str(QWEN_72B), *overrides, "--json"]) == 1
    planned = json.loads(capsys.readouterr().out)
    with pytest.raises(UserError) as caught:
        train(load_config(QWEN_72B, overrides))
    assert str(caught.value) == planned["refusal"]
    assert not (tmp_path / "run").exists()


def test_a_run_that_fits_is_not_refused():
    config = load_config(QWEN_72B)
    check_fit(config, QWEN["Qwen2.5-72B"], H100)
    config.cluster.gpu_memory_gib = 40.0
    with pytest.raises(UserError, match="does not fit: in the phase `update`"):
        check_fit(config, QWEN["Qwen2.5-72B"], H100)


def test_engines_on_nodes_of_their_own_share_no_gpu_with_the_trainer():
    shared = make_plan(load_config(QWEN_72B, ["rollout.engines=4"])).memory
    apart = make_plan(load_config(QWEN_72B, ["rollout.engines=4", "rollout.nodes=4"])).memory
    assert all(demand.device.engine != (demand.device.stage is not None) for demand in apart.demands)
    trainer = {"weights", "gradients", "optimizer", "contexts"}
    assert all(d.parts.keys() == trainer for d in apart.demands if d.phase == "generate" and not d.device.engine)
    assert apart.engine.kv_cache > 1.1 * shared.engine.kv_cache
    # They do not sleep.
    asleep = [d.parts for d in apart.demands if d.device.engine and d.phase == "update"]
    assert asleep and all("KV cache" in parts for parts in asleep)
    assert not any("KV cache" in d.parts for d in shared.demands if d.phase != "generate")


@pytest.mark.parametrize(
    ("changes", "phase", "grows"),
    [
        (["train.micro_batch_tokens=16384"], "update", True),
        (["train.forward_tokens=65536"], "forward", True),
        (["model.recompute=full"], "update", False),
        (["parallel.virtual_pipeline=2"], "update", True),
        (["rollout.kv_cache_gib=30"], "generate", False),
        (["rollout.kv_cache_gib=30", "train.offload_optimizer=false"], "forward", True),
        (["model.dtype=float32"], "weight sync", True),
        (["parallel.sequence=false"], "update", True),
    ],
)
def test_a_setting_changes_memory_in_its_own_direction(changes, phase, grows):
    before, after = (make_plan(load_config(QWEN_72B, overrides)).memory for overrides in ([], changes))
    assert (after.peak(phase).total > before.peak(phase).total) == grows
    assert after.peak(phase).total != before.peak(phase).total


def test_every_rank_engine_and_shard_is_placed_once():
    plan = make_plan(load_config(QWEN_72B, ["rollout.nodes=2", "rollout.engines=4", "rollout.tensor=4"]))
    rows = plan.placement
    ranks = [rank for row in rows if row.ranks for rank in numbers(row.ranks)]
    assert sorted(ranks) == list(range(64))
    assert sorted(engine for row in rows for engine in numbers(row.engines)) == list(range(4))
    assert [row.shard for row in rows if row.shard is not None] == list(range(plan.layout.data))
    assert {row.node for row in rows if row.stage is None} == {8, 9}
    assert [row.layers for row in rows if row.replica == 0] == ["E 0-19", "20-39", "40-59", "60-79 H"]


def test_context_parallel_ranks_share_a_stage_and_a_shard():
    plan = make_plan(load_config(CONFIGS / "meds_qwen2.5_32b.yaml", ["parallel.context=2"]))
    rows = plan.placement
    assert sorted(rank for row in rows for rank in numbers(row.ranks)) == list(range(32))
    assert [(row.stage, row.replica, row.context) for row in rows] == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    assert [row.shard for row in rows] == [0, None, None, None]
    half, whole = (
        make_plan(load_config(CONFIGS / "meds_qwen2.5_32b.yaml", overrides)).memory.peak("update").parts["activations"]
        for overrides in (["parallel.context=2"], [])
    )
    assert half == pytest.approx(whole / 2, rel=0.01)


def numbers(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1)) if text else []


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("case", ["fits", *TOO_LARGE])
def test_the_text_is_no_wider_than_the_terminal_and_says_it_all(case, width):
    path, overrides = TOO_LARGE.get(case, (QWEN_72B, []))
    console = Console(width=width, record=True, file=io.StringIO())
    plan = make_plan(load_config(path, overrides))
    show_plan(plan, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    assert (plan.refusal or "The run fits.") in flat
    for word in ("node", "GPUs", "KV cache", "optimizer", *PHASES, "tensor parallel, update", *TIMED):
        assert word in flat
    assert "…" not in text


def test_a_known_name_stands_for_a_model_that_is_not_here():
    config = Config()
    for path, name in (
        ("models/Qwen2.5-Math-7B", "Qwen2.5-Math-7B"),
        ("Qwen/Qwen3-8B-Base", "Qwen3-8B"),
        ("~/hub/models--Qwen--Qwen3-32B/snapshots/0123abcd", "Qwen3-32B"),
    ):
        config.model.path = path
        assert planned_shape(config) == QWEN[name]
    config.model.path = "models/Qwen2.5-7B-Instruct"
    assert planned_shape(config).max_positions == 32768 < QWEN["Qwen2.5-7B"].max_positions
    config.model.path = "models/mine"
    with pytest.raises(UserError, match=r"models/mine is not here, .* copy the model's config\.json"):
        planned_shape(config)


def test_the_arithmetic_models_shape_is_known_before_it_is_made():
    from meds_megatron.toy_tasks import arithmetic_model

    config = load_config(CONFIGS / "quickstart.yaml")
    tokenizer = arithmetic_model.build_tokenizer()
    made = arithmetic_model.build_model(tokenizer, 0).config
    shape = planned_shape(config)
    assert (shape.hidden_size, shape.num_layers, shape.num_heads) == (
        made.hidden_size,
        made.num_hidden_layers,
        made.num_attention_heads,
    )
    assert (shape.num_kv_heads, shape.head_dim, shape.ffn_size, shape.vocab_size, shape.tie_embeddings) == (
        made.num_key_value_heads,
        made.head_dim,
        made.intermediate_size,
        made.vocab_size,
        made.tie_word_embeddings,
    )
    assert shape.max_positions == made.max_position_embeddings
    validate_model(config, shape)


def test_a_run_calibrates_its_own_prediction_exactly(tmp_path):
    config = load_config(CONFIGS / "meds_qwen3_8b.yaml")
    save_config(config, tmp_path / "config.yaml")
    line = {"response/count": 16384, "response/length_mean": 2000.0, "filter/kept_share": 0.5, "policy/updates": 32}
    times = {"time/rollout": 300.0, "time/forward": 20.0, "time/update": 90.0, "time/sync": 4.0}
    warm_up = {name: 10 * seconds for name, seconds in times.items()}
    lines = [{"step": 1} | line | warm_up, {"step": 2} | line | times, {"step": 3} | line | times]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    plan = make_plan(config, calibrate=tmp_path)
    assert plan.seconds == pytest.approx({phase: times[f"time/{phase}"] for phase in TIMED})
    assert plan.calibration.steps == 2
    assert plan.tokens.response == pytest.approx(2000)
    # Half the nodes have twice the work each; what a node sends stays.
    half = make_plan(load_config(CONFIGS / "meds_qwen3_8b.yaml", ["cluster.nodes=2", "rollout.engines=16"]), tmp_path)
    assert 1.5 * 90 < half.seconds["update"] < 2.1 * 90
    assert half.seconds["rollout"] > 300


def test_a_run_whose_phases_overlap_cannot_calibrate(tmp_path):
    save_config(load_config(CONFIGS / "quickstart.yaml", ["train.max_staleness=1"]), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"phases of a run with train\.max_staleness = 1 overlap"):
        make_plan(load_config(CONFIGS / "quickstart.yaml"), calibrate=tmp_path)


def test_a_run_without_steps_cannot_calibrate(tmp_path):
    config = load_config(CONFIGS / "quickstart.yaml")
    for missing in ("config.yaml", "metrics.jsonl"):
        with pytest.raises(UserError, match=rf"expected a run directory with .*{missing}"):
            make_plan(config, calibrate=tmp_path)
        save_config(config, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match="has 0 finished steps"):
        make_plan(config, calibrate=tmp_path)


@pytest.mark.usefixtures("processes")
def test_nothing_heavy_is_imported():
    program = f"""
import sys
from meds_megatron.cli import main
assert main(["plan", {str(QWEN_72B)!r}]) == 0
heavy = {{"torch", "ray", "vllm", "megatron", "transformers", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "The run fits." in done.stdout


def test_a_problem_names_the_kv_cache_where_engines_have_none():
    given = load_config(CONFIGS / "meds_qwen2.5_32b.yaml", ["rollout.kv_cache_gib=0.1"])
    assert "rollout.kv_cache_gib = 0.1 gives an engine rank 0.1 GiB of KV cache" in make_plan(given).refusal
    left = load_config(CONFIGS / "meds_qwen2.5_32b.yaml", ["rollout.tensor=2", "cluster.gpu_memory_gib=45"])
    assert "the trainer leaves an engine rank 0.0 GiB of KV cache" in problem(left, make_plan(left).memory)


def test_engines_that_generate_ahead_shorten_the_step_to_the_longer_half():
    path = CONFIGS / "meds_qwen2.5_72b.yaml"
    turns, ahead = (
        make_plan(load_config(path, ["rollout.nodes=4", "rollout.engines=4", f"train.max_staleness={s}"]))
        for s in (0, 1)
    )
    assert turns.seconds == ahead.seconds
    trainer = turns.seconds["forward"] + turns.seconds["update"]
    assert turns.step_seconds == pytest.approx(sum(turns.seconds.values()))
    assert ahead.step_seconds == pytest.approx(max(trainer, turns.seconds["rollout"]) + turns.seconds["sync"])

"""Settings that a config leaves open: the KV cache, whether the optimizer leaves the GPUs meanwhile, corrections."""

from pathlib import Path

import pytest

from meds_megatron.config import QWEN, load_config
from meds_megatron.plan.choices import with_choices
from meds_megatron.plan.hardware import CPU, GIB, H100, RESERVE
from meds_megatron.plan.plan import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ON_GPUS = sorted(CONFIGS.glob("meds_q*.yaml"))


@pytest.mark.parametrize("path", ON_GPUS, ids=lambda path: path.stem)
def test_the_kv_cache_is_all_that_is_left_but_the_reserve(path):
    plan = make_plan(load_config(path))
    limit = 79 * GIB
    assert 0 <= (1 - RESERVE) * limit - plan.memory.peak("generate").total < 2**20 + 2
    assert plan.memory.engine.kv_cache == plan.config.rollout.kv_cache_gib * GIB
    # Parts of a GiB of one engine, and the same again when the config that is saved with the run is planned.
    assert make_plan(plan.config).to_dict() == plan.to_dict()


def test_a_small_model_gets_what_its_sequences_can_use():
    config = load_config(CONFIGS / "quickstart.yaml", ["cluster.device=cuda", "rollout.kv_cache_gib=null"])
    plan = make_plan(config)
    engine = plan.memory.engine
    blocks = config.rollout.max_num_seqs * -(-engine.longest // 16) + 1
    assert engine.kv_cache <= blocks * 16 * engine.kv_bytes_per_token < engine.kv_cache + 2**20
    assert plan.memory.peak("generate").total < 8 * GIB


def test_the_size_in_the_config_stays():
    config = load_config(CONFIGS / "meds_qwen2.5_72b.yaml", ["rollout.kv_cache_gib=20"])
    assert make_plan(config).memory.engine.kv_cache == 20 * GIB


def test_without_gpus_nothing_moves_and_the_cache_has_one_gib():
    config = load_config(CONFIGS / "gsm8k_smoke.yaml")
    chosen = with_choices(config, QWEN["Qwen2.5-0.5B"], CPU, on_gpu=False)
    assert (chosen.rollout.kv_cache_gib, chosen.train.offload_optimizer) == (1.0, False)
    assert (config.rollout.kv_cache_gib, config.train.offload_optimizer) == (None, None)


@pytest.mark.parametrize(
    ("changes", "pays"),
    [
        ([], True),
        (["rollout.nodes=8"], False),
        # The KV cache holds all responses at once with the optimizer next to it.
        (["rollout.max_num_seqs=16"], False),
        (["train.offload_optimizer=false"], False),
    ],
)
def test_the_optimizer_moves_where_a_larger_kv_cache_saves_more_than_the_copies_take(changes, pays):
    config = load_config(CONFIGS / "meds_qwen2.5_72b.yaml", changes)
    assert with_choices(config, QWEN["Qwen2.5-72B"], H100, on_gpu=True).train.offload_optimizer is pays


def test_a_run_that_fits_only_so_moves_its_optimizer():
    config = load_config(CONFIGS / "meds_qwen2.5_72b.yaml", ["cluster.gpu_memory_gib=70", "rollout.kv_cache_gib=40"])
    assert make_plan(config).refusal is None
    config.train.offload_optimizer = False
    assert "in the phase `generate`" in make_plan(config).refusal


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [([], "none"), (["train.max_staleness=1"], "token"), (["train.max_staleness=1", "policy.importance=none"], "none")],
)
def test_stale_responses_are_corrected_unless_the_config_says_otherwise(settings, chosen):
    config = load_config(CONFIGS / "quickstart.yaml", ["rollout.deterministic=false", *settings])
    chosen_config = with_choices(config, QWEN["Qwen2.5-0.5B"], CPU, on_gpu=False)
    assert chosen_config.policy.importance == chosen

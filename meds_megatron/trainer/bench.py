"""Benchmarks of the parts as a run uses them."""

from contextlib import ExitStack

from meds_megatron.config import Config
from meds_megatron.config.validate import validate_model
from meds_megatron.model.shape import ModelShape
from meds_megatron.model.source import ensure_model
from meds_megatron.rollout import bench as rollout_bench
from meds_megatron.trainer.main import resolve_device
from meds_megatron.trainer.parts import read_prompts, start_ray


def rollout(config: Config, rounds: int) -> dict:
    """`meds_megatron.rollout.bench.run` on the prompts of one step of a run."""
    config.cluster.device = resolve_device(config.cluster.device)
    model_dir = ensure_model(config.model, config.data, config.cache_dir)
    validate_model(config, ModelShape.from_hf(model_dir))
    prompts = read_prompts(config, model_dir).train[: config.train.prompts_per_step]
    with ExitStack() as stack:
        start_ray(config, stack)
        token_ids = [prompt.token_ids for prompt in prompts]
        return rollout_bench.run(config, str(model_dir), token_ids, config.cluster.device == "cuda", rounds)

"""Benchmarks of the parts as a run uses them."""

import copy
import tempfile

from meds_megatron.bench import rollout as rollout_bench
from meds_megatron.cluster.device import resolve_device
from meds_megatron.cluster.ray_cluster import ray_cluster
from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.config.validate import validate_model
from meds_megatron.data.tokenizer import load_tokenizer
from meds_megatron.plan.choices import with_choices
from meds_megatron.plan.hardware import CPU, H100
from meds_megatron.run.reader import read_run
from meds_megatron.toy_tasks.make import ensure_model
from meds_megatron.trainer.main import train
from meds_megatron.trainer.prompts import read_prompts


def rollout(config: Config, rounds: int) -> dict:
    """`meds_megatron.bench.rollout.run` on the prompts of one step of a run."""
    config.cluster.device = resolve_device(config.cluster)
    model_dir = ensure_model(config.model, config.data, config.cache_dir)
    shape, on_gpu = ModelShape.from_hf(model_dir), config.cluster.device == "cuda"
    validate_model(config, shape)
    config = with_choices(config, shape, H100 if on_gpu else CPU, on_gpu)
    prompts = read_prompts(config, load_tokenizer(model_dir)).train[: config.train.prompts_per_step]
    with ray_cluster(config.cluster):
        token_ids = [prompt.token_ids for prompt in prompts]
        return rollout_bench.run(config, str(model_dir), token_ids, on_gpu, rounds)


def phases(config: Config, steps: int) -> dict:
    """Trains for `steps` steps after one of warm-up, and leaves nothing behind.

    Keys: `steps`, and the means over them of every `time/...` (seconds) and `throughput/...` of metrics.jsonl.
    """
    config = copy.deepcopy(config)
    config.train.steps = steps + 1
    config.train.validate_every = 0
    config.train.export_hf = config.wandb.enabled = False
    with tempfile.TemporaryDirectory(prefix="meds-bench-") as directory:
        config.run_dir = directory
        train(config)
        measured = [line for line in read_run(directory).metrics if line["step"] > 1]
    names = [name for name in measured[-1] if name.startswith(("time/", "throughput/"))]
    return {"steps": len(measured)} | {
        name: sum(line.get(name, 0.0) for line in measured) / len(measured) for name in names
    }

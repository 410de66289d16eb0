"""`meds train`: from a config to a trained model."""

import sys
from contextlib import ExitStack
from pathlib import Path

from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.config.validate import validate, validate_model
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.embedded.make import ensure_model
from meds_megatron.errors import UserError
from meds_megatron.trainer import loop
from meds_megatron.trainer.console import Console
from meds_megatron.trainer.parts import Prompts, read_prompts, start_parts, start_ray
from meds_megatron.trainer.run_dir import RunDirectory
from meds_megatron.trainer.state import RunState


def train(config: Config) -> None:
    """Runs `config` to its end. Raises UserError, before anything is started, for whatever can be told by then."""
    config.cluster.device = resolve_device(config.cluster.device)
    validate(config)
    check_machine(config)
    model_dir = ensure_model(config.model, config.data, config.cache_dir, report=_say)
    validate_model(config, ModelShape.from_hf(model_dir))
    prompts = read_prompts(config, model_dir)
    run = RunDirectory.create(config)
    try:
        _run(config, model_dir, prompts, run)
    except BaseException:
        run.discard_if_empty()
        raise


def _run(config: Config, model_dir: Path, prompts: Prompts, run: RunDirectory) -> None:
    with ExitStack() as stack:
        console = stack.enter_context(Console(config))
        if prompts.skipped:
            console.note(f"{prompts.skipped} prompts are longer than rollout.max_prompt_tokens and were left out")
        console.phase("starting engines and trainer ranks")
        start_ray(config, stack)
        parts = start_parts(config, model_dir, prompts, run, console, stack)
        state = RunState(PromptSampler(len(parts.prompts), config.train.seed, config.data.shuffle))
        loop.train(parts, state)
        if config.train.export_hf:
            console.note(f"the trained model is in {run.hf_export(state.step)}")


def check_machine(config: Config) -> None:
    """Raises UserError for a run that this machine cannot hold."""
    cluster = config.cluster
    if cluster.device == "cuda" and cluster.address is None:
        import torch

        if torch.cuda.device_count() < cluster.ranks_per_node:
            raise UserError(
                f"cluster.ranks_per_node = {cluster.ranks_per_node}, but this machine has {torch.cuda.device_count()} "
                "GPUs; lower it, and parallel.tensor and parallel.pipeline with it"
            )


def _say(text: str) -> None:
    print(f"meds: {text}", file=sys.stderr)


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` on a machine that has it, else `cpu`."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

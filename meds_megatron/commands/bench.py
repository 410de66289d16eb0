"""`meds bench`: each part against the plain way of doing the same."""

from collections.abc import Sequence
from pathlib import Path

import click

from meds_megatron.commands.options import Command, with_config, with_json


@click.group()
def bench() -> None:
    """Benchmark one part of a run on this machine."""


@bench.command(cls=Command, example="meds bench rollout configs/quickstart.yaml --json")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, help="Measured generations of each engine, after one warm-up."
)
@with_json
@with_config
def rollout(config, rounds: int) -> dict:
    """Tokens per second of a run's engine and of plain vLLM.

    Both generate the responses to one step's prompts, alternately, with the same model and sampling.
    """
    from meds_megatron.bench.run import rollout

    return rollout(config, rounds)


@bench.command("eval", cls=Command, example="meds bench eval --json")
@click.option("--model", metavar="DIR", help="A Hugging Face directory.  [default: the toy arithmetic model]")
@click.option("--responses", type=click.IntRange(min=1), default=8, help="To each of 200 problems.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Measured generations, after one warm-up.")
@click.option("--answers", type=click.IntRange(min=1), default=2000, help="Answers that are graded.")
@click.option("--workers", type=click.IntRange(min=1), default=2, help="Grader processes.")
@with_json
def bench_eval(model: str | None, responses: int, rounds: int, answers: int, workers: int) -> dict:
    """Tokens per second of `meds eval` and of plain vLLM, and seconds of grading.

    Both generate the same responses to arithmetic problems, alternately.
    """
    from meds_megatron.bench.evaluation import run

    return run(responses, rounds, answers, workers, model=Path(model) if model else None)


@bench.command(cls=Command, example="meds bench phases configs/quickstart.yaml --steps 5 --json")
@click.option("--steps", type=click.IntRange(min=1), default=5, help="Measured steps, after one warm-up step.")
@with_json
@with_config
def phases(config, steps: int) -> dict:
    """Seconds of each phase of a training step.

    Runs `meds train` in a temporary run directory without validation and export.
    """
    from meds_megatron.bench.run import phases

    return phases(config, steps)


@bench.command(cls=Command, example="meds bench step --model Qwen2.5-1.5B --layers 2 --json")
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("Qwen2.5-1.5B", "Qwen2.5-7B"),
    help="Published model whose shape is taken; may be given several times.",
)
@click.option("--layers", type=click.IntRange(min=1), default=1, help="Layers of it.")
@click.option("--responses", type=click.IntRange(min=4), default=32, help="Synthetic responses of a step.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, help="Measured steps of each form, after a warm-up.")
@with_json
def step(models: Sequence[str], layers: int, responses: int, rounds: int) -> dict:
    """Tokens per second of a policy's forward pass with fingerprints and update.

    Packed micro-batches against padded rectangles of 4 responses and a plain loop of transformers and torch's AdamW, on
    responses of long-tailed lengths (mean 300, longest 2000 tokens): on a GPU in bfloat16, else on one CPU core in
    float32. There 32 responses take about 40 minutes at the 7B shape, 4 about 10, and 7 GB of memory.
    """
    from meds_megatron.bench.step import run

    return run(models, layers, responses, rounds)


@bench.command(cls=Command, example="meds bench overlap --steps 30 --seeds 3 --json")
@click.option("--steps", type=click.IntRange(min=1), default=30, help="Training steps of each run.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Pairs of runs.")
@click.option("--max-staleness", type=click.IntRange(min=1), default=1, help="train.max_staleness of the second run.")
@click.option("--directory", type=click.Path(file_okay=False), help="Where to keep the runs.  [default: nowhere]")
@click.argument("overrides", nargs=-1)
@with_json
def overlap(steps: int, seeds: int, max_staleness: int, directory: str | None, overrides: Sequence[str]) -> dict:
    """Time of training while the engine generates for later steps, against taking turns.

    Trains the quickstart with one trainer rank and one engine, a core each, at train.max_staleness 0 and above.
    OVERRIDES are key=value settings of both.
    """
    from meds_megatron.bench.overlap import run

    return run(steps, seeds, max_staleness, list(overrides), directory)


@bench.command("overlap-simulation", cls=Command, example="meds bench overlap-simulation --json")
@click.option("--config", "config_file", type=click.Path(), help="A run's config.  [default: 32B, 64 + 64 GPUs]")
@click.option("--answers", type=click.IntRange(min=1), default=100_000, help="Responses that each method trains on.")
@click.option("--lengths", type=click.Path(), help="Response lengths: a file of numbers, or a run's directory.")
@click.option("--mean-response", type=float, help="Tokens to scale them to.  [default: a quarter of the limit]")
@click.option("--kept-share", type=click.FloatRange(0, 1, min_open=True), default=0.5, help="Groups the filter keeps.")
@click.option("--correlation", type=click.FloatRange(0, 1), default=0.5, help="Of lengths within a prompt.")
@click.option("--grading", "grading_seconds", type=click.FloatRange(0), default=0.1, help="Seconds of a grading.")
@click.option("--seed", type=int, default=0, help="Of lengths and outcomes.")
@click.argument("overrides", nargs=-1)
@with_json
def overlap_simulation(config_file: str | None, overrides: Sequence[str], lengths: str | None, **options) -> dict:
    """Step time and idle share of ways to overlap generation and training, simulated.

    The real training loop, schedule and engine pool in simulated time, over engines and GPUs that take as long as `meds
    plan` assumes. Lengths are those of MATH-500's solutions, scaled, or given ones. OVERRIDES are key=value settings.
    """
    from meds_megatron.bench.overlap_simulation import run

    return run(config_file, overrides, lengths_file=lengths, **options)


@bench.command(cls=Command, example="meds bench fingerprint --responses 8 --tokens 64 --json")
@click.option("--responses", type=click.IntRange(min=1), default=8, help="Responses with a fingerprint.")
@click.option("--tokens", type=click.IntRange(min=4), default=64, help="Length of each sequence.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Measured forward passes of each kind.")
@with_json
def fingerprint(responses: int, tokens: int, rounds: int) -> dict:
    """Time and memory that fingerprints add to a forward pass.

    Shape of Qwen2.5-0.5B with random weights on two pipeline stages (one GPU each, on a single GPU one stage, without
    GPUs two CPU threads): without fingerprints, with ours, and with the published method, which keeps all hidden states
    and applies the full head to every layer.
    """
    from meds_megatron.bench.fingerprint import run

    return run(responses=responses, tokens=tokens, rounds=rounds)


@bench.command(cls=Command, example="meds bench memory --history 64 --history 1600 --json")
@click.option(
    "--history",
    "histories",
    type=click.IntRange(min=2),
    multiple=True,
    default=(16, 64, 256, 800, 1600),
    help="Stored vectors of each problem; may be given several times.",
)
@click.option("--keys", type=click.IntRange(min=1), default=512, help="Problems in a step.")
@click.option("--new", type=click.IntRange(min=1), default=12, help="New vectors of each problem.")
@with_json
def memory(histories: Sequence[int], keys: int, new: int) -> dict:
    """CPU seconds of the error memory in a step.

    Measured on one thread: against clustering from scratch, over several shards, and with a million problems.
    """
    from meds_megatron.bench.memory import run

    return run(histories=histories, keys=keys, new=new)


@bench.command(cls=Command, example="meds bench checkpoint --directory /scratch --json")
@click.option("--directory", type=click.Path(file_okay=False, exists=True), help="Where to save.  [default: system's]")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Measured saves of each kind.")
@with_json
def checkpoint(directory: str | None, rounds: int) -> dict:
    """Time that training waits for a checkpoint.

    An asynchronous save of model and optimizer against a synchronous one: shape of Qwen2.5-0.5B with random weights on
    two CPU pipeline stages; needs 18 GiB of memory and 7 GiB of disk.
    """
    from meds_megatron.bench.checkpoint import run

    return run(directory, rounds=rounds)


@bench.command(cls=Command, example="meds bench reshard --json")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Measured updates of each method.")
@click.option("--network-gbit", type=float, default=400.0, help="Gbit/s of a node, each way.")
@click.option("--local-gbyte", type=float, default=100.0, help="GB/s between GPUs of a node.")
@with_json
def reshard(rounds: int, network_gbit: float, local_gbyte: float) -> dict:
    """Time and bytes of a weight update of the engines.

    Measured for the shape of Qwen2.5-0.5B on CPU, from TP2 x PP2 to an engine of TP2: resharding against gathering the
    whole model. Computed for 7B, 32B and 72B models: the bytes of an update and a lower bound on its time.
    """
    from meds_megatron.bench.reshard import run
    from meds_megatron.bench.reshard_forecast import forecasts

    return run(rounds=rounds) | {"plans": forecasts(network_gbit, local_gbyte)}

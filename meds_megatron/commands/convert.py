"""`meds convert`: model formats."""

import warnings

import click

from meds_megatron.commands.options import Command, with_json


@click.group()
def convert() -> None:
    """Convert models to megatron-core checkpoints and back, and compare models."""
    # megatron-core warns at every import about each optional package that is not installed.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")


@convert.command("to-mcore", cls=Command, example="meds convert to-mcore models/Qwen3-8B checkpoints/Qwen3-8B")
@click.argument("hf")
@click.argument("out")
def to_mcore(hf: str, out: str) -> None:
    """Convert the Hugging Face directory HF to the checkpoint OUT.

    OUT contains the weights in megatron-core's distributed format, which any parallel layout can load, in the dtypes
    of HF, and HF's configuration and tokenizer. Needs no GPU, and memory for one layer or the embedding.
    """
    from meds_megatron.weights.conversion.convert import to_mcore

    to_mcore(hf, out)


@convert.command("to-hf", cls=Command, example="meds convert to-hf checkpoints/step_000050 exported --dtype bfloat16")
@click.argument("checkpoint")
@click.argument("out")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="Of all weights.  [default: as saved]")
def to_hf(checkpoint: str, out: str, dtype: str | None) -> None:
    """Convert CHECKPOINT to the Hugging Face directory OUT.

    CHECKPOINT may have any parallel layout. Its configuration and tokenizer are copied, so that transformers and vLLM
    load OUT like the original model. Needs no GPU, and memory for about one layer or the embedding.
    """
    import torch

    from meds_megatron.weights.conversion.convert import to_hf

    to_hf(checkpoint, out, None if dtype is None else getattr(torch, dtype))


@convert.command(cls=Command, example="meds convert verify models/Qwen3-8B checkpoints/Qwen3-8B --text problems.txt")
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest difference of a weight, of any dtype.  [default: the same bits]",
)
@click.option("--text", type=click.File(encoding="utf-8"), help="Text for the log-probs.  [default: a built-in one]")
@click.option("--logprob-limit", type=click.FloatRange(min=0), default=1e-4, help="Largest difference of a log-prob.")
@click.option("--weights-only", is_flag=True, help="Do not compare log-probs.")
@with_json
def verify(a: str, b: str, tolerance: float | None, text, logprob_limit: float, weights_only: bool) -> dict:
    """Compare the models A and B.

    Each is a Hugging Face directory or a checkpoint. All weights are compared, one tensor at a time, then the log-probs
    of a text, computed in float32 by transformers with one model in memory at a time (a checkpoint is converted to a
    temporary directory under TMPDIR first). The exit status is 1 if they differ.
    """
    from meds_megatron.weights.conversion.verify import SAMPLE_TEXT, verify

    if weights_only:
        return verify(a, b, tolerance, text=None)
    return verify(a, b, tolerance, text.read() if text else SAMPLE_TEXT, logprob_limit)

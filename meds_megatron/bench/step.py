"""The policy's part of a training step, with three forms of micro-batch: packed sequences, padded rectangles, and those
of a plain loop of transformers and torch's AdamW."""

import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from meds_megatron.actor.policy import Policy
from meds_megatron.actor.process_group import form_groups, join
from meds_megatron.actor.schedule import schedule
from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.actor.worker import rank_env_vars
from meds_megatron.bench.plain_loop import PlainLoop
from meds_megatron.bench.rectangles import padded_rectangles
from meds_megatron.bench.synthetic import synthetic_batch, write_random_model
from meds_megatron.config import QWEN, Config, ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.store import open_store

FORMS = ("packed", "padded", "sorted", "plain")
"""`padded`: rectangles of RECTANGLE_ROWS responses as they come; `sorted`: of responses of like length."""
RECTANGLE_ROWS = 4
PROMPT_TOKENS = (40, 160)


def run(models: Sequence[str], layers: int, responses: int, rounds: int) -> dict:
    """Forward pass with fingerprints, and update, of `responses` synthetic responses (`bench.synthetic`) in each form.

    Shapes are those of `models` with `layers` layers and a vocabulary that is smaller by as much; random weights,
    float32 on one CPU thread or bfloat16 on a GPU. Each form runs in a process of its own. Keys, for each model and
    form: `forward_s`, `update_s` (medians of `rounds`, after a warm-up; on a CPU seconds of the processor),
    `tokens_per_second` (prompts and responses, both phases together), `mfu` (their operations without padding, per
    second, as a share of `matrix_tflops` measured for a matrix product), `peak_bytes` (of the GPU, or resident).
    `over_padded`, `over_sorted` and `over_plain`: tokens per second of the packed form as a multiple; for all models
    the least.
    """
    if unknown := set(models) - QWEN.keys():
        raise UserError(f"--model {unknown.pop()} is not known; choose from {', '.join(QWEN)}.")
    found = {name: _of_model(QWEN[name], layers, responses, rounds) for name in models}
    least = {f"over_{form}": min(model[f"over_{form}"] for model in found.values()) for form in FORMS[1:]}
    return {"models": found, **least, "responses": responses, "rounds": rounds}


def _of_model(whole: ModelShape, layers: int, responses: int, rounds: int) -> dict:
    layers = min(layers, whole.num_layers)
    vocabulary = max(1024, whole.vocab_size * layers // whole.num_layers // 128 * 128)
    shape = replace(whole, num_layers=layers, vocab_size=vocabulary)
    context, found = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory(prefix="meds-bench-") as directory:
        write_random_model(shape, directory)
        for form in FORMS:
            ours, theirs = context.Pipe()
            process = context.Process(target=_measure, args=(theirs, form, directory, shape, responses, rounds))
            process.start()
            theirs.close()
            found[form] = ours.recv()
            process.join()
            # A round of one form takes minutes on a CPU.
            print(f"meds: {form}: {found[form]['tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)
    speeds = {form: report["tokens_per_second"] for form, report in found.items()}
    over = {f"over_{form}": speeds["packed"] / speeds[form] for form in FORMS[1:]}
    return {**found, **over, "layers": layers, "vocabulary": vocabulary}


def _measure(pipe: Connection, form: str, directory: str, shape: ModelShape, responses: int, rounds: int) -> None:
    """Sends the report of one form."""
    os.environ.update(rank_env_vars(Config()))
    torch.set_num_threads(1)
    device = join((store := open_store("127.0.0.1", 1)).address, 0, 1, store=store)
    config = Config()
    if device == "cpu":
        config.model.dtype = "float32"
        # Room for the longest sequence; activations of more tokens are beyond a CPU's caches.
        config.train.micro_batch_tokens = config.train.forward_tokens = 4096
    batch = synthetic_batch(np.random.default_rng(0), responses, shape.vocab_size, PROMPT_TOKENS)
    # The warm-up: the first of each form's kernels, at little cost on a CPU.
    few = batch.select(np.argsort(batch.lengths_B)[:RECTANGLE_ROWS]) if device == "cpu" else batch
    make = _plain if form == "plain" else _ours
    forward, update = make(form, directory, shape, config, device)
    forward(few), update(few)
    seconds: dict[str, list[float]] = {"forward": [], "update": []}
    for _ in range(rounds):
        seconds["forward"].append(_seconds(forward, batch))
        seconds["update"].append(_seconds(update, batch))
    took = {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    total, tokens = sum(took.values()), int(batch.lengths_B.sum())
    # A forward pass in the first phase; a forward and a backward pass, of twice the operations, in the second.
    operations = 4 * float((batch.lengths_B * shape.token_operations(batch.lengths_B)).sum())
    rate = matrix_rate(config.model.dtype, device, shape.hidden_size)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _resident_peak()
    pipe.send(
        {
            **took,
            "tokens_per_second": tokens / total,
            "mfu": operations / total / rate,
            "matrix_tflops": rate / 1e12,
            "peak_bytes": peak,
        }
    )


Phase = Callable[[TrainBatch], object]


def _ours(form: str, directory: str, shape: ModelShape, config: Config, device: str) -> tuple[Phase, Phase]:
    form_groups(config.parallel, seed=0)
    policy = Policy(config, directory, device)

    def micro_batches(batch: TrainBatch, tokens: int) -> list[np.ndarray]:
        if form == "packed":
            costs_B = batch.lengths_B * shape.token_operations(batch.lengths_B)
            return schedule(batch.lengths_B, costs_B, np.zeros(len(batch), np.int64), 1, tokens).micro_batches[0][0]
        order = np.argsort(-batch.lengths_B, kind="stable") if form == "sorted" else np.arange(len(batch))
        return [order[start : start + RECTANGLE_ROWS] for start in range(0, len(order), RECTANGLE_ROWS)]

    def shaped():
        return nullcontext() if form == "packed" else padded_rectangles()

    def forward(batch: TrainBatch) -> None:
        with shaped():
            policy.forward(batch, micro_batches(batch, config.train.forward_tokens))

    def update(batch: TrainBatch) -> None:
        with shaped():
            policy.update(batch, [micro_batches(batch, config.train.micro_batch_tokens)], step=0)

    return forward, update


def _plain(_form: str, directory: str, _shape: ModelShape, config: Config, device: str) -> tuple[Phase, Phase]:
    loop = PlainLoop(Path(directory), config, device, RECTANGLE_ROWS)
    return loop.forward, loop.update


def _seconds(phase: Phase, batch: TrainBatch) -> float:
    return _timed(lambda: phase(batch))


def _timed(work: Callable[[], object]) -> float:
    """Seconds of work; without a GPU those of the processor, which other processes do not lengthen."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    torch.cuda.synchronize()
    began = clock()
    work()
    torch.cuda.synchronize()
    return clock() - began


def matrix_rate(dtype: str, device: str, size: int) -> float:
    """Operations per second of a square matrix product of `size` rows, or of 8192 on a GPU: the best of several."""
    size = 8192 if device == "cuda" else size
    left, right = (torch.randn(size, size, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    return 2 * size**3 / min(_timed(lambda: left @ right) for _ in range(5))


def _resident_peak() -> int:
    """Largest resident size of this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

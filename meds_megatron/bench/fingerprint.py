"""Cost of fingerprints: a forward pass without them, with ours, and with the published method.

The published method keeps the hidden states of all layers and tokens and applies the full head to each layer.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meds_megatron.actor.fingerprint import FingerprintCollector
from meds_megatron.actor.pipeline import run_pipeline
from meds_megatron.actor.process_group import form_groups, join
from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.bench.processes import placed_on
from meds_megatron.config import ModelConfig, ParallelConfig
from meds_megatron.config.model_shape import QWEN, ModelShape
from meds_megatron.model.gpt import PolicyModel, build_chunks, chunk_layers, transformer_config
from meds_megatron.weights.store import open_store
from meds_megatron.weights.store_address import StoreAddress


def run(
    pipeline: int | None = None,
    responses: int = 8,
    tokens: int = 64,
    rounds: int = 5,
    published_rounds: int = 1,
    shape: ModelShape = QWEN["Qwen2.5-0.5B"],
) -> dict:
    """Measures forward passes of each kind alternately on `pipeline` ranks: a GPU each (default: two, or the only one),
    or without GPUs a CPU thread each (default: two). Weights are random, in bfloat16 on GPUs and float32 without.

    `responses` sequences of `tokens` tokens, half of them prompt, each with a fingerprint, two in a micro-batch. Keys:
    `forward_s`, `ours_s`, `published_s` (medians), `overhead`, `published_overhead` (medians of the rounds' ratios to
    the forward pass, minus 1); `extra_bytes` (peak memory with ours minus without, of the rank where it is largest),
    `extra_bytes_bound` (2 N L H 4 + N H 4), `published_extra_bytes`; `sent_bytes`
    between stages and `sent_bytes_expected` (the head's rows to the other stages, each stage's layers of the result).
    """
    gpus = torch.cuda.device_count()
    pipeline = pipeline or min(2, gpus) or 2
    store = open_store("127.0.0.1", pipeline)
    context = multiprocessing.get_context("spawn")
    ranks, pipes = [], []
    for rank in range(pipeline):
        ours, theirs = context.Pipe()
        settings = (gpus > 0, pipeline, responses, tokens, rounds, published_rounds, shape)
        ranks.append(context.Process(target=_rank, args=(theirs, store.address, rank, *settings), daemon=True))
        with placed_on(rank if gpus else None):
            ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    reports = [pipe.recv() for pipe in pipes]
    for process in ranks:
        process.join()
    seconds = reports[-1]["seconds"]
    extra = {kind: max(r["peaks"][kind] - r["peaks"]["forward"] for r in reports) for kind in ("ours", "published")}
    layers, hidden = shape.num_layers, shape.hidden_size
    return {
        **{f"{name}_s": statistics.median(values) for name, values in seconds.items()},
        "overhead": _overhead(seconds["ours"], seconds["forward"]),
        "published_overhead": _overhead(seconds["published"], seconds["forward"]),
        "extra_bytes": extra["ours"],
        "extra_bytes_bound": 4 * responses * (2 * layers * hidden + hidden),
        "published_extra_bytes": extra["published"],
        "sent_bytes": sum(report["sent_bytes"] for report in reports),
        "sent_bytes_expected": 4 * responses * ((pipeline - 1) * hidden + pipeline * layers) if pipeline > 1 else 0,
        "device": "cuda" if gpus else "cpu",
        "pipeline": pipeline,
        "responses": responses,
        "tokens": tokens,
        "rounds": rounds,
    }


def _rank(
    pipe: Connection,
    store: StoreAddress,
    rank: int,
    on_gpu: bool,
    pipeline: int,
    responses: int,
    tokens: int,
    rounds: int,
    published_rounds: int,
    shape: ModelShape,
) -> None:
    torch.set_num_threads(1)
    device = join(store, rank, pipeline)
    parallel = ParallelConfig(pipeline=pipeline)
    form_groups(parallel, seed=0)
    model = ModelConfig(dtype="bfloat16" if on_gpu else "float32")
    (chunk,) = build_chunks(shape, transformer_config(shape, model, parallel), tokens)
    torch.manual_seed(0)
    for parameter in chunk.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    kinds = _Kinds(chunk, shape, _random_data(shape, responses, tokens), device)
    with torch.no_grad():
        # Also the warm-up of each kind.
        peaks = {name: peak_bytes(kind) for name, kind in kinds.by_name().items()}
        seconds: dict[str, list[float]] = {name: [] for name in kinds.by_name()}
        for number in range(rounds):
            for name, kind in kinds.by_name().items():
                if name != "published" or number < published_rounds:
                    seconds[name].append(_seconds(kind))
    pipe.send({"peaks": peaks, "seconds": seconds, "sent_bytes": kinds.sent_bytes})


class _Kinds:
    """The three kinds of forward pass."""

    def __init__(self, chunk: PolicyModel, shape: ModelShape, data: TrainBatch, device: str):
        self._chunk, self._shape, self._data, self._device = chunk, shape, data, device
        self.sent_bytes = 0

    def by_name(self) -> dict[str, Callable[[], None]]:
        return {"forward": self._forward, "ours": self._ours, "published": self._published}

    def _forward(self, before_chunk: Callable | None = None) -> None:
        run_pipeline(
            [self._chunk],
            self._data,
            np.array_split(np.arange(len(self._data)), max(1, len(self._data) // 2)),
            lambda _batch, logprobs_R, _entropy_R: (logprobs_R.sum(), {}),
            temperature=1.0,
            vocab_size=self._shape.vocab_size,
            device=self._device,
            forward_only=True,
            before_chunk=before_chunk,
        )

    def _ours(self) -> None:
        collector = FingerprintCollector([self._chunk], self._data, "last", self._device)
        with collector.hooked():
            self._forward(before_chunk=collector.begin)
        collector.gather(len(self._data))
        self.sent_bytes = collector.sent_bytes

    def _published(self) -> None:
        states: list[Tensor] = []
        sources = [layer for _, layer in chunk_layers(self._chunk)]
        if self._chunk.post_process:
            sources[-1] = self._chunk.decoder.final_layernorm
        hooks = [
            source.register_forward_hook(lambda _m, _i, output: states.append(_hidden(output))) for source in sources
        ]
        self._forward()
        for hook in hooks:
            hook.remove()
        for hidden_T1H in states:
            hidden_T1H @ self._chunk.head_weight().T


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _random_data(shape: ModelShape, responses: int, tokens: int) -> TrainBatch:
    random = np.random.default_rng(0)
    half = tokens // 2
    prompts, answers = (random.integers(0, shape.vocab_size, (responses, half)).tolist() for _ in range(2))
    positions = random.integers(0, half - 1, responses).tolist()
    return TrainBatch.of_responses(prompts, answers, [[0.0] * half] * responses, positions, list(range(responses)))


def _seconds(kind: Callable[[], None]) -> float:
    _wait_for_all()
    began = time.perf_counter()
    kind()
    _wait_for_all()
    return time.perf_counter() - began


def _wait_for_all() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def _overhead(seconds: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=False)) - 1


def peak_bytes(kind: Callable[[], None]) -> int:
    """Peak of the bytes that torch allocates during `kind`, on a CPU from its profiler's record of allocations."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kind()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kind()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

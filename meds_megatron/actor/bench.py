"""What fingerprints cost: the forward pass without them, with ours, and with them taken the published way.

The published way keeps the hidden states of all layers and tokens and runs the full head on each layer's.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from meds_megatron.actor import passes
from meds_megatron.actor.fingerprint import FingerprintCollector
from meds_megatron.actor.messages import Rendezvous
from meds_megatron.actor.process_group import form_groups, join, open_store
from meds_megatron.actor.step_data import StepData
from meds_megatron.config import ModelConfig, ParallelConfig
from meds_megatron.model.gpt import PolicyModel, build_chunks, chunk_layers, transformer_config
from meds_megatron.model.shape import ModelShape

QWEN25_05B = ModelShape(
    architecture="qwen2",
    hidden_size=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    ffn_size=4864,
    vocab_size=151936,
    tie_embeddings=True,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_positions=32768,
)


def run(responses: int = 8, tokens: int = 128, rounds: int = 5, shape: ModelShape = QWEN25_05B) -> dict:
    """Measures `rounds` forward passes of each kind in turn, in this process, on random weights in float32.

    `responses` sequences of `tokens` tokens, half of them prompt, each with a fingerprint. Keys: `forward_s`, `ours_s`,
    `published_s` (medians), `overhead`, `published_overhead` (medians of the rounds' ratios to the forward pass, minus
    1), `extra_bytes` (peak memory with ours minus without, as torch's allocator counts it), `extra_bytes_bound`
    (2 N L H 4 + N H 4), `published_extra_bytes`, and `sent_bytes` / `sent_bytes_expected` for one rank.
    """
    device = join(Rendezvous("127.0.0.1", 0, 0, 1), open_store("127.0.0.1", 1))
    parallel = ParallelConfig()
    form_groups(parallel, seed=0)
    chunks = build_chunks(shape, transformer_config(shape, ModelConfig(dtype="float32"), parallel), tokens)
    torch.manual_seed(0)
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    data = _random_data(shape, responses, tokens)
    sent: list[int] = []

    def plain() -> None:
        _forward(chunks, data, shape, device)

    def ours() -> None:
        collector = FingerprintCollector(chunks, data, "last", device)
        with collector.hooked():
            _forward(chunks, data, shape, device, before_chunk=collector.begin)
        collector.gather(len(data))
        sent.append(collector.sent_bytes)

    def published() -> None:
        states: list[torch.Tensor] = []
        layers = [layer for _, layer in chunk_layers(chunks[0])]
        sources = [*layers[:-1], chunks[0].decoder.final_layernorm]
        hooks = [s.register_forward_hook(lambda _m, _i, o: states.append(_hidden(o))) for s in sources]
        _forward(chunks, data, shape, device)
        for hook in hooks:
            hook.remove()
        for hidden_SBH in states:
            hidden_SBH @ chunks[0].head_weight().T

    kinds = {"forward": plain, "ours": ours, "published": published}
    with torch.no_grad():
        peaks = {name: _peak_bytes(kind) for name, kind in kinds.items()}
        seconds = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, kind in kinds.items():
                began = time.perf_counter()
                kind()
                seconds[name].append(time.perf_counter() - began)
    layers, hidden = shape.num_layers, shape.hidden_size
    return {
        **{f"{name}_s": statistics.median(values) for name, values in seconds.items()},
        "overhead": _overhead(seconds["ours"], seconds["forward"]),
        "published_overhead": _overhead(seconds["published"], seconds["forward"]),
        "extra_bytes": peaks["ours"] - peaks["forward"],
        "extra_bytes_bound": 4 * responses * (2 * layers * hidden + hidden),
        "published_extra_bytes": peaks["published"] - peaks["forward"],
        "sent_bytes": sent[-1],
        "sent_bytes_expected": 4 * responses * (2 * hidden + 2 * layers),
        "responses": responses,
        "tokens": tokens,
        "rounds": rounds,
    }


def _forward(chunks: list[PolicyModel], data: StepData, shape: ModelShape, device: str, before_chunk=None) -> None:
    passes.run(
        chunks,
        data,
        [np.arange(len(data))],
        lambda _batch, logprobs_R, _entropy_R: (logprobs_R.sum(), {}),
        temperature=1.0,
        vocab_size=shape.vocab_size,
        device=device,
        forward_only=True,
        before_chunk=before_chunk,
    )


def _random_data(shape: ModelShape, responses: int, tokens: int) -> StepData:
    random = np.random.default_rng(0)
    half = tokens // 2
    prompts, answers = (random.integers(0, shape.vocab_size, (responses, half)).tolist() for _ in range(2))
    positions = random.integers(0, half - 1, responses).tolist()
    return StepData.of_responses(prompts, answers, [[0.0] * half] * responses, positions, list(range(responses)))


def _hidden(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _overhead(seconds: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True)) - 1


def _peak_bytes(kind: Callable[[], None]) -> int:
    """The most that torch had allocated above the start, by its own record of every allocation and release."""
    kind()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kind()
    held = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

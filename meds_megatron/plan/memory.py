"""Memory of every kind of device by phase of a step: what is on it at once, and whether that fits.

A run's phases (`trainer.loop`): engines generate, alongside the trainer's weights and, where `train.offload_optimizer`
does not move it to the host's memory, its optimizer state; engines sleep while the trainer computes; weights are
exchanged while the engines have their weights but no KV cache. Gradients exist in updates only. Engines on nodes of
their own do not sleep, and the trainer's state stays where it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from meds_megatron.cluster.placement import engine_places, rank_places
from meds_megatron.config import Config, ModelShape, ParallelLayout
from meds_megatron.plan.activations import backward_bytes, head_bytes, layer_bytes, stage_bytes
from meds_megatron.plan.engine import EngineMemory, engine_item_bytes, engine_memory
from meds_megatron.plan.hardware import GIB, RESERVE, Hardware
from meds_megatron.plan.sizes import largest_bucket, rank_sizes

PHASES = ("generate", "forward", "update", "weight sync")
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "fingerprints",
    "temporary",
    "engine weights",
    "engine work",
    "KV cache",
    "staging",
    "resharding",
    "contexts",
)
"""Names of the parts of a demand, in the order in which they are shown."""


@dataclass(frozen=True)
class DeviceKind:
    """Devices that hold the same: ranks of one pipeline stage with or without an engine, or an engine alone."""

    stage: int | None
    """Pipeline stage of the trainer rank; None where there is none."""
    engine: bool
    node: int
    gpu: int
    """The first device of this kind."""


@dataclass(frozen=True)
class Demand:
    """Bytes that one kind of device needs in one phase, by what needs them."""

    device: DeviceKind
    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """All demands of a run, and the limit of each device."""

    demands: list[Demand]
    engine: EngineMemory
    limit: int | None
    """Bytes of a card; None without CUDA, where processes share the machine's memory."""

    def peak(self, phase: str) -> Demand:
        """The largest demand of a phase."""
        return _largest(d for d in self.demands if d.phase == phase)

    @property
    def columns(self) -> dict[str, Demand]:
        """The largest demand of devices with a trainer rank in each phase and, where there are engines without one,
        of those in any, under the name `engine`."""
        trainer = [d for d in self.demands if d.device.stage is not None]
        columns = {phase: _largest(d for d in trainer if d.phase == phase) for phase in PHASES}
        if alone := [d for d in self.demands if d.device.stage is None]:
            columns["engine"] = _largest(alone)
        return columns

    @property
    def over(self) -> list[Demand]:
        """The largest demand of each phase that does not fit."""
        if self.limit is None:
            return []
        return [peak for peak in map(self.peak, PHASES) if peak.total > self.limit]


def _largest(demands: Iterable[Demand]) -> Demand:
    return max(demands, key=lambda demand: demand.total)


def device_kinds(config: Config, layout: ParallelLayout, on_gpu: bool) -> list[DeviceKind]:
    """The kinds of device of a run, each with its first device.

    Without CUDA a trainer rank and an engine rank are processes, each a device of its own.
    """
    engine_gpus = {(p.node, gpu) for p in engine_places(config.cluster, config.rollout) for gpu in p.gpus}
    ranks = {(place.node, place.gpus[0]): rank for rank, place in enumerate(rank_places(config.cluster))}
    kinds: dict[tuple, DeviceKind] = {}
    for node, gpu in sorted(ranks.keys() | engine_gpus):
        rank, engine = ranks.get((node, gpu)), (node, gpu) in engine_gpus
        stage = None if rank is None else layout.coordinates(rank).pipeline
        contents = [(stage, engine)] if on_gpu else [(stage, False)] * (stage is not None) + [(None, True)] * engine
        for content in contents:
            kinds.setdefault(content, DeviceKind(*content, node, gpu))
    return list(kinds.values())


def plan_memory(config: Config, shape: ModelShape, layout: ParallelLayout, hardware: Hardware, on_gpu: bool) -> Memory:
    """Demands of every kind of device in every phase. Of a config that leaves `train.offload_optimizer` to the plan
    (`plan.choices`) they are those with it, which are nowhere larger."""
    limit = int(config.cluster.gpu_memory_gib * GIB) if on_gpu else None
    kinds = device_kinds(config, layout, on_gpu)

    def held(kind: DeviceKind, phase: str) -> dict[str, int]:
        trainer = {} if kind.stage is None else _trainer_parts(config, shape, layout, kind.stage, phase, on_gpu)
        return _base(config, layout, hardware, kind) | trainer

    room = None
    if limit is not None:
        fullest = max(sum(held(kind, "generate").values()) for kind in kinds if kind.engine)
        room = int((1 - RESERVE) * limit) - fullest
    engine = engine_memory(config, shape, room)
    demands = []
    for kind in kinds:
        for phase in PHASES:
            parts = held(kind, phase)
            if kind.engine:
                parts |= _engine_parts(engine, phase, sleeps=on_gpu and config.rollout.nodes is None)
            parts |= _phase_parts(config, shape, layout, kind, phase, hardware, on_gpu)
            demands.append(Demand(kind, phase, {name: size for name, size in parts.items() if size}))
    return Memory(demands, engine, limit)


def _base(config: Config, layout: ParallelLayout, hardware: Hardware, kind: DeviceKind) -> dict[str, int]:
    """Processes before any tensor: contexts and communicators, of the trainer rank and of the engine."""
    gib = 0.0
    if kind.stage is not None:
        gib += hardware.context_gib + hardware.communicator_gib * (layout.ranks > 1)
    if kind.engine:
        gib += hardware.engine_context_gib + hardware.communicator_gib * (config.rollout.tensor > 1)
    return {"contexts": int(gib * GIB)}


def _trainer_parts(
    config: Config, shape: ModelShape, layout: ParallelLayout, stage: int, phase: str, on_gpu: bool
) -> dict[str, int]:
    """Parts that a trainer rank holds from one phase to the next."""
    sizes, shared = rank_sizes(shape, layout, stage), on_gpu and config.rollout.nodes is None
    parts = {"weights": sizes.weight_bytes(config.model.dtype)}
    if not shared or phase == "update":
        parts["gradients"] = sizes.gradient_bytes
    if not shared or config.train.offload_optimizer is False or phase == "update":
        parts["optimizer"] = sizes.optimizer_bytes(config.model.dtype)
    if shared:
        # The block in which it stages weights for the engines, which is never freed.
        parts["staging"] = largest_bucket(shape) * engine_item_bytes(config) // layout.tensor
    return parts


def _engine_parts(engine: EngineMemory, phase: str, sleeps: bool) -> dict[str, int]:
    """Parts of an engine rank: all of them while it generates and, if it does not sleep meanwhile, always."""
    if phase == "weight sync" and sleeps:
        return {"engine weights": engine.weights}
    if phase in ("forward", "update") and sleeps:
        return {}
    return {
        "engine weights": engine.weights,
        "engine work": engine.work,
        "KV cache": max(0, engine.kv_cache),
    }


def _phase_parts(
    config: Config,
    shape: ModelShape,
    layout: ParallelLayout,
    kind: DeviceKind,
    phase: str,
    hardware: Hardware,
    on_gpu: bool,
) -> dict[str, int]:
    """Parts that exist in one phase only."""
    if phase == "generate":
        return {}
    if phase == "weight sync":
        return {"resharding": _resharding(config, shape, layout, kind, on_gpu)}
    if kind.stage is None:
        return {}
    slack = 1 + hardware.allocator_slack
    last = kind.stage == layout.pipeline - 1
    if phase == "forward":
        tokens = layout.rank_tokens(config.train.forward_tokens)
        parts = {"activations": layer_bytes(config, shape, tokens, on_gpu)}
        if last:
            parts["logits"] = head_bytes(config, shape, tokens, backward=False)
        parts["fingerprints"] = _fingerprint_bytes(config, shape, layout)
        return {name: int(slack * size) for name, size in parts.items()}
    kept = int(slack * stage_bytes(config, shape, layout, kind.stage, on_gpu))
    temporary = int(slack * backward_bytes(config, shape, layout, kind.stage))
    # AdamW of torch, where Transformer Engine's is missing: one float32 tensor more of the state's size on CUDA, when
    # the activations are gone.
    step = 4 * rank_sizes(shape, layout, kind.stage).optimizer if on_gpu else 0
    return {"activations": kept, "temporary": max(temporary, step - kept)}


def _fingerprint_bytes(config: Config, shape: ModelShape, layout: ParallelLayout) -> int:
    """The head's float32 row of every response of a rank's share of the step (`actor.fingerprint`)."""
    responses = config.train.prompts_per_step * config.rollout.responses_per_prompt // layout.data
    return 4 * shape.hidden_size * responses


def _resharding(config: Config, shape: ModelShape, layout: ParallelLayout, kind: DeviceKind, on_gpu: bool) -> int:
    """Buffers of a weight update (`weights.resharding.transfer`): an engine rank assembles tensors of full shape, and a
    rank without a block for it stages, or converts what it sends of, its share of a bucket. Together the buckets under
    way are no larger than the largest."""
    bucket = largest_bucket(shape) * engine_item_bytes(config)
    shared = on_gpu and config.rollout.nodes is None
    return (bucket if kind.engine else 0) + (0 if shared or kind.stage is None else bucket // layout.tensor)

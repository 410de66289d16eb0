"""Contents of each GPU, as the rows of a table."""

from dataclasses import dataclass

from meds_megatron.cluster.placement import engine_places, rank_places
from meds_megatron.config import Config, ModelShape, ParallelLayout


@dataclass(frozen=True)
class PlacementRow:
    """Neighbouring GPUs of one node with the ranks of one tensor-parallel group, or with engines alone."""

    node: int
    gpus: str
    ranks: str
    stage: int | None
    replica: int | None
    """Data-parallel rank."""
    tensor: str
    """Tensor-parallel ranks."""
    context: int | None
    """Context-parallel rank."""
    layers: str
    """Layers of each model chunk, counted from 0, with `E` the embedding and `H` the final norm and head."""
    engines: str
    shard: int | None
    """Shard of the error memory, a process on the node's CPU."""


def placement_rows(config: Config, shape: ModelShape, layout: ParallelLayout) -> list[PlacementRow]:
    """A row for each tensor-parallel group and node, then one for each engine on nodes of its own."""
    engines: dict[tuple[int, int], int] = {}
    for engine, place in enumerate(engine_places(config.cluster, config.rollout)):
        engines |= {(place.node, gpu): engine for gpu in place.gpus}
    groups: dict[tuple[int, int, int, int], list[tuple[int, int, int]]] = {}
    for rank, place in enumerate(rank_places(config.cluster)):
        where = layout.coordinates(rank)
        groups.setdefault((place.node, where.pipeline, where.data, where.context), []).append(
            (rank, place.gpus[0], where.tensor)
        )
    rows = []
    for (node, stage, replica, context), members in groups.items():
        ranks, gpus, tensor = map(list, zip(*members, strict=True))
        here = sorted({engines.pop((node, gpu)) for gpu in gpus if (node, gpu) in engines})
        rows.append(
            PlacementRow(
                node=node,
                gpus=_range(gpus),
                ranks=_range(ranks),
                stage=stage,
                replica=replica,
                tensor=_range(tensor),
                context=context,
                layers=_layers(layout, stage, shape.num_layers),
                engines=_range(here),
                # A shard is where the first rank of its data-parallel rank is.
                shard=replica if stage == context == 0 and 0 in tensor else None,
            )
        )
    alone: dict[tuple[int, int], list[int]] = {}
    for (node, gpu), engine in engines.items():
        alone.setdefault((node, engine), []).append(gpu)
    rows += [
        PlacementRow(node, _range(gpus), "", None, None, "", None, "", str(engine), None)
        for (node, engine), gpus in sorted(alone.items())
    ]
    return rows


def _layers(layout: ParallelLayout, stage: int, num_layers: int) -> str:
    chunks = [_range(layout.layers_of(stage, chunk, num_layers)) for chunk in range(layout.virtual)]
    if stage == 0:
        chunks[0] = f"E {chunks[0]}"
    if stage == layout.pipeline - 1:
        chunks[-1] = f"{chunks[-1]} H"
    return ", ".join(chunks)


def _range(numbers: list[int]) -> str:
    if not numbers:
        return ""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"

"""Parallel layout of the policy: the coordinates of each rank and the layers of each model chunk.

Ranks are numbered in megatron-core's default order: tensor fastest, then data, then pipeline, so that the ranks of a
tensor-parallel group are consecutive and on one node.
"""

from dataclasses import dataclass
from typing import NamedTuple

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.config.schema import Config
from meds_megatron.errors import UserError


class RankCoordinates(NamedTuple):
    """A rank's index along each axis of the layout."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class ParallelLayout:
    """Number of ranks along each axis, and the split of the layers over the pipeline stages."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Model chunks on each pipeline stage."""
    data: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @classmethod
    def from_config(cls, config: Config) -> "ParallelLayout":
        """The layout of `config`; the data-parallel size is ranks / (tensor * pipeline).

        Raises UserError when tensor * pipeline does not divide the number of ranks.
        """
        parallel, cluster = config.parallel, config.cluster
        ranks = cluster.nodes * cluster.ranks_per_node
        model_ranks = parallel.tensor * parallel.pipeline
        if ranks % model_ranks:
            raise UserError(
                f"cluster.nodes x cluster.ranks_per_node = {cluster.nodes} x {cluster.ranks_per_node} ranks cannot be "
                f"divided by parallel.tensor x parallel.pipeline = {parallel.tensor} x {parallel.pipeline}; "
                f"make the number of ranks a multiple of {model_ranks}."
            )
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual_pipeline,
            data=ranks // model_ranks,
            first_stage_layers=parallel.first_stage_layers,
            last_stage_layers=parallel.last_stage_layers,
        )

    @property
    def ranks(self) -> int:
        return self.tensor * self.data * self.pipeline

    def coordinates(self, rank: int) -> RankCoordinates:
        return RankCoordinates(
            tensor=rank % self.tensor,
            data=rank // self.tensor % self.data,
            pipeline=rank // (self.tensor * self.data),
        )

    def rank(self, tensor: int, data: int, pipeline: int) -> int:
        return tensor + self.tensor * (data + self.data * pipeline)

    def stage_sizes(self, num_layers: int) -> list[int]:
        """Layers on each pipeline stage, first to last; UserError when they cannot be divided evenly."""
        ends = ((0, self.first_stage_layers), (self.pipeline - 1, self.last_stage_layers))
        fixed = {stage: size for stage, size in ends if size is not None}
        rest, stages_left = num_layers - sum(fixed.values()), self.pipeline - len(fixed)
        if self.pipeline == 1 and fixed:
            raise UserError(
                "parallel.first_stage_layers and parallel.last_stage_layers need parallel.pipeline > 1; leave them out."
            )
        if rest < stages_left or rest % max(stages_left, 1) or (stages_left == 0 and rest):
            raise UserError(self._uneven_split(num_layers, fixed, rest, stages_left))
        share = rest // stages_left if stages_left else 0
        sizes = [fixed.get(stage, share) for stage in range(self.pipeline)]
        if any(size < 1 or size % self.virtual for size in sizes):
            raise UserError(
                f"pipeline stages of {sizes} layers cannot each be divided into equal chunks by "
                f"parallel.virtual_pipeline = {self.virtual}; choose a virtual_pipeline that divides every stage."
            )
        return sizes

    def layers_of(self, stage: int, chunk: int, num_layers: int) -> list[int]:
        """Indices (0-based, in the whole model) of the layers of model chunk `chunk` on pipeline stage `stage`.

        Chunks interleave: chunk 0 of every stage in order, then chunk 1 of every stage, and so on.
        """
        chunk_sizes = [size // self.virtual for size in self.stage_sizes(num_layers)]
        start = chunk * sum(chunk_sizes) + sum(chunk_sizes[:stage])
        return list(range(start, start + chunk_sizes[stage]))

    def check_model(self, model: ModelShape) -> None:
        """UserError when the model's heads, feed-forward width or layers do not divide over this layout."""
        for size, name in (
            (model.num_heads, "attention heads"),
            (model.num_kv_heads, "key/value heads"),
            (model.ffn_size, "feed-forward columns"),
        ):
            if size % self.tensor:
                raise UserError(
                    f"the model's {size} {name} cannot be divided over parallel.tensor = {self.tensor} ranks; "
                    f"choose a parallel.tensor that divides {size}."
                )
        self.stage_sizes(model.num_layers)

    def _uneven_split(self, num_layers: int, fixed: dict[int, int], rest: int, stages_left: int) -> str:
        if not fixed:
            return (
                f"the model's {num_layers} layers cannot be divided over parallel.pipeline = {self.pipeline} stages; "
                "choose a divisor, or set parallel.first_stage_layers and parallel.last_stage_layers."
            )
        return (
            f"{rest} of the model's {num_layers} layers are left for {stages_left} pipeline stages by "
            f"parallel.first_stage_layers = {self.first_stage_layers} and parallel.last_stage_layers = "
            f"{self.last_stage_layers}; choose them so that the other stages get equal numbers of layers."
        )

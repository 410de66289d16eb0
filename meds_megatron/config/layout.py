"""Parallel layout of the policy: the coordinates of each rank and the layers of each model chunk.

Ranks are numbered in megatron-core's default order: tensor fastest, then context, data and pipeline, so that the ranks
of a tensor-parallel group are consecutive and on one node.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.config.schema import Config, ParallelConfig
from meds_megatron.errors import UserError

TOKEN_MULTIPLE = 64
"""Micro-batches are padded to a multiple of it, so that their shapes are few."""


class RankCoordinates(NamedTuple):
    """A rank's index along each axis of the layout."""

    tensor: int
    context: int
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
    context: int = 1
    """Ranks of a data-parallel rank over which the tokens of each sequence are split."""
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @classmethod
    def from_config(cls, config: Config) -> "ParallelLayout":
        """The layout of `config`; the data-parallel size is ranks / (tensor * context * pipeline).

        Raises UserError when tensor * context * pipeline does not divide the number of ranks.
        """
        parallel, cluster = config.parallel, config.cluster
        ranks = cluster.nodes * cluster.ranks_per_node
        model_ranks = parallel.tensor * parallel.context * parallel.pipeline
        if ranks % model_ranks:
            raise UserError(
                f"cluster.nodes x cluster.ranks_per_node = {cluster.nodes} x {cluster.ranks_per_node} ranks cannot be "
                f"divided by parallel.tensor x parallel.context x parallel.pipeline = {parallel.tensor} x "
                f"{parallel.context} x {parallel.pipeline}; make the number of ranks a multiple of {model_ranks}."
            )
        return cls.of(parallel, ranks // model_ranks)

    @classmethod
    def of(cls, parallel: ParallelConfig, data: int = 1) -> "ParallelLayout":
        """The layout of `data` replicas of the model; without `data`, that of one."""
        return cls(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual=parallel.virtual_pipeline,
            data=data,
            context=parallel.context,
            first_stage_layers=parallel.first_stage_layers,
            last_stage_layers=parallel.last_stage_layers,
        )

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def copies(self) -> int:
        """Ranks that hold the same parameters, over which the optimizer's state is sharded."""
        return self.data * self.context

    def coordinates(self, rank: int) -> RankCoordinates:
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return RankCoordinates(tensor, context, data, pipeline)

    def rank(self, tensor: int, context: int, data: int, pipeline: int) -> int:
        return tensor + self.tensor * (context + self.context * (data + self.data * pipeline))

    @property
    def sequence_multiple(self) -> int:
        """Multiple to which the tokens of a sequence are padded: two equal chunks for each context-parallel rank."""
        return 1 if self.context == 1 else 2 * self.context

    def padded_tokens(self, tokens: int) -> int:
        """Tokens of a micro-batch with its padding, at least one multiple, of which each context-parallel rank, and of
        its tokens each tensor-parallel rank, gets an equal part."""
        multiple = math.lcm(TOKEN_MULTIPLE, 2 * self.context * self.tensor)
        return max(1, -(-tokens // multiple)) * multiple

    def rank_tokens(self, tokens: int) -> int:
        """Tokens of a padded micro-batch of up to `tokens` tokens on each context-parallel rank."""
        return self.padded_tokens(tokens) // self.context

    def stage_sizes(self, num_layers: int) -> list[int]:
        """Layers on each pipeline stage, first to last.

        Stages without a size of their own get equal numbers. Where these do not divide, some have one layer less: the
        last, which has the head to compute, then the first and those after it, which keep the activations of the most
        micro-batches. Raises UserError when a model chunk would get no layer.
        """
        ends = ((0, self.first_stage_layers), (self.pipeline - 1, self.last_stage_layers))
        sizes = {stage: size for stage, size in ends if size is not None}
        if self.pipeline == 1 and sizes:
            raise UserError(
                "parallel.first_stage_layers and parallel.last_stage_layers need parallel.pipeline > 1; leave them out."
            )
        rest, others = num_layers - sum(sizes.values()), [s for s in range(self.pipeline) if s not in sizes]
        if rest < len(others) * self.virtual or (rest and not others):
            raise UserError(self._too_few_layers(num_layers, rest, len(others)))
        fewest_first = sorted(others, key=lambda stage: (stage != self.pipeline - 1, stage))
        for place, stage in enumerate(fewest_first):
            sizes[stage] = (rest + place) // len(others)
        if min(sizes.values()) < self.virtual:
            raise UserError(
                f"pipeline stages of {[sizes[stage] for stage in range(self.pipeline)]} layers have too few for the "
                f"parallel.virtual_pipeline = {self.virtual} model chunks of each; lower it, or enlarge "
                "parallel.first_stage_layers and parallel.last_stage_layers."
            )
        return [sizes[stage] for stage in range(self.pipeline)]

    def chunk_sizes(self, num_layers: int) -> list[list[int]]:
        """Layers of each model chunk, by chunk and stage: the order of the model.

        Of a stage whose layers do not divide over its chunks, the first chunks have one more.
        """
        stages = self.stage_sizes(num_layers)
        return [
            [size // self.virtual + (chunk < size % self.virtual) for size in stages] for chunk in range(self.virtual)
        ]

    def layers_of(self, stage: int, chunk: int, num_layers: int) -> list[int]:
        """Indices (0-based, in the whole model) of the layers of model chunk `chunk` on pipeline stage `stage`.

        Chunks interleave: chunk 0 of every stage in order, then chunk 1 of every stage, and so on.
        """
        sizes = self.chunk_sizes(num_layers)
        start = sum(map(sum, sizes[:chunk])) + sum(sizes[chunk][:stage])
        return list(range(start, start + sizes[chunk][stage]))

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

    def _too_few_layers(self, num_layers: int, rest: int, stages_left: int) -> str:
        if self.first_stage_layers is None and self.last_stage_layers is None:
            return (
                f"the model's {num_layers} layers are fewer than the model chunks of parallel.pipeline x "
                f"parallel.virtual_pipeline = {self.pipeline} x {self.virtual}; lower one of them."
            )
        return (
            f"{rest} of the model's {num_layers} layers are left for {stages_left} pipeline stages by "
            f"parallel.first_stage_layers = {self.first_stage_layers} and parallel.last_stage_layers = "
            f"{self.last_stage_layers}; choose them so that every model chunk of the other stages gets a layer and "
            "none is left over."
        )

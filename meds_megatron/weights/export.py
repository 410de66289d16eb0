"""A Hugging Face directory from the model chunks of all ranks."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.chunks import local_table, rank_parameters
from meds_megatron.weights.collective import on_all_ranks
from meds_megatron.weights.directory import new_directory, writing_directory
from meds_megatron.weights.gather import iterate_hf
from meds_megatron.weights.hf_directory import MAX_FILE_BYTES, finish_hf, write_tensors


def export_hf(
    model_chunks: Sequence[nn.Module],
    shape: ModelShape,
    directory: str | Path,
    source: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes the model to `directory` as Hugging Face expects it. Called by all ranks, under megatron's parallel state.

    `source` gives the configuration and tokenizer, `dtype` the type of the weights (default: the model's own). Of each
    pipeline stage the first rank (tensor- and data-parallel rank 0) writes files of at most `max_file_bytes` (one
    tensor may exceed it), so the stages need a common file system. Besides the model, memory holds one bucket.

    Raises UserError on every rank when one fails: an existing `directory` without `overwrite`, no config.json in
    `source`, a full disk.
    """
    first_rank = dist.get_rank() == 0
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    dtype = dtype or next(model_chunks[0].parameters()).dtype
    writing = writing_directory(directory)

    def begin() -> None:
        if first_rank:
            if not (Path(source) / "config.json").is_file():
                raise UserError(f"{source} has no config.json: name the model directory that training started from")
            created.enter_context(new_directory(directory, overwrite))

    def write() -> None:
        if first_replica:
            try:
                _write_stage(model_chunks, shape, writing, dtype, max_file_bytes)
            except OSError as error:
                raise UserError(f"writing the export {directory} failed: {error}") from error

    def finish() -> None:
        if first_rank:
            finish_hf(shape, directory, writing, source, dtype)

    with ExitStack() as created:
        # Closing `created` gives the directory its name; an error removes it instead.
        for step in (begin, write, finish, created.close):
            on_all_ranks(step, "the export")


def _write_stage(
    model_chunks: Sequence[nn.Module], shape: ModelShape, writing: Path, dtype: torch.dtype, max_file_bytes: int
) -> None:
    """Writes the tensors of this pipeline stage; called by all tensor-parallel ranks of one of its replicas.

    Where the file system refuses, raises OSError after the last gather: no other rank of the group waits in one.
    """
    tp_group = parallel_state.get_tensor_model_parallel_group()
    buckets = iterate_hf(model_chunks, shape, tp_group)
    try:
        if tp_group.rank() == 0:
            held = rank_parameters(model_chunks, shape, tp_group.size())
            stored = [row for row in local_table(shape, tp_group.size()).stored if row.name in held]
            shapes = {name: s for parameter in stored for name, s in parameter.hf_shapes().items()}
            stage = parallel_state.get_pipeline_model_parallel_rank()
            write_tensors(buckets, shapes, writing, stage, dtype, max_file_bytes)
    finally:
        for _ in buckets:
            pass

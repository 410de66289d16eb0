"""A Hugging Face directory from the model chunks of all ranks.

`export_hf` does it all and is called by every rank. It is made of three steps, with a barrier between them, that a
caller with other needs can take himself: `begin_hf` (one rank), `write_stage` (each pipeline stage), `finish_hf` (one
rank).
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.chunks import local_parameters, local_table
from meds_megatron.weights.directory import writing_directory
from meds_megatron.weights.gather import iterate_hf
from meds_megatron.weights.hf_directory import MAX_FILE_BYTES, begin_hf, finish_hf, write_tensors
from meds_megatron.weights.table import HfShape


def export_hf(
    model_chunks: list[nn.Module],
    shape: ModelShape,
    directory: str | Path,
    source: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes the model to `directory` as Hugging Face expects it. Called by all ranks, under megatron's parallel state.

    `source` gives the configuration and tokenizer, `dtype` the type of the weights (default: the model's own). Of
    each pipeline stage the first rank (tensor- and data-parallel rank 0) writes files of at most `max_file_bytes` (one
    tensor may exceed it), so the stages need a common file system. Beside the model, memory holds one layer group.

    Raises UserError on every rank when one fails: an existing `directory` without `overwrite`, no config.json in
    `source`, a full disk.
    """
    first_rank = dist.get_rank() == 0
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    dtype = dtype or next(model_chunks[0].parameters()).dtype

    def begin() -> None:
        if first_rank:
            begin_hf(directory, source, overwrite)

    def write() -> None:
        if first_replica:
            stage = parallel_state.get_pipeline_model_parallel_rank()
            write_stage(model_chunks, shape, directory, stage, dtype, max_file_bytes)

    def finish() -> None:
        if first_rank:
            finish_hf(shape, directory, source, dtype, overwrite)

    _on_all_ranks(begin)
    try:
        _on_all_ranks(write)
        _on_all_ranks(finish)
    except Exception:
        if first_rank:
            shutil.rmtree(writing_directory(directory), ignore_errors=True)
        raise


def write_stage(
    model_chunks: list[nn.Module],
    shape: ModelShape,
    directory: str | Path,
    stage: int,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
    tp_group: dist.ProcessGroup | None = None,
) -> None:
    """Writes the tensors of pipeline stage `stage`; called by all tensor-parallel ranks of one of its replicas.

    Raises UserError when the file system refuses, after the other ranks of the group have been served: none is left
    waiting in a gather.
    """
    tp_group = tp_group or parallel_state.get_tensor_model_parallel_group()
    groups = iterate_hf(model_chunks, shape, tp_group)
    if tp_group.rank() == 0:
        table = local_table(shape, tp_group.size())
        shapes: dict[str, HfShape] = {}
        for entry, _ in local_parameters(model_chunks, table, tp_group.size()):
            if not entry.copy:
                shapes |= entry.hf_shapes()
        try:
            write_tensors(groups, shapes, writing_directory(directory), stage, dtype, max_file_bytes)
        except OSError as error:
            raise UserError(f"writing the export {directory} failed: {error}") from error
        finally:
            _exhaust(groups)
    else:
        _exhaust(groups)


def _on_all_ranks(step: Callable[[], None]) -> None:
    """Runs `step` on every rank and waits for all; where it fails on one, it fails on all."""
    failure: Exception | None = None
    try:
        step()
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text is not None:
            raise UserError(f"the export failed on rank {rank}: {text}")


def _exhaust(groups: Iterator[dict[str, Tensor]]) -> None:
    for _ in groups:
        pass

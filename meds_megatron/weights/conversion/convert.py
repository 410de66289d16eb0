"""Conversion between Hugging Face directories and megatron-core checkpoints, in one process and without ranks.

A whole model is never in memory: a Hugging Face directory is written tensor by tensor, a checkpoint chunk by chunk.
torch's checkpoint writer requests each chunk from its planner when it is about to write it, and the chunk is read from
the safetensors only then. A chunk is a number of rows of one parameter, so that a rank that loads its part of a large
parameter reads little else.
"""

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.conversion.checkpoint import BACKEND, CheckpointWeights, is_checkpoint, stored_name
from meds_megatron.weights.directory import new_directory
from meds_megatron.weights.hf_directory import MAX_FILE_BYTES, TYPE_CODES, finish_hf, write_tensors
from meds_megatron.weights.hf_weights import HfWeights
from meds_megatron.weights.model_files import copy_model_files
from meds_megatron.weights.table import MegatronParameter, Table, build_table

CHUNK_BYTES = 16 * 2**20


def to_mcore(source: str | Path, directory: str | Path, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Makes a checkpoint from the Hugging Face directory `source`, for model chunks of any layout to load.

    Memory holds a chunk of one parameter. Raises UserError when `source` cannot be trained here, `directory` exists or
    the file system refuses.
    """
    if is_checkpoint(source):
        raise UserError(f"{source} is a checkpoint, expected a Hugging Face directory: it needs no conversion")
    weights = HfWeights(source)
    table = build_table(ModelShape.from_hf(source))
    weights.check(table.hf_shapes)
    with new_directory(directory) as writing:
        _write_checkpoint(weights, table, writing, chunk_bytes)


def to_hf(
    checkpoint: str | Path,
    directory: str | Path,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Makes a Hugging Face directory from a checkpoint that was saved at any layout.

    `dtype` is that of all weights (default: the checkpoint's own). Memory holds about one bucket. Raises UserError
    when `checkpoint` is none or incomplete, `directory` exists or the file system refuses.
    """
    weights = CheckpointWeights(checkpoint)
    dtype = dtype or weights.common_dtype()
    if dtype not in TYPE_CODES:
        raise UserError(f"{checkpoint} holds {dtype} weights: choose what to convert them to with --dtype")
    with new_directory(directory) as writing:
        tensors = (weights.read(parameter, dtype) for parameter in weights.table.stored)
        write_tensors(tensors, weights.table.hf_shapes, writing, 0, dtype, max_file_bytes)
        finish_hf(weights.shape, directory, writing, weights.directory, dtype)


def _write_checkpoint(weights: HfWeights, table: Table, writing: Path, chunk_bytes: int) -> None:
    """Writes the weights, each in the dtype that it has, and the model's configuration and tokenizer into `writing`.

    `weights` has passed its `check`; a chunk has at most `chunk_bytes`, or one row. Raises OSError when the file system
    refuses.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

    planner = _LazyPlanner(weights, table, chunk_bytes)
    writer = _FilePerLayer(writing)
    writer.set_up_storage_writer(is_coordinator=True)
    planner.set_up_planner({}, writer.storage_meta(), is_coordinator=True)
    [plan], metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    [plan] = writer.prepare_global_plan([plan])
    results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])
    torch.save({}, writing / COMMON_STATE_FNAME)
    copy_model_files(weights.directory, writing)
    save_config(CheckpointingConfig(sharded_backend=BACKEND), str(writing))


class _LazyPlanner(DefaultSavePlanner):
    """Plans every chunk of the model, and reads one when it is about to be written."""

    def __init__(self, weights: HfWeights, table: Table, chunk_bytes: int):
        super().__init__(flatten_state_dict=False)
        self._weights, self._table, self._chunk_bytes = weights, table, chunk_bytes
        self._layers = len(table.buckets) - 2
        self._dtypes = _stored_dtypes(weights, table)
        self._rows: dict[MetadataIndex, tuple[MegatronParameter, int]] = {}
        """Parameter and first row of each chunk."""

    def create_local_plan(self) -> SavePlan:
        parameters = self._table.stored
        return SavePlan([item for row in parameters for item in (*self._chunks(row), *_extra_state(row, self._layers))])

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            # The list that megatron-core wraps the objects of one rank in.
            data = io.BytesIO()
            torch.save([None], data)
            return data
        parameter, first_row = self._rows[write_item.index]
        tensor = write_item.tensor_data
        assert tensor is not None
        chunk = torch.empty(tensor.chunk.sizes, dtype=tensor.properties.dtype)
        rows = chunk.view(-1, *parameter.local_shape(1)[1:])
        self._weights.fill(rows, parameter, 0, 1, first_row)
        return chunk

    def _chunks(self, parameter: MegatronParameter) -> Iterator[WriteItem]:
        key, layer = stored_name(parameter.name)
        dtype, shape = self._dtypes[key], parameter.local_shape(1)
        stack, at, one = ((), (), ()) if layer is None else ((self._layers,), (layer,), (1,))
        most = max(1, self._chunk_bytes // (dtype.itemsize * (parameter.columns or 1)))
        for first in range(0, shape[0], most):
            count = min(most, shape[0] - first)
            offsets = torch.Size((*at, first, *[0] * len(shape[1:])))
            index = MetadataIndex(key, offsets)
            self._rows[index] = parameter, first
            chunk = ChunkStorageMetadata(offsets=offsets, sizes=torch.Size((*one, count, *shape[1:])))
            data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype), size=torch.Size((*stack, *shape)))
            yield WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)


class _FilePerLayer(FileSystemWriter):
    """Writes the items of each layer to a file of its own."""

    def __init__(self, path: Path):
        # Reading ahead would hold more than one chunk.
        super().__init__(path, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, (_, items) in enumerate(groupby(plan.items, key=_file_of)):
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = replace(plan, items=list(items), storage_data=prefix)
            try:
                results += super().write_data(part, planner).wait()
            except RuntimeError as error:
                # A broken write leaves torch's file half done, and closing it then raises this in the write's place.
                if isinstance(error.__context__, OSError | KeyboardInterrupt):
                    raise error.__context__ from None
                raise
        written: Future[list[WriteResult]] = Future()
        written.set_result(results)
        return written


def _file_of(item: WriteItem) -> int | None:
    """The item's layer, which neighbours in the plan share; None before the first layer and after the last."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    if item.type is WriteItemType.BYTE_IO:
        return ShardedObject.empty_from_unique_key(item.index.fqn).global_offset[0]
    offset = item.index.offset
    return offset[0] if offset is not None and item.index.fqn.startswith("decoder.layers.") else None


def _extra_state(parameter: MegatronParameter, layers: int) -> Iterator[WriteItem]:
    """The state that megatron-core's linear layers load in addition to their weight; on most machines it is empty."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    module, _, last = parameter.name.rpartition(".")
    key, layer = stored_name(f"{module}._extra_state")
    if layer is not None and last == "weight" and ".linear_" in module:
        item = ShardedObject(key, None, (layers,), (layer,))
        yield WriteItem(index=MetadataIndex(item.unique_key), type=WriteItemType.BYTE_IO)


def _stored_dtypes(weights: HfWeights, table: Table) -> dict[str, torch.dtype]:
    """The dtype of every key: the narrowest that holds all tensors stored under it, since a key has only one."""
    dtypes: dict[str, torch.dtype] = {}
    for parameter in table.stored:
        key, _ = stored_name(parameter.name)
        for dtype in (weights.dtypes[name] for name in parameter.hf_shapes()):
            dtypes[key] = torch.promote_types(dtypes.get(key, dtype), dtype)
    return dtypes

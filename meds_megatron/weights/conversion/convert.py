"""Between Hugging Face directories and checkpoints of megatron-core, in one process."""

from pathlib import Path

import torch

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.conversion.checkpoint import CheckpointWeights, is_checkpoint
from meds_megatron.weights.conversion.checkpoint_writer import CHUNK_BYTES, write_checkpoint
from meds_megatron.weights.directory import new_directory
from meds_megatron.weights.hf_directory import MAX_FILE_BYTES, TYPE_CODES, finish_hf, write_tensors
from meds_megatron.weights.load import HfWeights
from meds_megatron.weights.table import build_table


def to_mcore(source: str | Path, directory: str | Path, chunk_bytes: int = CHUNK_BYTES) -> None:
    """Makes a checkpoint from the Hugging Face directory `source`, which model chunks of any layout can load.

    Memory holds a chunk of one parameter. Raises UserError when `source` cannot be trained here, `directory` exists or
    the file system refuses.
    """
    if is_checkpoint(source):
        raise UserError(f"{source} is a checkpoint, expected a Hugging Face directory: it needs no conversion")
    weights = HfWeights(source)
    table = build_table(ModelShape.from_hf(source))
    weights.check(table.hf_shapes)
    with new_directory(directory) as writing:
        write_checkpoint(weights, table, writing, chunk_bytes)


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

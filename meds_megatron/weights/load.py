"""Loading of a Hugging Face directory into the parameters of this rank; each rank reads only its own slices."""

from collections.abc import Iterable
from pathlib import Path

from megatron.core import parallel_state
from torch import nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.chunks import local_parameters, local_table
from meds_megatron.weights.hf_weights import HfWeights


def load_hf(
    model_chunks: Iterable[nn.Module],
    shape: ModelShape,
    directory: str | Path,
    tp_rank: int | None = None,
    tp_size: int | None = None,
) -> None:
    """Fills the parameters of this rank's model chunks from the safetensors in `directory`, converting their dtype.

    `tp_rank` and `tp_size` default to megatron's parallel state. Rows of vocabulary padding become 0. Memory above the
    model's own stays below `hf_weights.MAPPED_BYTES`. Where an optimizer with main weights exists already, its
    `reload_model_params()` must follow.

    Raises UserError, before any parameter is written, when a file or tensor is missing, unknown or of another shape.
    """
    tp_rank = parallel_state.get_tensor_model_parallel_rank() if tp_rank is None else tp_rank
    tp_size = parallel_state.get_tensor_model_parallel_world_size() if tp_size is None else tp_size
    table = local_table(shape, tp_size)
    weights = HfWeights(directory)
    weights.check(table.hf_shapes)
    for parameter, tensor in local_parameters(model_chunks, table, tp_size):
        weights.fill(tensor.data, parameter, tp_rank, tp_size)

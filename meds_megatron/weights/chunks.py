"""Parameters that a rank holds, matched with their rows of the table."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.table import MegatronParameter, Table, build_table, padded_vocab

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def unwrapped(chunk: nn.Module) -> "GPTModel":
    """The GPTModel inside megatron's wrappers (DistributedDataParallel, Float16Module)."""
    inner: Any = chunk
    while not hasattr(inner, "decoder"):
        inner = inner.module
    return inner


def local_table(shape: ModelShape, tp_size: int) -> Table:
    """The table of a model whose vocabulary is padded for `tp_size` ranks."""
    return build_table(shape, padded_vocab(shape.vocab_size, tp_size))


def local_parameters(
    chunks: Iterable[nn.Module], table: Table, tp_size: int
) -> Iterator[tuple[MegatronParameter, Tensor]]:
    """Row of the table and tensor of every parameter of this rank's model chunks, in the order of the model.

    Raises UserError for a parameter that the table does not have, ValueError for one of another shape than expected.
    """
    for wrapped in chunks:
        chunk = unwrapped(wrapped)
        global_layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, tensor in chunk.named_parameters():
            layer = global_layers[int(name.split(".")[2])] if name.startswith("decoder.layers.") else None
            parameter = table.parameter(name, layer)
            if tuple(tensor.shape) != parameter.local_shape(tp_size):
                raise ValueError(
                    f"{parameter.name} is {list(tensor.shape)} in the model and"
                    f" {list(parameter.local_shape(tp_size))} in the table at TP={tp_size}: the model was built for"
                    " another shape"
                )
            yield parameter, tensor


def rank_parameters(chunks: Iterable[nn.Module], shape: ModelShape, tp_size: int) -> dict[str, Tensor]:
    """This rank's parameters by Megatron name, without a tied head, which is a copy of the embedding."""
    held = local_parameters(chunks, local_table(shape, tp_size), tp_size)
    return {parameter.name: tensor for parameter, tensor in held if not parameter.copy}

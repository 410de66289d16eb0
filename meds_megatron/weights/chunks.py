"""The parameters that a rank holds, matched with their entries of the table."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.table import Entry, Table, build_table, padded_vocab


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The GPTModel inside megatron's wrappers (DistributedDataParallel, Float16Module)."""
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module
    return chunk


def local_table(shape: ModelShape, tp_size: int) -> Table:
    """The table of a model whose vocabulary is padded for `tp_size` ranks."""
    return build_table(shape, padded_vocab(shape.vocab_size, tp_size))


def local_parameters(chunks: Iterable[nn.Module], table: Table, tp_size: int) -> Iterator[tuple[Entry, Tensor]]:
    """Every parameter of this rank's model chunks with its entry, in the order of the model.

    Raises UserError for a parameter that the table does not know, ValueError for one of another shape than expected.
    """
    for wrapped in chunks:
        chunk = unwrapped(wrapped)
        global_layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            layer = global_layers[int(name.split(".")[2])] if name.startswith("decoder.layers.") else None
            entry = table.entry(name, layer)
            if tuple(parameter.shape) != entry.local_shape(tp_size):
                raise ValueError(
                    f"{entry.name} is {list(parameter.shape)} in the model and {list(entry.local_shape(tp_size))} in"
                    f" the table at TP={tp_size}: the model was built for another shape"
                )
            yield entry, parameter


def shares(chunks: Iterable[nn.Module], shape: ModelShape, tp_size: int) -> dict[str, Tensor]:
    """This rank's parameters by the names of their entries; a tied head, which is a copy, is left out."""
    held = local_parameters(chunks, local_table(shape, tp_size), tp_size)
    return {entry.name: parameter for entry, parameter in held if not entry.copy}

"""Parts of Hugging Face tensors that a range of elements of a rank's flattened parameter covers: pure shapes.

A data-parallel rank of the distributed optimizer owns such ranges, whose ends know nothing of rows. In the coordinates
of the Hugging Face tensors they can be saved as they are and read back under any other layout.
"""

from collections.abc import Iterator

from meds_megatron.weights.table import MegatronParameter, TensorSlice


def range_slices(
    parameter: MegatronParameter, tp_rank: int, tp_size: int, first: int, stop: int
) -> Iterator[TensorSlice]:
    """The rectangles that elements `first` to `stop` of the flattened parameter of a tensor-parallel rank consist of.

    Each is one run of elements of the flattened parameter; `flat_start` gives where it begins. Rows of padding belong
    to none.
    """
    columns = _local_columns(parameter, tp_size)
    for part in parameter.slices(tp_rank, tp_size):
        for rows, row_columns in _rectangles(first, stop, columns):
            inside = part.rows(*rows)
            if inside is not None and parameter.columns is not None:
                hf_rows, hf_columns = inside.hf_slices()
                begin = hf_columns.start
                inside = inside.intersect((hf_rows, slice(begin + row_columns[0], begin + row_columns[1])))
            if inside is not None:
                yield inside


def flat_start(parameter: MegatronParameter, tp_size: int, part: TensorSlice) -> int:
    """Index in the rank's flattened parameter of the first element of a part."""
    row, *column = part.local_start
    return row * _local_columns(parameter, tp_size) + sum(column)


def _local_columns(parameter: MegatronParameter, tp_size: int) -> int:
    return 1 if parameter.columns is None else parameter.local_shape(tp_size)[1]


def _rectangles(first: int, stop: int, columns: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Rows and columns of at most three rectangles: the end of a row, whole rows, the beginning of a row."""
    first_row, first_column = divmod(first, columns)
    last_row, last_column = divmod(stop, columns)
    if first_row == last_row:
        if first_column < last_column:
            yield (first_row, first_row + 1), (first_column, last_column)
        return
    if first_column:
        yield (first_row, first_row + 1), (first_column, columns)
        first_row += 1
    if first_row < last_row:
        yield (first_row, last_row), (0, columns)
    if last_column:
        yield (last_row, last_row + 1), (0, last_column)

"""From a Hugging Face directory into the parameters of this rank; each rank reads only its own slices."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Self

import torch
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.chunks import local_parameters, local_table
from meds_megatron.weights.table import LM_HEAD, Entry, HfShape, row_slabs

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAPPED_BYTES = 32 * 2**20
_FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_ITEM = 8


def load_hf(
    model_chunks: Iterable[nn.Module],
    shape: ModelShape,
    directory: str | Path,
    tp_rank: int | None = None,
    tp_size: int | None = None,
) -> None:
    """Fills the parameters of this rank's model chunks from the safetensors in `directory`, converting their dtype.

    `tp_rank` and `tp_size` default to megatron's parallel state. Rows of vocabulary padding become 0. Memory above the
    model's own stays below MAPPED_BYTES. Where an optimizer with main weights exists already, its
    `reload_model_params()` must follow.

    Raises UserError, before any parameter is written, when a file or tensor is missing, unknown or of another shape.
    """
    tp_rank = parallel_state.get_tensor_model_parallel_rank() if tp_rank is None else tp_rank
    tp_size = parallel_state.get_tensor_model_parallel_world_size() if tp_size is None else tp_size
    table = local_table(shape, tp_size)
    weights = HfWeights(directory)
    weights.check(table.hf_shapes)
    for entry, parameter in local_parameters(model_chunks, table, tp_size):
        weights.fill(parameter.data, entry, tp_rank, tp_size)


class HfWeights:
    """The safetensors of a Hugging Face directory: one file, or several with an index."""

    def __init__(self, directory: str | Path):
        """Raises UserError when there is no directory, no safetensors in it, or a file of its index is missing."""
        self.directory = Path(directory).expanduser()
        if not self.directory.is_dir():
            raise UserError(f"model directory {self.directory} does not exist: give a Hugging Face directory")
        index = self.directory / INDEX_FILE
        self.source = index if index.exists() else self.directory / SINGLE_FILE
        self.files: dict[str, Path] = self._indexed(index) if index.exists() else self._single(self.source)

    def check(self, expected: dict[str, HfShape]) -> None:
        """Raises UserError unless the directory holds exactly the tensors of `expected`, each of its shape.

        A head beside tied embeddings, and the rotary frequencies of old checkpoints, may be present and are ignored.
        """
        for name in expected:
            if name not in self.files:
                raise UserError(
                    f"{self.source} has no tensor {name}: config.json describes another model, or the download is"
                    " incomplete"
                )
        unknown = [name for name in self.files if name not in expected and not _ignorable(name)]
        if unknown:
            raise UserError(
                f"{self.files[unknown[0]]} holds tensor {unknown[0]}, which the model of config.json does not have:"
                " use the config.json that belongs to these weights"
            )
        for path in sorted(set(self.files.values())):
            with _open(path) as handle:
                present = set(handle.keys())
                for name in (name for name in expected if self.files[name] == path):
                    _check_tensor(handle, path, name, expected[name], present)

    def fill(self, local: Tensor, entry: Entry, tp_rank: int, tp_size: int, first_row: int = 0) -> None:
        """Writes rank `tp_rank`'s part of `entry` into `local`, straight from the mapped files.

        `local` may be some rows of that part, from `first_row` on. The pages that were read count as this process's
        memory until the file is closed: it is opened anew when they would pass MAPPED_BYTES.
        """
        widths = {name: prod(shape[1:]) for name, shape in entry.hf_shapes().items()}
        filled = 0
        with torch.no_grad(), _MappedFiles() as mapped:
            for whole in entry.pieces(tp_rank, tp_size):
                piece = whole.within(first_row, local.shape[0])
                if piece is None:
                    continue
                for slab in row_slabs(piece, max(1, MAPPED_BYTES // (widths[piece.hf_name] * _LARGEST_ITEM))):
                    read_bytes = slab.size[0] * widths[slab.hf_name] * _LARGEST_ITEM
                    file = mapped.file(self.files[slab.hf_name], read_bytes)
                    local[slab.local_slices()].copy_(file.get_slice(slab.hf_name)[slab.hf_slices()])
                filled += piece.size[0]
            # Only the vocabulary has padding, and it has it in the last rows.
            local[filled:].zero_()

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, on the mapped file."""
        with _open(self.files[name]) as handle:
            return handle.get_tensor(name)

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """The dtype of each named tensor, all of which passed `check`."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        found: dict[str, torch.dtype] = {}
        for path, names_in_file in by_file.items():
            with _open(path) as handle:
                found |= {name: _FLOAT_TYPES[handle.get_slice(name).get_dtype()] for name in names_in_file}
        return found

    def _indexed(self, index: Path) -> dict[str, Path]:
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files = {name: self.directory / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is not a safetensors index ({error}): download the model again") from error
        for path in sorted(set(files.values())):
            if not path.exists():
                raise UserError(f"{path} is named by {INDEX_FILE} and missing: download the model again")
        return files

    def _single(self, path: Path) -> dict[str, Path]:
        if not path.exists():
            raise UserError(
                f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}: weights in another format must be saved"
                " as safetensors first"
            )
        with _open(path) as handle:
            return dict.fromkeys(handle.keys(), path)


class _MappedFiles:
    """Open safetensors files; all are closed when more than MAPPED_BYTES have been read from them together."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, safe_open] = {}
        self._read_bytes = 0

    def file(self, path: Path, read_bytes: int) -> safe_open:
        """The open file, from which the caller now reads `read_bytes`."""
        if self._read_bytes + read_bytes > MAPPED_BYTES:
            self._stack.close()
            self._files.clear()
            self._read_bytes = 0
        self._read_bytes += read_bytes
        if path not in self._files:
            self._files[path] = self._stack.enter_context(_open(path))
        return self._files[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download or copy it again") from error


def _check_tensor(handle: safe_open, path: Path, name: str, expected: HfShape, present: set[str]) -> None:
    if name not in present:
        raise UserError(f"{path} lacks tensor {name}, which {INDEX_FILE} places there: download the model again")
    tensor = handle.get_slice(name)
    if tuple(tensor.get_shape()) != expected:
        raise UserError(
            f"{path}: tensor {name} is {tensor.get_shape()}, config.json asks for {list(expected)}:"
            " use the config.json that belongs to these weights"
        )
    if tensor.get_dtype() not in _FLOAT_TYPES:
        raise UserError(
            f"{path}: tensor {name} is {tensor.get_dtype()}, expected one of {', '.join(sorted(_FLOAT_TYPES))}:"
            " quantized weights cannot be trained, use the unquantized model"
        )


def _ignorable(name: str) -> bool:
    return name == LM_HEAD or name.endswith("rotary_emb.inv_freq")

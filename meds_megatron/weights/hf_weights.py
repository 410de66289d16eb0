"""The safetensors of a Hugging Face directory, read slice by slice and without megatron-core."""

from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meds_megatron.errors import UserError
from meds_megatron.json_text import parse_json
from meds_megatron.weights.table import LM_HEAD, HfShape, MegatronParameter

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAPPED_BYTES = 32 * 2**20
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_ITEM = 8


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
        self.dtypes: dict[str, torch.dtype] = {}
        """Data types of the tensors that passed `check`."""

    def check(self, expected: dict[str, HfShape]) -> None:
        """Raises UserError unless the directory holds exactly the tensors of `expected`, each of its shape.

        A head in addition to tied embeddings, and the rotary frequencies of old checkpoints, may be present and are
        ignored.
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
            file = open_safetensors(path)
            present = set(file.keys())
            for name in (name for name in expected if self.files[name] == path):
                if name not in present:
                    raise UserError(
                        f"{path} lacks tensor {name}, which {INDEX_FILE} places there: download the model again"
                    )
                self.dtypes[name] = _check_tensor(file, path, name, expected[name])

    def fill(self, local: Tensor, parameter: MegatronParameter, tp_rank: int, tp_size: int, first_row: int = 0) -> None:
        """Writes rank `tp_rank`'s part of `parameter` into `local`, straight from the mapped files.

        `local` may be some rows of that part, from `first_row` on. The pages that were read count as this process's
        memory until the file is closed: it is opened again before they pass MAPPED_BYTES.
        """
        row_bytes = {name: prod(shape[1:]) * _LARGEST_ITEM for name, shape in parameter.hf_shapes().items()}
        file, file_path, mapped_bytes, filled = None, None, 0, 0
        with torch.no_grad():
            for held in parameter.slices(tp_rank, tp_size):
                path, width, row = self.files[held.hf_name], row_bytes[held.hf_name], held.local_start[0]
                begin, end = max(row, first_row), min(row + held.size[0], first_row + local.shape[0])
                step = max(1, MAPPED_BYTES // width)
                for row in range(begin, end, step):
                    part = held.rows(row, min(row + step, end))
                    assert part is not None
                    mapped_bytes += part.size[0] * width
                    if file is None or path != file_path or mapped_bytes > MAPPED_BYTES:
                        file = None
                        file, file_path, mapped_bytes = open_safetensors(path), path, part.size[0] * width
                    target = local.narrow(0, row - first_row, part.size[0])
                    target.copy_(file.get_slice(part.hf_name)[part.hf_slices()])
                    filled += part.size[0]
            # Only the vocabulary has padding, and it has it in the last rows.
            local[filled:].zero_()

    def read(self, parameter: MegatronParameter) -> dict[str, Tensor]:
        """The Hugging Face tensors of one parameter, on the mapped files."""
        return {name: open_safetensors(self.files[name]).get_tensor(name) for name in parameter.hf_shapes()}

    def _indexed(self, index: Path) -> dict[str, Path]:
        try:
            weight_map: dict[str, str] = parse_json(index.read_text())["weight_map"]
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
        return dict.fromkeys(open_safetensors(path).keys(), path)


def open_safetensors(path: Path) -> safe_open:
    """The open file, mapped until it is garbage. Raises UserError when it is damaged or cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download or copy it again") from error


def _check_tensor(file: safe_open, path: Path, name: str, expected: HfShape) -> torch.dtype:
    tensor = file.get_slice(name)
    if tuple(tensor.get_shape()) != expected:
        raise UserError(
            f"{path}: tensor {name} is {tensor.get_shape()}, config.json asks for {list(expected)}:"
            " use the config.json that belongs to these weights"
        )
    if tensor.get_dtype() not in FLOAT_TYPES:
        raise UserError(
            f"{path}: tensor {name} is {tensor.get_dtype()}, expected one of {', '.join(sorted(FLOAT_TYPES))}:"
            " quantized weights cannot be trained, use the unquantized model"
        )
    return FLOAT_TYPES[tensor.get_dtype()]


def _ignorable(name: str) -> bool:
    return name == LM_HEAD or name.endswith("rotary_emb.inv_freq")

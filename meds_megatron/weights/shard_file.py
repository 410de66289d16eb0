"""A safetensors file written tensor by tensor, so that a file of gigabytes needs memory for one tensor only."""

import json
import os
import struct
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from meds_megatron.weights.table import HfShape

TYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class ShardFile:
    """Writes `tensors` (names and shapes, in file order), all of one `dtype`, to `path`.

    The tensors may come in any order. The file has the name `path` only once it is whole: until `close` it is
    `path` + ".partial".
    """

    def __init__(self, path: Path, tensors: dict[str, HfShape], dtype: torch.dtype):
        self._path, self._dtype = path, dtype
        self._shapes = dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors.items():
            begin, end = end, end + prod(shape) * dtype.itemsize
            self._offsets[name] = begin
            header[name] = {"dtype": TYPE_CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        # Readers map the data, so it begins at a multiple of 8 bytes; the format allows spaces after the header.
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._file = open(f"{path}.partial", "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors not yet written."""
        return list(self._offsets)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor, from any device and in any dtype. Raises ValueError for another shape than announced."""
        if tuple(tensor.shape) != self._shapes[name]:
            raise ValueError(f"{name} is {list(tensor.shape)}, announced as {list(self._shapes[name])}")
        offset = self._offsets.pop(name)
        data = tensor.detach().to(device="cpu", dtype=self._dtype).contiguous()
        self._file.seek(self._data_start + offset)
        self._file.write(data.view(torch.uint8).numpy())

    def close(self) -> None:
        """Brings the file to disk and gives it its name. Raises ValueError when a tensor has not been written."""
        if self._offsets:
            raise ValueError(f"{self._path} lacks {', '.join(self._offsets)}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._file.name, self._path)

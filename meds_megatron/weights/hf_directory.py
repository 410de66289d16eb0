"""The files of a Hugging Face directory: safetensors written tensor by tensor, their index, configuration, tokenizer.

`write_tensors` once for each writer (every pipeline stage, or a single one), then `finish_hf` by one process.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.hf_weights import INDEX_FILE, SINGLE_FILE, open_safetensors
from meds_megatron.weights.model_files import copy_model_files
from meds_megatron.weights.table import HfShape, build_table

MAX_FILE_BYTES = 4 * 2**30
TYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types of exported weights, with their names in the safetensors format."""


def write_tensors(
    buckets: Iterable[dict[str, Tensor]],
    shapes: dict[str, HfShape],
    writing: Path,
    stage: int,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes the tensors of `buckets`, on any device, as `dtype` to files in `writing`; `stage` keeps writers apart.

    `shapes` are the names and shapes of all tensors in the same order. A file has at most `max_file_bytes`, or one
    tensor that exceeds them. Takes the tensors out of the dicts, so that none is kept while the next are made. Raises
    OSError when the file system refuses.
    """
    tensors = _one_by_one(buckets)
    for number, contents in enumerate(_split_into_files(shapes, dtype, max_file_bytes)):
        with open(writing / f"stage-{stage:04d}-{number:04d}.safetensors", "wb") as file:
            file.write(_header(contents, dtype))
            for announced in contents.items():
                file.write(_data(*next(tensors), announced, dtype))
            file.flush()
            os.fsync(file.fileno())


def finish_hf(shape: ModelShape, directory: str | Path, writing: Path, source: str | Path, dtype: torch.dtype) -> None:
    """Checks that every tensor was written once, names the files and adds index, configuration and tokenizer.

    `writing` is to be renamed to `directory`, `source` holds the configuration and tokenizer. Raises UserError when
    tensors are missing or files damaged.
    """
    paths = sorted(writing.glob("stage-*.safetensors"))
    expected = build_table(shape).hf_shapes
    weight_map: dict[str, str] = {}
    for number, path in enumerate(paths, start=1):
        file, final_name = open_safetensors(path), f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        for name in file.keys():
            found = tuple(file.get_slice(name).get_shape())
            if name in weight_map or expected.get(name) != found:
                raise UserError(f"the export {directory}: {path.name} has an unexpected {name}, {list(found)}")
            weight_map[name] = final_name
        os.replace(path, writing / final_name)
    missing = [name for name in expected if name not in weight_map]
    if missing:
        raise UserError(
            f"the export {directory} lacks {len(missing)} tensors, the first is {missing[0]}:"
            " all pipeline stages must see the same file system"
        )
    if len(paths) == 1:
        os.replace(writing / final_name, writing / SINGLE_FILE)
    else:
        total = sum(prod(s) for s in expected.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": {name: weight_map[name] for name in expected}}
        (writing / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    copy_model_files(Path(source), writing)
    _set_dtype(writing / "config.json", str(dtype).removeprefix("torch."))
    _add_chat_template(writing)


def _one_by_one(buckets: Iterable[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for tensors in buckets:
        for name in list(tensors):
            yield name, tensors.pop(name)


def _data(name: str, tensor: Tensor, announced: tuple[str, HfShape], dtype: torch.dtype) -> memoryview:
    if announced != (name, tuple(tensor.shape)):
        raise ValueError(f"{name}, {list(tensor.shape)}, is written in the place of {announced}")
    return tensor.detach().to(device="cpu", dtype=dtype).contiguous().view(torch.uint8).numpy().data


def _split_into_files(shapes: dict[str, HfShape], dtype: torch.dtype, max_bytes: int) -> list[dict[str, HfShape]]:
    """The tensors in order, in files of at most `max_bytes`; a larger tensor gets a file of its own."""
    files: list[dict[str, HfShape]] = []
    free = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        if size > free or not files:
            files.append({})
            free = max_bytes
        files[-1][name] = shape
        free -= size
    return files


def _header(tensors: dict[str, HfShape], dtype: torch.dtype) -> bytes:
    """Beginning of a safetensors file with the tensors in this order.

    The `safetensors` package writes whole files only, for which all their tensors must be in memory. Source of the
    format: https://github.com/huggingface/safetensors.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": TYPE_CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the data, so it begins at a multiple of 8 bytes; the format allows spaces after the header.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _set_dtype(path: Path, dtype: str) -> None:
    """Sets the dtype in config.json; leaves the file untouched where it is right already."""
    config = json.loads(path.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != dtype for key in keys):
        path.write_text(json.dumps(config | dict.fromkeys(keys, dtype), indent=2) + "\n")


def _add_chat_template(directory: Path) -> None:
    """Copies a template that has its own file into tokenizer_config.json: some readers look only there."""
    tokenizer, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    if not (tokenizer.exists() and template.exists()):
        return
    settings = json.loads(tokenizer.read_text())
    if "chat_template" not in settings:
        settings["chat_template"] = template.read_text()
        tokenizer.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

"""A Hugging Face directory, written tensor by tensor.

`begin_hf`, then `write_tensors` once for each writer (every pipeline stage, or a single one), then `finish_hf`. Until
that last step the files lie in a hidden directory beside the target, so the target is never half-written.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.directory import begin_directory, finish_directory, writing_directory
from meds_megatron.weights.load import INDEX_FILE, SINGLE_FILE
from meds_megatron.weights.shard_file import ShardFile
from meds_megatron.weights.table import HfShape, build_table

MAX_FILE_BYTES = 4 * 2**30

# Everything beside the weights that makes the directory usable: a model card or training state does not belong here.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
)


def begin_hf(directory: str | Path, source: str | Path, overwrite: bool = False) -> None:
    """Makes the hidden directory that the tensors are written into, clearing what a broken export left there.

    Raises UserError when `directory` exists and is not to be overwritten, or `source` has no config.json.
    """
    if not (Path(source) / "config.json").is_file():
        raise UserError(f"{source} has no config.json: name the model directory that training started from")
    begin_directory(directory, overwrite)


def write_tensors(
    groups: Iterable[dict[str, Tensor]],
    shapes: dict[str, HfShape],
    writing: Path,
    stage: int,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes the tensors of `groups`, announced by `shapes`, to files in `writing`; `stage` keeps writers apart.

    A file has at most `max_file_bytes`, or one tensor that exceeds them. Takes the tensors out of the dicts, so that
    none is kept while the next are made. Raises OSError when the file system refuses.
    """
    files = _cut_into_files(shapes, dtype, max_file_bytes)
    place = {name: number for number, names in enumerate(files) for name in names}
    open_files: dict[int, ShardFile] = {}
    for tensors in groups:
        for name in list(tensors):
            number = place[name]
            if number not in open_files:
                path = writing / f"stage-{stage:04d}-{number:04d}.safetensors"
                open_files[number] = ShardFile(path, files[number], dtype)
            open_files[number].write(name, tensors.pop(name))
            if not open_files[number].missing:
                open_files.pop(number).close()


def finish_hf(
    shape: ModelShape, directory: str | Path, source: str | Path, dtype: torch.dtype, overwrite: bool = False
) -> None:
    """Checks that every tensor was written once, adds index, configuration and tokenizer, and gives the directory its
    name. Called by one process after all writers.

    Raises UserError when a writer's files are missing or broken, or `directory` exists and is not to be overwritten.
    """
    directory, source = Path(directory), Path(source)
    writing = writing_directory(directory)
    paths = sorted(writing.glob("stage-*.safetensors"))
    where = _check_files(paths, build_table(shape).hf_shapes, directory)
    _name_files(writing, paths, where, dtype)
    copy_model_files(source, writing)
    _set_dtype(writing / "config.json", str(dtype).removeprefix("torch."))
    _add_chat_template(writing)
    finish_directory(directory, overwrite)


def copy_model_files(source: Path, target: Path) -> None:
    """Copies what a model directory holds beside its weights, byte for byte."""
    for name in MODEL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _cut_into_files(shapes: dict[str, HfShape], dtype: torch.dtype, max_bytes: int) -> list[dict[str, HfShape]]:
    """The tensors in order, cut into files of at most `max_bytes`; a larger tensor gets a file of its own."""
    files: list[dict[str, HfShape]] = []
    room = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        if size > room or not files:
            files.append({})
            room = max_bytes
        files[-1][name] = shape
        room -= size
    return files


def _check_files(paths: list[Path], expected: dict[str, HfShape], directory: Path) -> dict[str, Path]:
    """The file of every tensor. Raises UserError unless the files hold exactly the `expected` tensors."""
    where: dict[str, Path] = {}
    for path in paths:
        for name, shape in _read_header(path).items():
            if name in where or expected.get(name) != shape:
                raise UserError(f"the export {directory}: {path.name} has an unexpected {name}, {list(shape)}")
            where[name] = path
    missing = [name for name in expected if name not in where]
    if missing:
        raise UserError(
            f"the export {directory} lacks {len(missing)} tensors, the first is {missing[0]}:"
            " all pipeline stages must see the same file system"
        )
    return {name: where[name] for name in expected}


def _read_header(path: Path) -> dict[str, HfShape]:
    """Names and shapes in a safetensors file. Raises UserError when the file is shorter than its header says."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    size = 8 + length + max(tensor["data_offsets"][1] for tensor in header.values())
    if path.stat().st_size != size:
        raise UserError(f"{path} has {path.stat().st_size} bytes where {size} were written: check the file system")
    return {name: tuple(tensor["shape"]) for name, tensor in header.items()}


def _name_files(writing: Path, paths: list[Path], where: dict[str, Path], dtype: torch.dtype) -> None:
    """Gives the files the names that transformers looks for, and writes the index that several of them need."""
    if len(paths) == 1:
        os.replace(paths[0], writing / SINGLE_FILE)
        return
    names = {path: f"model-{i:05d}-of-{len(paths):05d}.safetensors" for i, path in enumerate(paths, start=1)}
    total = sum(prod(shape) for path in paths for shape in _read_header(path).values()) * dtype.itemsize
    for path, name in names.items():
        os.replace(path, writing / name)
    weight_map = {name: names[path] for name, path in where.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (writing / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _set_dtype(path: Path, dtype: str) -> None:
    """Leaves config.json untouched unless the weights have another dtype than it says."""
    config = json.loads(path.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != dtype for key in keys):
        path.write_text(json.dumps(config | dict.fromkeys(keys, dtype), indent=2) + "\n")


def _add_chat_template(directory: Path) -> None:
    """Puts a template that has its own file into tokenizer_config.json as well: some readers know only one place."""
    tokenizer, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    if not (tokenizer.exists() and template.exists()):
        return
    settings = json.loads(tokenizer.read_text())
    if "chat_template" not in settings:
        settings["chat_template"] = template.read_text()
        tokenizer.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

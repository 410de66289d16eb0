"""A Hugging Face directory from the model chunks of all ranks.

`export_hf` does it all and is called by every rank. It is made of three steps, with a barrier between them, that a
caller with other needs can take himself: `begin_hf` (one rank), `write_stage` (each pipeline stage), `finish_hf` (one
rank). Until the last step the files lie in a hidden directory beside the target, so the target is never half-written.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from meds_megatron.errors import UserError
from meds_megatron.model.shape import ModelShape
from meds_megatron.weights.chunks import local_parameters, local_table
from meds_megatron.weights.gather import iterate_hf
from meds_megatron.weights.load import INDEX_FILE, SINGLE_FILE
from meds_megatron.weights.shard_file import ShardFile
from meds_megatron.weights.table import HfShape, build_table

MAX_FILE_BYTES = 4 * 2**30

# Everything beside the weights that makes the directory usable: a model card or training state does not belong here.
_COPIED_FILES = (
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


def export_hf(
    model_chunks: list[nn.Module],
    shape: ModelShape,
    directory: str | Path,
    source: str | Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes the model to `directory` as Hugging Face expects it. Called by all ranks, under megatron's parallel state.

    `source` gives the configuration and tokenizer, `dtype` the type of the weights (default: the model's own). Of
    each pipeline stage the first rank (tensor- and data-parallel rank 0) writes files of at most `max_file_bytes` (one
    tensor may exceed it), so the stages need a common file system. Beside the model, memory holds one layer group.

    Raises UserError on every rank when one fails: an existing `directory` without `overwrite`, no config.json in
    `source`, a full disk.
    """
    first_rank = dist.get_rank() == 0
    first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    dtype = dtype or next(model_chunks[0].parameters()).dtype

    def begin() -> None:
        if first_rank:
            begin_hf(directory, source, overwrite)

    def write() -> None:
        if first_replica:
            stage = parallel_state.get_pipeline_model_parallel_rank()
            write_stage(model_chunks, shape, directory, stage, dtype, max_file_bytes)

    def finish() -> None:
        if first_rank:
            finish_hf(shape, directory, source, dtype)

    _on_all_ranks(begin)
    try:
        _on_all_ranks(write)
        _on_all_ranks(finish)
    except Exception:
        if first_rank:
            shutil.rmtree(writing_directory(directory), ignore_errors=True)
        raise


def begin_hf(directory: str | Path, source: str | Path, overwrite: bool = False) -> None:
    """Makes the hidden directory that the stages write into, clearing what a broken export left there.

    Raises UserError when `directory` exists and is not to be overwritten, or `source` has no config.json.
    """
    directory, source = Path(directory), Path(source)
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json: name the model directory that training started from")
    if directory.exists() and not overwrite and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists already: choose another directory or remove it")
    writing = writing_directory(directory)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)


def write_stage(
    model_chunks: list[nn.Module],
    shape: ModelShape,
    directory: str | Path,
    stage: int,
    dtype: torch.dtype,
    max_file_bytes: int = MAX_FILE_BYTES,
    tp_group: dist.ProcessGroup | None = None,
) -> None:
    """Writes the tensors of pipeline stage `stage`; called by all tensor-parallel ranks of one of its replicas.

    Raises UserError when the file system refuses, after the other ranks of the group have been served: none is left
    waiting in a gather.
    """
    tp_group = tp_group or parallel_state.get_tensor_model_parallel_group()
    groups = iterate_hf(model_chunks, shape, tp_group)
    if tp_group.rank() == 0:
        table = local_table(shape, tp_group.size())
        shapes: dict[str, HfShape] = {}
        for entry, _ in local_parameters(model_chunks, table, tp_group.size()):
            if not entry.copy:
                shapes |= entry.hf_shapes()
        files = _cut_into_files(shapes, dtype, max_file_bytes)
        try:
            _write_files(groups, files, writing_directory(directory), stage, dtype)
        except OSError as error:
            raise UserError(f"writing the export {directory} failed: {error}") from error
        finally:
            _exhaust(groups)
    else:
        _exhaust(groups)


def finish_hf(shape: ModelShape, directory: str | Path, source: str | Path, dtype: torch.dtype) -> None:
    """Checks that the stages wrote every tensor once, adds index, configuration and tokenizer, and gives the directory
    its name. Called by one rank after all stages have written.

    Raises UserError when a stage's files are missing or broken.
    """
    directory, source = Path(directory), Path(source)
    writing = writing_directory(directory)
    paths = sorted(writing.glob("stage-*.safetensors"))
    where = _check_files(paths, build_table(shape).hf_shapes, directory)
    _name_files(writing, paths, where, dtype)
    _copy_configuration(source, writing, dtype)
    if directory.exists():
        replaced = directory.with_name(f".{directory.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(directory, replaced)
        os.replace(writing, directory)
        shutil.rmtree(replaced)
    else:
        os.replace(writing, directory)


def writing_directory(directory: str | Path) -> Path:
    """Where an export to `directory` is written until it is whole."""
    directory = Path(directory)
    return directory.with_name(f".{directory.name}.writing")


def _on_all_ranks(step: Callable[[], None]) -> None:
    """Runs `step` on every rank and waits for all; where it fails on one, it fails on all."""
    failure: Exception | None = None
    try:
        step()
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text is not None:
            raise UserError(f"the export failed on rank {rank}: {text}")


def _exhaust(groups: Iterator[dict[str, Tensor]]) -> None:
    for _ in groups:
        pass


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


def _write_files(
    groups: Iterator[dict[str, Tensor]], files: list[dict[str, HfShape]], writing: Path, stage: int, dtype: torch.dtype
) -> None:
    place = {name: number for number, names in enumerate(files) for name in names}
    open_files: dict[int, ShardFile] = {}
    for tensors in groups:
        for name, tensor in tensors.items():
            number = place[name]
            if number not in open_files:
                path = writing / f"stage-{stage:04d}-{number:04d}.safetensors"
                open_files[number] = ShardFile(path, files[number], dtype)
            open_files[number].write(name, tensor)
            if not open_files[number].missing:
                open_files.pop(number).close()


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


def _copy_configuration(source: Path, target: Path, dtype: torch.dtype) -> None:
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _copy_config(source / "config.json", target / "config.json", str(dtype).removeprefix("torch."))
    tokenizer, template = target / "tokenizer_config.json", target / "chat_template.jinja"
    if tokenizer.exists() and template.exists():
        # Some readers know only the one place of the template, some only the other.
        settings = json.loads(tokenizer.read_text())
        settings.setdefault("chat_template", template.read_text())
        tokenizer.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _copy_config(source: Path, target: Path, dtype: str) -> None:
    """The model's own config.json, untouched unless the weights have another dtype than it says."""
    config = json.loads(source.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if all(config.get(key) == dtype for key in keys):
        shutil.copyfile(source, target)
        return
    config |= dict.fromkeys(keys, dtype)
    target.write_text(json.dumps(config, indent=2) + "\n")

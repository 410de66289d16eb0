"""Weights handed from trainer to engines through shared memory: a safetensors file a bucket, mapped by the readers.

The trainer's ranks write buckets into one directory of the machine's shared memory, each engine rank maps them and
copies out what it needs, and the driver removes them. Nothing but the files is shared: a `BucketInfo` says which.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from meds_megatron.errors import UserError
from meds_megatron.weights.shard_file import ShardFile

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class BucketInfo:
    """A bucket that lies ready."""

    path: str
    names: list[str]
    """Hugging Face names of its tensors."""
    shapes: list[list[int]]
    dtype: str
    """Of all its tensors, without the `torch.`."""
    bytes: int
    """Of the tensors, the file's header left out."""


def make_bucket_directory(root: str | Path = SHARED_MEMORY) -> Path:
    """A new directory under `root` that only this user can read; its owner removes it.

    Raises UserError when `root` cannot be written to.
    """
    try:
        return Path(tempfile.mkdtemp(prefix="meds-weights-", dir=root))
    except OSError as error:
        raise UserError(f"{root}, where weights pass to the engines, cannot be written to: {error.strerror}") from error


def write_bucket(directory: str | Path, name: str, tensors: dict[str, Tensor]) -> BucketInfo:
    """Writes `tensors`, all of one dtype, to `directory`/`name`.safetensors.

    The file has its name only once it is whole, and is written straight from the tensors: there is no second copy in
    this process. Raises ValueError for no tensors or mixed dtypes, OSError when the shared memory is full.
    """
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1:
        found = ", ".join(sorted(map(str, dtypes))) or "nothing"
        raise ValueError(f"bucket {name} needs tensors of one dtype, got {found}")
    dtype = dtypes.pop()
    path = Path(directory) / f"{name}.safetensors"
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    file = ShardFile(path, shapes, dtype)
    for key, tensor in tensors.items():
        file.write(key, tensor)
    file.close()
    return BucketInfo(
        path=str(path),
        names=list(tensors),
        shapes=[list(shape) for shape in shapes.values()],
        dtype=str(dtype).removeprefix("torch."),
        bytes=sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize,
    )


def read_bucket(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a bucket, one at a time.

    The tensors are views of the mapped file: they cost no memory of their own and stay valid after it is removed.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def remove_bucket(bucket: BucketInfo) -> None:
    """Gives the memory back, as soon as no reader maps it any more."""
    Path(bucket.path).unlink(missing_ok=True)

"""The model part of a checkpoint: megatron-core's distributed format (`torch_dist`), read without ranks.

A checkpoint is a directory with `.metadata` and `*.distcp` files as `dist_checkpointing.save` writes them, the Hugging
Face configuration and tokenizer files of the model, and `metadata.json`, which is written last: without it the
checkpoint is not complete. Whatever else it holds (an optimizer's state, for one) is ignored here.

Every parameter of the table is stored as one rank would hold it without tensor parallelism, under the key that
megatron-core gives it: the layers stacked along a first axis (`decoder.layers.mlp.linear_fc2.weight` is [L, H, F]), or
each under its own number where the layers were saved as different from each other.
"""

import pickle
import re
from collections.abc import Iterable
from functools import reduce
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.digests import MARKER, Manifest, is_large
from meds_megatron.errors import UserError
from meds_megatron.json_text import parse_json
from meds_megatron.weights.gather import merge
from meds_megatron.weights.table import TRANSFORMER_ENGINE_NAMES, MegatronParameter, build_table, canonical_name

BACKEND = "torch_dist"
METADATA_FILE = ".metadata"
CONFIG_FILE = "metadata.json"
"""megatron-core's CONFIG_FNAME: reading a checkpoint takes torch only."""
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_MODEL_KEY = re.compile(r"(decoder|embedding|output_layer)\.")
_FUSED_NAMES = {local: fused for fused, local in TRANSFORMER_ENGINE_NAMES.items()}

# The classes that describe tensors and their places; a pickle that needs any other is refused.
_KNOWN = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "pathlib._local": {"Path", "PosixPath"},
}


def stored_name(name: str) -> tuple[str, int | None]:
    """The key of the table's parameter `name`, and its place along the axis of layers (None: there is no such axis).

    Keys have Transformer Engine's names also where the layers are local ones: megatron-core's local spec renames them.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, None
    return f"decoder.layers.{_FUSED_NAMES.get(match[2], match[2])}", int(match[1])


def is_checkpoint(directory: str | Path) -> bool:
    """Whether `directory` holds a checkpoint, complete or not."""
    directory = Path(directory)
    if (directory / METADATA_FILE).is_file() or any(directory.glob("*.distcp")):
        return True
    # Other programs, too, keep files of this name next to a model.
    return (directory / CONFIG_FILE).is_file() and not any(directory.glob("*.safetensors"))


class CheckpointWeights:
    """The parameters of a checkpoint as Hugging Face tensors, one parameter at a time.

    Memory holds the parameter that is being read, twice while its parts are put in Hugging Face's order, and the chunk
    that it is read from.
    """

    def __init__(self, directory: str | Path):
        """Raises UserError when `directory` is no checkpoint, an incomplete one, or does not fit its config.json."""
        self.directory = Path(directory).expanduser()
        _check_complete(self.directory)
        manifest = _read_manifest(self.directory)
        if manifest:
            _check_content(self.directory, manifest, [name for name in manifest.sizes if _is_of_model(name)])
        self.shape = ModelShape.from_hf(self.directory)
        self.table = build_table(self.shape)
        metadata = read_metadata(self.directory / METADATA_FILE)
        stored = metadata.state_dict_metadata
        self._tensors = {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}
        self._places = self._find()
        files = _check_files(self.directory, metadata, {key for key, _ in self._places.values()})
        if manifest:
            _check_content(self.directory, manifest, files)
        self._reader = FileSystemReader(self.directory)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)

    def common_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every weight."""
        return reduce(torch.promote_types, {self._tensors[key].properties.dtype for key, _ in self._places.values()})

    def read(self, parameter: MegatronParameter, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The Hugging Face tensors of one parameter, in `dtype` or their own.

        Raises UserError when its file is damaged.
        """
        key, layer = self._places[parameter.name]
        stack = () if layer is None else (layer,)
        shape = parameter.local_shape(tp_size=1)
        whole = torch.empty(shape, dtype=dtype or self._tensors[key].properties.dtype)
        region = ChunkStorageMetadata(
            offsets=torch.Size((*stack, *[0] * len(shape))), sizes=torch.Size((*[1] * len(stack), *shape))
        )
        items = create_read_items_for_chunk_list(key, self._tensors[key], [region])
        try:
            self._reader.read_data(LoadPlan(items), _Into(whole.view(region.sizes))).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            files = {self._reader.storage_data[item.storage_index].relative_path for item in items}
            raise UserError(
                f"{self.directory}: {key} in {' or '.join(sorted(files))} is damaged: copy the checkpoint again, or use"
                " another one"
            ) from error
        names = list(parameter.hf_shapes())
        return {names[0]: whole} if len(names) == 1 else merge(parameter, [whole])

    def _find(self) -> dict[str, tuple[str, int | None]]:
        """The key and layer of every parameter of the table."""
        places: dict[str, tuple[str, int | None]] = {}
        for key in self._tensors:
            for name, layer in self._names(key):
                if name in places:
                    raise self._misfit(f"the checkpoint holds {name} twice, as {places[name][0]} and as {key}")
                places[name] = (key, layer)
        expected = [parameter.name for parameter in self.table.stored]
        for name, (key, layer) in places.items():
            if name not in expected:
                raise self._misfit(f"the checkpoint holds {key}, which the model of config.json does not have")
            self._check_shape(self.table.parameters[name], key, layer)
        for name in expected:
            if name not in places:
                raise self._misfit(f"the checkpoint has no tensor {stored_name(name)[0]}")
        return places

    def _names(self, key: str) -> list[tuple[str, int | None]]:
        """The parameters that are stored under `key`, none if it does not belong to the model."""
        if match := _STACKED.fullmatch(key):
            layers = range(self.shape.num_layers)
            return [(canonical_name(f"decoder.layers.{layer}.{match[1]}"), layer) for layer in layers]
        return [(canonical_name(key), None)] if _MODEL_KEY.match(key) else []

    def _check_shape(self, parameter: MegatronParameter, key: str, layer: int | None) -> None:
        """The stored tensor may have more rows than the vocabulary; otherwise it has the table's shape."""
        stored = tuple(self._tensors[key].size)
        stack = () if layer is None else (self.shape.num_layers,)
        expected = (*stack, *parameter.local_shape(tp_size=1))
        vocabulary = parameter.bucket in (0, self.shape.num_layers + 1) and parameter.columns is not None
        if stored != expected and not (vocabulary and stored[0] >= expected[0] and stored[1:] == expected[1:]):
            raise self._misfit(f"{key} is {list(stored)}, config.json asks for {list(expected)}")

    def _misfit(self, found: str) -> UserError:
        return UserError(
            f"{self.directory}: {found}; put the config.json that belongs to these weights next to them, or use another"
            " checkpoint"
        )


class _Into(DefaultLoadPlanner):
    """Reads into one tensor, in its dtype."""

    def __init__(self, target: Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(offset, offset + length) for offset, length in region)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _check_complete(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory} does not exist: give the directory of a checkpoint")
    marker = directory / CONFIG_FILE
    if not is_checkpoint(directory):
        raise UserError(f"{directory} is not a checkpoint: it has no {CONFIG_FILE} and no {METADATA_FILE}")
    for path in (marker, directory / METADATA_FILE):
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: the checkpoint was not written or not copied completely, use another one"
            )
    try:
        backend = parse_json(marker.read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{marker} is not that of a checkpoint ({error}): use another checkpoint") from error
    if backend != BACKEND:
        raise UserError(f"{marker} says the format is {backend}, expected {BACKEND}: save the checkpoint as that")
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} has no config.json: copy the config.json and tokenizer files of the model's Hugging Face"
            " directory there"
        )


def read_metadata(path: Path) -> Metadata:
    """The description of a checkpoint, a pickle, which could run anything: only known classes are loaded.

    Raises UserError when the file is damaged or needs another class.
    """
    try:
        with open(path, "rb") as file:
            metadata = _SafeUnpickler(file).load()
    except ImportError as error:
        raise UserError(f"{path} {error}: it is not the description of a checkpoint, use another one") from error
    except Exception as error:
        # A damaged pickle can raise any exception.
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged, use another one") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path} does not describe a checkpoint: use another one")
    return metadata


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _KNOWN.get(module, ()):
            raise ImportError(f"needs {module}.{name}")
        return super().find_class(module, name)


def _read_manifest(directory: Path) -> Manifest | None:
    """Manifest of a run's checkpoint; None where there is none, as with converted weights."""
    if not (directory / MARKER).is_file():
        return None
    try:
        return Manifest.read(directory)
    except (ValueError, OSError) as error:
        raise UserError(f"{directory / MARKER} cannot be read ({error}): use another checkpoint") from error


def _is_of_model(name: str) -> bool:
    """Whether a file of a run's checkpoint is one that describes the model: those of the run's state are in directories
    of their own."""
    return "/" not in name and not is_large(name)


def _check_content(directory: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Raises UserError for a file that is not as it was written."""
    if damage := manifest.damage(directory, [name for name in names if name in manifest.sizes]):
        raise UserError(f"{damage}: copy the checkpoint again, or use another one")


def _check_files(directory: Path, metadata: Metadata, keys: set[str]) -> list[str]:
    """Checks that every byte of the tensors `keys` is there, and returns the names of their files. Raises UserError,
    naming the tensor or the file."""
    placed = {(index.fqn, index.offset) for index in metadata.storage_data}
    for key in sorted(keys):
        tensor = metadata.state_dict_metadata[key]
        assert isinstance(tensor, TensorStorageMetadata)
        stored = [chunk for chunk in tensor.chunks if (key, chunk.offsets) in placed]
        if sum(prod(chunk.sizes) for chunk in stored) != prod(tensor.size):
            raise UserError(
                f"{directory}: {key} is stored only in part: some ranks did not write theirs, use another checkpoint"
            )
    sizes: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        if index.fqn in keys:
            sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    for name, size in sizes.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise UserError(f"{path} is missing: copy the checkpoint again, or use another one")
        if found < size:
            raise UserError(f"{path} has {found} bytes, expected {size}: copy the checkpoint again, or use another one")
    return list(sizes)

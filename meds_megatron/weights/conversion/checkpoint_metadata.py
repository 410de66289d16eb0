"""What a distributed checkpoint says of itself in `.metadata`, read without trusting it.

The file is a pickle, and a pickle can run anything. Only the classes that describe tensors and their places are let in.
"""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from meds_megatron.errors import UserError

METADATA_FILE = ".metadata"
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


def read_metadata(directory: Path) -> Metadata:
    """The description of the checkpoint in `directory`.

    Raises UserError when the file is damaged or would bring in anything but a description.
    """
    path = directory / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = _DescriptionsOnly(file).load()
    except ImportError as error:
        raise UserError(f"{path} {error}: it is not the description of a checkpoint, do not trust it") from error
    except Exception as error:
        # A damaged pickle can fail in any way at all.
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged, use another one") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path} does not describe a checkpoint: use another one")
    return metadata


class _DescriptionsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _KNOWN.get(module, ()):
            raise ImportError(f"asks for {module}.{name}")
        return super().find_class(module, name)

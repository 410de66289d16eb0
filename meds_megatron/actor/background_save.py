"""A save strategy for megatron-core's dist_checkpointing that writes on a thread of the rank.

megatron-core's own strategy forks a process that writes. A rank is a Ray actor with threads of gRPC, NCCL and gloo,
which a fork must not copy; a copy in host memory and a thread do without. The part on the critical path is the planning
and the copy.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, _StoragePrefix
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from meds_megatron.actor.optimizer_state import is_optimizer_key
from meds_megatron.digests import DigestFile


class BackgroundSave(AsyncSaveShardedStrategy):
    """The `torch_dist` format. `async_save` returns when the tensors are copied: training may continue and change
    them."""

    def __init__(self, copies: "HostCopies") -> None:
        super().__init__("torch_dist", 1)
        self._copies = copies
        self.digests: dict[str, str] = {}
        """Digests of the files that this rank has written, by name."""

    def can_handle_sharded_objects(self) -> bool:
        return True

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> AsyncRequest:
        """Plans the save with all ranks and copies this rank's share. The request's function writes it and may run on
        any thread; its `finalize_fns` are collectives."""
        shares, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        writer = _CopyingWriter(checkpoint_dir, self._copies)
        self.digests = writer.files.digests
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(shares), writer, planner=planner)
        return AsyncRequest(writer.write, (), [partial(save_state_dict_async_finalize, *planned)])


class HostCopies:
    """A rank's share of a checkpoint in host memory, which one save after the other fills.

    The operating system makes the pages of new memory when they are first written, which takes longer than the copy.
    """

    def __init__(self) -> None:
        self._tensors: dict[MetadataIndex, Tensor] = {}

    def copy(self, index: MetadataIndex, data: Tensor) -> Tensor:
        """The copy of `data` until the next call with `index`. One from a GPU is complete when the GPU has finished."""
        copy = self._tensors.get(index)
        if copy is None or (copy.shape, copy.dtype) != (data.shape, data.dtype):
            copy = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=data.is_cuda)
            self._tensors[index] = copy
        return copy.copy_(data, non_blocking=True)


class DigestedFiles(FileSystem):
    """torch's files, with the digests of those written, by name."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            raise ValueError(f"{path} is opened to be written only, not {mode}")
        with DigestFile(Path(path)) as stream:
            yield stream
        self.digests[Path(path).name] = stream.digest

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _CopyingWriter(FileSystemWriter):
    """torch's writer in two parts: `prepare_write_data` copies, `write` writes the copies, the optimizer's to a file of
    their own: others read the model alone."""

    can_run_decentralized_global_plan = True

    def __init__(self, path: str | Path, copies: HostCopies) -> None:
        super().__init__(path)
        self.fs = self.files = DigestedFiles()
        self._copies = copies

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        return replace(plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        share = {item.index: planner.resolve_data(item) for item in plan.items}
        for index, data in share.items():
            if isinstance(data, Tensor):
                share[index] = self._copies.copy(index, data)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._plan, self._planner = plan, _CopiedShare(share)
        self._results: list[WriteResult] = []

    def write(self) -> None:
        """Raises OSError, or torch's RuntimeError in its place, when the file system refuses."""
        prefix = self._plan.storage_data.prefix
        for part, is_optimizer in (("model", False), ("optimizer", True)):
            items = [item for item in self._plan.items if is_optimizer_key(item.index.fqn) == is_optimizer]
            if items:
                plan = replace(self._plan, items=items, storage_data=_StoragePrefix(f"{prefix}{part}_"))
                self._results += self.write_data(plan, self._planner).wait()

    def retrieve_write_results(self) -> list[WriteResult]:
        return self._results


class _CopiedShare(DefaultSavePlanner):
    def __init__(self, share: dict[MetadataIndex, Tensor | io.BytesIO]) -> None:
        super().__init__()
        self._share = share

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._share[write_item.index]

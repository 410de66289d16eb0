"""One rank's part of a checkpoint: its share of the model and the optimizer, and its random states.

A checkpoint directory has the model's weights in megatron-core's distributed format, as `meds convert` reads and writes
them, the optimizer's state next to them, and `rng/` with a file for each rank.
"""

import random
import re
from pathlib import Path
from threading import Thread

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from meds_megatron.actor import optimizer_state
from meds_megatron.actor.background_save import BackgroundSave, HostCopies
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.digests import DigestFile, Manifest, is_large
from meds_megatron.errors import UserError
from meds_megatron.model.gpt import PolicyModel
from meds_megatron.weights.chunks import unwrapped
from meds_megatron.weights.collective import on_all_ranks
from meds_megatron.weights.conversion.checkpoint import METADATA_FILE, read_metadata

_RANK_FILE = re.compile(r"__(\d+)_\w+\.distcp")


class PolicySave:
    """A save under way. The constructor and `finish` are collectives of all ranks; the policy may train in between."""

    def __init__(
        self,
        chunks: list[PolicyModel],
        optimizer: MegatronOptimizer,
        shape: ModelShape,
        directory: str | Path,
        copies: HostCopies,
    ):
        """Copies this rank's share into `copies`, which no other save may be writing from, and begins to write it into
        `directory`, which exists. Raises UserError on all ranks when one cannot write."""
        self._directory = Path(directory)
        state = {
            "optimizer_step": optimizer_state.step_of(optimizer),
            "optimizer": optimizer_state.sharded_state(optimizer, chunks, shape),
            **_model_state(chunks),
        }
        self._strategy = BackgroundSave(copies)
        self._request = dist_checkpointing.save(
            state, str(directory), self._strategy, validate_access_integrity=False, async_sharded_save=True
        )
        on_all_ranks(self._save_random_states, self._name)
        self._failure: Exception | None = None
        self._thread = Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def written(self) -> bool:
        """Whether this rank has written its share: `finish` does not wait for it."""
        return not self._thread.is_alive()

    def finish(self) -> dict[str, str]:
        """Waits for the rest and completes the model part of the directory. Returns the digests of the files that this
        rank has written, by name. Raises UserError on all ranks when one could not write."""
        self._thread.join()
        on_all_ranks(self._raise_failure, self._name)
        for finalize in self._request.finalize_fns:
            finalize()
        return self._strategy.digests | self._random_states_digest

    @property
    def _name(self) -> str:
        return f"saving {self._directory}"

    def _write(self) -> None:
        try:
            self._request.async_fn()
        except Exception as error:
            # torch raises an error of its own while it closes the file that could not be written.
            self._failure = error.__context__ if isinstance(error.__context__, OSError) else error

    def _raise_failure(self) -> None:
        if isinstance(self._failure, OSError):
            raise UserError(
                f"{self._directory} cannot be written ({self._failure.strerror}): make space or access there"
            )
        if self._failure is not None:
            raise self._failure

    def _save_random_states(self) -> None:
        path = _random_states_file(self._directory, dist.get_rank())
        try:
            path.parent.mkdir(exist_ok=True)
            with DigestFile(path) as file:
                torch.save(random_states(), file)
            self._random_states_digest = {str(path.relative_to(self._directory)): file.digest}
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be written ({error}): make space or access there") from error


def damage_of(directory: Path, rank: int, ranks: int) -> str | None:
    """Half a sentence about a large file of a checkpoint that is not as it was written; None if all are. Each of the
    `ranks` that will read them looks at its share; under the layout that saved them, at what it reads itself."""
    manifest = Manifest.read(directory)
    return manifest.damage(directory, (name for name in manifest.sizes if _reader(name, ranks) == rank))


def _reader(name: str, ranks: int) -> int | None:
    writer = _RANK_FILE.fullmatch(name)
    if writer is None:
        return 0 if is_large(name) else None
    return int(writer[1]) % ranks


def load(
    chunks: list[PolicyModel],
    optimizer: MegatronOptimizer,
    shape: ModelShape,
    directory: str | Path,
    same_layout: bool,
) -> None:
    """Fills model and optimizer with a checkpoint that was saved under any layout; all ranks call it.

    The random states continue under the same layout only. Raises UserError when the checkpoint is damaged or does not
    fit the model.
    """
    directory = Path(directory)
    _refuse_objects(directory / METADATA_FILE)
    state = {
        "optimizer": optimizer_state.sharded_state(optimizer, chunks, shape),
        **_model_state(chunks),
    }
    try:
        loaded = dist_checkpointing.load(
            state, str(directory), common_strategy=_SafeCommon(), validate_access_integrity=False
        )
    except (OSError, RuntimeError, KeyError, EOFError, CheckpointingException, CheckpointException) as error:
        # torch's exception has one line for each rank that failed.
        raise UserError(
            f"{directory} cannot be loaded ({str(error).strip().splitlines()[-1]}): it is damaged or belongs to another"
            " model; remove it to resume from the checkpoint before it"
        ) from error
    for number, chunk in enumerate(chunks):
        # Transformer Engine's extra states, which bfloat16 training does not use, are not saved.
        unwrapped(chunk).load_state_dict(loaded[f"model{number}"], strict=False)
    optimizer_state.set_step(optimizer, loaded["optimizer_step"])
    path = _random_states_file(directory, dist.get_rank())
    if same_layout and path.is_file():
        set_random_states(_read_values(path))


class _SafeCommon(TorchCommonLoadStrategy):
    """Reads the file of everything but tensors, as far as it is plain values: megatron-core's own strategy leaves to
    torch's default whether a pickle may run anything."""

    def load_common(self, checkpoint_dir: str | Path) -> dict:
        return _read_values(Path(checkpoint_dir) / COMMON_STATE_FNAME)


def _read_values(path: Path) -> dict:
    """Raises UserError for a file that is damaged, or that holds more than tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged pickle can raise any exception.
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged or was not saved by meds train; remove the "
            "checkpoint to resume from the one before it"
        ) from error


def random_states() -> dict:
    """State of every random generator of this process that a computation could use."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    kind, keys, *rest = state
    states = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_states(states: dict) -> None:
    """Continues from what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["megatron"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _refuse_objects(path: Path) -> None:
    """Raises UserError for a checkpoint with anything but tensors: torch would unpickle it. The file itself, which
    megatron-core unpickles, is read with known classes only."""
    for name, entry in read_metadata(path).state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(
                f"{path} describes {name}, which is not a tensor: it was not saved by meds train, remove it"
            )


def _model_state(chunks: list[PolicyModel]) -> dict:
    """Megatron's mapping of each model chunk, tensors only: reading its objects back would unpickle them."""
    return {
        f"model{number}": {
            name: part
            for name, part in unwrapped(chunk).sharded_state_dict().items()
            if not name.endswith("_extra_state")
        }
        for number, chunk in enumerate(chunks)
    }


def _random_states_file(directory: Path, rank: int) -> Path:
    return directory / "rng" / f"rank{rank:05d}.pt"

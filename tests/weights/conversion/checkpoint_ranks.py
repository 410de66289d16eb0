"""Functions that the ranks of the conversion tests run: load a checkpoint into a model, or save one."""

import multiprocessing
import shutil
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from meds_megatron.actor.process_group import form_groups
from meds_megatron.config import ParallelConfig
from meds_megatron.weights.model_files import MODEL_FILES
from tests.weights.round_trip import Case, load


def differences(rank: int, cases: list[Case]) -> list[str]:
    """Parameters of this rank that the checkpoint `case.target` fills otherwise than `load_hf` does from the source."""
    form_groups(ParallelConfig(**cases[0].parallel), seed=0)
    found = []
    for case in cases:
        expected, _ = load(case)
        chunks, _ = load(case)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(torch.nan)
        states = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
        loaded = dist_checkpointing.load(states, str(case.target))
        for number, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{number}"])
        for ours, theirs in zip(chunks, expected, strict=True):
            pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
            found += [f"{case.source.name}: {name}" for (name, a), b in pairs if not torch.equal(a, b)]
    return found


def save(rank: int, cases: list[Case]) -> None:
    """Source -> model -> checkpoint, with the model's files next to the tensors."""
    # megatron-core writes in processes of its own, which a daemon must not have.
    multiprocessing.current_process()._config["daemon"] = False
    form_groups(ParallelConfig(**cases[0].parallel), seed=0)
    for case in cases:
        chunks, _ = load(case)
        if rank == 0:
            case.target.mkdir()
            copy_files(case.source, case.target)
        torch.distributed.barrier()
        states = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
        dist_checkpointing.save(states, str(case.target))


def copy_files(source: Path, target: Path) -> None:
    for name in MODEL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)

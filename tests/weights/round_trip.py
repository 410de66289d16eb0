"""Functions that the ranks of the round-trip tests run: load a Hugging Face directory, write another."""

import resource
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state

from meds_megatron.actor.process_group import form_groups
from meds_megatron.config import ModelConfig, ParallelConfig
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.model.gpt import build_chunks, chunk_layers, transformer_config
from meds_megatron.weights.directory import writing_directory
from meds_megatron.weights.export import export_hf
from meds_megatron.weights.gather import iterate_hf
from meds_megatron.weights.load import load_hf


@dataclass
class Case:
    source: Path
    target: Path
    parallel: dict
    dtype: str = "float32"
    options: dict = field(default_factory=dict)
    """Keyword arguments of `export_hf`."""


def round_trips(rank: int, cases: list[Case]) -> list[list[int]]:
    """Source -> Megatron -> target for cases of one layout, on all ranks. Returns the layers of this rank's chunks."""
    form_groups(ParallelConfig(**cases[0].parallel), seed=0)
    for case in cases:
        chunks, shape = load(case)
        export_hf(chunks, shape, case.target, case.source, **case.options)
    return [[number for number, _ in chunk_layers(chunk)] for chunk in chunks]


def load(case: Case):
    """This rank's chunks, every weight of which came from the source: they were NaN before."""
    shape = ModelShape.from_hf(case.source)
    config = transformer_config(shape, ModelConfig(dtype=case.dtype), ParallelConfig(**case.parallel))
    chunks = build_chunks(shape, config, max_sequence_length=64)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    for parameter in parameters:
        parameter.data.fill_(torch.nan)
    load_hf(chunks, shape, case.source)
    # A sum is NaN as soon as one element is, and needs no memory for a mask.
    assert not any(parameter.sum().isnan() for parameter in parameters)
    return chunks, shape


def padding_rows(rank: int, case: Case) -> list[tuple[int, bool]]:
    """Rows of this rank's embedding and head, and whether the last of each is all zero."""
    form_groups(ParallelConfig(**case.parallel), seed=0)
    chunks, _ = load(case)
    weights = [
        p for chunk in chunks for name, p in chunk.named_parameters() if p.shape[0] > 60 and "layers" not in name
    ]
    return [(weight.shape[0], not weight[-1].any()) for weight in weights]


def tensors_per_bucket(rank: int, case: Case) -> list[int]:
    form_groups(ParallelConfig(**case.parallel), seed=0)
    chunks, shape = load(case)
    return [len(tensors) for tensors in iterate_hf(chunks, shape, parallel_state.get_tensor_model_parallel_group())]


def memory_of_loading(rank: int, case: Case) -> tuple[int, int]:
    """Bytes of this rank's parameters, and by how much building and loading them raised the peak of its memory."""
    form_groups(ParallelConfig(**case.parallel), seed=0)
    # The first time also brings in code.
    load(case)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_memory()
    chunks, _ = load(case)
    return sum(p.nbytes for chunk in chunks for p in chunk.parameters()), _peak_memory() - before


def _peak_memory() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def failing_exports(rank: int, case: Case) -> list[str]:
    """The errors of an export onto an existing directory, and of one that rank 2 cannot write; nothing is left."""
    form_groups(ParallelConfig(**case.parallel), seed=0)
    chunks, shape = load(case)
    errors = []
    case.target.mkdir(exist_ok=True)
    (case.target / "precious").write_text("")
    errors.append(_error_of(chunks, shape, case, case.target))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    other = case.target / "other"
    errors.append(_error_of(chunks, shape, case, other))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    torch.distributed.barrier()
    assert not other.exists() and not writing_directory(other).exists()
    return errors


def _error_of(chunks, shape, case, target) -> str:
    try:
        export_hf(chunks, shape, target, case.source)
    except UserError as error:
        return str(error)
    return "none"

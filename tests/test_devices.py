"""The choice of GPUs by the tests, for machines with any number of them."""

import os

import pytest
import torch

from meds_megatron.bench.processes import placed_on, result_of
from tests.devices import GPU_ENV_VARS, GPU_TOLERANCE, engine_kind, rank_gpus, tolerance


@pytest.mark.parametrize(
    ("world_size", "gpus", "expected"),
    [
        (1, 0, [None]),
        (1, 1, [0]),
        (2, 1, [None, None]),
        (2, 2, [0, 1]),
        (4, 8, [0, 1, 2, 3]),
        (16, 8, [None] * 16),
    ],
)
def test_every_rank_has_a_gpu_of_its_own_or_none_has_one(world_size, gpus, expected):
    assert rank_gpus(world_size, gpus) == expected


@pytest.mark.parametrize(
    ("needed", "gpus", "cuda_build", "expected"),
    [(1, 0, False, "cpu"), (1, 8, False, "cpu"), (1, 1, True, "cuda"), (2, 1, True, None), (1, 0, True, None)],
)
def test_engines_are_on_what_vllms_build_can_use(needed, gpus, cuda_build, expected):
    assert engine_kind(needed, gpus, cuda_build) == expected


def test_tolerances_are_those_of_the_cpu_unless_there_are_gpus():
    from meds_megatron.bench.gpu_check import PARITY

    assert [tolerance(1e-5, gpus=gpus) for gpus in (0, 1, 8)] == [1e-5, 1e-3, 1e-3]
    assert tolerance(1e-5, "bfloat16", gpus=0) == 1e-5 and tolerance(0.5, "bfloat16", gpus=1) == 0.5
    assert GPU_TOLERANCE == PARITY


@pytest.mark.usefixtures("processes")
def test_processes_see_their_own_gpu_first_and_the_others_behind_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert result_of(1, seen) == ("5,4,6", "0")
    assert result_of(None, seen) == ("", "0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5,6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with placed_on(2):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,0,1"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def seen() -> tuple[str, str]:
    return os.environ["CUDA_VISIBLE_DEVICES"], os.environ["NVIDIA_TF32_OVERRIDE"]


def test_ranks_on_the_cpu_see_no_gpu(cpu_ranks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert cpu_ranks.run(2, environment_of_rank) == [("", "0")] * 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def environment_of_rank(rank: int) -> tuple[str, str]:
    assert GPU_ENV_VARS.items() <= os.environ.items()
    return seen()

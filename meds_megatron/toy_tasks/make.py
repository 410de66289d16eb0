"""The directory of the model to train: the user's own, or a generated one that is kept in a cache."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from meds_megatron import atomic
from meds_megatron.config import DataConfig, ModelConfig, ModelShape, RandomModelConfig
from meds_megatron.data.tokenizer import TOKENIZER_FILES
from meds_megatron.errors import UserError
from meds_megatron.toy_tasks.arithmetic import Variant

logger = logging.getLogger(__name__)

REPORT_EVERY = 100
"""Warm-up steps between two reports."""


def ensure_model(
    config: ModelConfig, data: DataConfig, cache_dir: str | Path, report: Callable[[str], None] = logger.info
) -> Path:
    """The Hugging Face directory of the model to train; generated in `cache_dir` when the config asks for it.

    Generating the arithmetic model takes a minute or two, once; `report` is called with its progress. Raises UserError
    when `model.path` is missing, has no config.json or an unsupported architecture.
    """
    # Absolute paths: processes on other nodes have other working directories.
    cache = Path(cache_dir).expanduser().absolute()
    if config.make == "arithmetic":
        return ensure_arithmetic_model(data.arithmetic_rules, cache, report)
    if config.make == "random":
        return _random_model(config.random, cache)
    if not config.path:
        raise UserError("model.path is not set: give it a Hugging Face directory, or set model.make")
    ModelShape.from_hf(config.path)
    return Path(config.path).expanduser().absolute()


def ensure_arithmetic_model(
    rules: Variant, cache: Path, report: Callable[[str], None] = logger.info, steps: int | None = None
) -> Path:
    """The arithmetic model's directory in `cache`, generated with `steps` of warm-up (None: as many as it takes)."""

    def make(directory: Path) -> None:
        from meds_megatron.toy_tasks.arithmetic_model import WarmUp, make_arithmetic_model

        warm_up = WarmUp() if steps is None else WarmUp(steps=steps)

        def progress(step: int, loss: float) -> None:
            if step % REPORT_EVERY == 0:
                report(f"warming up the arithmetic model: step {step} of {warm_up.steps}, loss {loss:.3f}")

        make_arithmetic_model(directory, rules, warm_up, progress)

    sources = _sources("arithmetic", "arithmetic_model", "random_model", "remainder")
    return _cached(cache, f"arithmetic-{rules}", {"rules": rules, "steps": steps, "sources": sources}, make)


def _random_model(config: RandomModelConfig, cache: Path) -> Path:
    def make(directory: Path) -> None:
        from meds_megatron.toy_tasks.random_model import make_random_model

        make_random_model(config, directory)

    assert config.tokenizer is not None  # `validate_model` has checked it.
    tokenizer = Path(config.tokenizer).expanduser()
    files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    key = {
        "config": asdict(config),
        "files": {file.name: _digest(file.read_bytes()) for file in files},
        "sources": _sources("random_model"),
    }
    return _cached(cache, f"random-{config.architecture}", key, make)


def _cached(cache: Path, name: str, key: dict, make: Callable[[Path], None]) -> Path:
    """The directory for `key` in the cache, generated if it is not there.

    It is written under a temporary name and renamed when complete: an interrupted run leaves no partial directory. Of
    two concurrent runs the second waits for the first one's result.
    """
    final = cache / f"{name}-{_digest(json.dumps(key, sort_keys=True).encode())[:16]}"
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = cache / f".{final.name}.lock"
        with FileLock(lock):
            try:
                if not final.is_dir():
                    _make(final, make)
            finally:
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cache_dir = {cache} cannot be written ({error.strerror}): set cache_dir=... to a writable directory"
        ) from error
    return final


def _make(final: Path, make: Callable[[Path], None]) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        make(draft)
        draft.chmod(0o755)
        try:
            atomic.sync_tree(draft)
            draft.rename(final)
        except OSError:
            # Of processes that wait for a lock whose file is removed, two may have it.
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sources(*modules: str) -> list[str]:
    """The code that generates a model: a change of it invalidates the cache. Read and not imported, which would take a
    start seconds for transformers' models although there is nothing to generate."""
    return [Path(__file__).with_name(f"{module}.py").read_text() for module in modules]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

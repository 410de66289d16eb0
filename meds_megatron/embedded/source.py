"""Where the trained model comes from: a directory of the user's, or one made on the spot and kept in a cache."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from meds_megatron.config import DataConfig, ModelConfig, RandomModelConfig
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError

REPORT_EVERY = 100
"""Warm-up steps between two reports."""


def ensure_model(
    config: ModelConfig,
    data: DataConfig,
    cache_dir: str | Path,
    report: Callable[[str], None] | None = None,
) -> Path:
    """The Hugging Face directory of the model to train; makes it in `cache_dir` when the config says so.

    Warming up the arithmetic model takes a minute or two, once: `report` is told how far it is. Raises UserError when
    `model.path` is missing, holds no config.json or an unsupported architecture.
    """
    cache = Path(cache_dir).expanduser()
    if config.make == "arithmetic":
        return _arithmetic_model(data, cache, report)
    if config.make == "random":
        return _random_model(config.random, cache)
    if not config.path:
        raise UserError("model.path is not set: give it a Hugging Face directory, or set model.make")
    ModelShape.from_hf(config.path)
    return Path(config.path).expanduser()


def _arithmetic_model(data: DataConfig, cache: Path, report: Callable[[str], None] | None) -> Path:
    from meds_megatron.embedded import arithmetic
    from meds_megatron.embedded import arithmetic_model as embedded

    warm_up = embedded.WarmUp()

    def progress(step: int, loss: float) -> None:
        if report and step % REPORT_EVERY == 0:
            report(f"warming up the arithmetic model: step {step} of {warm_up.steps}, loss {loss:.3f}")

    sources = [Path(module.__file__).read_text() for module in (arithmetic, embedded)]
    key = {"rules": data.arithmetic_rules, "warm_up": asdict(warm_up), "sources": sources}
    return _cached(
        cache,
        f"arithmetic-{data.arithmetic_rules}",
        key,
        lambda directory: embedded.make_arithmetic_model(directory, data.arithmetic_rules, warm_up, progress),
    )


def _random_model(config: RandomModelConfig, cache: Path) -> Path:
    from meds_megatron.embedded import boxing, random_model

    tokenizer = Path(config.tokenizer).expanduser()
    files = {
        name: _digest((tokenizer / name).read_bytes())
        for name in random_model.TOKENIZER_FILES
        if (tokenizer / name).is_file()
    }
    sources = [Path(module.__file__).read_text() for module in (random_model, boxing)]
    key = {"config": asdict(config), "files": files, "sources": sources}
    return _cached(
        cache,
        f"random-{config.architecture}",
        key,
        lambda directory: random_model.make_random_model(config, directory),
    )


def _cached(cache: Path, name: str, key: dict, make: Callable[[Path], None]) -> Path:
    """The directory for `key` in the cache, made first if need be.

    It is made under a temporary name and renamed when whole, so that an interrupted or a second maker leaves nothing
    half-written behind.
    """
    final = cache / f"{name}-{_digest(json.dumps(key, sort_keys=True).encode())[:16]}"
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
    try:
        make(draft)
        draft.chmod(0o755)
        try:
            draft.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

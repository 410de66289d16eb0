"""Altered bits in a checkpoint: noticed in every kind of file, by whoever reads it, and not resumed from."""

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from meds_megatron.config import Config, MemoryConfig, save_config
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.digests import MARKER, Manifest
from meds_megatron.errors import UserError
from meds_megatron.memory import MemoryShard
from meds_megatron.run import checkpoint_files as files
from meds_megatron.weights.model_files import copy_model_files
from tests.model import qwen_cases as cases

RANKS = 2
KINDS = [
    "*_model_*.distcp",
    "*_optimizer_*.distcp",
    "rng/rank*.pt",
    "rng/engines.npz",
    "memory/*.memory",
    "common.pt",
    ".metadata",
    "metadata.json",
    "state.json",
    "config.yaml",
    "config.json",
    MARKER,
]
FLIPS = 4
"""Flips of each kind of file."""


@pytest.fixture(scope="module")
def saved(cpu_ranks, tmp_path_factory) -> Path:
    """A directory with the checkpoints of steps 5, only to go back to, and 10, with everything that a run saves."""
    from tests.actor import checkpoint_ranks as on_rank

    directory, path = tmp_path_factory.mktemp("digests"), None
    model = cases.cached_model(tmp_path_factory, "qwen2 tied")
    for step in (5, 10):
        path = directory / f"step_{step:06d}"
        path.mkdir()
        of_ranks = (
            cpu_ranks.run(RANKS, on_rank.save_with_digests, str(model), {"tensor": 2}, str(path)) if step == 10 else []
        )
        shard = MemoryShard(MemoryConfig())
        shard.remember(["problem|wrong"] * 4, np.eye(4, dtype=np.float32))
        taken = {f"memory/{name}": digest for name, digest in shard.save(path / "memory").items()}
        (path / "rng").mkdir(exist_ok=True)
        np.savez(path / "rng" / "engines.npz", **{"engine0.rank0.cpu": np.arange(50)})
        copy_model_files(model, path)
        save_config(Config(), path / "config.yaml")
        files.write_state(path, {"step": step}, 0, asdict(ParallelLayout(tensor=2)))
        files.mark_complete(path, {name: digest for of_rank in of_ranks for name, digest in of_rank.items()} | taken)
    return directory


@pytest.fixture
def checkpoint(saved) -> Path:
    return saved / "step_000010"


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """A file of which one bit is another, for as long as the block lasts."""
    whole = path.read_bytes()
    path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
    try:
        yield
    finally:
        path.write_bytes(whole)


def found_by_ranks(checkpoint: Path) -> list[str]:
    from meds_megatron.actor.checkpoint import damage_of

    return [damage for rank in range(RANKS) if (damage := damage_of(checkpoint, rank, RANKS))]


def test_the_digests_are_those_of_another_program(checkpoint):
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    names.remove(MARKER)
    listed = subprocess.run(
        ["b2sum", "--length=256", *names], cwd=checkpoint, capture_output=True, text=True, check=True
    )
    digests = {name: digest for digest, name in (line.split(maxsplit=1) for line in listed.stdout.splitlines())}
    assert Manifest.read(checkpoint).digests == digests
    assert all(list(checkpoint.glob(kind)) for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_is_noticed_and_named(saved, checkpoint, kind, caplog):
    assert files.newest(saved).step == 10 and not found_by_ranks(checkpoint)
    draw = random.Random(kind)
    for _ in range(FLIPS):
        path = draw.choice(sorted(checkpoint.glob(kind)))
        with flipped(path, draw.randrange(8 * path.stat().st_size)):
            if path.suffix == ".distcp":
                damages = found_by_ranks(checkpoint)
                passed_over = {checkpoint: damages[0]}
                assert damages == [f"{path} is altered (its digest differs from that in {MARKER})"]
                assert files.newest(saved, passed_over).step == 5
            else:
                caplog.clear()
                assert files.newest(saved).step == 5
                assert checkpoint.name in caplog.text
                assert path.name in caplog.text or kind == MARKER
    assert files.newest(saved).step == 10 and not found_by_ranks(checkpoint)


def test_all_ranks_together_look_at_every_large_file(checkpoint):
    """Also those of another number of ranks than have saved it."""
    from meds_megatron.actor.checkpoint import damage_of

    for path in checkpoint.glob("*.distcp"):
        with flipped(path, 800):
            for ranks in (1, 2, 3, 8):
                assert sum(damage_of(checkpoint, rank, ranks) is not None for rank in range(ranks)) == 1


def test_an_altered_memory_is_left_to_its_shards_where_they_may_go_on_without(saved, checkpoint):
    (path,) = (checkpoint / "memory").iterdir()
    with flipped(path, 100):
        assert files.newest(saved).step == 5
        assert files.newest(saved, skip_memory=True).step == 10


def test_pruning_reads_no_file(saved, checkpoint):
    """It is in the way of the training after every save."""
    with flipped(checkpoint / "config.json", 9):
        assert files.prune(saved, keep_last=2, keep_every=None) == []
        assert files.damage_of(checkpoint, content=False) is None


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "null",
        "[" * 100_000,
        '{"files": ["a"]}',
        '{"files": {}}',
        '{"files": {"state.json": "12"}}',
        '{"files": {"../state.json": 12}}',
        '{"files": {"/etc/passwd": 12}}',
        '{"files": {"state.json": 12}, "digests": {}, "digest": ""}',
        '{"files": {"state.json": 12}, "digests": null, "digest": ""}',
        '{"files": {"state.json": 12}, "digests": {"state.json": "00"}, "digest": "00"}',
        '{"files": {"state.json": 12}, "digests": {"state.json": "00"}}',
        '{"files": {"state.json": 12}, "digeste": {}}',
    ],
    ids=lambda content: content[:50],
)
def test_a_malformed_marker_is_one_sentence_and_not_whole(tmp_path, caplog, content):
    for step in (5, 10):
        path = tmp_path / f"step_{step:06d}"
        path.mkdir()
        files.write_state(path, {"step": step}, 0, {})
        files.mark_complete(path)
    (path / MARKER).write_text(content)
    assert files.newest(tmp_path).step == 5
    assert f"{path / MARKER} cannot be read (" in caplog.text


def test_a_checkpoint_of_a_release_without_digests_is_read(saved, checkpoint, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "old") / checkpoint.name
    marker = json.loads((copy / MARKER).read_text())
    (copy / MARKER).write_text(json.dumps({"files": marker["files"]}, indent=1))
    assert files.newest(copy.parent).step == 10 and not found_by_ranks(copy)
    (copy / "common.pt").write_bytes(b"")
    assert files.newest(copy.parent).step == 5


def test_a_conversion_checks_what_it_reads(checkpoint, tmp_path):
    from meds_megatron.weights.conversion.convert import to_hf

    weights, optimizer = (sorted(checkpoint.glob(f"*_{part}_*.distcp"))[0] for part in ("model", "optimizer"))
    for path in (weights, checkpoint / "config.json", checkpoint / ".metadata", checkpoint / "common.pt"):
        with flipped(path, 8 * (path.stat().st_size // 2)), pytest.raises(UserError) as caught:
            to_hf(checkpoint, tmp_path / "refused")
        assert str(caught.value).startswith(f"{path} is altered"), path
    with flipped(optimizer, 800):
        to_hf(checkpoint, tmp_path / "converted")


def test_an_evaluation_passes_over_an_altered_checkpoint(saved, checkpoint, tmp_path, capsys):
    from meds_megatron.evaluation.models import find_model

    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoints")
    save_config(Config(), run / "config.yaml")
    assert find_model(str(run)).path.name == "step_000010"
    with flipped(run / "checkpoints" / checkpoint.name / "config.json", 100):
        assert find_model(str(run)).path.name == "step_000005"
    assert "step_000010/config.json is altered" in capsys.readouterr().err

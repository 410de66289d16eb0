"""Checkpoints and a power cut: what the marker names is on disk before the marker is."""

import os
from pathlib import Path

import pytest

from meds_megatron.run import checkpoint_files as files


def test_every_file_and_folder_is_synced_before_the_marker_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step_000005"
    (path / "memory").mkdir(parents=True)
    (path / "memory" / "shard").write_bytes(b"12345")
    (path / "model.distcp").write_bytes(b"12345")
    files.write_state(path, {"step": 5}, 0, {"tensor": 2})
    content = {path, *path.rglob("*")}
    calls: list[Path | str] = []
    """Paths that were synced, and MARKER where it was renamed."""
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        replace(source, target)
        calls.append(target.name)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    files.mark_complete(path)

    renamed = calls.index(files.MARKER)
    assert content <= set(calls[:renamed])
    # The marker itself, under the hidden name that it has until it is renamed.
    assert any(str(name).startswith(str(path / f".{files.MARKER}.")) for name in calls[:renamed])
    assert {path, path.parent} <= set(calls[renamed:])

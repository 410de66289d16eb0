"""Files that appear whole or not at all."""

import os

import pytest

from meds_megatron import atomic


def test_a_file_has_its_name_when_all_of_it_is_on_disk(tmp_path, monkeypatch):
    path, calls = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with atomic.open_atomic(path) as file:
        file.write("text")
        assert not path.exists()
    written, folder = calls
    assert os.path.basename(written).startswith(".file.") and folder == str(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_text() == "text"


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    atomic.write_text(path, "before")
    with pytest.raises(type(error)), atomic.open_atomic(path, "wb") as file:
        file.write(b"half of it")
        raise error
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_text() == "before"


def test_a_directory_replaces_an_older_one(tmp_path):
    for name in ("draft", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of_{name}").write_text("")
    atomic.publish_directory(tmp_path / "draft", tmp_path / "final")
    assert [str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")] == ["final", "final/of_draft"]

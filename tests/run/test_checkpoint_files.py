import json

import pytest

from meds_megatron.errors import UserError
from meds_megatron.run import checkpoint_files as files


def make(directory, step: int, complete: bool = True, format: int | None = None):
    path = directory / f"step_{step:06d}"
    (path / "memory").mkdir(parents=True)
    (path / "memory" / "shard").write_bytes(b"12345")
    files.write_state(path, {"step": step}, 0, {"tensor": 2})
    if format is not None:
        content = json.loads((path / files.STATE_FILE).read_text())
        (path / files.STATE_FILE).write_text(json.dumps(content | {"format": format}))
    if complete:
        files.mark_complete(path)
    return path


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    assert files.newest(tmp_path / "none") is None
    make(tmp_path, 5)
    make(tmp_path, 1000000)
    make(tmp_path, 1000005, complete=False)
    (tmp_path / "step_by_step").mkdir()
    found = files.newest(tmp_path)
    assert (found.step, found.layout, found.state) == (1000000, {"tensor": 2}, {"step": 1000000, "policy_version": 0})


def zero(path):
    """Zeros, as a file system may leave them in a file whose blocks were lost."""
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda path: (path / "memory" / "shard").unlink(), "shard is missing"),
        (lambda path: (path / "memory" / "shard").write_bytes(b"123"), "shard has 3 bytes, expected 5"),
        (lambda path: (path / files.MARKER).write_text("{"), "complete.json cannot be read"),
        (lambda path: (path / files.MARKER).write_text("[]"), "complete.json cannot be read"),
        (lambda path: zero(path / files.STATE_FILE), "state.json is altered"),
    ],
    ids=["missing", "cut short", "torn marker", "foreign marker", "zeroed"],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, caplog, damage, word):
    make(tmp_path, 5)
    damage(make(tmp_path, 10))
    assert files.newest(tmp_path).step == 5
    assert word in caplog.text and "step_000010" in caplog.text


def test_only_damaged_checkpoints_are_not_the_same_as_none(tmp_path):
    zero(make(tmp_path, 5) / files.MARKER)
    (make(tmp_path, 10) / "memory" / "shard").unlink()
    assert files.any_completed(tmp_path) and not files.any_completed(tmp_path / "none")
    with pytest.raises(UserError, match=r"no checkpoint is whole, and the newest is damaged .*step_000010"):
        files.newest(tmp_path)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    make(tmp_path, 5, format=99)
    with pytest.raises(UserError, match="format 99, expected 1"):
        files.newest(tmp_path)


@pytest.mark.parametrize("version", [None, "7", True])
def test_a_state_without_the_policys_version_is_refused(tmp_path, version):
    checkpoint = files.Checkpoint(tmp_path, 3, {}, {"step": 3, "policy_version": version})
    with pytest.raises(UserError, match=r"state\.json: policy_version is .*, expected a number"):
        _ = checkpoint.policy_version


def test_pruning_keeps_the_newest_and_every_nth(tmp_path):
    for step in range(2, 14, 2):
        make(tmp_path, step)
    make(tmp_path, 14, complete=False)
    removed = files.prune(tmp_path, keep_last=2, keep_every=4)
    assert [path.name for path in removed] == ["step_000002", "step_000006"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_0000{step:02d}" for step in (4, 8, 10, 12, 14)]
    assert files.prune(tmp_path, keep_last=2, keep_every=None) == [tmp_path / "step_000004", tmp_path / "step_000008"]


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    for step in (2, 4, 6, 8, 10):
        path = make(tmp_path, step)
        if step in (4, 8):
            (path / "memory" / "shard").unlink()
    assert files.prune(tmp_path, keep_last=3, keep_every=None) == []
    removed = files.prune(tmp_path, keep_last=2, keep_every=None)
    assert [path.name for path in removed] == ["step_000002", "step_000004"]
    assert files.newest(tmp_path).step == 10


def test_a_removal_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch):
    path = make(tmp_path, 5)
    monkeypatch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: None)
    files.remove(path)
    assert path.exists() and files.newest(tmp_path) is None


def test_what_interrupted_saves_left_is_removed(tmp_path):
    make(tmp_path, 5)
    make(tmp_path, 10, complete=False)
    files.remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000005"]

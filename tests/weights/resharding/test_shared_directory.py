"""Directories in shared memory belong to living processes: those of killed ones are removed, others never."""

import subprocess
import sys
from pathlib import Path

import pytest

from meds_megatron.shared_memory import PREFIX, claim, list_files, remove, remove_unclaimed

OWNER = """
import sys, threading
from pathlib import Path
from meds_megatron.shared_memory import claim, list_files
directory = Path(sys.argv[1])
descriptor = claim(directory)
(directory / "bucket").write_text("weights")
listed = directory.parent / f"psm_{sys.argv[2]}"
listed.write_text("ring buffer")
list_files(directory, [listed])
print("claimed", flush=True)
threading.Event().wait()
"""


@pytest.fixture
def owner():
    """Starts a process that claims a directory and lists a file next to it."""
    started = []

    def start(directory: Path, name: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(directory), name], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "claimed\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.usefixtures("processes")
def test_what_a_killed_process_left_is_removed_and_what_a_running_one_has_stays(tmp_path, owner):
    (tmp_path / "psm_stranger").write_text("of another program")
    dead = owner(tmp_path / f"{PREFIX}dead", "dead")
    owner(tmp_path / f"{PREFIX}alive", "alive")
    assert remove_unclaimed(tmp_path) == []
    dead.kill()
    dead.wait()
    assert remove_unclaimed(tmp_path) == [tmp_path / f"{PREFIX}dead"]
    assert names(tmp_path) == {"psm_stranger", f"{PREFIX}alive", "psm_alive"}


@pytest.mark.usefixtures("processes")
def test_a_directory_of_several_processes_stays_until_the_last_has_ended(tmp_path, owner):
    shared = tmp_path / f"{PREFIX}weights"
    first, second = owner(shared, "first"), owner(shared, "second")
    first.kill()
    first.wait()
    assert remove_unclaimed(tmp_path) == []
    second.kill()
    second.wait()
    assert remove_unclaimed(tmp_path) == [shared] and not names(tmp_path)


def test_a_removed_directory_can_be_claimed_again(tmp_path):
    directory = tmp_path / f"{PREFIX}weights"
    claim(directory)
    remove(directory)
    claim(directory)
    assert directory.is_dir() and remove_unclaimed(tmp_path) == []


def test_listed_files_that_are_gone_are_no_error(tmp_path):
    directory = tmp_path / f"{PREFIX}engine"
    claim(directory)
    list_files(directory, [tmp_path / "psm_gone"])
    remove(directory)
    assert not names(tmp_path)


def test_a_missing_parent_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        claim(tmp_path / "missing" / f"{PREFIX}weights")

"""The directory of a Ray that a run starts, without Ray: who can enter it, how long it may be named, who removes it."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from meds_megatron.cluster import ray_directory
from meds_megatron.cluster.ray_directory import LONGEST_SOCKET, base_directory, longest_base, write_token
from meds_megatron.cluster.slurm import node
from meds_megatron.cluster.slurm.environment import SlurmJob
from meds_megatron.errors import UserError

LONGEST_SESSION = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Longest session path: that of Ray's process with the highest number that Linux gives."""
NAME = "meds-ray-01234567"
KILLED = """
import os, signal
from meds_megatron.cluster.ray_directory import ray_directory
with ray_directory() as directory:
    print(directory, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """TMPDIR, short enough for Ray, of the test's own."""
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_only_the_user_can_read_a_token_and_enter_its_directory(temporary, open_umask):
    with ray_directory.ray_directory() as directory:
        assert directory.parent == temporary
        assert directory.stat().st_mode & 0o777 == 0o700
        (token,) = directory.iterdir()
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)
        assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ and not list(temporary.iterdir())


def test_a_token_is_not_written_into_a_file_that_somebody_has_open(tmp_path):
    (tmp_path / "token").touch()
    with pytest.raises(FileExistsError):
        write_token(tmp_path, "secret")


def test_every_run_has_a_token_of_its_own(temporary):
    with ray_directory.ray_directory() as first, ray_directory.ray_directory() as second:
        assert (first / "token").read_text() != (second / "token").read_text()


@pytest.mark.usefixtures("processes")
def test_what_a_killed_run_left_is_removed_by_the_next_and_what_a_live_one_has_stays(temporary):
    (temporary / "meds-17.0").mkdir()  # Of a Slurm job.
    with ray_directory.ray_directory() as live:
        killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
        assert Path(killed.stdout.strip()).is_dir(), killed.stderr
        with ray_directory.ray_directory() as directory:
            assert {path.name for path in temporary.iterdir()} == {"meds-17.0", live.name, directory.name}


@pytest.mark.parametrize("spare", [0, -1])
def test_a_directory_too_long_for_a_socket_is_not_used(monkeypatch, caplog, spare):
    base = "/" + "x" * (longest_base(NAME) - spare - 1)
    assert len(f"{base}/{NAME}/ray/{LONGEST_SESSION}") == LONGEST_SOCKET - spare
    monkeypatch.setattr(tempfile, "tempdir", base)
    with caplog.at_level(logging.WARNING):
        found = base_directory(NAME)
    if spare == 0:
        assert found == Path(base) and not caplog.messages
    else:
        assert found == Path("/tmp")
        assert caplog.messages == [
            f"TMPDIR={base} is too long for the paths of Ray's sockets, by 1 characters: Ray's temporary files are in "
            "/tmp"
        ]


def test_a_directory_that_cannot_be_made_is_named(temporary, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "no"))
    message = r"no/meds-ray-\w+ cannot be made .*No such file or directory.*set TMPDIR"
    with pytest.raises(UserError, match=message), ray_directory.ray_directory():
        pass


def test_a_slurm_jobs_directory_is_as_closed_and_as_short(temporary, open_umask):
    job = SlurmJob("123456789", "meds", 1, 99, None)
    directory = node.make_directory(job)
    assert directory.parent == temporary and directory.stat().st_mode & 0o777 == 0o700
    token = Path(node.environment(directory, "secret")["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() == "secret"
    assert len(f"{'/' + 'x' * (longest_base(directory.name) - 1)}/{directory.name}/ray/{LONGEST_SESSION}") == 107

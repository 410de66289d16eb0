"""A process that has lost the lock of its run directory changes nothing there any more."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from meds_megatron.errors import UserError
from meds_megatron.run.directory import RunDirectory
from meds_megatron.trainer.main import report
from tests.run.lock_owner import Owner, config_of

pytestmark = pytest.mark.usefixtures("processes")


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@dataclass
class Superseded:
    """A process's `first` owner that has lost the lock to `second`, which continued the run."""

    first: Owner
    second: Owner


@pytest.fixture
def superseded(tmp_path) -> Iterator[Superseded]:
    config = config_of(tmp_path)
    with ExitStack() as second_stack, ExitStack() as first_stack:
        first = Owner(first_stack.enter_context(RunDirectory(tmp_path).claim(config)), config, "first")
        first.step(1)
        first.step(2)
        # As if it had not been renewed for longer than the lease; nothing tells the first owner.
        (tmp_path / "lock").unlink()
        second = Owner(second_stack.enter_context(RunDirectory(tmp_path).claim(config)), config, "second")
        second.rewind(1)
        for step in (2, 3, 4):
            second.step(step)
        yield Superseded(first, second)


@pytest.mark.parametrize("write", ["metrics", "rollouts", "checkpoint", "last", "complete", "rewind"])
def test_no_write_of_a_process_that_lost_the_lock_comes_through(superseded, tmp_path, write):
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"lock was lost \(process \d+ on .* has it\): another process may train"):
        getattr(superseded.first, write)(2)
    assert contents(tmp_path) == before


def test_a_save_that_was_under_way_touches_no_file_of_the_one_after_it(superseded, tmp_path):
    """Its ranks were stopped with it and continue where they were, before anyone asks for the lock."""
    before = contents(tmp_path)
    ranks = superseded.first.ranks
    with pytest.raises(FileNotFoundError):
        ranks.finish_save()
    # Not even when they make the directory that the second owner has removed.
    ranks.begin_save(str(ranks._directory))
    ranks.finish_save()
    written = {path: content for path, content in contents(tmp_path).items() if before.get(path) != content}
    assert {path.relative_to(tmp_path).parts[1] for path in written} == {ranks._directory.name}
    superseded.second.rewind(4)
    assert not any(path.exists() for path in written)


def test_a_process_that_lost_the_lock_leaves_what_it_has_not_written_when_it_ends(tmp_path):
    """Before the first line of metrics the end of a claim frees the run's name."""
    config = config_of(tmp_path)
    with ExitStack() as second, ExitStack() as first:
        first.enter_context(RunDirectory(tmp_path).claim(config))
        (tmp_path / "lock").unlink()
        run = second.enter_context(RunDirectory(tmp_path).claim(config))
        before = contents(tmp_path)
        first.close()
        assert contents(tmp_path) == before
        assert run.rollouts.exists()


def test_a_process_that_lost_the_lock_writes_no_report(superseded, tmp_path, capsys):
    report(superseded.first.run)
    assert not (tmp_path / "report.html").exists()
    assert "there is no report of the run" in capsys.readouterr().err


def test_a_lock_that_is_gone_is_lost_and_one_that_is_away_for_an_instant_is_not(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    with RunDirectory(tmp_path).claim(config) as run:
        lock, aside = tmp_path / "lock", tmp_path / "aside"

        def put_back() -> None:
            if aside.exists():
                aside.rename(lock)

        lock.rename(aside)
        # A contender puts it back while the check looks again.
        monkeypatch.setattr("meds_megatron.run.lock.time.sleep", lambda _: put_back())
        run.check_lock()
        lock.rename(aside)
        monkeypatch.setattr("meds_megatron.run.lock.time.sleep", lambda _: None)
        with pytest.raises(UserError, match=r"lock was lost \(the file is gone\)"):
            run.check_lock()
        aside.rename(lock)


HOST = ["unshare", "--uts", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
"""Gives a process a host name of its own."""


class OwnerProcess:
    """tests/run/lock_owner.py in a process, on a host named `host`."""

    def __init__(self, directory: Path, host: str):
        program = [*HOST, "sh", "-c", f'hostname {host} && exec "$@"', "sh"]
        program += [sys.executable, "-m", "tests.run.lock_owner", str(directory)]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> str:
        return self._process.stdout.readline().rstrip("\n")

    def ask(self, command: str) -> str:
        print(command, file=self._process.stdin, flush=True)
        return self.answer()

    def freeze(self) -> None:
        """Returns when it is stopped."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def wake(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> int:
        """The exit code, once its input has ended."""
        self._process.communicate(timeout=60)
        return self._process.returncode

    def __enter__(self) -> "OwnerProcess":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()


def test_a_process_that_was_frozen_for_longer_than_the_lease_finds_another_one_and_leaves_its_files(tmp_path):
    tried = subprocess.run([*HOST, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no host name of its own for a process: {tried.stderr.strip()}")
    with ExitStack() as stack:
        first = stack.enter_context(OwnerProcess(tmp_path, "red"))
        assert first.answer() == "claimed"
        assert [first.ask(f"step {step}") for step in (1, 2, 3)] == 3 * ["done"]
        first.freeze()
        second = stack.enter_context(OwnerProcess(tmp_path, "blue"))
        # Step 3's checkpoint was under way.
        assert second.answer() == "claimed"
        assert [second.ask(f"step {step}") for step in (3, 4, 5)] == 3 * ["done"]
        before = contents(tmp_path)
        first.wake()
        for command in ("metrics 4", "rollouts 4", "checkpoint 4", "rewind 2", "complete 4"):
            assert f"lock was lost (process {second.pid} on blue has it)" in first.ask(command)
        assert contents(tmp_path) == before
        assert first.end() == 0
        assert contents(tmp_path) == before
        assert second.ask("complete 5") == "done"
        assert second.end() == 0
    owners = {path.parent.name: path.read_text() for path in tmp_path.glob("checkpoints/*/second")}
    assert owners == {"step_000003": "blue", "step_000004": "blue", "step_000005": "blue"}
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_an_empty_lock_is_taken_over_when_it_is_older_than_the_lease(tmp_path):
    """A crash of the machine before the claim was on disk leaves one."""
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    with RunDirectory(tmp_path).claim(config_of(tmp_path)) as run:
        run.check_lock()


def test_an_empty_lock_that_is_young_is_one_sentence(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    sentence = f"{lock} is empty: another process is about to train in this run directory, or one was lost with its"
    with pytest.raises(UserError, match=sentence), RunDirectory(tmp_path).claim(config_of(tmp_path)):
        pass
    assert lock.read_bytes() == b""

"""A grader that is frozen while it judges: it is named, killed and replaced, and the run continues."""

import logging
import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest

from meds_megatron.faults.supervision import Supervisor
from meds_megatron.faults.watchdog import Watchdog
from meds_megatron.reward.grading import GraderPool
from meds_megatron.run.timer import PhaseTimer
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def graders():
    """One grader, which has started, with a limit of its own of 20 minutes."""
    with GraderPool(workers=1, timeout_seconds=300) as pool:
        assert pool.grade([r"\boxed{1 + x}"], ["x + 1"])[0].correct
        yield pool


def frozen(graders: GraderPool) -> tuple[int, object]:
    """Its process id, and the future of an answer that it got when it was stopped."""
    (process,) = graders.pids
    os.kill(process, signal.SIGSTOP)
    future = graders.submit(r"\boxed{2 + x}", "x + 2")
    deadline = time.monotonic() + HANG_SECONDS
    while not any(one.since for one in graders._processes.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process, future


def test_a_frozen_grader_is_named_killed_and_replaced(graders, tmp_path, caplog):
    process, future = frozen(graders)
    timer, pool = PhaseTimer(), SimpleNamespace(finished_requests=0, engines=[])
    with Supervisor(str(tmp_path)) as supervisor, Watchdog(0.05, supervisor, timer, pool, graders), timer("reward"):
        grade = future.result(HANG_SECONDS)
    assert (grade.outcome, grade.correct) == ("error", False)
    (sentence,) = [message for message in caplog.messages if "grader" in message]
    assert sentence.startswith(f"a grader is replaced: it does not answer (process {process} on ")
    assert ", stopped): nothing has progressed for 0.05 minutes (faults.hang_minutes) in phase reward" in sentence
    assert graders.grade([r"\boxed{2 + x}"], ["x + 2"])[0].correct and graders.pids != [process]


def test_graders_that_are_idle_or_not_late_are_left_alone(graders, caplog):
    with caplog.at_level(logging.INFO):
        assert graders.kill_hung(0.0) == []
        process, future = frozen(graders)
        assert graders.kill_hung(HANG_SECONDS) == []
        psutil.Process(process).resume()
        assert future.result(HANG_SECONDS).correct
    assert graders.pids == [process]


def test_a_verdict_is_progress(graders):
    before = graders.verdicts
    graders.grade([r"\boxed{3 + x}", r"\boxed{x + 3}"], ["x + 3", "3 + x"])
    assert graders.verdicts == before + 2

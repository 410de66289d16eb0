"""Signals that stop a run, in a process of its own."""

import signal
import subprocess
import sys
import time

import pytest

from meds_megatron.faults.interruption import SAME_SECONDS, Interruption
from tests.limits import HANG_SECONDS

PROGRAM = """
import concurrent.futures, sys, threading, time
from meds_megatron.errors import Stopped
from meds_megatron.faults.interruption import Interruption
with Interruption() as interruption:
    interruption.check()
    print("ready", flush=True)
    concurrent.futures.wait([interruption.requested])
    try:
        interruption.check()
    except Stopped as stop:
        print(stop, stop.exit_code, flush=True)
    if sys.argv[1:] == ["stay"]:
        threading.Event().wait()
sys.exit(interruption.exit_code)
"""


def started(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_completes_the_future_and_gives_the_exit_code(number, code):
    process = started()
    process.send_signal(number)
    output, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code
    assert output == f"{number.name} stopped the run {code}\n"
    assert f"{number.name}: the run stops before its next update" in errors


@pytest.mark.usefixtures("processes")
def test_a_second_signal_ends_the_process_at_once():
    process = started("stay")
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in process.stdout.readline()
    # What follows at once is the same request: a scheduler may signal both the process and its group.
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130 and "SIGINT again: ended at once" in errors


def test_the_handlers_before_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

"""Logging of a process, in a process of its own."""

import signal
import subprocess
import sys

import pytest

from meds_megatron.logs import STACKS_SIGNAL, last_log_line
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("processes")

LOGGED = """
import logging, sys
from meds_megatron.logs import configure_process_logging
configure_process_logging(sys.argv[1], "rank00003")
logger = logging.getLogger("meds_megatron.actor.worker")
logger.debug("not kept")
logger.info("model loaded")
logger.warning("engine 1 is gone")
"""


def run(directory, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, timeout=HANG_SECONDS
    )


def test_lines_name_the_process_and_only_warnings_reach_the_terminal(tmp_path):
    done = run(tmp_path, LOGGED)
    lines = (tmp_path / "logs" / "rank00003.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO    rank00003 meds_megatron.actor.worker: model loaded",
        "WARNING rank00003 meds_megatron.actor.worker: engine 1 is gone",
    ]
    assert "engine 1 is gone" in done.stderr and "model loaded" not in done.stderr


def test_a_process_that_a_signal_ends_leaves_its_stack(tmp_path):
    done = run(tmp_path, LOGGED + "import os\ndef stuck(): os.abort()\nstuck()\n")
    assert done.returncode == -signal.SIGABRT
    text = (tmp_path / "logs" / "rank00003.log").read_text()
    assert "Fatal Python error: Aborted" in text and "in stuck" in text


def test_a_restarted_process_appends(tmp_path):
    run(tmp_path, LOGGED)
    run(tmp_path, LOGGED)
    assert (tmp_path / "logs" / "rank00003.log").read_text().count("model loaded") == 2


DRIVER = """
import faulthandler, logging, sys
from meds_megatron.logs import process_logging
root = logging.getLogger()
root.addHandler(before := logging.NullHandler())
root.setLevel(logging.ERROR)
shown = []
terminal = logging.Handler()
terminal.emit = lambda record: shown.append(record.getMessage())
try:
    with process_logging(sys.argv[1], "driver", terminal):
        logging.getLogger("meds").info("only in the file")
        logging.getLogger("meds").warning("on the terminal too")
        raise ValueError("out of memory")
except ValueError:
    pass
assert shown == ["on the terminal too"], shown
assert (root.handlers, root.level, faulthandler.is_enabled()) == ([before], logging.ERROR, False)
"""


def test_the_error_that_ends_a_run_is_in_its_log_and_the_callers_logging_is_restored(tmp_path):
    done = run(tmp_path, DRIVER)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "logs" / "driver.log").read_text()
    assert "only in the file" in text and "ValueError: out of memory" in text and "Traceback" in text


def test_without_a_run_directory_there_is_no_file(tmp_path):
    done = run(tmp_path / "none", LOGGED)
    assert done.returncode == 0 and not (tmp_path / "none").exists()


def test_a_log_on_a_full_disk_ends_with_one_line(tmp_path):
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
    done = run(tmp_path, limited + LOGGED + "logger.info('again')\nprint('goes on')\n")
    assert done.stdout == "goes on\n" and done.returncode == 0
    assert done.stderr.count("rank00003.log cannot be written (File too large): the log ends here") == 1
    assert "Traceback" not in done.stderr


def test_last_words_are_the_last_record_or_the_fatal_signal_after_it(tmp_path):
    assert last_log_line(tmp_path, "rank00003") == ""
    run(tmp_path, LOGGED + "logging.getLogger().info('two\\nlines')\n")
    assert last_log_line(tmp_path, "rank00003") == "root: two"
    run(tmp_path, LOGGED + "import os\nos.abort()\n")
    assert last_log_line(tmp_path, "rank00003") == "Fatal Python error: Aborted"
    run(tmp_path, LOGGED)
    assert last_log_line(tmp_path, "rank00003") == "meds_megatron.actor.worker: engine 1 is gone"


def test_a_signal_writes_the_stacks_of_all_threads_and_the_process_goes_on(tmp_path):
    waiting = "import threading\ndef stuck():\n    threading.Event().wait(1)\n"
    waiting += "threading.Thread(target=stuck).start()\nimport os\n"
    done = run(tmp_path, LOGGED + waiting + f"os.kill(os.getpid(), {int(STACKS_SIGNAL)})\nprint('still here')\n")
    assert done.returncode == 0 and "still here" in done.stdout
    assert " in stuck\n" in (tmp_path / "logs" / "rank00003.log").read_text()


def test_a_process_without_a_log_survives_the_signal_too(tmp_path):
    done = run(tmp_path / "none", LOGGED + f"import os\nos.kill(os.getpid(), {int(STACKS_SIGNAL)})\n")
    assert done.returncode == 0 and "most recent call first" in done.stderr

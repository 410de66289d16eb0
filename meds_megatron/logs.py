"""Logging of a run's processes: one file each under the run's `logs/`, warnings on the terminal as well."""

import faulthandler
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

FORMAT = "%(asctime)s %(levelname)-7s {process} %(name)s: %(message)s"
STACKS_SIGNAL = signal.SIGUSR2
"""Signal that makes a process write the stacks of all its threads into its log."""
LONGEST_LAST_WORDS = 200


def configure_process_logging(run_dir: str | Path, process: str, terminal: logging.Handler | None = None) -> None:
    """Logs this process to `run_dir`/logs/`process`.log from INFO on, and the stack of a fatal signal (a segmentation
    fault or an abort) and, at STACKS_SIGNAL, of all threads as well.

    `process` is its role and number (`rank00003`, `engine000`) and stands in every line. `terminal` shows warnings
    (default: standard error, which Ray forwards to the driver). There is no file where the run directory does not
    exist: in tests and benchmarks, and on nodes that do not share the driver's file system.
    """
    formatter = logging.Formatter(FORMAT.format(process=process))
    if terminal is None:
        terminal = logging.StreamHandler()
        terminal.setFormatter(formatter)
    terminal.setLevel(logging.WARNING)
    handlers = [terminal]
    stacks: TextIO = sys.stderr
    if Path(run_dir).is_dir():
        path = log_file(run_dir, process)
        path.parent.mkdir(exist_ok=True)
        file = _LogFile(path)
        file.setFormatter(formatter)
        assert file.stream is not None
        stacks = file.stream
        faulthandler.enable(stacks)
        handlers.append(file)
    # Also without a log: the default action of the signal ends the process.
    faulthandler.register(STACKS_SIGNAL, stacks, chain=False)
    root = logging.getLogger()
    root.handlers = handlers
    root.setLevel(logging.INFO)


class _LogFile(logging.FileHandler):
    """A log file that ends, with one warning on standard error, when it cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            return super().handleError(record)
        logging.getLogger().removeHandler(self)
        print(f"{self.baseFilename} cannot be written ({error.strerror}): the log ends here", file=sys.stderr)


@contextmanager
def process_logging(run_dir: str | Path, process: str, terminal: logging.Handler) -> Iterator[None]:
    """`configure_process_logging` for as long as the block lasts; an exception that ends it is in the file."""
    root = logging.getLogger()
    handlers, level, dumps_stacks = root.handlers, root.level, faulthandler.is_enabled()
    configure_process_logging(run_dir, process, terminal)
    try:
        yield
    except BaseException:
        # INFO: the terminal has its own account of the error.
        logger.info("the run ended with an error", exc_info=True)
        raise
    finally:
        faulthandler.disable()
        faulthandler.unregister(STACKS_SIGNAL)
        for handler in root.handlers:
            handler.close()
        root.handlers, root.level = handlers, level
        if dumps_stacks:
            faulthandler.enable()


def log_file(run_dir: str | Path, process: str) -> Path:
    return Path(run_dir) / "logs" / f"{process}.log"


def last_log_line(run_dir: str | Path, process: str) -> str:
    """Fatal signal of `process` if its log has one after its last record, else the last record; "" without a log."""
    path = log_file(run_dir, process)
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        found = line.startswith("Fatal Python error") or f" {process} " in line
        if found:
            return line.partition(f" {process} ")[2][:LONGEST_LAST_WORDS] or line[:LONGEST_LAST_WORDS]
    return ""

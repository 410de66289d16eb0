"""Logging of a run's processes: one file each under the run's `logs/`, warnings on the terminal as well."""

import faulthandler
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

FORMAT = "%(asctime)s %(levelname)-7s {process} %(name)s: %(message)s"


def configure_process_logging(run_dir: str | Path, process: str, terminal: logging.Handler | None = None) -> None:
    """Logs this process to `run_dir`/logs/`process`.log from INFO on, and the stack of a fatal signal (a segmentation
    fault or an abort) as well.

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
    if Path(run_dir).is_dir():
        path = log_file(run_dir, process)
        path.parent.mkdir(exist_ok=True)
        file = logging.FileHandler(path)
        file.setFormatter(formatter)
        faulthandler.enable(file.stream)
        handlers.append(file)
    root = logging.getLogger()
    root.handlers = handlers
    root.setLevel(logging.INFO)


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
        for handler in root.handlers:
            handler.close()
        root.handlers, root.level = handlers, level
        if dumps_stacks:
            faulthandler.enable()


def log_file(run_dir: str | Path, process: str) -> Path:
    return Path(run_dir) / "logs" / f"{process}.log"

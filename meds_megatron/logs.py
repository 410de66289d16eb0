"""Logging of a run's processes: one file each under the run's `logs/`, warnings on the terminal as well."""

import faulthandler
import logging
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)-7s {process} %(name)s: %(message)s"


def configure_process_logging(run_dir: str | Path, process: str, terminal: logging.Handler | None = None) -> None:
    """Logs this process to `run_dir`/logs/`process`.log from INFO on, with a stack trace should a signal end it.

    `process` is its role and number (`rank00003`, `engine000`) and stands in every line. `terminal` shows warnings
    (default: standard error, which Ray forwards to the driver). Without a run directory, as in tests and benchmarks,
    there is no file.
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
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


def log_file(run_dir: str | Path, process: str) -> Path:
    return Path(run_dir) / "logs" / f"{process}.log"

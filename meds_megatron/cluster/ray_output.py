"""Output of Ray's own processes, which Ray prints on the driver's terminal, moved to the driver's log."""

import logging
from functools import cache, partial
from typing import Any

logger = logging.getLogger("ray_output")


@cache
def redirect_ray_output() -> None:
    """Keeps only the lines of the run's actors, their warnings, on the terminal. What Ray's own processes print about a
    death comes before the run's sentence about it, and is many lines of no use without Ray's source.

    Ray has no setting for it: `log_to_driver` is for the actors' lines alone.
    """
    import ray._private.worker

    ray._private.worker.print_worker_logs = partial(_print_or_log, ray._private.worker.print_worker_logs)


def _print_or_log(print_lines: Any, data: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
    """`data` is Ray's record of some lines: `pid` is a number for an actor or task, else the name of a part of Ray."""
    if str(data.get("pid")).isdigit():
        print_lines(data, *arguments, **keywords)
    elif data.get("pid") != "autoscaler":  # It reports every few seconds that there is nothing to do.
        for line in data.get("lines", []):
            logger.info("(%s) %s", data.get("pid"), line)

"""Errors that end a command, and the exit codes of its process. Standard library only."""

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75
"""Exit code of a run that has saved its state and is to be started again (EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake of the user, described in one sentence: the command line prints it without a traceback."""


class RunFailed(Exception):
    """A failure of the machines that a run is on, in one sentence: the same run may succeed when it is tried again."""


class Stopped(Exception):
    """The run ended on request before its last step; one sentence says what was saved."""

    def __init__(self, sentence: str, exit_code: int):
        super().__init__(sentence)
        self.exit_code = exit_code


class RayletDied(RunFailed):
    """The raylet of the driver's machine has ended: Ray ends the driver when it next stores or fetches an object."""


class RayDied(Stopped):
    """Processes of Ray itself have ended; one sentence says which, and what was saved before the run stopped."""

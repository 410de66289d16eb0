"""The directory of the Ray that a run starts on this machine: its temporary files, and the token that lets into it.

Ray makes its own directories and its token as readable and writable as the system lets any file be, so they are in a
directory that only the user can enter.
"""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meds_megatron.errors import UserError
from meds_megatron.shared_memory import claim, remove_unclaimed

PREFIX = "meds-ray-"
LONGEST_SOCKET = 107
"""Characters of the path of a Unix socket, by the kernel."""
OF_RAY = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
TOKEN_VARIABLE = "RAY_AUTH_TOKEN_PATH"

logger = logging.getLogger(__name__)


@contextmanager
def ray_directory() -> Iterator[Path]:
    """A new directory with a token, which Ray finds through the environment; it is removed when the block ends, or by
    the next run of the user where a killed one leaves it."""
    from ray._raylet import AuthenticationTokenLoader

    name = PREFIX + secrets.token_hex(4)
    base = base_directory(name)
    remove_unclaimed(base, PREFIX)
    directory, before = base / name, os.environ.get(TOKEN_VARIABLE)
    try:
        lock = claim(directory)
        os.environ[TOKEN_VARIABLE] = str(write_token(directory, secrets.token_hex(32)))
    except OSError as error:
        raise UserError(
            f"{directory} cannot be made for Ray's temporary files ({error.strerror}): make space or access there, or "
            f"set TMPDIR to a directory whose path has at most {longest_base(name)} characters"
        ) from error
    # Drops the token that it has read for another cluster in this process.
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield directory
    finally:
        os.environ.pop(TOKEN_VARIABLE)
        if before is not None:
            os.environ[TOKEN_VARIABLE] = before
        AuthenticationTokenLoader.instance().reset_cache()
        # Ray's agents may still write their logs: what is left then is the next run's to remove.
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def base_directory(name: str) -> Path:
    """Parent of a directory `name` for Ray's temporary files: the user's choice (TMPDIR), or /tmp where the paths of
    Ray's sockets would be too long."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) <= longest_base(name):
        return base
    logger.warning(
        "TMPDIR=%s is too long for the paths of Ray's sockets, by %d characters: Ray's temporary files are in /tmp",
        base,
        len(str(base)) - longest_base(name),
    )
    return Path("/tmp")


def longest_base(name: str) -> int:
    """Characters that the path of a directory may have in which `name` is made for Ray."""
    return LONGEST_SOCKET - OF_RAY - len(f"/{name}")


def write_token(directory: Path, token: str) -> Path:
    """A new file that only the user can read, from its first moment on."""
    path = directory / "token"
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(token)
    return path

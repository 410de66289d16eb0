"""All tests, `python -m tests.all_tests`, in two processes of pytest side by side: whole runs, which wait for much, and
the tests that compute. On a machine with GPUs, which they would share, in one.

Arguments go to both; the output of the runs follows when the others have ended.
"""

import signal
import subprocess
import sys
import tempfile

from tests.devices import gpu_count

RUNS = "run or slurm"
"""Tiers of one process; the other has the rest."""


def main(arguments: list[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", *arguments]
    if gpu_count():
        return subprocess.call(pytest)
    with tempfile.TemporaryFile() as output:
        runs = subprocess.Popen([*pytest, "-m", RUNS], stdout=output, stderr=subprocess.STDOUT)
        others = subprocess.Popen([*pytest, "-m", f"not ({RUNS})"])
        try:
            codes = [others.wait(), runs.wait()]
        except KeyboardInterrupt:
            # The terminal has sent it to them, too.
            codes = [signal.SIGINT + 128, others.wait(), runs.wait()]
        output.seek(0)
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

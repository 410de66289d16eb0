#!/usr/bin/env bash
# Installs meds_megatron and what its tests need into .venv (the first time), and runs them. Arguments go to pytest:
# bash tools/test.sh tests/memory -k cluster. --fast runs the tests that start no process, --full every case. All tests
# are run by two processes of pytest (tests/all_tests.py).
# With --faults first it kills processes of runs at random moments instead, 36 times or as --kills says, and prints the
# counts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
set_up dev
if [ "${1:-}" = --faults ]; then
    exec .venv/bin/python -m tests.faults.campaign "${@:2}"
fi
if [ $# = 0 ] || [ "$*" = --full ]; then
    exec .venv/bin/python -m tests.all_tests "$@"
fi
exec .venv/bin/python -m pytest "$@"

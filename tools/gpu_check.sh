#!/usr/bin/env bash
# Installs meds_megatron into .venv (the first time) and checks what only GPUs can show, on those of this machine: parity
# with the CPU, speed, cost of fingerprints, weight updates, NCCL, and a short run. Prints a table; the exit status is 1 if
# a check fails. Without GPUs it makes those checks that a CPU can. `bash tools/test.sh` then runs the tests, on the GPUs
# where there are enough of them for a test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
set_up
exec .venv/bin/python -m meds_megatron.bench.gpu_check

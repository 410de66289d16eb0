#!/usr/bin/env bash
# Installs meds_megatron and what its tests need into .venv (the first time), and runs them. Arguments go to pytest:
# bash tools/test.sh tests/memory -k cluster
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
set_up dev
exec .venv/bin/python -m pytest "$@"

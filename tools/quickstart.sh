#!/usr/bin/env bash
# Installs meds_megatron into .venv (the first time) and trains: a small model, made on the spot, learns arithmetic with
# MEDS. Settings can be overridden: bash tools/quickstart.sh train.steps=20 penalty.target=none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
set_up

# Every run keeps its own directory.
[[ " $* " == *" name="* || " $* " == *" run_dir="* ]] || set -- "name=quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
exec .venv/bin/meds train configs/quickstart.yaml "$@"

#!/usr/bin/env bash
# Installs meds_megatron into .venv (the first time) and trains: a small model, made on the spot, learns arithmetic with
# MEDS. Settings can be overridden: bash tools/quickstart.sh train.steps=20 penalty.target=none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
set_up

# The quickstart has two trainer ranks; a single GPU holds one.
if [ "$(device)" = cuda ] && [ "$(nvidia-smi -L | wc -l)" = 1 ]; then
    set -- cluster.ranks_per_node=1 parallel.pipeline=1 "$@"
fi

# Every run keeps its own directory.
[[ " $* " == *" name="* || " $* " == *" run_dir="* ]] || set -- "name=quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
exec .venv/bin/meds train configs/quickstart.yaml "$@"

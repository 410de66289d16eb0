#!/usr/bin/env bash
# Writes constraints-cpu.txt: the versions of everything that pip chooses now for a CPU with the tests, in a new
# environment (minutes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
written="$CPU_VERSIONS"
VENV="$(mktemp --directory)"
trap 'rm --recursive "$VENV"' EXIT
CPU_VERSIONS=/dev/null
device() { echo cpu; }
set_up dev
{
    echo "# All versions of the CPU environment, as tools/lock.sh writes them and tools/setup.sh installs them."
    # The build of torch is chosen by tools/setup.sh.
    pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$//'
} > "$VENV/versions"
mv "$VENV/versions" "$written"

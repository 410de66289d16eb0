"""Run as a program: converts a directory both ways and prints by how many bytes each raised the peak of its memory.

The pages of mapped files count. Arguments: a small model to warm up with, the model, a directory to write into.
"""

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

from meds_megatron.weights.conversion.convert import to_hf, to_mcore
from meds_megatron.weights.conversion.verify import verify


def peak_of(work: Callable[[], object]) -> int:
    # What an earlier piece of work left free in the heap would hide what this one takes.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_memory()
    work()
    return _peak_memory() - before


def _peak_memory() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def convert(source: Path, out: Path) -> dict[str, int]:
    return {
        "to_mcore": peak_of(lambda: to_mcore(source, out / "checkpoint")),
        "to_hf": peak_of(lambda: to_hf(out / "checkpoint", out / "hf")),
        "verify": peak_of(lambda: verify(source, out / "checkpoint", text=None)),
    }


if __name__ == "__main__":
    small, source, out = map(Path, sys.argv[1:])
    # The first time also brings in code.
    convert(small, out / "small")
    print(json.dumps(convert(source, out / "large")))

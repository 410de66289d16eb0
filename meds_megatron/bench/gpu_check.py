"""Checks of what only GPUs can show, printed as a table: `bash tools/gpu_check.sh`, on a machine with one or more.

Each check is a function of the GPUs' number, and returns rows of the table; without GPUs (0) it does the same on the
CPU, where the tests run it, and expects no speed.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from meds_megatron.bench import fingerprint, step
from meds_megatron.bench.gpu_transfers import DEADLINE, staged_updates, transfer_group
from meds_megatron.bench.processes import result_of
from meds_megatron.bench.synthetic import synthetic_batch, write_random_model
from meds_megatron.config import QWEN, Config, ModelShape
from meds_megatron.run.reader import read_run

PARITY: dict[Literal["float32", "bfloat16"], float] = {"float32": 1e-3, "bfloat16": 2e-2}
"""Largest difference between GPU and CPU by data type."""
LEAST_MFU, LEAST_OVER_PLAIN, MOST_FINGERPRINT = 0.45, 1.3, 0.01
UPDATES, MOST_GROWTH = 20, 64 * 2**20
MOST_MISMATCH = 0.05
"""Mean difference between the log-probs of trainer and engine."""
SMALL = ModelShape("qwen3", 256, 4, 4, 2, 64, 512, 1024, True, 1e6, 1e-6, 4096)
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    what: str
    found: str
    expected: str
    ok: bool


def parity(gpus: int) -> list[Row]:
    """Log-probs, fingerprints and two updates of one policy, on a GPU and on the CPU."""
    # Few on the CPU, which multiplies bfloat16 slowly.
    rows, responses = [], 8 if gpus else 2
    with tempfile.TemporaryDirectory(prefix="meds-check-") as directory:
        expected = result_of(None, policy_results, directory, responses)
        found = result_of(0 if gpus else None, policy_results, directory, responses)
    for dtype, limit in PARITY.items():
        for name, values in expected[dtype].items():
            scale = max(1.0, float(np.abs(values).max())) if name != "log-probs" else 1.0
            difference = float(np.abs(found[dtype][name] - values).max()) / scale
            rows.append(Row(f"{name}, {dtype}", f"{difference:.1e}", f"<= {limit:g}", difference <= limit))
    return rows


def policy_results(directory: str, responses: int) -> dict[str, dict[str, np.ndarray]]:
    """Results of a policy that has this process alone, by data type: a forward pass, and the gradient norms and losses
    of two updates. Writes the model where it is not there yet."""
    from meds_megatron.actor.policy import Policy
    from meds_megatron.actor.process_group import form_groups, join
    from meds_megatron.weights.store import open_store

    if not Path(directory, "config.json").exists():
        write_random_model(SMALL, directory)
    device = join((store := open_store("127.0.0.1", 1)).address, 0, 1, store=store)
    config = Config()
    config.optimizer.lr = 1e-4
    form_groups(config.parallel, seed=0)
    results: dict[str, dict[str, np.ndarray]] = {}
    for dtype in PARITY:
        config.model.dtype = dtype
        policy = Policy(config, directory, device)
        batch = synthetic_batch(np.random.default_rng(0), responses, SMALL.vocab_size, (20, 40))
        micro_batches = np.array_split(np.arange(len(batch)), 2)
        output = policy.forward(batch, micro_batches)
        batch.logprobs_R = output.logprobs_R
        updates = policy.update(batch, [micro_batches, micro_batches], step=0)
        results[dtype] = {
            "log-probs": output.logprobs_R,
            "fingerprints": output.fingerprints_BL,
            "losses": np.array([update.loss for update in updates]),
            "gradient norms": np.array([update.grad_norm for update in updates]),
        }
    return results


def speed(gpus: int) -> list[Row]:
    """The update at the 7B layer shape against the GPU's rate of matrix products, and against a plain loop; a small
    shape without GPUs."""
    name = "Qwen2.5-7B" if gpus else "Qwen2.5-0.5B"
    sizes = dict(layers=4, responses=128, rounds=3) if gpus else dict(layers=1, responses=4, rounds=1)
    report = step.run([name], **sizes)["models"][name]
    packed = report["packed"]
    # Of the operations of both phases three quarters are the update's.
    mfu = 0.75 * packed["mfu"] * (packed["forward_s"] + packed["update_s"]) / packed["update_s"]
    over = report["over_plain"]
    rate = f"{packed['matrix_tflops']:.0f} TFLOP/s"
    return [
        Row(f"update of {name} layers, of {rate}", f"{mfu:.0%}", f">= {LEAST_MFU:.0%}", not gpus or mfu >= LEAST_MFU),
        Row("over a plain loop", f"{over:.2f}x", f">= {LEAST_OVER_PLAIN}x", not gpus or over >= LEAST_OVER_PLAIN),
    ]


def fingerprints(gpus: int) -> list[Row]:
    """Time that fingerprints add to a forward pass."""
    sizes = dict(responses=64, tokens=1024, rounds=9) if gpus else dict(responses=4, tokens=16, rounds=3)
    report = fingerprint.run(shape=QWEN["Qwen2.5-1.5B"] if gpus else SMALL, **sizes)
    cost = report["overhead"]
    return [
        Row("time of fingerprints", f"{cost:.1%}", f"<= {MOST_FINGERPRINT:.0%}", not gpus or cost <= MOST_FINGERPRINT)
    ]


def weight_updates(gpus: int) -> list[Row]:
    """Updates of two engines through one node's memory, on the trainer's GPU and, where there is one, on another."""
    places: list[int | None] = [0, min(1, gpus - 1)] if gpus else [None, None]
    report = staged_updates(QWEN["Qwen2.5-1.5B"] if gpus else SMALL, places[0], places, UPDATES)
    where = "CUDA IPC" if gpus else "shared memory"
    growth = f"{report.growth_bytes / 2**20:.0f} MiB"
    return [
        Row(f"{UPDATES} updates through {where}", "equal" if report.equal else "differ", "equal", report.equal),
        Row(
            "memory that does not come back", growth, f"<= {MOST_GROWTH >> 20} MiB", report.growth_bytes <= MOST_GROWTH
        ),
    ]


def network(gpus: int) -> list[Row]:
    """A transfer group of a trainer rank and an engine rank, and the death of the engine."""
    if gpus == 1:
        return [Row("transfer group", "needs two GPUs", "", True)]
    report = transfer_group((0, 1) if gpus else (None, None))
    limit = 2 * DEADLINE.total_seconds()
    kind = "NCCL" if gpus else "gloo"
    return [
        Row(f"{kind} group connects", f"{report.connect_s:.1f} s", f"<= {limit:.0f} s", report.connect_s <= limit),
        Row("and sends", f"{report.gbyte_per_s:.1f} GB/s", "", True),
        Row(
            "loss of the engine is noticed", f"{report.noticed_s:.1f} s", f"<= {limit:.0f} s", report.noticed_s <= limit
        ),
    ]


def run(gpus: int) -> list[Row]:
    """Three steps of the quickstart, with vLLM next to the trainer on the same GPUs: sleep, weight updates, offload."""
    ranks = min(2, gpus) or 2
    changes = [f"cluster.ranks_per_node={ranks}", f"parallel.pipeline={ranks}", "train.steps=3", "wandb.enabled=false"]
    changes += ["train.export_hf=false", "train.offload_optimizer=true", "sync.checksum_every=1"]
    if gpus:
        changes += ["cluster.device=cuda", "model.dtype=bfloat16", "rollout.enforce_eager=false"]
    with tempfile.TemporaryDirectory(prefix="meds-check-") as directory:
        command = [sys.executable, "-m", "meds_megatron.cli", "train", str(ROOT / "configs" / "quickstart.yaml")]
        done = subprocess.run([*command, *changes, f"run_dir={directory}/run"], capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["?"]
            return [Row("quickstart, 3 steps", last[0], "ends well", False)]
        lines = read_run(Path(directory, "run")).metrics
    mismatch = max(line.get("mismatch/logprob_abs_mean", 0.0) for line in lines)
    return [
        Row(
            "quickstart, 3 steps: trainer - engine", f"{mismatch:.1e}", f"<= {MOST_MISMATCH}", mismatch <= MOST_MISMATCH
        )
    ]


CHECKS: tuple[Callable[[int], list[Row]], ...] = (parity, fingerprints, weight_updates, network, run, speed)


def checked(check: Callable[[int], list[Row]], gpus: int) -> list[Row]:
    """The rows of a check, or one with the error of a check that failed: the others are made all the same."""
    try:
        return check(gpus)
    except Exception as error:
        return [Row(check.__name__, str(error).strip().splitlines()[-1], "ends well", False)]


def main() -> int:
    """Makes the checks; the exit status is 1 if one fails."""
    from rich.console import Console
    from rich.table import Table

    gpus = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0) if gpus else "no GPU: the CPU's half, without expectations of speed"
    table = Table("check", "found", "expected", "", title=f"{gpus} x {name}, torch {torch.__version__}")
    failed = 0
    for check in CHECKS:
        print(f"meds: {check.__name__} ...", file=sys.stderr)
        for row in checked(check, gpus):
            table.add_row(row.what, row.found, row.expected, "ok" if row.ok else "FAILED")
            failed += not row.ok
    Console().print(table)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

"""The longer test of sweeps: `python -m tests.slurm.long_sweep`, ten minutes on two cores, as root.

Four runs of a sweep over a real Slurm of two nodes, and the same four over local processes, give the same table.
"""

import os
import sys
import tempfile
from pathlib import Path

from meds_megatron.sweeps import sweep
from meds_megatron.toy_tasks.arithmetic_model import WarmUp, make_arithmetic_model
from tests.slurm.cluster import ROOT, Cluster, obstacle

SWEEP = """
config: {root}/configs/quickstart.yaml
directory: {directory}
settings:
  cluster.device: cpu
  model.make: "no"
  model.path: {model}
  data.limit_train: 6
  rollout.responses_per_prompt: 8
  filter.metric: none
  train.steps: 2
  train.prompts_per_step: 4
  train.mini_batch_prompts: 4
  train.micro_batch_tokens: 512
  train.validate_every: 0
  train.export_hf: false
  wandb.enabled: false
grid:
  penalty.alpha: [0.1, 0.02]
seeds: [0, 1]
metrics: [accuracy/mean, reward/shaped_mean, policy/loss, policy/grad_norm]
concurrent: 2
job: {{gpus_per_node: 0, cpus_per_task: 4, exclusive: false, hours: 0.5, save_seconds: 60}}
"""


def main() -> None:
    if reason := obstacle():
        sys.exit(f"no Slurm of two nodes can be made here: {reason}")
    with tempfile.TemporaryDirectory(prefix="meds-test-sweep-") as name:
        shared = Path(name)
        model = shared / "model"
        make_arithmetic_model(model, "shared", WarmUp(steps=100))
        tables = {}
        for executor in ("local", "slurm"):
            file = shared / f"{executor}.yaml"
            file.write_text(SWEEP.format(root=ROOT, directory=shared / executor, model=model))
            if executor == "local":
                tables[executor] = sweep(file, "local")
                continue
            (shared / "cluster").mkdir()
            cluster = Cluster(shared / "cluster", shared=shared)
            try:
                os.environ.update(PATH=cluster.environment["PATH"], SLURM_CONF=cluster.environment["SLURM_CONF"])
                tables[executor] = sweep(file, "slurm")
            finally:
                cluster.close()
        for executor, rows in tables.items():
            print(executor, *rows, sep="\n  ")
        assert [row["state"] for row in tables["local"]] == ["finished"] * 4
        assert len({row["policy/loss"] for row in tables["local"]}) == 4
        assert tables["local"] == tables["slurm"]
        print("the same table")


if __name__ == "__main__":
    main()

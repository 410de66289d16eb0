"""A supervised actor that takes part in collectives."""

import logging
import time
from datetime import timedelta

from meds_megatron.errors import UserError
from meds_megatron.faults.supervised import SupervisedActor
from meds_megatron.logs import configure_process_logging

logger = logging.getLogger(__name__)


class Member(SupervisedActor):
    def __init__(self, run_dir: str, number: int):
        configure_process_logging(run_dir, f"member{number}")
        self._number = number

    def join(self, store: str, members: int) -> None:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, members),
            rank=self._number,
            world_size=members,
            timeout=timedelta(minutes=10),
        )
        logger.info("member %d of %d joined", self._number, members)

    def reduce(self) -> float:
        import torch
        import torch.distributed as dist

        value = torch.ones(1)
        dist.all_reduce(value)
        return float(value)

    def number(self) -> int:
        return self._number

    def work_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.work += 1
            time.sleep(0.05)

    def refuse(self) -> None:
        raise UserError("data.train is empty")

    def fail(self, name: str) -> None:
        import torch
        import torch.distributed as dist

        if name == "AcceleratorError":
            raise torch.AcceleratorError(
                "CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"
            )
        if name == "DistBackendError":
            raise dist.DistBackendError("NCCL error: remote process exited or there was a network error")
        raise torch.OutOfMemoryError("CUDA out of memory")

"""Device of the ranks: decided on the machines that they run on, not on the driver's."""

import os
import socket
from typing import Literal

from meds_megatron.cluster.ray_cluster import ray_cluster
from meds_megatron.config import ClusterConfig
from meds_megatron.errors import UserError


def resolve_device(cluster: ClusterConfig) -> Literal["cuda", "cpu"]:
    """`cuda` or `cpu`; `auto` is `cuda` where a machine of the Ray cluster has a GPU.

    Connects to a cluster that is running, for as long as this takes; Ray that is yet to be started on this machine will
    have what torch finds.
    """
    if cluster.device != "auto":
        return cluster.device
    if cluster.address is None:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    import ray

    with ray_cluster(cluster):
        return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


def require_gpu() -> None:
    """Raises UserError in a process without a GPU, which would otherwise compute on the CPU."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"cluster.device = cuda, but torch {torch.__version__} finds no GPU on {socket.gethostname()} (built for "
            f"CUDA {torch.version.cuda}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); install the "
            "CUDA build there and check nvidia-smi, or set cluster.device=cpu."
        )

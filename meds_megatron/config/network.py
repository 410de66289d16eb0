"""The network interface of a run's own processes."""

from meds_megatron.config.schema import ClusterConfig

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"


def on_one_machine(cluster: ClusterConfig) -> bool:
    """Whether the run starts Ray itself, and so has all its processes on this machine."""
    return cluster.address is None


def network_env_vars(cluster: ClusterConfig) -> dict[str, str]:
    """Variables that torch's gloo and vLLM read: on one machine no other can reach their sockets. On several, gloo
    takes the interface of the host name unless GLOO_SOCKET_IFNAME says otherwise."""
    return {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "VLLM_HOST_IP": LOOPBACK} if on_one_machine(cluster) else {}

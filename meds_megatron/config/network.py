"""The network interface of a run's own processes."""

from meds_megatron.config.schema import ClusterConfig

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"


def on_one_machine(cluster: ClusterConfig) -> bool:
    """Whether the run starts Ray itself, and so has all its processes on this machine."""
    return cluster.address is None


def network_env_vars(cluster: ClusterConfig) -> dict[str, str]:
    """Variables by which gloo, NCCL and vLLM choose among a node's network interfaces: all of them, from the config.

    On one machine no other can reach the sockets of gloo and vLLM, unless `cluster.interface` is set.
    """
    variables: dict[str, str] = {}
    if on_one_machine(cluster):
        variables |= {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "VLLM_HOST_IP": LOOPBACK}
    if cluster.interface is not None:
        variables |= {"GLOO_SOCKET_IFNAME": cluster.interface, "NCCL_SOCKET_IFNAME": cluster.interface}
    if cluster.infiniband is not None:
        variables["NCCL_IB_HCA"] = cluster.infiniband
    return variables

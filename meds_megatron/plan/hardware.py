"""Assumptions about machines: everything of a plan that neither the config nor the model's shape determines."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One kind of device and its links."""

    name: str
    tflops: float
    """Dense matrix rate of one device in the model's data type, TFLOP/s."""
    efficiency: float
    """Share of that rate that the matrix products of training and prefill reach."""
    memory_gbyte: float
    """Memory bandwidth of one device, GB/s."""
    memory_efficiency: float
    """Share of it that decoding and the optimizer reach."""
    local_gbyte: float
    """Bandwidth between devices of a node, GB/s each way of one device."""
    host_gbyte: float
    """Bandwidth between a device and its host's memory, GB/s."""
    network_gbit: float
    """Bandwidth of a node to others, Gbit/s each way."""
    decode_step_ms: float
    """Time of an engine's decode step beyond its reads and products: scheduler, sampler, launches."""
    collective_us: float
    """Latency of one collective between devices of a node."""
    context_gib: float
    """Memory of a trainer rank on the device before any tensor: CUDA context, loaded kernels, cuBLAS workspaces; on a
    CPU the process itself."""
    engine_context_gib: float
    """The same of an engine rank."""
    communicator_gib: float
    """Buffers of a process's NCCL communicators, none where it has no peer."""
    allocator_slack: float
    """Memory that torch's allocator holds beyond the live activations, as a share of them (fragments)."""


H100 = Hardware(
    # Rates: NVIDIA H100 SXM data sheet (dense bfloat16, HBM3, NVLink 4, PCIe 5) and DGX H100 (8 x 400 Gbit/s a node).
    # Efficiencies, latencies, context and NCCL sizes are round figures of experience; `--calibrate` replaces the times.
    name="H100 SXM 80 GB",
    tflops=989.0,
    efficiency=0.5,
    memory_gbyte=3350.0,
    memory_efficiency=0.7,
    local_gbyte=450.0,
    host_gbyte=50.0,
    network_gbit=3200.0,
    decode_step_ms=4.0,
    collective_us=15.0,
    context_gib=0.75,
    engine_context_gib=0.75,
    communicator_gib=1.25,
    allocator_slack=0.05,
)

CPU = Hardware(
    # One core of a server: rates of torch 2.13 in float32 as seen on the machine that runs the tests. The memory of
    # processes is what `python tools/measure.py --processes meds train configs/quickstart.yaml` shows there.
    name="CPU core",
    tflops=0.05,
    efficiency=0.4,
    memory_gbyte=10.0,
    memory_efficiency=0.5,
    local_gbyte=2.0,
    host_gbyte=5.0,
    network_gbit=10.0,
    decode_step_ms=8.0,
    collective_us=200.0,
    context_gib=0.55,
    engine_context_gib=0.9,
    communicator_gib=0.0,
    allocator_slack=0.05,
)


@dataclass(frozen=True)
class Workload:
    """Lengths and kept share of a step's responses, assumed or as in a run (`plan.calibration`)."""

    mean_response_share: float = 0.4
    """Mean length of a response as a share of `rollout.max_response_tokens`."""
    mean_prompt_share: float = 0.15
    """Mean length of a prompt as a share of `rollout.max_prompt_tokens`."""
    kept_share: float = 0.5
    """Share of the generated prompts that pass the group filter (1 with `filter.metric: none`)."""


# vLLM 0.32 (EngineArgs.get_batch_defaults): tokens of one engine step on cards of 70 GiB and more, for offline use.
VLLM_BATCH_TOKENS = 16384
# Tokens of a block of vLLM's KV cache.
VLLM_BLOCK_TOKENS = 16
# Share of a card that the plan leaves empty while engines generate, for what it does not know of.
RESERVE = 0.06
# CUDA graphs of vLLM's default capture sizes, outside of its KV cache's budget.
VLLM_GRAPH_GIB = 1.0

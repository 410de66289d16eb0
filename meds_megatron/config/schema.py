"""Every setting of a run, typed. The defaults reproduce the published MEDS method.

This module imports neither torch nor any other package of ours: a launcher reads a config in a blink.
Sources of the published values: the MEDS paper (arXiv 2604.11297) and DAPO (arXiv 2503.14476).
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RandomModelConfig:
    """Shape of a randomly initialised model (`model.make: random`), for tests and benchmarks without a download."""

    architecture: Literal["qwen2", "qwen3"] = "qwen3"
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    ffn_size: int = 384
    tie_embeddings: bool = True
    tokenizer: str | None = None
    """Directory whose tokenizer files and vocabulary the model takes; needed with `make: random`."""
    vocab_size: int | None = None
    """Rows of the embedding; default: the tokenizer's own size. Qwen pads its 151665 tokens to 151936 rows."""
    boxing_steps: int = 0
    """Short warm-up that teaches the model to answer any prompt with some number in a box; 0 leaves it random."""
    seed: int = 0


@dataclass
class ModelConfig:
    """Which model is trained."""

    path: str | None = None
    """A Hugging Face directory (config.json, safetensors, tokenizer)."""
    make: Literal["no", "arithmetic", "random"] = "no"
    """Make the model on the spot instead of reading `path`: the warm-started arithmetic model, or a random one."""
    random: RandomModelConfig = field(default_factory=RandomModelConfig)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in the backward pass; `full` recomputes every layer."""


@dataclass
class ClusterConfig:
    """The machines a run may use."""

    nodes: int = 1
    ranks_per_node: int = 8
    """Trainer ranks on each node: GPUs on CUDA, processes on CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    address: str | None = None
    """Ray cluster to join (`auto` inside `ray symmetric-run`); none starts Ray on this machine."""
    threads_per_rank: int = 1
    """CPU threads of each trainer rank; only used without CUDA."""
    collective_timeout_minutes: int = 30


@dataclass
class ParallelConfig:
    """How the policy is laid out over ranks; what remains of nodes * ranks_per_node is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks on each pipeline stage (interleaved schedule); 1 means no interleaving."""
    sequence: bool = False
    """Megatron sequence parallelism over the tensor-parallel ranks."""
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    """Uneven pipeline split: layers on the first / last stage; the stages between share the rest evenly."""


@dataclass
class DataConfig:
    """Problems and how they become prompts."""

    train: list[str] = field(default_factory=list)
    """jsonl or parquet files; `arithmetic` is the embedded task."""
    validation: list[str] = field(default_factory=list)
    limit_train: int | None = None
    limit_validation: int | None = None
    system_prompt: str | None = "Please reason step by step, and put your final answer within \\boxed{}."
    """System line of the chat template; null leaves it out."""
    chat_template: bool = True
    """False gives the problem text to the model as it is."""
    shuffle: bool = True
    overlong_prompts: Literal["skip", "error"] = "skip"
    """What to do with a prompt longer than `rollout.max_prompt_tokens`: leave it out and count it, or stop."""
    arithmetic_rules: Literal["shared", "per_kind"] = "shared"
    """`shared`: one right rule for all kinds of problem (learns fast); `per_kind`: each kind has its own."""


@dataclass
class RolloutConfig:
    """Generation with vLLM."""

    engines: int = 1
    tensor: int = 1
    """Tensor-parallel size of each engine."""
    nodes: int | None = None
    """Nodes that the engines have to themselves, beside cluster.nodes (disaggregated). Null: engines and trainer ranks
    share nodes and GPUs (colocated), and engines sleep while the policy learns."""
    max_failures: int = 3
    """How often in a row an engine may fail, and be started anew, without having generated anything in between."""
    responses_per_prompt: int = 16
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 3072
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    validation_temperature: float = 1.0
    validation_top_p: float = 0.7
    validation_responses: int = 1
    gpu_memory_utilization: float = 0.6
    cpu_kv_cache_gib: float = 1.0
    """KV cache of an engine rank without CUDA."""
    threads: int = 1
    """CPU threads of each engine rank without CUDA."""
    max_num_seqs: int = 256
    deterministic: bool = False
    """True repeats every response for the same seed, machine and engines: the requests of a generation batch start
    together in a fixed order. False sends each request to the least loaded engine as soon as there is room."""
    enforce_eager: bool = False
    """True skips vLLM's compilation and CUDA graphs: faster start, slower generation."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the engine's weights; `auto` takes `model.dtype`."""


@dataclass
class OverlongConfig:
    """DAPO soft over-long penalty: 0 up to max_response_tokens - buffer, then linear down to -factor."""

    enabled: bool = True
    buffer: int = 512
    factor: float = 1.0


@dataclass
class RewardConfig:
    """Grading of answers."""

    workers: int = 8
    """Grader processes; each can be killed."""
    timeout_seconds: float = 10.0
    """Processor time one answer may take before its grader is killed and the answer counts as a timeout."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)


@dataclass
class MemoryConfig:
    """The memory of past mistakes; the defaults are the published ones (MEDS, sections 3 and 4), with HDBSCAN's exact
    spanning tree where the published code takes the package's nearly minimal one."""

    method: Literal["hdbscan", "single"] = "hdbscan"
    """`single`: every vector of a key is one cluster (ablation)."""
    min_cluster_size: int = 2
    min_samples: int = 1
    knn: int = 3
    last_n_layers: int = 14
    norm: Literal["last", "all", "none"] = "last"
    """Which layers' hidden states pass the model's final norm before the head: the last (published), all (the usual
    logit lens) or none."""
    layer_diff: bool = False
    """Cluster the differences of neighbouring layers, taken before the last-n slice."""
    noise: Literal["cluster", "ignore"] = "cluster"
    """`cluster`: HDBSCAN noise counts as one cluster (published); `ignore`: noise has size 0."""
    allow_single_cluster: bool = False
    """Let HDBSCAN answer that all vectors of a key are one cluster."""
    no_answer: Literal["escape", "own_cluster"] = "escape"
    """Targeted wrong responses without an answer, and so without a fingerprint: `escape` leaves them unpunished
    (published); `own_cluster` counts all of a prompt as one cluster."""
    remember_filtered: bool = False
    """Remember the mistakes of prompts that are generated but not trained on too; those that the filter has no need of
    take a forward pass for that."""
    window: int | None = None
    """Newest vectors kept of each key; null keeps all."""
    half_life_steps: float | None = None
    """Steps after which a vector counts half in the size of its cluster (sizes are rounded); null: it counts fully."""
    budget_gib: float | None = None
    """Memory each shard may use. When it is passed, the longest histories lose their oldest vectors until 7/8 of it is
    used; when even one vector a key is too much, the keys not remembered for longest go. Null is no limit."""
    skip_damaged: bool = False
    """When a saved memory is loaded, leave out its damaged segments and name them; false refuses it."""


@dataclass
class PenaltyConfig:
    """MEDS shaping: p = alpha * min(ln(n + 1), 2) for a response whose mistake was seen n times."""

    target: Literal["wrong", "right", "both", "none"] = "wrong"
    """Which responses are shaped; `none` is the clean control."""
    alpha: float = 0.1


@dataclass
class FilterConfig:
    """Dynamic sampling: groups whose metric has no spread are dropped and replaced."""

    metric: Literal["accuracy", "shaped", "none"] = "accuracy"
    """`shaped` is the score after all penalties, the memory's included: every response generated takes a forward pass.
    `none` keeps every group."""
    generation_prompts: int | None = None
    """Prompts of one generation batch; default: train.prompts_per_step."""
    max_batches: int = 10
    """Generation batches tried to fill one step."""
    when_short: Literal["continue", "stop"] = "continue"
    """After max_batches: train on what there is and say so, or stop."""


@dataclass
class AdvantageConfig:
    """Group-relative advantages."""

    normalize_std: bool = True
    """False is Dr.GRPO: subtract the mean only."""
    epsilon: float = 1e-6
    std_floor: float = 0.0
    """Least standard deviation to divide by in groups without a right answer, whose scores differ by penalties only."""
    entropy_coefficient: float = 0.0
    """Entropy-shaped advantage: A + min(coefficient * H, |A| / entropy_bound); 0 is off."""
    entropy_bound: float = 2.0


@dataclass
class PolicyConfig:
    """The policy loss."""

    loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    """`ppo`: clipped token ratios with dual clip (DAPO, GRPO); `gspo`: clipped sequence ratios (arXiv 2507.18071);
    `cispo`: clipped importance weights of the log-probs (arXiv 2506.13585)."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    """Lower bound on the loss of negative advantages: ratio clipped at this value; null is off."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """`token_mean`: over all tokens of the mini-batch (DAPO); `sequence_mean`: each response's mean, then the mean of
    responses (GRPO); `sequence_sum`: sum over tokens divided by max_response_tokens, mean of responses (Dr.GRPO)."""
    importance_cap: float | None = None
    """Truncated importance sampling: weight min(pi_trainer_old / pi_rollout, cap); null is off."""


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    warmup_steps: int = 10
    """Training steps (not optimizer updates) over which the learning rate rises linearly; constant afterwards."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainConfig:
    """The loop."""

    steps: int = 100
    prompts_per_step: int = 512
    mini_batch_prompts: int = 16
    """Prompts in one optimizer step; prompts_per_step / mini_batch_prompts updates are made a step."""
    micro_batch_responses: int = 1
    """Responses in one forward/backward pass of one data-parallel rank."""
    seed: int = 0
    validate_every: int = 2
    """Steps between validations; 0 is never. Step 0 (before training) and the last step are validated too."""
    export_every: int = 50
    """Steps between exports of the policy as a Hugging Face directory; 0 leaves only the one after the last step."""
    save_rollouts: bool = True
    export_hf: bool = True
    """False writes no Hugging Face directory, not even at the end."""


@dataclass
class SyncConfig:
    """Weights from trainer to engines."""

    transport: Literal["auto", "network"] = "auto"
    """`auto`: through a node's memory where trainer rank and engine share the node, over the network elsewhere;
    `network`: over the network everywhere (needs nodes of the engines' own on GPUs, which NCCL does not let share)."""
    checksum_every: int = 50
    """Weight updates between comparisons of checksums on both sides; 0 leaves only the one before the first step."""
    max_logprob_difference: float | None = None
    """Stop when the mean |trainer - rollout| log-prob of a step exceeds this; null only reports it."""


@dataclass
class WandbConfig:
    enabled: bool = True
    """Without an API key the run is recorded offline."""
    project: str = "meds_megatron"
    entity: str | None = None
    group: str | None = None


@dataclass
class Config:
    """A run."""

    name: str = "meds"
    run_dir: str = "runs/${name}"
    cache_dir: str = "~/.cache/meds_megatron"
    """Where models made on the spot are kept."""
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

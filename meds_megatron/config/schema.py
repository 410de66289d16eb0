"""Every setting of a run, typed. The defaults are the published MEDS method's: the paper (arXiv 2604.11297), its code,
which is a fork of verl, and DAPO (arXiv 2503.14476).

Departures of the defaults, each described at its key (those of `memory` here):

- `optimizer.warmup_steps`: the learning rate of warm-up step s is lr * s / 10, published lr * (s - 1) / 10.
- `optimizer.weight_decay`: norms and biases are not decayed, published they are.
- `filter.when_short`: a step that cannot be filled trains on fewer prompts, published the run stops.
- `data.overlong_prompts`: prompts that are too long are left out, published they lose their beginning.
- `reward.timeout_seconds`: a failed grading is neither right nor wrong, published it is wrong.
- `memory`, where the published code rounds, confuses problems or depends on order: HDBSCAN's spanning tree is exact,
  not the package's approximate one. Ties do not depend on the order of edges, as they do in the package: equal vectors
  are one weighted point, which nothing splits, and edges of equal length are merged in the order of their newer, then
  of their older vector; a tied vote goes to the smallest label, numbered as the package does. A fingerprint's logits
  are float32, not bfloat16, which rounds them to steps of 1/8; its position is that of the last box in the text, not of
  the last one that is tokenized in the commonest way; and a key has the problem's id, not a hash of its text without
  what stands between < and >.

`model`, `cluster`, `parallel`, `checkpoint`, `faults`, `sync` and the engines' sizes have no published counterpart:
they change where and how fast a run computes, not what. The settings that the paper changes from model to model are in
`configs/`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

RESUMABLE = {"resumable": True}
"""Metadata of keys, and of sections with all of their keys, that may differ when a run resumes: they change where, how
fast or how long a run computes and what it writes. All others change what is learned (`config.changes`)."""


def setting(default: Any, resumable: bool = False, **bounds: float) -> Any:
    """A key and its metadata: a resumed run may change it if it is `resumable` (see RESUMABLE), and its number lies
    within `bounds`, which `validate` checks: `gt`, `ge`, `lt`, `le`.

    `off` is one value outside the range that is allowed too; null is allowed where the type allows it.
    """
    return field(default=default, metadata={"resumable": resumable, "bounds": bounds})


def choice(default: str, *others: str) -> Any:
    """A key whose value is one of a few names, or a function of the user's own (`user_functions`)."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass
class RandomModelConfig:
    """Shape of a randomly initialised model (`model.make: random`), for tests and benchmarks without a download."""

    architecture: Literal["qwen2", "qwen3"] = "qwen3"
    hidden_size: int = setting(128, gt=0)
    num_layers: int = setting(4, gt=0)
    num_heads: int = setting(4, gt=0)
    num_kv_heads: int = setting(2, gt=0)
    head_dim: int = setting(32, gt=0)
    ffn_size: int = setting(384, gt=0)
    tie_embeddings: bool = True
    tokenizer: str | None = None
    """Directory of the tokenizer files that the model uses; required with `make: random`."""
    vocab_size: int | None = setting(None, gt=0)
    """Rows of the embedding; default: the tokenizer's own size. Qwen pads its 151665 tokens to 151936 rows."""
    boxing_steps: int = setting(0, ge=0)
    """Warm-up steps that train the model to answer every prompt with a number in `\\boxed{}`; 0 leaves it random."""
    seed: int = setting(0, ge=0)


@dataclass
class ModelConfig:
    """The trained model."""

    path: str | None = None
    """A Hugging Face directory (config.json, safetensors, tokenizer)."""
    make: Literal["no", "arithmetic", "random"] = "no"
    """Generate the model instead of reading `path`: the warm-started arithmetic model, or a random one."""
    random: RandomModelConfig = field(default_factory=RandomModelConfig)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = setting("none", resumable=True)
    """Activation recomputation in the backward pass; `full` recomputes every layer."""


@dataclass
class ClusterConfig:
    """Size of the cluster."""

    nodes: int = setting(1, gt=0)
    ranks_per_node: int = setting(8, gt=0)
    """Trainer ranks on each node: GPUs on CUDA, processes on CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: `cuda` where a node of the cluster has a GPU. Configs for GPUs set `cuda`: a rank or engine that finds
    none, by mistake, ends the run."""
    gpu_memory_gib: float = setting(79.0, gt=0)
    """Usable memory of a GPU, by which `meds plan` and `meds train` judge whether a run fits: 79 of an 80 GB H100."""
    address: str | None = None
    """Ray cluster to join (`auto` inside `ray symmetric-run`); null starts Ray on this machine."""
    threads_per_rank: int = setting(1, gt=0)
    """CPU threads of each trainer rank; only used without CUDA."""
    collective_timeout_minutes: int = setting(30, gt=0)
    interface: str | None = None
    """Network interfaces for gloo and NCCL (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), such as `ib0`; null: gloo takes
    the one that the host name resolves to, NCCL chooses."""
    infiniband: str | None = None
    """InfiniBand adapters for NCCL (NCCL_IB_HCA), such as `mlx5`; null: all."""


@dataclass
class ParallelConfig:
    """Layout of the policy over the ranks; the data-parallel size is nodes * ranks_per_node / (tensor * context *
    pipeline)."""

    tensor: int = setting(1, gt=0)
    context: int = setting(1, gt=0)
    """Context parallelism: the tokens of each sequence are split over this many ranks, for long responses."""
    pipeline: int = setting(1, gt=0)
    virtual_pipeline: int = setting(1, gt=0)
    """Model chunks on each pipeline stage (interleaved schedule); 1 means no interleaving."""
    sequence: bool = False
    """Megatron sequence parallelism over the tensor-parallel ranks."""
    first_stage_layers: int | None = setting(None, gt=0)
    last_stage_layers: int | None = setting(None, gt=0)
    """Layers on the first / last pipeline stage. Null, like the stages between: an equal part of the rest. Where this
    does not divide, some have one layer less, the last and the first before others (`meds plan` prints them)."""


@dataclass
class DataConfig:
    """Problems and prompts."""

    train: list[str] = field(default_factory=list)
    """jsonl or parquet files; `arithmetic` is the toy task."""
    validation: list[str] = field(default_factory=list, metadata=RESUMABLE)
    limit_train: int | None = setting(None, gt=0)
    limit_validation: int | None = setting(None, gt=0, resumable=True)
    system_prompt: str | None = "Please reason step by step, and put your final answer within \\boxed{}."
    """System message of the chat template; it replaces that of rows which have one. Null passes none."""
    chat_template: bool = True
    """False takes the question itself as the prompt."""
    enable_thinking: bool | None = None
    """Thinking mode of chat templates that have one (Qwen3), passed to them as `enable_thinking`: false starts every
    response with an empty thinking block. Null passes nothing and leaves the template's own default, for Qwen3
    thinking. Templates without such a mode (Qwen2.5) ignore it."""
    shuffle: bool = True
    overlong_prompts: Literal["skip", "error"] = "skip"
    """Prompts longer than `rollout.max_prompt_tokens`: `skip` leaves them out and reports their number. Departure:
    DAPO's training scripts, which the published code follows, cut their beginning off and train on the rest."""
    arithmetic_rules: Literal["shared", "per_kind", "remainder"] = "shared"
    """Embedded task: `shared` has one correct rule for all kinds of problem, `per_kind` one for each kind. `remainder`
    is `per_kind` with a last step after which equal wrong answers come from different mistakes and different ones from
    the same mistake."""


CPU_KV_CACHE_GIB = 1.0
"""`rollout.kv_cache_gib` where it is null and there is no GPU."""


@dataclass
class RolloutConfig:
    """Generation with vLLM."""

    engines: int = setting(1, gt=0, resumable=True)
    tensor: int = setting(1, gt=0, resumable=True)
    """Tensor-parallel size of each engine."""
    nodes: int | None = setting(None, gt=0, resumable=True)
    """Nodes reserved for the engines, in addition to cluster.nodes (disaggregated). Null: engines and trainer ranks
    share nodes and GPUs (colocated), and engines sleep during the policy update."""
    max_failures: int = setting(3, ge=0, resumable=True)
    """Consecutive failures of an engine, without a completion in between, after which it is not restarted."""
    responses_per_prompt: int = setting(16, ge=2)
    max_prompt_tokens: int = setting(1024, gt=0)
    max_response_tokens: int = setting(3072, gt=0)
    temperature: float = setting(1.0, gt=0)
    top_p: float = setting(1.0, gt=0, le=1)
    top_k: int = setting(-1, gt=0, off=-1)
    """top_p below 1 and top_k are refused in training: they bias the importance ratios."""
    validation_temperature: float = setting(1.0, ge=0, resumable=True)
    validation_top_p: float = setting(1.0, gt=0, le=1, resumable=True)
    validation_responses: int = setting(1, gt=0, resumable=True)
    """Responses to each validation problem. With n of them the metrics are mean@n and pass@k
    (`trainer.validation`); sets as small as AIME's 30 problems need 32."""
    kv_cache_gib: float | None = setting(None, gt=0, resumable=True)
    """KV cache of each engine rank. Null on a GPU that a trainer uses too: what the plan finds free there, but no more
    than `max_num_seqs` of the longest sequences need; on another what vLLM finds free. Null without GPUs: 1."""
    threads: int = setting(1, gt=0, resumable=True)
    """CPU threads of each engine rank without CUDA."""
    max_num_seqs: int = setting(256, gt=0, resumable=True)
    on_update: Literal["continue", "finish"] = setting("continue", resumable=True)
    """Responses under way when the engines get new weights (train.max_staleness above 0). `continue`: an engine stops
    between two tokens, takes the weights, recomputes the KV cache with them and continues; each token keeps the version
    that it was drawn with. `finish`: the update waits until the engines are idle, and they get no new requests
    meanwhile."""
    deterministic: bool = False
    """True: the same seed, machine and engines give the same responses; the requests of a generation batch start
    together in a fixed order. False: each request goes to the least loaded engine as soon as that one can take it."""
    enforce_eager: bool = setting(False, resumable=True)
    """True skips vLLM's compilation and CUDA graphs: faster start, slower generation."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the engines' weights; `auto` is `model.dtype`."""


@dataclass
class OverlongConfig:
    """DAPO soft over-long penalty: 0 up to max_response_tokens - buffer, then linear down to -factor."""

    enabled: bool = True
    buffer: int = setting(512, gt=0)
    factor: float = setting(1.0, ge=0)


@dataclass
class RewardConfig:
    """Grading of answers."""

    workers: int = setting(8, gt=0, resumable=True)
    """Grader processes."""
    timeout_seconds: float = setting(10.0, gt=0)
    """CPU time for one answer; beyond it the grader process is killed and the grading has failed. Departure: a response
    whose grading failed is neither right nor wrong. It is counted (`grading/timeout`, `grading/error`) and left out
    of its group's mean and deviation, the group filter, the memory and the loss; the published code counts it as
    wrong."""
    memory_gib: float = setting(4.0, ge=0.25)
    """Address space of a grader process, of which 0.1 GiB are its own; an answer that needs more ends it, and its
    grading has failed."""
    grader: Literal["math_verify", "strict", "limo"] = "math_verify"
    """`math_verify` accepts any form of the same value, `strict` the same text or number only, `limo` what LIMO's
    evaluation accepts, its known false accepts included (`reward.rules`)."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)


@dataclass
class MemoryConfig:
    """The error memory. The defaults are the published ones (MEDS, sections 3 and 4). Departures, listed at the head of
    this file: exact spanning tree, ties by age, float32 fingerprints at the last box, keys by the problem's id."""

    method: Literal["hdbscan", "single", "answer"] = "hdbscan"
    """`single`: every vector of a key is one cluster (ablation). `answer`: responses with the same normalised final
    answer are a cluster, whatever their fingerprints (rival); what concerns layers, HDBSCAN and noise has no effect
    then."""
    min_cluster_size: int = setting(2, ge=2)
    min_samples: int = setting(1, gt=0)
    knn: int = setting(3, gt=0)
    last_n_layers: int = setting(14, gt=0)
    norm: Literal["last", "all", "none"] = "last"
    """Layers whose hidden states pass the model's final norm before the head: the last (published), all (the usual
    logit lens) or none."""
    layer_diff: bool = False
    """Cluster the differences of consecutive layers, taken before the last-n slice."""
    noise: Literal["cluster", "ignore"] = "cluster"
    """`cluster`: HDBSCAN noise counts as one cluster (published); `ignore`: noise has size 0."""
    allow_single_cluster: bool = False
    """Allow HDBSCAN to return a single cluster of all vectors of a key."""
    novelty: bool = False
    """A mistake that is farther from its nearest stored vector than that vector's cluster reaches is new: its size is
    0. A cluster reaches as far as the shortest edge of the spanning tree that leaves it, 1 / lambda of its birth. Noise
    has no reach, so `noise` decides where the nearest vector is noise. False (published): every lookup falls into some
    cluster. Needs min_samples=1; no effect with `method: single`."""
    no_answer: Literal["escape", "own_cluster"] = "escape"
    """Targeted wrong responses without an answer, and so without a fingerprint: `escape` leaves them unpunished
    (published); `own_cluster` counts all of a prompt as one cluster."""
    remember_filtered: bool = False
    """Remember also the mistakes of prompts that were generated but not trained on; those that the filter does not
    score need an additional forward pass."""
    window: int | None = setting(None, gt=0)
    """Number of newest vectors kept for each key; null keeps all."""
    half_life_steps: float | None = setting(None, gt=0)
    """Steps after which a vector's weight in the size of its cluster is halved (sizes are rounded); null: no decay."""
    budget_gib: float | None = setting(None, gt=0, resumable=True)
    """Limit of each shard's RAM; null is no limit. Beyond it the longest histories lose their oldest vectors until 7/8
    of it is used; if one vector a key is still too much, the least recently remembered keys are dropped."""
    skip_damaged: bool = setting(False, resumable=True)
    """Loading a memory with damaged files: true leaves them out and names them, false is an error."""


@dataclass
class PenaltyConfig:
    """MEDS shaping: p = alpha * min(ln(n + 1), 2) for a response whose mistake was seen n times."""

    target: Literal["wrong", "right", "both", "none"] = "wrong"
    """Responses that are shaped; `none` is the control without MEDS."""
    alpha: float = setting(0.1, ge=0)


@dataclass
class FilterConfig:
    """Dynamic sampling: groups whose metric has no spread are dropped and replaced."""

    metric: str = choice("accuracy", "shaped", "none")
    """`shaped` is the score after all penalties including the error memory's, and needs a forward pass of every
    generated response. `none` keeps every group. Or a function of yours, from a `TrainBatch` of the responses (scores
    of failed gradings are NaN) to their values [B]."""
    generation_prompts: int | None = setting(None, gt=0)
    """Prompts of one generation batch; default: train.prompts_per_step."""
    max_batches: int = setting(10, gt=0)
    """Generation batches tried to fill one step. With train.max_staleness above 0, where dropped prompts are replaced
    one by one, as many prompts as these batches would have."""
    when_short: Literal["continue", "stop"] = "continue"
    """Too few groups after max_batches: `continue` trains on fewer, with a warning. Departure: the published code
    stops."""


@dataclass
class AdvantageConfig:
    """Advantages of responses, from the scores of their group, and what is added to them."""

    estimator: str = choice("group", "pass_at_k")
    """`group`: distance from the group's mean score; `pass_at_k`: pass@k training (arXiv 2508.10751), which rewards
    sets of pass_k responses for their best one and sees right and wrong only, no penalties. Or a function of yours with
    the arguments and the result of `algorithm.advantages.group_relative`."""
    pass_k: int = setting(4, gt=0)
    normalize_std: bool = True
    """False is Dr.GRPO: subtract the mean only."""
    epsilon: float = setting(1e-6, gt=0)
    std_floor: float = setting(0.0, ge=0)
    """Lower bound on the standard deviation of groups whose answers are all wrong or all right: their scores differ by
    penalties alone."""
    entropy_coefficient: float = setting(0.0, ge=0)
    """Entropy-shaped advantage: A + min(coefficient * H, |A| / entropy_bound), where H is each token's entropy under
    the policy in the update's own forward pass, without gradient; 0 is off."""
    entropy_bound: float = setting(2.0, gt=0)
    focal_gamma: float = setting(0.0, ge=0)
    """F-GRPO (arXiv 2602.06717): A * (1 - share of right responses in the group) ** focal_gamma; 0 is off."""
    diversity_alpha: float = setting(0.0, ge=0)
    diversity_beta: float = setting(0.0, ge=0)
    diversity_bound: float = setting(2.0, gt=0)
    """EDAS (arXiv 2605.17333), for the wrong responses of a group: A changes with the rarity of their answer among
    them, by up to diversity_alpha times their mean |A|; where all gave the same answer, A falls by diversity_beta times
    it. No change exceeds |A| / diversity_bound. Both 0: off."""
    count_coefficient: float = setting(0.0, ge=0)
    count_baseline: float = setting(0.5, ge=0, le=1)
    """Outcome-based exploration (arXiv 2509.06941): A + count_coefficient * (min(1, 1 / sqrt(n)) - count_baseline) for
    responses in the memory's cluster of n earlier ones, with `memory.method: answer` those of the same answer; 0 is
    off. Counts all responses with `penalty.target: both`, without a penalty with `penalty.alpha: 0`."""

    @property
    def shapes_by_answer(self) -> bool:
        """Whether advantages depend on the responses' final answers."""
        return self.diversity_alpha > 0 or self.diversity_beta > 0


@dataclass
class PolicyConfig:
    """The policy loss."""

    loss: str = choice("ppo", "gspo", "cispo")
    """`ppo`: clipped token ratios with dual clip (DAPO, GRPO); `gspo`: clipped sequence ratios (arXiv 2507.18071);
    `cispo`: clipped importance weights of the log-probs (arXiv 2506.13585). Or a function of yours with the arguments
    and the result of `algorithm.losses.policy_loss`."""
    clip_low: float = setting(0.2, gt=0, le=1)
    clip_high: float = setting(0.28, gt=0)
    """Ratios are clipped to [1 - clip_low, 1 + clip_high]: those of tokens with `ppo` (DAPO: 0.2 and 0.28, GRPO: 0.2
    twice) and `cispo` (no lower bound: clip_low 1), those of whole responses with `gspo`, whose published ranges are
    3e-4 and 4e-4."""
    dual_clip: float | None = setting(10.0, gt=1)
    """`ppo` and `gspo`: upper bound -A * dual_clip on the loss of negative advantages A, that is on their ratio; null
    is off. `cispo` has no such bound."""
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "token_mean"
    """`token_mean`: over all tokens of the mini-batch (DAPO); `sequence_mean`: each response's mean, then the mean of
    responses (GRPO); `sequence_sum`: sum over tokens divided by max_response_tokens, mean of responses (Dr.GRPO)."""
    importance: Literal["auto", "none", "token", "sequence"] = "auto"
    """Importance weights pi_trainer_old / pi_rollout in the loss, of each token or of whole responses
    (`algorithm.corrections`). `auto`: `token` with train.max_staleness above 0, else `none`."""
    importance_cap: float | None = setting(2.0, gt=0)
    """Weights are truncated to it; null is off."""
    importance_low: float | None = setting(None, ge=0, le=1)
    importance_high: float | None = setting(None, ge=1)
    """Tokens, or responses, whose weight would lie outside are left out of the loss; null is no bound. IcePop is
    `importance: token` with 0.5 and 5 and no cap."""


@dataclass
class OptimizerConfig:
    lr: float = setting(1e-6, ge=0)
    warmup_steps: int = setting(10, ge=0)
    """Training steps (not optimizer updates) over which the learning rate rises linearly; constant afterwards.
    Departure: the rate of step s (from 1) is lr * s / warmup_steps; published it is lr * (s - 1) / warmup_steps, so
    that the first step's responses train nothing."""
    weight_decay: float = setting(0.1, ge=0)
    """AdamW's decay of matrices, the embedding included. Departure: norms and biases are not decayed; the published
    code decays every parameter."""
    beta1: float = setting(0.9, ge=0, lt=1)
    beta2: float = setting(0.999, ge=0, lt=1)
    epsilon: float = setting(1e-8, gt=0)
    clip_grad: float = setting(1.0, ge=0)


@dataclass
class TrainConfig:
    """The training loop."""

    steps: int = setting(100, gt=0, resumable=True)
    prompts_per_step: int = setting(512, gt=0)
    mini_batch_prompts: int = setting(16, gt=0)
    """Prompts of one optimizer update; a step makes prompts_per_step / mini_batch_prompts updates."""
    micro_batch_tokens: int = setting(8192, gt=0, resumable=True)
    """Most tokens of one forward and backward pass of one data-parallel rank, its context-parallel ranks together:
    responses and their prompts, packed without padding between them."""
    forward_tokens: int = setting(16384, gt=0, resumable=True)
    """The same for passes that are forward only, which keep no activations."""
    max_staleness: int = setting(0, ge=0)
    """Updates of the policy that may lie between the draw of a response's first token and the step that trains on it.
    0 (published): engines and trainer take turns. Above, engines generate for later steps while the trainer computes,
    groups are trained on in the order in which they finish, and `rollout.nodes` gives the engines GPUs of their own
    (`rollout.group_schedule`)."""
    offload_optimizer: bool | None = setting(None, resumable=True)
    """The optimizer's state is in the host's memory while engines on the same GPUs generate, and leaves room for their
    KV cache. Null: where the plan expects the step to be faster. Gradients are never there meanwhile."""
    seed: int = setting(0, ge=0)
    validate_every: int = setting(2, ge=0, resumable=True)
    """Steps between validations; 0 is never. Step 0 (before training) and the last step are validated too."""
    export_every: int = setting(50, ge=0, resumable=True)
    """Steps between exports of the policy as a Hugging Face directory; 0 exports only after the last step."""
    save_rollouts: bool = setting(True, resumable=True)
    export_hf: bool = setting(True, resumable=True)
    """False writes no Hugging Face directory, not even at the end."""


@dataclass
class CheckpointConfig:
    """Checkpoints of the whole run, from which `meds train` on the same run directory resumes."""

    every: int = setting(10, ge=0)
    """Steps between checkpoints; one more is saved after the last step and when a signal stops the run. 0 saves none:
    the run cannot be resumed."""
    keep_last: int = setting(2, gt=0)
    """Newest checkpoints that are kept."""
    keep_every: int | None = setting(None, gt=0)
    """Checkpoints of steps that are multiples of this are kept for ever."""
    asynchronous: bool = True
    """False waits until a checkpoint is on disk before the next step begins."""
    accept_changes: bool = False
    """Resume even though settings differ that make it another run, such as penalty.alpha."""


@dataclass
class FaultsConfig:
    """Handling of failures."""

    max_restarts: int = setting(3, ge=0)
    """Consecutive restarts from the last checkpoint after a trainer rank, a memory shard or Ray died or the run hung. A
    step beyond all that were finished before sets the count back to 0. Engines are restarted alone
    (`rollout.max_failures`), and graders always."""
    max_bad_updates: int = setting(3, gt=0)
    """Consecutive optimizer updates that are skipped because their loss or gradient is not finite, before the run
    stops."""
    hang_minutes: float | None = setting(20.0, gt=0)
    """Time without any progress after which engines and graders that hang are replaced; if none does, the phase and
    stack of every rank are logged and the run restarts from its last checkpoint. Shorter than
    cluster.collective_timeout_minutes, longer than the start of an engine. Null is never."""
    start_minutes: float = setting(30.0, gt=0)
    """Time in a Slurm job for Ray to be up on all nodes after the task of the first has started; beyond it the job
    fails. Nodes that import a container may differ by minutes."""
    cancel_seconds: int = setting(25, gt=0)
    """Time in a Slurm job for the run to save and end after SIGTERM (scancel, preemption); a little less than Slurm's
    KillWait (by default 30), or the partition's GraceTime where that is longer."""


@dataclass
class SyncConfig:
    """Weight updates of the engines."""

    transport: Literal["auto", "network"] = "auto"
    """`auto`: shared memory or CUDA IPC between processes of one node, network between nodes; `network`: network
    everywhere (with GPUs this needs rollout.nodes, since NCCL does not support two ranks on one GPU)."""
    checksum_every: int = setting(50, ge=0)
    """Weight updates between two comparisons of checksums; 0 compares only those before the first step."""
    max_logprob_difference: float | None = setting(None, ge=0)
    """Stop when the mean |trainer - rollout| log-prob of a step exceeds this; null only reports it."""


@dataclass
class WandbConfig:
    enabled: bool = True
    """Record the run with wandb; offline without an API key."""
    project: str = "meds_megatron"
    entity: str | None = None
    group: str | None = None
    responses_every: int = setting(10, ge=0)
    """Steps between tables of sample responses, the first after step 1; 0 is none."""
    responses: int = setting(32, gt=0)
    """Responses of such a table."""


@dataclass
class Config:
    """A run."""

    name: str = setting("meds", resumable=True)
    run_dir: str = setting("runs/${name}", resumable=True)
    cache_dir: str = setting("~/.cache/meds_megatron", resumable=True)
    """Directory of generated models."""
    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata=RESUMABLE)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=RESUMABLE)
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
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=RESUMABLE)
    faults: FaultsConfig = field(default_factory=FaultsConfig, metadata=RESUMABLE)
    sync: SyncConfig = field(default_factory=SyncConfig, metadata=RESUMABLE)
    wandb: WandbConfig = field(default_factory=WandbConfig, metadata=RESUMABLE)

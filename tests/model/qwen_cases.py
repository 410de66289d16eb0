"""Small Qwen models and a batch of ragged responses, with transformers' results for them."""

from pathlib import Path

import numpy as np
import torch

from meds_megatron.actor.schedule import Schedule, schedule
from meds_megatron.actor.train_batch import ForwardOutput, TrainBatch
from meds_megatron.algorithm.aggregation import aggregation_weights
from tests.devices import this_device

MODELS = ["qwen2 tied", "qwen2 untied", "qwen3 tied", "qwen3 untied"]
VOCAB = 260
LAYERS = 4
HIDDEN = 64
RESPONSES = 7
WITH_ANSWER = 5
MAX_TOKENS = 64
"""Most tokens of a prompt, and of a response."""


def make_model(directory: Path, name: str, spread: float = 0.1, layers: int = LAYERS) -> Path:
    """Writes a random model with norms and biases away from their initial values, so that each one matters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(MODELS.index(name))
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        rope_theta=1e4 if name.startswith("qwen2") else 1e6,
        tie_word_embeddings=name.endswith(" tied"),
    )
    if name.startswith("qwen2"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return directory


MINIBATCHES_B = np.array([0, 1, 0, 1, 0, 1, 0])


GIVEN = {0: [(3, 8)], 2: [(0, 4), (20, 31)], 5: [(10, 24)]}
"""Stretches, begin and end, of a response that the policy was given: in the middle, at the beginning and at the end."""


def train_batch(given: dict[int, list[tuple[int, int]]] = GIVEN) -> TrainBatch:
    """Seven sequences of different lengths, two of them without an answer, some with stretches that were given.

    Each has more tokens than half of the multiple that micro-batches are padded to: with sequence parallelism every
    tensor-parallel rank of two holds some that are no padding.
    """
    random = np.random.default_rng(0)
    prompts = [random.integers(0, VOCAB, size).tolist() for size in (15, 26, 17, 30, 40, 20, 8)]
    responses = [random.integers(0, VOCAB, size).tolist() for size in (27, 12, 36, 18, 1, 24, 30)]
    loss_masks = [np.ones(len(response), dtype=bool) for response in responses]
    for row, stretches in given.items():
        for begin, end in stretches:
            loss_masks[row][begin:end] = False
    return TrainBatch.of_responses(
        prompts,
        responses,
        logprobs=[[0.0] * int(mask.sum()) for mask in loss_masks],
        answer_positions=[9, 0, 33, -1, -1, 8, 6],
        groups=list(range(RESPONSES)),
        loss_masks=loss_masks,
    )


ONE_BY_ONE, PAIRS, PACKS = 1, 104, 192
"""Tokens of a micro-batch with room for one sequence, for about two and for about four."""


def scheduled(batch: TrainBatch, minibatches_B: np.ndarray, parallel: dict, tokens: int) -> Schedule:
    multiple = parallel["pipeline"] if parallel.get("virtual_pipeline", 1) > 1 else 1
    lengths_B = batch.lengths_B
    return schedule(lengths_B, lengths_B, minibatches_B, parallel.get("data", 1), tokens, multiple)


def world_size(parallel: dict) -> int:
    return int(np.prod([parallel.get(axis, 1) for axis in ("tensor", "context", "data", "pipeline")]))


def run_forward(policy, batch: TrainBatch, parallel: dict, tokens: int) -> ForwardOutput | None:
    work = scheduled(batch, MINIBATCHES_B, parallel, tokens)
    return policy.forward(batch, [rows for minibatch in work.micro_batches[0] for rows in minibatch])


def forward(
    rank: int, directory: str, parallel: dict, tokens: int = PAIRS, norm: str = "last", dtype: str = "float32"
) -> ForwardOutput | None:
    """Our policy's results for `train_batch`, on one rank of a layout."""
    policy = make_policy(directory, parallel, norm=norm, dtype=dtype)
    return run_forward(policy, train_batch(), parallel, tokens)


def forward_in_order(rank: int, directory: str, parallel: dict, tokens: int, order) -> ForwardOutput | None:
    """The same for the responses in another order."""
    return run_forward(make_policy(directory, parallel), train_batch().select(order), parallel, tokens)


def bytes_sent(rank: int, directory: str, parallel: dict) -> int:
    """Bytes that the fingerprints send from this rank to other stages."""
    from meds_megatron.actor.fingerprint import FingerprintCollector

    policy = make_policy(directory, parallel)
    collector = FingerprintCollector(policy.chunks, train_batch(), "last", policy.device)
    collector.gather(RESPONSES)
    return collector.sent_bytes


_one_rank: dict[Path, ForwardOutput] = {}


def on_one_rank(ranks, directory: Path) -> ForwardOutput:
    """Results of a single rank for `train_batch`."""
    if directory not in _one_rank:
        (_one_rank[directory],) = ranks.run(1, forward, str(directory), {})
    return _one_rank[directory]


def forward_and_update(
    rank: int, directory: str, parallel: dict, tokens: int, aggregation: str, loss: str
) -> list[dict]:
    """One training step with made-up advantages on one rank: a dict of sums and the gradient norm for each update."""
    layout = {name: size for name, size in parallel.items() if name != "data"}
    policy = make_policy(directory, layout, aggregation, loss=loss)
    return train_step(policy, parallel, tokens, aggregation)


def train_step(policy, parallel: dict, tokens: int = PAIRS, aggregation: str = "token_mean") -> list[dict]:
    """The updates of `whole_step`."""
    return whole_step(policy, parallel, tokens, aggregation)[-1]


def whole_step(
    policy, parallel: dict, tokens: int, aggregation: str = "token_mean"
) -> tuple[np.ndarray, ForwardOutput, list[dict]]:
    """One training step with made-up advantages on one rank: the rows of its data-parallel rank, their forward pass,
    and a dict of sums and the gradient norm for each update."""
    whole = train_batch()
    whole.advantages_B = np.random.default_rng(1).standard_normal(RESPONSES).astype(np.float32)
    whole.loss_weights_B = loss_weights(whole, aggregation)
    work = scheduled(whole, MINIBATCHES_B, parallel, tokens)
    from megatron.core import parallel_state

    data = parallel_state.get_data_parallel_rank()
    mine, minibatches = whole.select(work.rows[data]), work.micro_batches[data]
    output = policy.forward(mine, [rows for minibatch in minibatches for rows in minibatch])
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (data, output))
    (found,) = [result for rank, result in everyone if result is not None and rank == data]
    mine.logprobs_R, mine.entropy_R = found.logprobs_R, found.entropy_R
    updates = [
        {**update.token_sums, **({"loss": update.loss} if update.token_sums else {}), "grad_norm": update.grad_norm}
        for update in policy.update(mine, minibatches, step=0)
    ]
    return work.rows[data], found, updates


def loss_weights(batch: TrainBatch, aggregation: str) -> np.ndarray:
    weights_B = np.zeros(RESPONSES, dtype=np.float32)
    for minibatch in (0, 1):
        rows = np.flatnonzero(minibatch == MINIBATCHES_B)
        lengths_B = torch.from_numpy(batch.drawn_lengths_B[rows])
        weights_B[rows] = aggregation_weights(
            lengths_B,
            aggregation,
            total_tokens=int(lengths_B.sum()),
            total_responses=len(rows),
            max_response_tokens=MAX_TOKENS,
        ).numpy()
    return weights_B


def add_up(results: list[list[dict]], parallel: dict) -> list[dict]:
    """Each update's sums over the ranks that have some, and the gradient norm that all ranks must share."""
    whole = []
    for updates in zip(*results, strict=True):
        norms = {update["grad_norm"] for update in updates}
        assert max(norms) - min(norms) <= 1e-6 * max(norms)
        of_last_stage = [update for update in updates if "loss" in update]
        total = {name: sum(update[name] for update in of_last_stage) for name in of_last_stage[0]}
        # The ranks of a replica's last stage all have the same sums.
        copies = len(of_last_stage) // parallel.get("data", 1)
        whole.append({**total, "grad_norm": max(norms), "loss": total["loss"] / copies})
    return whole


def make_policy(
    directory: str,
    parallel: dict,
    aggregation: str = "token_mean",
    norm: str = "last",
    dtype: str = "float32",
    loss: str = "ppo",
):
    """The policy of a rank, whose groups are made with the first."""
    from megatron.core import parallel_state

    from meds_megatron.actor.policy import Policy
    from meds_megatron.actor.process_group import form_groups
    from meds_megatron.config import Config, ParallelConfig

    config = Config(parallel=ParallelConfig(**parallel))
    config.model.dtype, config.memory.norm = dtype, norm
    config.rollout.max_prompt_tokens = config.rollout.max_response_tokens = MAX_TOKENS
    config.policy.aggregation, config.policy.loss = aggregation, loss
    # Large enough that the second update of a step depends on what the first one did.
    config.optimizer.lr, config.optimizer.warmup_steps = 1e-3, 1
    # Adam's first step is a gradient over its own size: with a smaller epsilon rounding decides the sign of those that
    # are all but zero.
    config.optimizer.epsilon = 1e-6
    if not parallel_state.model_parallel_is_initialized():
        form_groups(config.parallel, seed=0)
    return Policy(config, directory, this_device())


_models: dict[str, Path] = {}


def cached_model(tmp_path_factory, name: str) -> Path:
    """The model `name`, made once a test run."""
    if name not in _models:
        _models[name] = make_model(tmp_path_factory.mktemp("models") / name, name)
    return _models[name]


def transformers_answers(directory: Path, norm: str = "last") -> ForwardOutput:
    """The same numbers from transformers, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    batch = train_batch()
    logprobs, entropies = [], []
    fingerprints_BL = np.zeros((RESPONSES, model.config.num_hidden_layers), dtype=np.float32)
    for row in range(RESPONSES):
        tokens_T = torch.from_numpy(batch.tokens_T[batch.offsets_B1[row] : batch.offsets_B1[row + 1]])
        # The input of the final norm is the one state that transformers does not return.
        unnormed = []
        hook = model.model.norm.register_forward_pre_hook(lambda _m, inputs, kept=unnormed: kept.append(inputs[0]))
        with torch.no_grad():
            output = model(tokens_T[None], output_hidden_states=True)
        hook.remove()
        drawn = np.flatnonzero(batch.loss_mask_T[batch.offsets_B1[row] : batch.offsets_B1[row + 1]])
        all_TV = output.logits[0].log_softmax(-1)
        logprobs.append(all_TV[drawn - 1, tokens_T[drawn]])
        entropies.append(-(all_TV.exp() * all_TV).sum(-1)[drawn - 1])
        position = batch.answer_positions_B[row]
        if position >= 0:
            head_row_H = model.lm_head.weight[tokens_T[position + 1]]
            states = list(output.hidden_states[1:])
            if norm == "none":
                states[-1] = unnormed[0]
            if norm == "all":
                states[:-1] = [model.model.norm(state) for state in states[:-1]]
            hidden_LH = torch.stack([h[0, position] for h in states])
            fingerprints_BL[row] = (hidden_LH @ head_row_H).detach().numpy()
    return ForwardOutput(torch.cat(logprobs).numpy(), torch.cat(entropies).numpy(), fingerprints_BL)

"""Small Qwen models and a batch of ragged responses, with what transformers makes of them."""

from pathlib import Path

import numpy as np
import torch

from meds_megatron.actor.messages import ForwardResult
from meds_megatron.actor.step_data import StepData
from meds_megatron.trainer.partition import balance

MODELS = ["qwen2 tied", "qwen2 untied", "qwen3 tied", "qwen3 untied"]
VOCAB = 260
LAYERS = 4
HIDDEN = 64
RESPONSES = 7
WITH_ANSWER = 5


def make_model(directory: Path, name: str, spread: float = 0.1) -> Path:
    """Writes a random model with norms and biases away from their initial values, so that each one matters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(MODELS.index(name))
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
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


def step_data() -> StepData:
    """Seven sequences of different lengths, two of them without a fingerprint, in two mini-batches."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, VOCAB, size).tolist() for size in (3, 5, 4, 7, 3, 6, 5)]
    responses = [random.integers(0, VOCAB, size).tolist() for size in (9, 4, 12, 6, 1, 8, 10)]
    data = StepData.of_responses(
        prompts,
        responses,
        logprobs=[[0.0] * len(r) for r in responses],
        answer_positions=[3, 0, 10, -1, -1, 6, 2],
        groups=list(range(RESPONSES)),
    )
    data.minibatches_B = np.array([0, 1, 0, 1, 0, 1, 0])
    lengths_B = data.response_lengths_B
    data.minibatch_tokens_M = np.array([lengths_B[data.minibatches_B == m].sum() for m in (0, 1)])
    data.minibatch_responses_M = np.array([(data.minibatches_B == m).sum() for m in (0, 1)])
    return data


def forward(
    rank: int, directory: str, parallel: dict, micro_batch: int = 2, norm: str = "last", dtype: str = "float32"
) -> ForwardResult | None:
    """What our policy makes of `step_data`, on one rank of a layout."""
    return make_policy(directory, parallel, micro_batch, norm=norm, dtype=dtype).forward(step_data())


def forward_in_order(rank: int, directory: str, parallel: dict, micro_batch: int, order) -> ForwardResult | None:
    """The same for the responses in another order."""
    return make_policy(directory, parallel, micro_batch).forward(step_data().select(order))


def bytes_sent(rank: int, directory: str, parallel: dict) -> int:
    """What taking the fingerprints sends from this rank to other stages."""
    from meds_megatron.actor.fingerprint import FingerprintCollector

    collector = FingerprintCollector(make_policy(directory, parallel).chunks, step_data(), "last", "cpu")
    collector.gather(RESPONSES)
    return collector.sent_bytes


_one_rank: dict[Path, ForwardResult] = {}


def on_one_rank(ranks, directory: Path) -> ForwardResult:
    """What a single rank makes of `step_data`."""
    if directory not in _one_rank:
        (_one_rank[directory],) = ranks.run(1, forward, str(directory), {})
    return _one_rank[directory]


def forward_and_update(rank: int, directory: str, parallel: dict, micro_batch: int, loss: str) -> list[dict]:
    """One training step with made-up advantages on one rank: a dict of sums and the gradient norm for each update."""
    parallel = dict(parallel)
    data_parallel = parallel.pop("data", 1)
    policy = make_policy(directory, parallel, micro_batch, loss)
    whole = step_data()
    whole.advantages_B = np.random.default_rng(1).standard_normal(RESPONSES).astype(np.float32)
    shares = balance(whole.lengths_B, whole.minibatches_B, data_parallel)
    from megatron.core import parallel_state

    mine = whole.select(shares[parallel_state.get_data_parallel_rank()])
    results = policy.forward(mine)
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (parallel_state.get_data_parallel_rank(), results))
    (spoken,) = [r for rank, r in everyone if r is not None and rank == parallel_state.get_data_parallel_rank()]
    mine.logprobs_R, mine.entropy_R = spoken.logprobs_R, spoken.entropy_R
    return [{**result.sums, "grad_norm": result.grad_norm} for result in policy.update(mine, step=0)]


def add_up(results: list[list[dict]]) -> list[dict]:
    """Each update's sums over the ranks that have some, and the gradient norm that all ranks must share."""
    whole = []
    for updates in zip(*results, strict=True):
        norms = {update["grad_norm"] for update in updates}
        assert max(norms) - min(norms) <= 1e-6 * max(norms)
        speaking = [update for update in updates if "loss" in update]
        total = {name: sum(update[name] for update in speaking) for name in speaking[0]}
        # Tensor-parallel ranks of the last stage all have the same sums.
        replicas = len({tuple(update.items()) for update in speaking})
        whole.append({**total, "grad_norm": max(norms), "loss": total["loss"] * replicas / len(speaking)})
    return whole


def make_policy(
    directory: str,
    parallel: dict,
    micro_batch: int = 2,
    loss: str = "token_mean",
    norm: str = "last",
    dtype: str = "float32",
):
    from meds_megatron.actor.policy import Policy
    from meds_megatron.actor.process_group import form_groups
    from meds_megatron.config import Config, ParallelConfig

    config = Config(parallel=ParallelConfig(**parallel))
    config.model.dtype, config.memory.norm = dtype, norm
    config.rollout.max_prompt_tokens = config.rollout.max_response_tokens = 16
    config.train.micro_batch_responses = micro_batch
    config.policy.aggregation = loss
    # Large enough that the second update of a step depends on what the first one did.
    config.optimizer.lr, config.optimizer.warmup_steps = 1e-3, 1
    form_groups(config.parallel, seed=0)
    return Policy(config, directory, "cpu")


_models: dict[str, Path] = {}


def cached_model(tmp_path_factory, name: str) -> Path:
    """The model `name`, made once a test run."""
    if name not in _models:
        _models[name] = make_model(tmp_path_factory.mktemp("models") / name, name)
    return _models[name]


def transformers_answers(directory: Path, norm: str = "last") -> ForwardResult:
    """The same numbers from transformers, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    data = step_data()
    logprobs, entropies, fingerprints_BL = [], [], np.zeros((RESPONSES, LAYERS), dtype=np.float32)
    for row in range(RESPONSES):
        tokens_T = torch.from_numpy(data.tokens_T[data.offsets_B1[row] : data.offsets_B1[row + 1]])
        # What enters the final norm is the one state that transformers does not hand out.
        unnormed = []
        hook = model.model.norm.register_forward_pre_hook(lambda _m, inputs, kept=unnormed: kept.append(inputs[0]))
        with torch.no_grad():
            output = model(tokens_T[None], output_hidden_states=True)
        hook.remove()
        prompt = int(data.prompt_lengths_B[row])
        all_TV = output.logits[0].log_softmax(-1)
        logprobs.append(all_TV[:-1].gather(1, tokens_T[1:, None])[prompt - 1 :, 0])
        entropies.append(-(all_TV.exp() * all_TV).sum(-1)[prompt - 1 : -1])
        position = data.answer_positions_B[row]
        if position >= 0:
            head_row_H = model.lm_head.weight[tokens_T[position + 1]]
            states = list(output.hidden_states[1:])
            if norm == "none":
                states[-1] = unnormed[0]
            if norm == "all":
                states[:-1] = [model.model.norm(state) for state in states[:-1]]
            hidden_LH = torch.stack([h[0, position] for h in states])
            fingerprints_BL[row] = (hidden_LH @ head_row_H).detach().numpy()
    return ForwardResult(torch.cat(logprobs).numpy(), torch.cat(entropies).numpy(), fingerprints_BL)

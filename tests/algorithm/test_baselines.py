"""One small mini-batch, done by hand for MEDS and for every baseline, from scores to loss, with the configs' settings.

Four responses of one prompt: the first is right (1 token), the others are wrong (1, 1 and 3 tokens). The policy made
the right token 1.3 times as likely since the rollout; the other tokens are as they were. Every token's entropy is 1.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from meds_megatron.algorithm.advantages import AdvantageInputs, compute_advantages, shape_token_advantages
from meds_megatron.algorithm.aggregation import aggregation_weights
from meds_megatron.algorithm.group_filter import keep_groups
from meds_megatron.algorithm.losses import policy_loss
from meds_megatron.config import Config, load_config
from meds_megatron.reward.scores import penalties, shape_scores
from tests.algorithm.micro_batches import micro_batch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = CONFIGS / "meds_qwen2.5_math_7b.yaml"

CORRECT_B = np.array([True, False, False, False])
LENGTHS_B = torch.tensor([1, 1, 1, 3])
CLUSTER_SIZES_B = np.array([0, 0, 1, 7])
ANSWERS_B = torch.tensor([4, 0, 3, 3])
HISTORY_SIZES_B = np.array([0, 0, 12, 12])
MAX_RESPONSE_TOKENS = 10


def advantages_and_loss(config: Config) -> tuple[list[float], float]:
    """(advantages of the first token of each response, loss of the mini-batch)."""
    sizes_B = HISTORY_SIZES_B if config.memory.method == "single" else CLUSTER_SIZES_B
    penalties_B = penalties(sizes_B, config.penalty.alpha)
    scores_B = torch.from_numpy(shape_scores(CORRECT_B, CORRECT_B, penalties_B, config.penalty.target))
    groups_B = torch.zeros(4, dtype=torch.long)
    counts_B = torch.from_numpy(sizes_B)
    inputs = AdvantageInputs(scores_B, torch.from_numpy(CORRECT_B), groups_B, ANSWERS_B, counts_B)
    advantages_B = compute_advantages(inputs, config.advantage).advantages_B
    totals = dict(total_tokens=6, total_responses=4, max_response_tokens=MAX_RESPONSE_TOKENS)
    weights_B = aggregation_weights(LENGTHS_B, config.policy.aggregation, **totals)
    old_T = torch.full((6,), -2.0)
    inputs = micro_batch(
        old_T + torch.tensor([math.log(1.3), 0, 0, 0, 0, 0]),
        old_T,
        advantages_B.repeat_interleave(LENGTHS_B),
        weights_B.repeat_interleave(LENGTHS_B),
        LENGTHS_B,
        entropy=torch.ones(6),
    )
    advantages_T = shape_token_advantages(inputs, config.advantage).advantages_T
    loss = policy_loss(replace(inputs, advantages_T=advantages_T), config.policy).loss
    return advantages_T[:4].tolist(), loss.item()


@pytest.mark.parametrize(
    ("name", "advantages", "loss"),
    [
        # Scores 1, 0, 0, 0: mean 1/4, standard deviation 1/2. The right token's ratio is clipped to 1.28.
        ("dapo", [1.5, -0.5, -0.5, -0.5], (-1.5 * 1.28 + 5 * 0.5) / 6),
        # The same, clipped to 1.2.
        ("grpo", [1.5, -0.5, -0.5, -0.5], (-1.5 * 1.2 + 5 * 0.5) / 6),
        # Not divided by the standard deviation; tokens added up, divided by the length limit and the responses.
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25], (-0.75 * 1.2 + 5 * 0.25) / 10 / 4),
        # 0.4 H = 0.4 fits under half of 1.5; half of 0.5 is the bound of the others.
        ("grpo_entropy", [1.9, -0.25, -0.25, -0.25], (-1.9 * 1.2 + 5 * 0.25) / 6),
        # Four responses weigh the same; the right one's ratio is clipped to 1.0004.
        ("gspo", [1.5, -0.5, -0.5, -0.5], (-1.5 * 1.0004 + 3 * 0.5) / 4),
        # -weight A log pi: the right token's weight is its ratio, its log-prob -2 + ln 1.3; the others have 1 and -2.
        ("cispo", [1.5, -0.5, -0.5, -0.5], (-1.3 * 1.5 * (-2 + math.log(1.3)) + 5 * 0.5 * -2) / 6),
        # Shares 1/3 and 2/3 of the wrong answers: I = ln 3 and ln 1.5, H = 0.6365142, mean |A| = 1/2, so the changes
        # are 0.4 / 2 (I - H) / ln 3 = 0.0841240 and -0.0420620.
        (
            "edas",
            [1.5, -0.4158760, -0.5420620, -0.5420620],
            (-1.5 * 1.28 + 0.4158760 + 4 * 0.5420620) / 6,
        ),
        # Weight sqrt(1 - 1/4) = 0.8660254.
        ("f_grpo", [1.2990381, -0.4330127, -0.4330127, -0.4330127], (-1.2990381 * 1.2 + 5 * 0.4330127) / 6),
        # Bonuses 1, 1, 1 and 1 / sqrt 7 = 0.3779645, less 0.5, times 0.2.
        ("historical_counts", [1.6, -0.4, -0.4, -0.5244071], (-1.6 * 1.2 + 2 * 0.4 + 3 * 0.5244071) / 6),
        # Pairs: half of the six hold the right one, deviation 1/2; of the three that hold a given wrong one two are
        # wrong, mean 1/3.
        ("pass_at_k", [1.0, -1 / 3, -1 / 3, -1 / 3], (-1.2 + 5 / 3) / 6),
        # As with fingerprints, sizes 0, 1 and 7.
        (
            "meds_answer",
            [1.4829260, -0.3314311, -0.4571929, -0.6943028],
            (-1.4829260 * 1.28 + 0.3314311 + 0.4571929 + 3 * 0.6943028) / 6,
        ),
        # The first wrong answer has no box, the others have 12 predecessors, p = 0.2. Scores 1, 0, -0.2, -0.2: mean
        # 0.15, standard deviation 0.5744563.
        (
            "meds_single_cluster",
            [1.4796602, -0.2611165, -0.6092718, -0.6092718],
            (-1.4796602 * 1.28 + 0.2611165 + 4 * 0.6092718) / 6,
        ),
    ],
)
def test_baselines_by_hand(name, advantages, loss):
    pairs = ["advantage.pass_k=2"] if name == "pass_at_k" else []
    config = load_config(CONFIGS / "baselines" / f"{name}.yaml", [f"base={PUBLISHED}", *pairs])
    result = advantages_and_loss(config)
    assert result[0] == pytest.approx(advantages, abs=1e-5)
    assert result[1] == pytest.approx(loss, abs=1e-5)


def test_meds_by_hand():
    # p = 0, 0.1 ln 2 and 0.2: scores 1, 0, -0.0693147, -0.2, mean 0.1826713, standard deviation 0.5511592.
    advantages, loss = advantages_and_loss(load_config(PUBLISHED))
    assert advantages == pytest.approx([1.4829260, -0.3314311, -0.4571929, -0.6943028], abs=1e-5)
    assert loss == pytest.approx((-1.4829260 * 1.28 + 0.3314311 + 0.4571929 + 3 * 0.6943028) / 6, abs=1e-5)


def test_only_grpo_and_gspo_train_on_groups_that_are_all_right():
    correct_B, groups_B = torch.ones(4), torch.zeros(4, dtype=torch.long)
    assert not keep_groups(correct_B, groups_B).any()
    metrics = {path.stem: load_config(path).filter.metric for path in (CONFIGS / "baselines").glob("*.yaml")}
    grpo = {name for name, metric in metrics.items() if metric == "none"}
    assert grpo == {"grpo", "dr_grpo", "grpo_entropy", "gspo", "f_grpo", "historical_counts", "pass_at_k"}

import pytest
import torch

from meds_megatron.algorithm.aggregation import aggregation_weights


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Two responses of 1 and 3 tokens, each token's loss being 1 and 2 respectively.
        ("token_mean", (1 + 2 * 3) / 4),
        ("sequence_mean", (1 + 2) / 2),
        ("sequence_sum", (1 / 10 + 6 / 10) / 2),
    ],
)
def test_the_three_aggregations_by_hand(aggregation, expected):
    lengths_B = torch.tensor([1, 3])
    totals = dict(total_tokens=4, total_responses=2, max_response_tokens=10)
    weights_B = aggregation_weights(lengths_B, aggregation, **totals)
    losses_T = torch.tensor([1.0, 2.0, 2.0, 2.0])
    assert weights_B.dtype == torch.float32
    assert (weights_B.repeat_interleave(lengths_B) * losses_T).sum().item() == pytest.approx(expected)

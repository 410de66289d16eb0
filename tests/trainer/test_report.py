from types import SimpleNamespace

import numpy as np
import pytest

from meds_megatron.trainer.report import reward_metrics


@pytest.mark.parametrize(("target", "mean"), [("wrong", 0.25), ("right", 0.1), ("both", 0.2), ("none", 0.0)])
def test_the_mean_penalty_is_that_of_the_targeted_responses(target, mean):
    batch = SimpleNamespace(
        correct_B=np.array([False, False, True]),
        scores_B=np.array([0.0, 0.0, 1.0]),
        shaped_scores_B=np.array([-0.2, -0.3, 0.9]),
        penalties_B=np.array([0.2, 0.3, 0.1]),
    )
    assert reward_metrics(batch, target)["reward/penalty_mean"] == pytest.approx(mean)

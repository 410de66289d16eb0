"""Micro-batches at the edge of their budget, which random lengths seldom meet."""

import numpy as np
import pytest

from meds_megatron.actor.schedule import schedule


@pytest.mark.parametrize(("budget", "sizes"), [(10, [5, 6, 6]), (11, [6, 11])])
def test_a_micro_batch_is_filled_to_its_last_token_and_not_beyond(budget: int, sizes: list[int]) -> None:
    lengths_B = np.array([6, 6, 5])
    work = schedule(lengths_B, lengths_B, np.zeros(3, dtype=np.int64), ranks=1, micro_batch_tokens=budget)
    assert sorted(int(lengths_B[pack].sum()) for pack in work.micro_batches[0][0]) == sizes

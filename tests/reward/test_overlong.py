import numpy as np

from meds_megatron.config import OverlongConfig
from meds_megatron.reward.overlong import overlong_penalties


def test_edges_of_the_buffer():
    lengths_B = [0, 2559, 2560, 2561, 2816, 3071, 3072]
    penalties_B = overlong_penalties(np.array(lengths_B), 3072, OverlongConfig())
    np.testing.assert_allclose(penalties_B, [0, 0, 0, -1 / 512, -0.5, -511 / 512, -1], rtol=0, atol=0)
    assert not np.signbit(penalties_B[:3]).any()


def test_factor_and_buffer_are_used():
    config = OverlongConfig(buffer=4, factor=0.5)
    np.testing.assert_array_equal(overlong_penalties(np.array([12, 14, 16]), 16, config), [0, -0.25, -0.5])


def test_switched_off_it_takes_nothing():
    config = OverlongConfig(enabled=False, buffer=0)
    np.testing.assert_array_equal(overlong_penalties(np.array([1, 99]), 16, config), [0, 0])

"""Responses made of drawn and given stretches."""

import numpy as np

from meds_megatron.rollout.samples import Completion, Segment


def test_a_response_of_several_stretches():
    """Two turns of the policy with what it was given between them; weights change within the second turn."""
    first = Segment.drawn(np.array([10, 11, 12]), np.array([-1, -2, -3], np.float32), [(4, 0)])
    second = Segment.drawn(np.array([30, 31, 32]), np.array([-4, -5, -6], np.float32), [(4, 0), (5, 1), (7, 2)])
    completion = Completion((first, Segment.given(np.array([20, 21])), second), "", "stop")
    assert completion.token_ids_S.tolist() == [10, 11, 12, 20, 21, 30, 31, 32]
    assert completion.loss_mask_S.tolist() == [True] * 3 + [False] * 2 + [True] * 3
    assert completion.logprobs_R.tolist() == [-1, -2, -3, -4, -5, -6]
    assert completion.policy_versions_R.tolist() == [4, 4, 4, 4, 5, 7]
    assert completion.version_changes == [(4, 0), (5, 6), (7, 7)]


def test_a_response_of_one_stretch_is_not_copied():
    tokens, logprobs = np.array([1, 2]), np.zeros(2, np.float32)
    completion = Completion((Segment.drawn(tokens, logprobs, [(0, 0)]),), "", "stop")
    assert completion.token_ids_S is tokens and completion.logprobs_R is logprobs
    assert completion.loss_mask_S.all() and completion.version_changes == [(0, 0)]


def test_responses_of_an_evaluation_have_no_log_probs():
    completion = Completion((Segment.drawn(np.array([1, 2]), None, [(0, 0)]),), "", "length")
    assert len(completion.logprobs_R) == 0 and len(completion.policy_versions_R) == 2

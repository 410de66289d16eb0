import pytest

from meds_megatron.weights.resharding.transfer import CompletenessCheck


def test_every_parameter_once_is_complete():
    check = CompletenessCheck(["a", "b"])
    check.add("b")
    check.add("a")
    check.finish()


def test_a_repeated_parameter_is_named():
    check = CompletenessCheck(["a", "b"])
    check.add("a")
    with pytest.raises(ValueError, match=r"^a is twice in one weight update$"):
        check.add("a")


def test_a_parameter_that_the_model_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"^c is in a weight update, and the model has no such parameter$"):
        CompletenessCheck(["a"]).add("c")


def test_missing_parameters_are_named():
    check = CompletenessCheck("gfedcba")
    check.add("b")
    with pytest.raises(ValueError, match=r"^the weight update lacks a, c, d, e, f and 1 more$"):
        check.finish()

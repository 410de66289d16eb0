import pytest

from meds_megatron.weights.resharding.ledger import UpdateLedger


def test_every_parameter_once_is_complete():
    ledger = UpdateLedger(["a", "b"])
    ledger.take("b")
    ledger.take("a")
    ledger.check_complete()


def test_a_parameter_that_comes_twice_is_named():
    ledger = UpdateLedger(["a", "b"])
    ledger.take("a")
    with pytest.raises(ValueError, match="^a came twice in one weight update$"):
        ledger.take("a")


def test_a_parameter_that_does_not_belong_is_named():
    with pytest.raises(ValueError, match="^c came in a weight update, and the model has no such parameter$"):
        UpdateLedger(["a"]).take("c")


def test_missing_parameters_are_named():
    ledger = UpdateLedger("gfedcba")
    ledger.take("b")
    with pytest.raises(ValueError, match="^the weight update lacks a, c, d, e, f and 1 more$"):
        ledger.check_complete()

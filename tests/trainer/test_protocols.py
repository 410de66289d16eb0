"""Real, simulated and scripted parts of a run have what their protocols name, with the same parameters."""

import dis
import inspect

import pytest

from meds_megatron.bench.simulation import parts
from meds_megatron.faults.supervision import PendingResult
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.producer import GroupProducer
from meds_megatron.trainer import protocols
from meds_megatron.trainer.error_memory import ErrorMemory
from meds_megatron.trainer.policy_group import PolicyGroup
from meds_megatron.trainer.weight_sync import WeightSync
from tests import doubles

PARTS = {
    protocols.PendingCall: (PendingResult, parts.SimulatedPending, doubles.ScriptedCall),
    protocols.Policy: (PolicyGroup, parts.SimulatedPolicy, doubles.ScriptedPolicy),
    protocols.WeightSource: (PolicyGroup, doubles.ScriptedPolicy),
    protocols.Producer: (GroupProducer, doubles.ScriptedProducer),
    protocols.Engines: (EnginePool, parts.SimulatedEnginePool, doubles.ScriptedEnginePool),
    protocols.WeightUpdates: (WeightSync, parts.SimulatedWeightSync, doubles.ScriptedWeightSync),
    protocols.Memory: (ErrorMemory, parts.NoMemory),
}
OVERRIDABLE = {"_make_actor", "_end_actors", "_wait_for_any"}
"""Methods of EnginePool that pools of other than Ray's actors redefine."""


def differences(protocol: type, part: type) -> dict[str, str]:
    """Members of the protocol that the part lacks or has with other parameters, each with what the part has."""
    found = {}
    for name, member in vars(protocol).items():
        if name.startswith("_"):
            continue
        theirs = getattr(part, name, None)
        if isinstance(member, property):
            if not isinstance(theirs, property) and name not in attributes(part):
                found[name] = "missing"
        elif not inspect.isfunction(theirs):
            found[name] = "missing"
        elif parameters(theirs) != parameters(member):
            found[name] = str(inspect.signature(theirs))
    return found


def parameters(method) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]


def attributes(part: type) -> set[str]:
    """Names that the constructors of a class and its parents assign."""
    constructors = [vars(owner)["__init__"] for owner in part.__mro__[:-1] if "__init__" in vars(owner)]
    return {code.argval for init in constructors for code in dis.get_instructions(init) if code.opname == "STORE_ATTR"}


def test_every_protocol_is_compared():
    defined = {value for value in vars(protocols).values() if getattr(value, "_is_protocol", False)}
    assert {protocol for protocol in defined if protocol.__module__ == protocols.__name__} == set(PARTS)


@pytest.mark.parametrize(("protocol", "part"), [(protocol, part) for protocol, of in PARTS.items() for part in of])
def test_a_part_has_the_members_of_its_protocol(protocol, part):
    assert differences(protocol, part) == {}


@pytest.mark.parametrize("pool", [parts.SimulatedEnginePool, doubles.ScriptedEnginePool])
def test_a_pool_of_other_actors_overrides_what_depends_on_where_engines_run_and_nothing_else(pool):
    overridden = {name: method for name, method in vars(pool).items() if name in vars(EnginePool)}
    inherited = set(overridden) - {"__init__", "__doc__", "__module__"}
    assert inherited == OVERRIDABLE
    for name in OVERRIDABLE:
        assert parameters(overridden[name]) == parameters(getattr(EnginePool, name))


def test_members_that_are_missing_or_have_other_parameters_are_found():
    class Outdated:
        def __init__(self) -> None:
            self.versions = 0

        def update(self, weights): ...

        def refill(self, *, now=True): ...

    found = differences(protocols.WeightUpdates, Outdated)
    assert found == {
        "version": "missing",
        "update": "(self, weights)",
        "skip_update": "missing",
        "refill": "(self, *, now=True)",
    }

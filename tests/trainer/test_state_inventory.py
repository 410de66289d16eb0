"""Every source of randomness and all state that changes during a run, and where a resumed run has it from.

A new one fails here until it has a line: it is in the checkpoint, or it does not outlive what the line says.
"""

import ast
import re
from pathlib import Path

import pytest

from meds_megatron.data.sampler import PromptSampler
from meds_megatron.trainer.state import TrainerState

SOURCE = Path(__file__).resolve().parents[2] / "meds_megatron"
NOT_IN_A_RUN = (
    "bench",
    "data/duplicates.py",
    "toy_tasks",
    "evaluation",
    "report",
    "weights/conversion",
    "preflight",
    "sweeps",
)
"""Packages whose code no training step executes."""

CHECKPOINT = "in the checkpoint"
STEP = "empty between two steps"
START = "made again when the process starts, from the config and the checkpoint"
IN_FLIGHT = "empty between two steps or, with train.max_staleness, generated again: the prompts are in the checkpoint"
NO_EFFECT = "does not change what is learned"

RANDOMNESS = {
    "actor/checkpoint.py": CHECKPOINT,  # saves and restores the generators of a rank
    "actor/process_group.py": START,  # seeds them
    "data/sampler.py": "a function of the seed and the epoch, which are in the checkpoint",
    "cluster/fork_server.py": NO_EFFECT,  # name of a directory
    "cluster/slurm/job.py": NO_EFFECT,  # the token of a job's Ray cluster
    "cluster/ray_directory.py": NO_EFFECT,  # name of a directory and a token
    **dict.fromkeys(("weights/membership.py", "weights/sealed_store.py", "weights/store.py"), NO_EFFECT),  # secrets
    "weights/resharding/transport.py": NO_EFFECT,  # name of exported memory
    "reward/differences.py": "a function of the answers",
    "rollout/engine.py": CHECKPOINT,
    "trainer/processes.py": NO_EFFECT,  # name of a directory in shared memory
    "atomic.py": NO_EFFECT,  # name of a directory that is being written
    "run/wandb_run.py": NO_EFFECT,  # id of the wandb run
}
RANDOM = re.compile(
    r"(?:\w+\.)*(?:(?:random|secrets|uuid)\.\w+|torch\.rand\w*|manual_seed|set_random_seed|default_rng|SeedSequence|"
    r"multinomial|exponential_|normal_|uniform_|bernoulli\w*|dropout)"
)
"""Calls that draw random numbers or set a generator."""

MUTATORS = {
    "add",
    "append",
    "appendleft",
    "clear",
    "extend",
    "extendleft",
    "pop",
    "popleft",
    "put",
    "setdefault",
    "update",
}
CHANGING = {
    "_CopyingWriter": {"_plan": NO_EFFECT, "_planner": NO_EFFECT, "_results": NO_EFFECT},
    "PolicySave": {"_failure": NO_EFFECT, "_random_states_digest": NO_EFFECT},
    "BackgroundSave": {"digests": NO_EFFECT},
    "DigestFile": {"_hash": NO_EFFECT},
    "DigestedFiles": {"digests": NO_EFFECT},
    "FingerprintCollector": dict.fromkeys(("_micro_batch", "_places_N", "_values_NL", "sent_bytes"), STEP),
    "Policy": {"micro_batches_begun": NO_EFFECT},
    "Offload": {"_offloaded": NO_EFFECT, "_on_host": NO_EFFECT},
    "PolicyWorker": {
        "_copies": NO_EFFECT,
        "_policy": CHECKPOINT,
        "_save": NO_EFFECT,
        "_store": START,
        "_weight_sender": START,
    },
    "PromptSampler": {"_order": CHECKPOINT, "epoch": CHECKPOINT, "position": CHECKPOINT},
    "MemoryShard": {
        **dict.fromkeys(("_histories", "_moments", "_pending", "_step", "_totals"), CHECKPOINT),
        "_counts": STEP,
    },
    "StepCounts": dict.fromkeys(("hits", "lookups", "saturated", "size_sum"), STEP),
    "_Evaluation": {"depth": STEP, "position": STEP, "symbols": STEP},
    "GraderPool": {**dict.fromkeys(("_closed", "_futures", "_processes"), START), "verdicts": NO_EFFECT},
    "GraderProcess": {"since": NO_EFFECT},
    "RolloutEngine": {
        **dict.fromkeys(("_answers", "_claim", "_shared", "_stop_token_ids", "_tokenizer"), START),
        "llm": CHECKPOINT,  # its weights, by the first weight update, and its generators
        "_version": CHECKPOINT,
        **dict.fromkeys(("_finished", "_numbers"), IN_FLIGHT),
        **dict.fromkeys(("_interrupted", "_next_version"), STEP),
        "_update_failed": START,
        "work": NO_EFFECT,
    },
    "Engine": {"hung": START},
    "EngineHealth": dict.fromkeys(("failures_in_a_row", "restarts", "state"), START),
    "EnginePool": {
        **dict.fromkeys(("_holds", "asleep", "regenerated_prompts", "restarts"), STEP),
        "_queue": IN_FLIGHT,
        "finished_requests": NO_EFFECT,
    },
    "CompletenessCheck": {"_received": STEP},
    "Console": dict.fromkeys(("_rows", "_accuracy", "_validation", "_progress"), NO_EFFECT),
    "Interruption": dict.fromkeys(("_received", "_signal", "failed", "requested"), START),
    "RayProbe": {"_reached": NO_EFFECT},
    "HostCopies": {"_tensors": NO_EFFECT},
    "GroupProducer": {"_generating": IN_FLIGHT, "_grading": IN_FLIGHT},
    "_Grading": {"_unfinished": IN_FLIGHT},
    "GroupSchedule": {
        **dict.fromkeys(("_finished", "_generating"), IN_FLIGHT),
        **dict.fromkeys(("_batches", "_examined", "_is_open", "_kept", "_later_steps"), STEP),
        "_drawn": "of one step; a resumed run may generate as much again for its first step",
        **dict.fromkeys(("_recently_filtered", "_recently_kept"), "estimated again by a resumed run's first steps"),
        "version": CHECKPOINT,
    },
    "Collector": {"_finished": IN_FLIGHT, **dict.fromkeys(("_again", "_indices"), CHECKPOINT)},
    "Generation": {"_finished": IN_FLIGHT, "_weight_sync": CHECKPOINT},
    "Checkpointer": {
        **dict.fromkeys(("_newest", "_under_way"), START),
        **dict.fromkeys(("_policy_version", "_state"), CHECKPOINT),
    },
    "ErrorMemory": {"_pending": STEP, "_saving": NO_EFFECT},
    "Recovery": dict.fromkeys(("furthest", "in_a_row", "progressed", "stopping"), NO_EFFECT),
    "RunDirectory": {"_lock": START, "_skip_memory": START},
    "Supervisor": {"_started": START, "processes": START, "results_taken": NO_EFFECT},
    "PhaseTimer": dict.fromkeys(("_seconds", "_step_started", "entered", "phase", "since"), NO_EFFECT),
    "Job": dict.fromkeys(("_events", "_joined", "_ready", "_receivers", "_tasks", "cancelled"), NO_EFFECT),
    "NodeTask": dict.fromkeys(("_driver", "_ray_address", "_requested", "_send"), NO_EFFECT),
    "Placement": {"_known": START},
    "WeightSync": {"_connected": START, "version": CHECKPOINT},
    "HfWeights": {"dtypes": START},
    "WeightReceiver": {"checksums": STEP},
    "WeightSender": {
        **dict.fromkeys(("_stores", "groups"), START),
        "_local": STEP,
        "_staged": STEP,
    },
    "CudaIpc": dict.fromkeys(("_block", "_exported", "_opened"), START),
    "BlockAllocator": {"_taken": STEP},
    "SharedMemory": {"_claim": START},
    "SealedStore": {"_clones": START, "_inner": START},
    "TransferGroup": {"_group": START, "sent_bytes": NO_EFFECT},
    "ReshardTransfer": {"_completeness": STEP, "_receiver": START},
}
"""Attributes by class that are assigned after `__init__`, and where they come from."""


def sources() -> list[Path]:
    files = sorted(SOURCE.rglob("*.py"))
    return [file for file in files if not str(file.relative_to(SOURCE)).startswith(NOT_IN_A_RUN)]


def test_every_source_of_randomness_is_known():
    found = {str(file.relative_to(SOURCE)) for file in sources() if random_calls(ast.parse(file.read_text()))}
    assert found == set(RANDOMNESS)


def random_calls(module: ast.Module) -> list[str]:
    calls = [ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)]
    return [name for name in calls if RANDOM.fullmatch(name)]


@pytest.mark.parametrize("code", ["random.random()", "np.random.rand(3)", "x.exponential_()", "torch.randn(2).to(y)"])
def test_a_random_call_is_found(code):
    assert random_calls(ast.parse(code))


def test_every_changing_attribute_is_known():
    found: dict[str, set[str]] = {}
    for file in sources():
        for name, attributes in changing_attributes(ast.parse(file.read_text())).items():
            found.setdefault(name, set()).update(attributes)
    assert found == {name: set(attributes) for name, attributes in CHANGING.items()}


def changing_attributes(module: ast.Module) -> dict[str, set[str]]:
    """Attributes of `self` that methods other than `__init__` and `__enter__` assign or mutate, by class."""
    found: dict[str, set[str]] = {}
    for owner in (node for node in ast.walk(module) if isinstance(node, ast.ClassDef)):
        methods = [node for node in owner.body if isinstance(node, ast.FunctionDef)]
        for node in (n for m in methods if m.name not in ("__init__", "__enter__") for n in ast.walk(m)):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign | ast.Delete):
                targets = node.targets
            elif isinstance(node, ast.AugAssign | ast.AnnAssign):
                targets = [node.target]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                targets = [node.func.value]
            for target in targets:
                found.setdefault(owner.name, set()).update(attributes_of_self(target))
    return {name: attributes for name, attributes in found.items() if attributes}


def attributes_of_self(target: ast.expr) -> set[str]:
    if isinstance(target, ast.Tuple):
        return {name for element in target.elts for name in attributes_of_self(element)}
    while isinstance(target, ast.Subscript):
        target = target.value
    return {target.attr} if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self" else set()


@pytest.mark.parametrize(
    "code",
    [
        "self.new = 1",
        "self.a, self.new = 1, 2",
        "self.new += 1",
        "self.new: int = 1",
        "self.new[0] = 1",
        "del self.new[0]",
        "self.new.append(1)",
    ],
)
def test_a_new_attribute_is_found(code):
    module = ast.parse(f"class A:\n    def step(self):\n        {code}")
    assert "new" in changing_attributes(module)["A"]


def test_the_state_is_whole():
    """Every attribute of the TrainerState, and what its sampler draws next, comes back."""
    state = TrainerState(PromptSampler(7, seed=3))
    state.sampler.next(17)
    for number, name in enumerate(vars(state).keys() - {"sampler"}):
        setattr(state, name, number)
    copy = TrainerState(PromptSampler(7, seed=3))
    copy.load_state_dict(state.state_dict())
    assert {**vars(copy), "sampler": None} == {**vars(state), "sampler": None}
    assert copy.sampler.next(20) == state.sampler.next(20)

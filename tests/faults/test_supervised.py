"""Contents of Ray's errors about an actor that failed, with real actors."""

import os

import pytest
import ray

from meds_megatron.faults.supervised import failed_process, failure_reason

pytestmark = pytest.mark.usefixtures("shared_ray")


@ray.remote(num_cpus=0)
class Actor:
    def process(self) -> int:
        return os.getpid()

    def end(self) -> None:
        os._exit(3)

    def fail(self) -> None:
        raise ValueError("first line\nthe tensor is too large")


def error_of(actor, method: str) -> Exception:
    with pytest.raises(ray.exceptions.RayError) as raised:
        ray.get(getattr(actor, method).remote())
    return raised.value


@pytest.mark.parametrize(("method", "reason"), [("end", "exit"), ("fail", "the tensor is too large")])
def test_the_process_and_the_reason_are_found(method, reason):
    actor = Actor.remote()
    process = ray.get(actor.process.remote())
    error = error_of(actor, method)
    assert failed_process(error) == f"process {process} on {ray.util.get_node_ip_address()}"
    assert reason in failure_reason(error) and "\n" not in failure_reason(error)


def test_an_error_that_says_nothing_is_named_by_its_class():
    assert failure_reason(RuntimeError()) == "RuntimeError"
    assert failed_process(RuntimeError()) == "process unknown on an unknown node"

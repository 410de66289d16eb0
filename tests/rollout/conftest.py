import pytest


@pytest.fixture(scope="module")
def ray_cluster(cpu_engines, ray_processes):
    """A Ray of the module's own, for engines on the CPU."""


@pytest.fixture(scope="module")
def ray_processes():
    """A Ray of the module's own, with this directory's modules importable in its actors."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()

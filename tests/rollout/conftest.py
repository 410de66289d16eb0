import pytest


@pytest.fixture(scope="module")
def ray_cluster(cpu_engines):
    """A Ray of the module's own, with this directory's modules importable in its actors."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, obstacle


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    """A real Slurm of two nodes."""
    if reason := obstacle():
        pytest.skip(f"no Slurm of two nodes can be made here: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), shared=tmp_path_factory.getbasetemp())
    yield cluster
    cluster.close()

"""Exit codes of a Slurm job whose tasks end before they have said how the run ended."""

import pytest

from meds_megatron.errors import EXIT_FAILURE
from tests.cluster.slurm.test_job import run_job_of_one_task


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("status", "expected"), [(0, EXIT_FAILURE), (9, 9)])
def test_a_job_without_the_runs_exit_code_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, signal_handlers: None, status: int, expected: int
) -> None:
    assert run_job_of_one_task(monkeypatch, f"sys.exit({status})") == expected

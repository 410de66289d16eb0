"""`meds eval --regrade`: grades saved responses again, without generating."""

from collections.abc import Sequence
from pathlib import Path

from meds_megatron.config import RewardConfig
from meds_megatron.errors import UserError
from meds_megatron.evaluation.output import write_rows
from meds_megatron.evaluation.records import grade, read_records
from meds_megatron.evaluation.statistics import powers_of_two
from meds_megatron.evaluation.summary import Summary, summarise
from meds_megatron.reward.grading import GraderPool


def regrade(path: Path, graders: Sequence[str], ks: Sequence[int], workers: int, out: Path | None) -> list[Summary]:
    """Metrics of the responses in a file by each grader. With `out`, the rows with the new verdicts are written there.

    Raises UserError with file and row for what cannot be read, and for a k that no problem has enough responses for.
    """
    records = read_records(path)
    most = max(len(record.responses) for record in records)
    check_ks(ks, most)
    for grader in graders:
        with GraderPool(workers, RewardConfig.timeout_seconds, grader=grader) as pool:
            grade(records, pool)
    if out is not None:
        write_rows(out, {"regraded": str(path), "graders": list(graders)}, [record.to_row() for record in records])
    return [summarise(path.stem, records, grader, ks or powers_of_two(most)) for grader in graders]


def check_ks(ks: Sequence[int], responses: int) -> None:
    """Raises UserError for a k of pass@k that is larger than the number of responses."""
    if ks and max(ks) > responses:
        raise UserError(
            f"--k {max(ks)} needs as many responses to a problem, but there are {responses}: lower it, or raise "
            "--n-sampling"
        )

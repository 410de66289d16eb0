"""Responses of a run, as the report counts them."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from meds_megatron.report.responses import read_responses


def test_responses_whose_grading_failed_are_neither_answers_nor_mistakes(planted: Path, tmp_path: Path) -> None:
    table = pq.read_table(min((planted / "rollouts").iterdir()))
    rows = table.to_pylist()
    wrong = [row for row in rows if not row["correct"]]
    for row in wrong[::3]:
        row["outcome"] = "timeout"
    wrong[1]["outcome"] = "error"
    path = tmp_path / "step_000001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)

    found = read_responses([path])
    graded = [row for row in rows if row["outcome"] not in ("timeout", "error")]
    counted = {found.problems[problem].question: count for problem, _, count, _ in found.counts_G4.tolist()}
    assert counted == Counter(row["prompt"] for row in graded)
    assert len(found.wrong.row_W) == sum(not row["correct"] for row in graded)

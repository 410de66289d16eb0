"""`meds data`: training sets."""

from pathlib import Path

import click

from meds_megatron.commands.options import INTEGERS, Command, with_json
from meds_megatron.errors import UserError


@click.group()
def data() -> None:
    """Build and inspect training sets."""


@data.command(cls=Command, example="meds data unify --dapo dapo-math-17k.parquet --math math.jsonl --out train.parquet")
@click.option("--dapo", multiple=True, metavar="FILE", help="DAPO-Math-17K; may be given several times.")
@click.option("--math", multiple=True, metavar="FILE", help="Rows in the format of MATH; may be given several times.")
@click.option("--out", required=True, metavar="FILE", help="The parquet file to write.")
@click.option("--levels", type=INTEGERS, default="3,4,5", help="Levels of MATH that are kept.")
@click.option("--evaluation", multiple=True, metavar="FILE", help="Evaluation set to look for in the training set.")
@click.option("--remove-contaminated", is_flag=True, help="Leave out what is in an evaluation set.")
@with_json
def unify(dapo, math, out: str, levels, evaluation, remove_contaminated: bool) -> dict:
    """Make one training set of DAPO-Math-17K and MATH, each problem once.

    Problems are the same if their questions have the same words, or nearly the same words (Jaccard similarity 0.7 of
    three-word shingles, by MinHash-LSH) with the same numbers and answer. Those of the evaluation sets are listed in a
    jsonl file next to the output.
    """

    from meds_megatron.data.inspect import Described, summary
    from meds_megatron.data.unify import unify, write

    if not dapo and not math:
        raise UserError("expected --dapo FILE, --math FILE or both: name the data sets to unify")
    if not out.endswith(".parquet"):
        raise UserError(f"--out {out} does not end in .parquet: the training set is a parquet file")
    result = unify(dapo, math, levels, evaluation, remove_contaminated)
    described = [Described(p.source, str(p.level or ""), p.question, p.answer) for p in result.problems]
    return {
        "rows": dict(result.rows),
        "left out": dict(result.dropped),
        "problems": len(result.problems),
        "in evaluation sets": len(result.contaminated),
        "contaminated": [
            {name: pair[name] for name in ("id", "how", "evaluation")} for pair in result.contaminated[:20]
        ],
        "summary": summary(described),
        "files": [str(path) for path in write(result, Path(out))],
    }


@data.command(cls=Command, example="meds data inspect train.parquet")
@click.argument("file")
@with_json
def inspect(file: str) -> dict:
    """Count the problems in FILE by source, level and length, and name the first 20 rows that cannot be read."""

    from meds_megatron.data.inspect import inspect

    return inspect(Path(file))

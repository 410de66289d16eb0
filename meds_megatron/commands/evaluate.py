"""`meds eval`."""

import os
from pathlib import Path

import click

from meds_megatron.commands.options import INTEGERS, Command
from meds_megatron.errors import UserError


@click.command("eval", cls=Command, example="meds eval runs/mine --data aime24.jsonl --n-sampling 32 --k 1,8,32")
@click.argument("model", metavar="[MODEL_DIR]", required=False)
@click.option("--model_name_or_path", "model_name_or_path", metavar="DIR", help="MODEL_DIR, as LIMO has it.")
@click.option("--data", multiple=True, metavar="FILE", help="jsonl or parquet file; may be given several times.")
@click.option(
    "--data_name", "data_names", multiple=True, help="As LIMO has it: the data are in DATA_DIR/DATA_NAME/SPLIT.jsonl."
)
@click.option("--data_dir", default="data")
@click.option("--split", default="test")
@click.option("--surround_with_messages", is_flag=True, help="As LIMO has it: always, but for --prompt-type question.")
@click.option("--regrade", metavar="FILE", help="Grade the responses saved in FILE again, without generating.")
@click.option("--n-sampling", "--n_sampling", type=click.IntRange(min=1), default=1, help="Responses to each problem.")
@click.option("--k", type=INTEGERS, help="Of pass@k, with commas.  [default: powers of two]")
@click.option(
    "--temperature", type=click.FloatRange(min=0), help="0 is greedy.  [default: 0 for one response, 1 for several]"
)
@click.option("--top-p", "--top_p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0)
@click.option("--top-k", "--top_k", type=click.IntRange(min=-1), default=-1, help="-1 is off.")
@click.option(
    "--max-tokens", "--max_tokens", type=click.IntRange(min=1), help="Of a response.  [default: 8192, if they fit]"
)
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--start-idx", "--start_idx", type=click.IntRange(min=0), default=0, help="First problem.")
@click.option(
    "--end-idx", "--end_idx", type=click.IntRange(min=-1), default=-1, help="Problem to stop before; -1: all."
)
@click.option(
    "--prompt-type",
    "--prompt_type",
    type=click.Choice(["auto", "qwen-instruct", "question"]),
    default="auto",
    help="auto: as the run was trained, qwen-instruct (LIMO's) for a model of no run.",
)
@click.option("--enable-thinking/--no-thinking", default=None, help="Qwen3's thinking mode.  [default: the template's]")
@click.option(
    "--grader",
    "graders",
    type=click.Choice(["math_verify", "strict", "limo"]),
    multiple=True,
    default=("math_verify",),
    help="Rules of grading; several are reported side by side.",
)
@click.option("--fingerprints", is_flag=True, help="Report the top-1 eigenvalue ratio of the fingerprints.")
@click.option("--output-dir", "--output_dir", default="outputs", help="Where outputs are written and resumed.")
@click.option("--out", metavar="FILE", help="With --regrade: write the rows with the new verdicts to this jsonl file.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--address", help="Ray cluster whose GPUs to use (auto).  [default: this machine]")
@click.option("--engines", type=click.IntRange(min=1), help="vLLM engines.  [default: all GPUs; one without GPUs]")
@click.option("--tensor", type=click.IntRange(min=1), default=1, help="GPUs of an engine.")
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=256, help="Responses of an engine at once.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of an engine without GPUs.  [default: 1]")
@click.option(
    "--kv-cache-gib",
    type=click.FloatRange(min=0, min_open=True),
    help="KV cache of an engine's GPU.  [default: what vLLM finds free there; without GPUs 1]",
)
@click.option("--enforce-eager", is_flag=True, help="Skip vLLM's compilation: faster start, slower generation.")
@click.option("--workers", type=click.IntRange(min=1), help="Grader processes.  [default: one a core]")
def evaluate(
    model,
    model_name_or_path,
    data,
    data_names,
    data_dir,
    split,
    surround_with_messages,
    regrade,
    out,
    k,
    graders,
    workers,
    **options,
) -> None:
    """Evaluate a model as LIMO does: MODEL_DIR is a run, one of its checkpoints, or a Hugging Face directory.

    LIMO's own command lines work as they are, with `meds eval` in place of `python eval.py`.

    The responses of a data set go to OUTPUT_DIR/MODEL/DATA_SET/SETTINGS.jsonl in LIMO's fields, its metrics into a csv
    file and a plot next to it. The same command again resumes an evaluation that was interrupted. Engines start with
    seeds of their own for every response, so that neither batches nor interruptions change them.

    --regrade needs rows with `generated_responses` and `gold_answer` only. The last line that is printed is a JSON
    object with `n`, `accuracy` and `errors`.
    """

    from rich.console import Console

    from meds_megatron.evaluation.report import table
    from meds_megatron.evaluation.summary import last_line

    model = model or model_name_or_path
    data = (*data, *(f"{data_dir}/{name}/{split}.jsonl" for name in data_names))
    graders = tuple(dict.fromkeys(graders))
    workers = workers or len(os.sched_getaffinity(0))
    if regrade:
        from meds_megatron.evaluation.regrade import regrade as regrade_file

        if model or data:
            raise UserError("--regrade takes neither a model nor --data: leave them out")
        summaries = regrade_file(Path(regrade), graders, k or (), workers, Path(out) if out else None)
        files: list[Path] = []
    else:
        from meds_megatron.evaluation.evaluate import evaluate as run
        from meds_megatron.evaluation.settings import request_of

        summaries, files = run(request_of(model, data, k, graders, workers, **options))
    Console().print(table(summaries))
    for path in files:
        click.echo(path)
    click.echo(last_line(summaries, **({"files": [str(path) for path in files]} if files else {})))

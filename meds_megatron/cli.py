"""The `meds` command: one thin function a sub-command, which imports what it runs when it is called."""

import functools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import click

from meds_megatron.errors import RunFailed, Stopped, UserError

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Integers(click.ParamType):
    """Whole numbers from 1 on, separated by commas."""

    name = "integers"

    def convert(self, value, param, ctx) -> list[int]:
        if isinstance(value, list):
            return value
        numbers = [int(part) if part.strip().isdecimal() else 0 for part in value.split(",")]
        if min(numbers) < 1:
            self.fail(f"{value!r}: expected whole numbers from 1 on, separated by commas", param, ctx)
        return numbers


INTEGERS = Integers()


class Command(click.Command):
    """A command whose help ends with an example."""

    def __init__(self, *args, example: str, **kwargs):
        super().__init__(*args, epilog=f"\b\nExample:\n  {example}", **kwargs)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True})
@click.version_option(package_name="meds_megatron", message="%(prog)s %(version)s")
def cli() -> None:
    """Reinforcement learning of Qwen models with a memory of past mistakes (MEDS).

    Settings come from a YAML file (see configs/), and key=value after it override them: penalty.alpha=0.02.
    meds_megatron/config/schema.py explains every key.
    """


def with_config(command):
    """Adds the arguments CONFIG [KEY=VALUE]... and passes the command one validated Config."""

    @functools.wraps(command)
    def run(config: str, overrides: Sequence[str], **options):
        from meds_megatron.config import load_config
        from meds_megatron.config.validate import validate

        loaded = load_config(config, overrides)
        validate(loaded)
        return command(loaded, **options)

    return click.argument("config")(click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)(run))


def with_json(command):
    """Prints the dict that the command returns: as tables, or with --json as one JSON object on the last line.

    The exit status is 1 if the dict has the key `equal` and it is false.
    """

    @functools.wraps(command)
    def run(as_json: bool, **arguments) -> None:
        result = command(**arguments)
        if as_json:
            click.echo(json.dumps(result))
        else:
            show(result)
        if result.get("equal") is False:
            click.get_current_context().exit(EXIT_FAILURE)

    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, last.")(run)


@cli.command(cls=Command, example="meds train configs/meds_qwen3_8b.yaml cluster.nodes=4 penalty.alpha=0.02 name=mine")
@with_config
def train(config) -> None:
    """Train a model.

    The run directory (run_dir, by default runs/NAME) gets config.yaml with all settings, metrics.jsonl with a line a
    step, rollouts/ with every response, hf/ with the trained model.

    SIGTERM, SIGUSR1 and Ctrl-C stop the run between two steps and save it; a second one ends it at once. The exit
    status is then 75 (put the run back into the queue), or 130 after Ctrl-C; the same command continues.
    """
    from meds_megatron.trainer.main import train

    train(config)


@cli.command("eval", cls=Command, example="meds eval runs/mine --data aime24.jsonl --n-sampling 32 --k 1,8,32")
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
    file and a plot beside it. The same command again resumes an evaluation that was interrupted. Engines start with
    seeds of their own for every response, so that neither batches nor interruptions change them.

    --regrade needs rows with `generated_responses` and `gold_answer` only. The last line that is printed is a JSON
    object with `n`, `accuracy` and `errors`.
    """
    from pathlib import Path

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
        summaries, files = regrade_file(Path(regrade), graders, k or (), workers, Path(out) if out else None), []
    else:
        from meds_megatron.evaluation.evaluate import evaluate as run
        from meds_megatron.evaluation.settings import request_of

        summaries, files = run(request_of(model, data, k, graders, workers, **options))
    Console().print(table(summaries))
    for path in files:
        click.echo(path)
    click.echo(last_line(summaries, **({"files": [str(path) for path in files]} if files else {})))


@cli.command(cls=Command, example="meds plan configs/meds_qwen2.5_72b.yaml rollout.kv_cache_gib=40")
@click.option("--calibrate", metavar="RUN_DIR", help="Replace assumed times and lengths by those of a finished run.")
@click.option(
    "--network-gbit",
    type=click.FloatRange(min=0, min_open=True),
    help="Gbit/s of a node, each way.  [default: 3200 with GPUs]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_config
def plan(config, calibrate: str | None, network_gbit: float | None, as_json: bool) -> None:
    """Show what a run puts where, whether it fits, and how long a step takes.

    Needs no GPU and no model: the shapes of published Qwen2.5 and Qwen3 models are known by the last part of
    model.path. The exit status is 1 if the run does not fit; `meds train` then refuses it in the same words.
    """
    from meds_megatron.plan.plan import make_plan

    made = make_plan(config, calibrate, network_gbit)
    if as_json:
        click.echo(json.dumps(made.to_dict()))
    else:
        from rich.console import Console

        from meds_megatron.plan.render import show_plan

        show_plan(made, Console())
    if made.refusal:
        click.get_current_context().exit(EXIT_FAILURE)


@cli.command(cls=Command, example="meds check configs/quickstart.yaml")
@click.option("--links/--no-links", default=True, help="Measure an all-reduce between the ranks.")
@with_config
def check(config, links: bool) -> None:
    """Check the machines of a run before it starts.

    On every node: versions, devices, layer implementation, host name, free disk and shared memory, model and data
    readable, run directory writable; and the speed of the links in each parallel group. The exit status is 1 if
    something would fail. Every Slurm job runs it first, without the links.
    """
    from rich.console import Console
    from rich.table import Table

    from meds_megatron.trainer.check import check

    findings = check(config, links)
    table = Table("node", "what", "found", "")
    for finding in findings:
        table.add_row(finding.node, finding.what, finding.found, "ok" if finding.ok else "FAILS")
    Console().print(table)
    if not all(finding.ok for finding in findings):
        click.get_current_context().exit(EXIT_FAILURE)


@cli.command(cls=Command, example="meds sweep configs/sweeps/penalty_qwen7b.yaml")
@click.argument("file", metavar="SWEEP.yaml")
@click.option(
    "--executor",
    type=click.Choice(["auto", "slurm", "local"]),
    default="auto",
    help="Slurm jobs, or processes of this machine; auto is Slurm where there is an sbatch.",
)
def sweep(file: str, executor: str) -> None:
    """Train the runs of a sweep: grids and lists over any settings, with several seeds.

    The table of results is shown as it grows and is in results.csv in the sweep's directory. Runs that fail are tried
    again, and a sweep that was interrupted goes on where it stopped when it is started again. The exit status is 1 if a
    run failed for good. meds_megatron/launch/sweep_config.py explains every key of the file.
    """
    from meds_megatron.launch.sweep_runs import sweep_with_live_table

    rows = sweep_with_live_table(file, executor)
    if any(row["state"] == "failed" for row in rows):
        click.get_current_context().exit(EXIT_FAILURE)


@cli.command(cls=Command, example="meds report runs/meds runs/dapo --out compared.html")
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="The page.  [default: report.html, in RUN_DIR if there is only one]")
@click.option(
    "--text-mib",
    type=click.FloatRange(min=0),
    default=64.0,
    help="Limit of the responses' texts in the page, before compression; the most typical come first.",
)
def report(run_dirs: Sequence[str], out: str | None, text_mib: float) -> None:
    """Write a page that shows runs: their curves, and the mistakes that the model keeps making.

    The page is one file that needs no network. Several runs are drawn over each other. A run need not be finished.
    """
    from meds_megatron.report.page import write_report

    out = out or str(Path(run_dirs[0] if len(run_dirs) == 1 else ".") / "report.html")
    write_report(run_dirs, out, text_mib)
    click.echo(out)


@cli.group()
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
    jsonl file beside the output.
    """
    from pathlib import Path

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
    """Count the problems in FILE by source, level and length, and name the rows that cannot be read."""
    from pathlib import Path

    from meds_megatron.data.inspect import inspect

    return inspect(Path(file))


@cli.group()
def convert() -> None:
    """Convert models to megatron-core checkpoints and back, and compare models."""
    # megatron-core warns at every import about each optional package that is not installed.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")


@convert.command("to-mcore", cls=Command, example="meds convert to-mcore models/Qwen3-8B checkpoints/Qwen3-8B")
@click.argument("hf")
@click.argument("out")
def to_mcore(hf: str, out: str) -> None:
    """Convert the Hugging Face directory HF to the checkpoint OUT.

    OUT contains the weights in megatron-core's distributed format, which any parallel layout can load, in the dtypes
    of HF, and HF's configuration and tokenizer. Needs no GPU, and memory for one layer or the embedding.
    """
    from meds_megatron.weights.conversion.convert import to_mcore

    to_mcore(hf, out)


@convert.command("to-hf", cls=Command, example="meds convert to-hf checkpoints/step_000050 exported --dtype bfloat16")
@click.argument("checkpoint")
@click.argument("out")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="Of all weights.  [default: as saved]")
def to_hf(checkpoint: str, out: str, dtype: str | None) -> None:
    """Convert CHECKPOINT to the Hugging Face directory OUT.

    CHECKPOINT may have any parallel layout. Its configuration and tokenizer are copied, so that transformers and vLLM
    load OUT like the original model. Needs no GPU, and memory for about one layer or the embedding.
    """
    import torch

    from meds_megatron.weights.conversion.convert import to_hf

    to_hf(checkpoint, out, None if dtype is None else getattr(torch, dtype))


@convert.command(cls=Command, example="meds convert verify models/Qwen3-8B checkpoints/Qwen3-8B --text problems.txt")
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest difference of a weight, of any dtype.  [default: the same bits]",
)
@click.option("--text", type=click.File(encoding="utf-8"), help="Text for the log-probs.  [default: a built-in one]")
@click.option("--logprob-limit", type=click.FloatRange(min=0), default=1e-4, help="Largest difference of a log-prob.")
@click.option("--weights-only", is_flag=True, help="Do not compare log-probs.")
@with_json
def verify(a: str, b: str, tolerance: float | None, text, logprob_limit: float, weights_only: bool) -> dict:
    """Compare the models A and B.

    Each is a Hugging Face directory or a checkpoint. All weights are compared, one tensor at a time, then the log-probs
    of a text, computed in float32 by transformers with one model in memory at a time (a checkpoint is converted to a
    temporary directory under TMPDIR first). The exit status is 1 if they differ.
    """
    from meds_megatron.weights.conversion.verify import SAMPLE_TEXT, verify

    if weights_only:
        return verify(a, b, tolerance, text=None)
    return verify(a, b, tolerance, text.read() if text else SAMPLE_TEXT, logprob_limit)


@cli.group()
def bench() -> None:
    """Benchmark one part of a run on this machine."""


@bench.command(cls=Command, example="meds bench rollout configs/quickstart.yaml --json")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, help="Measured generations of each engine, after one warm-up."
)
@with_json
@with_config
def rollout(config, rounds: int) -> dict:
    """Tokens per second of a run's engine and of plain vLLM.

    Both generate the responses to one step's prompts, alternately, with the same model and sampling.
    """
    from meds_megatron.bench.run import rollout

    return rollout(config, rounds)


@bench.command("eval", cls=Command, example="meds bench eval --json")
@click.option("--responses", type=click.IntRange(min=1), default=8, help="To each of 200 problems.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Measured generations, after one warm-up.")
@click.option("--answers", type=click.IntRange(min=1), default=2000, help="Answers that are graded.")
@click.option("--workers", type=click.IntRange(min=1), default=2, help="Grader processes.")
@with_json
def bench_eval(responses: int, rounds: int, answers: int, workers: int) -> dict:
    """Tokens per second of `meds eval` and of plain vLLM, and seconds of grading.

    Both generate the same responses of the embedded arithmetic model, alternately.
    """
    from meds_megatron.bench.evaluation import run

    return run(responses, rounds, answers, workers)


@bench.command(cls=Command, example="meds bench phases configs/quickstart.yaml --steps 5 --json")
@click.option("--steps", type=click.IntRange(min=1), default=5, help="Measured steps, after one warm-up step.")
@with_json
@with_config
def phases(config, steps: int) -> dict:
    """Seconds of each phase of a training step.

    Runs `meds train` in a temporary run directory without validation and export.
    """
    from meds_megatron.bench.run import phases

    return phases(config, steps)


@bench.command(cls=Command, example="meds bench step --model Qwen2.5-1.5B --layers 2 --json")
@click.option(
    "--model",
    "models",
    multiple=True,
    default=("Qwen2.5-1.5B", "Qwen2.5-7B"),
    help="Published model whose shape is taken; may be given several times.",
)
@click.option("--layers", type=click.IntRange(min=1), default=1, help="Layers of it.")
@click.option("--responses", type=click.IntRange(min=4), default=16, help="Synthetic responses of a step.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, help="Measured steps of each form, after a warm-up.")
@with_json
def step(models: Sequence[str], layers: int, responses: int, rounds: int) -> dict:
    """Tokens per second of a policy's forward pass with fingerprints and update.

    Packed micro-batches against padded rectangles of 4 responses and a plain loop of transformers and torch's AdamW, on
    responses of long-tailed lengths (mean 300, longest 2000 tokens): on a GPU in bfloat16, else on one CPU core in
    float32.
    """
    from meds_megatron.bench.step import run

    return run(models, layers, responses, rounds)


@bench.command(cls=Command, example="meds bench fingerprint --responses 8 --tokens 64 --json")
@click.option("--responses", type=click.IntRange(min=1), default=8, help="Responses with a fingerprint.")
@click.option("--tokens", type=click.IntRange(min=4), default=64, help="Length of each sequence.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Measured forward passes of each kind.")
@with_json
def fingerprint(responses: int, tokens: int, rounds: int) -> dict:
    """Time and memory that fingerprints add to a forward pass.

    Shape of Qwen2.5-0.5B with random weights on two pipeline stages (one GPU each, on a single GPU one stage, without
    GPUs two CPU threads): without fingerprints, with ours, and with the published method, which keeps all hidden states
    and applies the full head to every layer.
    """
    from meds_megatron.bench.fingerprint import run

    return run(responses=responses, tokens=tokens, rounds=rounds)


@bench.command(cls=Command, example="meds bench memory --history 64 --history 1600 --json")
@click.option(
    "--history",
    "histories",
    type=click.IntRange(min=2),
    multiple=True,
    default=(16, 64, 256, 800, 1600),
    help="Stored vectors of each problem; may be given several times.",
)
@click.option("--keys", type=click.IntRange(min=1), default=512, help="Problems in a step.")
@click.option("--new", type=click.IntRange(min=1), default=12, help="New vectors of each problem.")
@with_json
def memory(histories: Sequence[int], keys: int, new: int) -> dict:
    """CPU seconds of the error memory in a step.

    Measured on one thread: against clustering from scratch, over several shards, and with a million problems.
    """
    from meds_megatron.bench.memory import run

    return run(histories=histories, keys=keys, new=new)


@bench.command(cls=Command, example="meds bench checkpoint --directory /scratch --json")
@click.option("--directory", type=click.Path(file_okay=False, exists=True), help="Where to save.  [default: system's]")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="Measured saves of each kind.")
@with_json
def checkpoint(directory: str | None, rounds: int) -> dict:
    """Time that training waits for a checkpoint.

    An asynchronous save of model and optimizer against a synchronous one: shape of Qwen2.5-0.5B with random weights on
    two CPU pipeline stages; needs 18 GiB of memory and 7 GiB of disk.
    """
    from meds_megatron.bench.checkpoint import run

    return run(directory, rounds=rounds)


@bench.command(cls=Command, example="meds bench reshard --json")
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="Measured updates of each method.")
@click.option("--network-gbit", type=float, default=400.0, help="Gbit/s of a node, each way.")
@click.option("--local-gbyte", type=float, default=100.0, help="GB/s between GPUs of a node.")
@with_json
def reshard(rounds: int, network_gbit: float, local_gbyte: float) -> dict:
    """Time and bytes of a weight update of the engines.

    Measured for the shape of Qwen2.5-0.5B on CPU, from TP2 x PP2 to an engine of TP2: resharding against gathering the
    whole model. Computed for 7B, 32B and 72B models: the bytes of an update and a lower bound on its time.
    """
    from meds_megatron.bench.reshard import run
    from meds_megatron.bench.reshard_forecast import forecasts

    return run(rounds=rounds) | {"plans": forecasts(network_gbit, local_gbyte)}


def show(result: dict, indent: str = "") -> None:
    """Print a result: a line for each value, a table for each list of rows."""
    for name, value in result.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{name}")
            show(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            click.echo(f"{indent}{name}")
            rows = [list(value[0]), *([_cell(cell) for cell in row.values()] for row in value)]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                click.echo(f"{indent}  {'  '.join(cells)}")
        else:
            click.echo(f"{indent + name:<28} {_cell(value)}")


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; what has a sentence for the user is printed as one line, without
    a traceback."""
    try:
        return cli.main(arguments, prog_name="meds", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return EXIT_USER_ERROR
    except UserError as error:
        # An error raised in a Ray actor has Ray's traceback in its text; `cause` is the original.
        print(f"meds: {getattr(error, 'cause', error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Stopped as stop:
        print(f"meds: {stop}", file=sys.stderr)
        return stop.exit_code
    except RunFailed as error:
        print(f"meds: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except (KeyboardInterrupt, click.Abort):
        print("meds: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

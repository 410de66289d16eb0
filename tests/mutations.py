"""Mutation check: hand-made faults, and the tests that should catch them. python -m tests.mutations [NAME...]

Each fault is one change of one file, made in a temporary worktree of HEAD: the working tree is left alone, and what is
not committed takes no part. There the tests of the changed file run. A fault has escaped when all of them pass, and the
outcome is unclear when the test that fails also does without the fault; the exit status is then 1.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "meds_megatron"
CAUGHT, ESCAPED, UNCLEAR = "caught", "ESCAPED", "UNCLEAR"
STOP_SECONDS = 60
"""Time for pytest to end its fixtures' processes after a time-out."""
REASON_CHARACTERS = 100
"""Length of a failure's reason in the table."""


@dataclass(frozen=True)
class Mutation:
    """A fault: in `file`, a path within the package, the text `old`, which is there exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    breaks: str
    """Consequence of the fault."""
    tests: str
    """Test files of the changed file, separated by spaces."""


# fmt: off
FAST = [
    Mutation("ppo-sign", "algorithm/losses/ppo.py",
             "plain_T = -advantages_T * ratio_T", "plain_T = advantages_T * ratio_T",
             "unclipped tokens are pushed away from good answers",
             "tests/algorithm/test_ppo.py"),
    Mutation("cispo-clip-bound", "algorithm/losses/cispo.py",
             "1.0 + config.clip_high", "1.0 + config.clip_low",
             "the upper clip bound is that of the lower one",
             "tests/algorithm/test_cispo.py"),
    Mutation("advantage-std", "algorithm/advantages/group.py",
             "(sizes_G - 1).clamp(min=1)", "sizes_G",
             "the standard deviation of a group is the biased one",
             "tests/algorithm/test_advantages.py"),
    Mutation("filter-comparison", "algorithm/group_filter.py",
             "highest_G > lowest_G", "highest_G >= lowest_G",
             "groups without a spread are trained on",
             "tests/algorithm/test_group_filter.py"),
    Mutation("vote-tie", "memory/clustering.py",
             "label < best_label", "label > best_label",
             "a tied vote goes to the largest label, noise loses every tie",
             "tests/memory/test_rules.py"),
    Mutation("file-fsync", "atomic.py",
             "os.fsync(file.fileno())", "pass",
             "a saved memory can be empty after a power cut although it has its name",
             "tests/test_atomic.py tests/memory/test_snapshot.py"),
    Mutation("schedule-room", "actor/schedule.py",
             "lengths_B[row] > room[loads[0][1]]", "lengths_B[row] > room[loads[0][1]] + 1",
             "a micro-batch may have one token too many",
             "tests/actor/test_schedule.py tests/actor/test_schedule_room.py"),
    Mutation("kv-head-slice", "weights/resharding/plan.py",
             "first = rank * shape.num_kv_heads // size * shape.head_dim",
             "first = rank % shape.num_kv_heads * shape.head_dim",
             "engine ranks that share key and value heads get those of other queries",
             "tests/weights/resharding/test_plan.py"),
    Mutation("gate-up-order", "weights/table.py",
             'for half in ("gate", "up")', 'for half in ("up", "gate")',
             "the halves of the feed-forward layer are swapped in Megatron",
             "tests/weights/test_split_merge.py tests/weights/test_table.py"),
    Mutation("answer-position", "rollout/answer_position.py",
             "while end >= opening.end():", "while end > opening.end():",
             "the fingerprint is taken one token late where the brace ends a token",
             "tests/rollout/test_answer_position.py"),
    Mutation("staleness-deadline", "rollout/group_schedule.py",
             "version + self.max_staleness <= d", "version + self.max_staleness < d",
             "a step trains on groups that are one version too old",
             "tests/rollout/test_group_schedule.py"),
    Mutation("grading-equality", "reward/answers.py",
             "if plain_answer == plain_truth:", "if plain_answer.lower() == plain_truth.lower():",
             "r - R is accepted for R - r",
             "tests/reward/test_answers.py tests/reward/test_letter_case.py"),
    Mutation("policy-version", "trainer/weight_sync.py",
             "self.version += 1\n        self._load(self._pool.ready())", "self._load(self._pool.ready())",
             "new weights have the version of the old ones",
             "tests/trainer/test_weight_sync.py"),
    Mutation("checkpoint-fsync", "atomic.py",
             "sync(Path(folder, name))", "pass",
             "a checkpoint is marked complete before its files are on disk",
             "tests/run/test_checkpoint_files.py tests/run/test_checkpoint_sync.py"),
    Mutation("layout-product", "config/layout.py",
             "model_ranks = parallel.tensor * parallel.context * parallel.pipeline",
             "model_ranks = parallel.tensor * parallel.pipeline",
             "the data-parallel size ignores context parallelism",
             "tests/config/test_layout.py"),
    Mutation("sampler-epoch", "data/sampler.py",
             "default_rng([self.seed, epoch])", "default_rng(self.seed)",
             "every epoch has the same order",
             "tests/data/test_sampler.py"),
    Mutation("pass-at-k", "evaluation/statistics.py",
             "1.0 - math.comb(responses - right, k) / math.comb(responses, k)", "1.0 - (1.0 - right / responses) ** k",
             "pass@k is the biased estimate",
             "tests/evaluation/test_evaluation_statistics.py"),
    Mutation("report-counts", "report/responses.py",
             "np.bincount(group_B, graded_B, len(problem_G))", "np.bincount(group_B, minlength=len(problem_G))",
             "responses whose grading failed are counted as wrong answers to a problem",
             "tests/report/test_find_mistakes.py tests/report/test_report_files.py tests/report/test_responses.py"),
]
"""Caught by tests that start no process."""

PROCESS = [
    Mutation("job-exit-code", "cluster/slurm/job.py",
             " or EXIT_FAILURE", "",
             "a Slurm job whose tasks end before the run has an exit code counts as a success",
             "tests/cluster/slurm/test_job.py tests/cluster/slurm/test_job_exit_codes.py"),
]
"""Caught by tests that start processes of their own."""

RANKS = [
    Mutation("logprob-temperature", "actor/logprobs.py",
             "grad_CV.mul_(grad_R[part, None] / temperature)", "grad_CV.mul_(grad_R[part, None])",
             "the gradient of the log-probs leaves the temperature out",
             "tests/actor/test_logprobs.py"),
    Mutation("fingerprint-norm", "actor/fingerprint.py",
             'source = chunk.decoder.final_layernorm if is_last and self._norm != "none" else layer', "source = layer",
             "the last layer's value of a fingerprint is taken before the final norm",
             "tests/model/test_parity.py"),
    Mutation("checkpoint-entry", "actor/optimizer_state.py",
             'STATES = ("param", "exp_avg", "exp_avg_sq")', 'STATES = ("param", "exp_avg")',
             "Adam's second moment is missing in checkpoints",
             "tests/actor/test_checkpoint.py"),
    Mutation("seed-not-restored", "actor/checkpoint.py",
             'np.random.set_state(states["numpy"])', "pass",
             "numpy draws other numbers after a resume",
             "tests/actor/test_checkpoint.py"),
    Mutation("qk-norm", "model/gpt.py",
             "qk_layernorm=shape.qk_norm", "qk_layernorm=False",
             "Qwen3 is computed without its norms of q and k",
             "tests/model/test_parity.py"),
    Mutation("received-slice", "weights/resharding/transfer.py",
             "target.copy_(values)", "pass",
             "slices of columns that come over the network are not put in their place",
             "tests/weights/resharding/test_transfer.py"),
    Mutation("tied-head", "weights/conversion/checkpoint.py",
             "expected = [parameter.name for parameter in self.table.stored]", "expected = list(self.table.parameters)",
             "a checkpoint of a model with tied embeddings is refused for a head that it need not have",
             "tests/weights/conversion/test_convert.py"),
    Mutation("optimizer-bytes", "plan/sizes.py",
             '8 if dtype == "float32" else 12', '12 if dtype == "float32" else 8',
             "the plan takes the optimizer's bytes of one dtype for those of the other",
             "tests/plan/test_sizes.py"),
]
"""Caught by tests that form process groups of trainer ranks."""

ENGINE = [
    Mutation("prefix-cache", "rollout/engine.py",
             "self._reset_prefix_cache()\n        # vLLM notes", "# vLLM notes",
             "engines continue from prefixes that old weights have computed",
             "tests/rollout/test_weight_update.py tests/rollout/test_in_flight_update.py"),
]
"""Caught by tests that start vLLM engines."""

RUN = [
    Mutation("warm-up-step", "trainer/loop.py",
             "batch.minibatches_B, state.step - 1)", "batch.minibatches_B, state.step)",
             "the learning rate is that of the next step",
             "tests/trainer/test_loop.py tests/trainer/test_replay.py"),
    Mutation("engine-random-states", "trainer/checkpointer.py",
             "self._pool.random_states()", "{}",
             "engines draw other responses after a resume",
             "tests/trainer/test_resume.py"),
]
"""Caught by tests that start whole runs."""
# fmt: on

TIERS = {"fast": FAST, "process": PROCESS, "ranks": RANKS, "engine": ENGINE, "run": RUN}
"""Mutations by the first tier of tests (tests/tiers.py) that should catch them."""


class MutationError(Exception):
    """A mistake in the table or the arguments, in one sentence."""


def chosen(names: list[str], tier: str | None) -> list[Mutation]:
    """The named mutations, or all; those of one tier if it is given."""
    everything = {mutation.name: mutation for mutations in TIERS.values() for mutation in mutations}
    if unknown := [name for name in names if name not in everything]:
        raise MutationError(f"there is no mutation {unknown[0]}: choose from {', '.join(everything)}")
    of_tier = TIERS[tier] if tier else everything.values()
    return [mutation for mutation in of_tier if not names or mutation.name in names]


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True)


@contextmanager
def worktree() -> Iterator[Path]:
    """A temporary worktree of HEAD, with the environment of this one."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as parent:
        copy = Path(parent) / "repository"
        git("worktree", "add", "--quiet", "--detach", str(copy), "HEAD")
        try:
            (copy / ".venv").symlink_to(ROOT / ".venv")
            yield copy
        finally:
            git("worktree", "remove", "--force", str(copy))


def check(mutation: Mutation, copy: Path) -> None:
    """Raises MutationError where the table does not fit the code."""
    if missing := [path for path in mutation.tests.split() if not (copy / path).exists()]:
        raise MutationError(f"{mutation.name}: {missing[0]} does not exist: name the tests of {mutation.file}")
    file = copy / PACKAGE / mutation.file
    found = file.read_text().count(mutation.old) if file.is_file() else 0
    if found != 1:
        raise MutationError(
            f"{mutation.name}: {PACKAGE}/{mutation.file} has {mutation.old!r} {found} times, expected once: "
            "correct the mutation"
        )


def apply(mutation: Mutation, copy: Path) -> None:
    file = copy / PACKAGE / mutation.file
    file.write_text(file.read_text().replace(mutation.old, mutation.new))


@dataclass(frozen=True)
class Failure:
    test: str
    """Id of the first test that failed, empty where pytest itself ended otherwise."""
    reason: str


def failure(tests: list[str], copy: Path, limit: float, log: Path) -> Failure | None:
    """Failure of `tests`, arguments of pytest; None where all pass. Output goes to `log`.

    Raises MutationError where there is no test.
    """
    command = [str(ROOT / ".venv" / "bin" / "python"), "-m", "pytest", "-x", "-q", *tests]
    variables = {"MEDS_TEST_DATA": str(ROOT.parent / "shared")} | os.environ | {"PYTHONPATH": str(copy)}
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, cwd=copy, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        return Failure("", f"time-out after {limit:.0f} s")
    finally:
        _end(process)
    text = log.read_text(errors="replace")
    if process.returncode == 0:
        return None
    if process.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise MutationError(f"pytest finds no test in {' '.join(tests)}: name files with tests")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - .*)?$", text, re.MULTILINE) or [""]
    reason = re.findall(r"^E +(\S.*)$", text, re.MULTILINE) or [f"pytest's exit code {process.returncode}"]
    return Failure(failed[0], reason[0][:REASON_CHARACTERS])


def _end(process: subprocess.Popen) -> None:
    """Ends pytest, if it still runs, and what is left of its processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description="Faults, and tests that see them.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations; default: all")
    parser.add_argument("--tests-of", choices=TIERS, help="only mutations of this tier; fast: also only its tests")
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS", help="for the tests of a mutation")
    parser.add_argument("--logs", type=Path, metavar="DIRECTORY", help="keeps pytest's output here")
    options = parser.parse_args(arguments)
    # Started in the background this process has SIGINT ignored, which pytest, ended by it, would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run(chosen(options.names, options.tests_of), options)
    except MutationError as error:
        print(f"mutations: {error}", file=sys.stderr)
        return 2


def run(mutations: list[Mutation], options: argparse.Namespace) -> int:
    """Prints a line for each mutation and one that counts them; the exit status."""
    with worktree() as copy:
        for mutation in mutations:
            check(mutation, copy)
    counts = Counter[str]()
    width = max((len(mutation.name) for mutation in mutations), default=0)
    with tempfile.TemporaryDirectory(prefix="mutation-logs-") as temporary:
        logs = (options.logs or Path(temporary)).absolute()
        logs.mkdir(parents=True, exist_ok=True)
        for mutation in mutations:
            began = time.monotonic()
            result, reason = outcome(mutation, options, logs)
            counts[result] += 1
            print(f"{mutation.name:{width}}  {result}: {reason}  {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(mutations)} faults: {counts[CAUGHT]} caught, {counts[ESCAPED]} escaped, {counts[UNCLEAR]} unclear")
    return int(counts[CAUGHT] < len(mutations))


def outcome(mutation: Mutation, options: argparse.Namespace, logs: Path) -> tuple[str, str]:
    """CAUGHT, ESCAPED or UNCLEAR, and what shows it. A test that fails without the fault as well has not caught it."""
    only = ["--fast"] if options.tests_of == "fast" else []
    with worktree() as copy:
        apply(mutation, copy)
        found = failure([*mutation.tests.split(), *only], copy, options.limit, logs / f"{mutation.name}.log")
    if found is None:
        return ESCAPED, mutation.breaks
    if found.test:
        with worktree() as copy:
            function = found.test.partition("[")[0]
            without = failure([function, *only], copy, options.limit, logs / f"{mutation.name}-without.log")
        if without is not None:
            return UNCLEAR, f"{found.test} fails without the fault, too: {without.reason}"
    return CAUGHT, f"{found.test} {found.reason}".strip()


if __name__ == "__main__":
    sys.exit(main())

r"""Grading: is the answer in a response's last `\boxed{}` the ground truth?

Most answers are told by looking at them (`reward.answers`). The others go to grader processes, which run math-verify
and which the pool kills when they take too long. Nothing that goes wrong is taken for a wrong answer without saying so.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from time import monotonic
from typing import Literal

from meds_megatron.latex import last_boxed
from meds_megatron.reward.answers import compare_plainly, normalised
from meds_megatron.reward.process import GraderProcess, Task

MAX_ANSWER_CHARACTERS = 2000
"""A longer box, or ground truth, is no answer to a problem; parsing it would only waste the time limit."""
MAX_BATCH_TASKS = 32
MAX_BATCH_CHARACTERS = 8000
"""At no more than 6 bytes each they fit into a pipe, so that handing out a batch never blocks."""
MAX_FAILED_STARTS = 3


@dataclass(frozen=True)
class Grade:
    """The verdict on one response. `correct` is False whenever `outcome` is not "graded"; `detail` says why."""

    correct: bool
    boxed: bool
    """An answer was found in a box."""
    outcome: Literal["graded", "no_answer", "timeout", "error"]
    detail: str = ""


class GraderPool:
    """Grades responses in up to `workers` processes, started when they are first needed and replaced when they die.

    An answer that takes `timeout_seconds` of processor time (or PATIENCE times that where the machine is too crowded to
    give it) costs its process and is a "timeout"; one whose process dies is an "error"; the answers behind it in that
    process's hands go to another. For use by one thread at a time.
    """

    def __init__(self, workers: int, timeout_seconds: float) -> None:
        if workers < 1 or timeout_seconds <= 0:
            raise ValueError(
                f"A pool needs a worker and some time, not {workers} workers and {timeout_seconds} seconds"
            )
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self._processes: list[GraderProcess] = []
        self._failed_starts = 0

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """The verdict on each response, given each one's ground truth in `answers`.

        A pair of box and ground truth that occurs many times is judged once.
        """
        boxes = [last_boxed(response) for response in responses]
        tasks = [None if not box else (truth, box) for truth, box in zip(answers, boxes, strict=True)]
        no_answer = Grade(False, False, "no_answer", "no closed \\boxed{} with something in it")
        verdicts: dict[Task | None, Grade] = {None: no_answer}
        undecided: list[Task] = []
        for task in tasks:
            if task in verdicts:
                continue
            verdict = self._at_a_glance(*task)
            if verdict is None:
                undecided.append(task)
            verdicts[task] = verdict
        verdicts.update(self._judge(undecided))
        return [verdicts[task] for task in tasks]

    def close(self) -> None:
        """Ends the processes. The pool can be used again: it would start new ones."""
        for process in self._processes:
            process.finish()
        self._processes.clear()

    def _at_a_glance(self, truth: str, box: str) -> Grade | None:
        """The verdict where it takes no mathematics, else None."""
        if not normalised(truth):
            return Grade(False, True, "error", f"the ground truth {truth!r} holds nothing to compare with")
        if len(box) > MAX_ANSWER_CHARACTERS:
            return Grade(False, True, "graded", f"a box of {len(box)} characters is taken for no answer")
        if len(truth) > MAX_ANSWER_CHARACTERS:
            return Grade(False, True, "error", f"a ground truth of {len(truth)} characters is taken for no answer")
        same = compare_plainly(box, truth)
        return None if same is None else Grade(same, True, "graded")

    def _judge(self, tasks: list[Task]) -> dict[Task, Grade]:
        pending = deque(tasks)
        verdicts: dict[Task, Grade] = {}
        try:
            while len(verdicts) < len(tasks):
                self._hand_out(pending)
                verdicts.update(self._collect(pending))
        except BaseException:
            # An interrupted pool holds answers that nobody waits for any more.
            for process in self._processes:
                process.kill()
            self._processes.clear()
            raise
        return verdicts

    def _hand_out(self, pending: deque[Task]) -> None:
        """Gives every idle process a batch, and starts processes while there are fewer than could be busy."""
        for process in self._processes:
            if pending and process.idle:
                batch = self._batch(pending)
                process.send(batch)
                if process.ended:
                    pending.extendleft(reversed(batch))
        waiting = sum(not process.ready for process in self._processes)
        for _ in range(min(self.workers - len(self._processes), len(pending) - waiting)):
            self._processes.append(GraderProcess(self.timeout_seconds))

    def _batch(self, pending: deque[Task]) -> list[Task]:
        """Takes the next tasks, at least one: few enough that the processes finish together, and a pipe holds them."""
        count = min(MAX_BATCH_TASKS, max(1, len(pending) // (2 * self.workers)))
        batch = [pending.popleft()]
        characters = sum(map(len, batch[0]))
        while pending and len(batch) < count:
            characters += sum(map(len, pending[0]))
            if characters > MAX_BATCH_CHARACTERS:
                break
            batch.append(pending.popleft())
        return batch

    def _collect(self, pending: deque[Task]) -> Iterator[tuple[Task, Grade]]:
        """Waits until a process has something to tell or is overdue, and settles what came of it."""
        deadlines = [process.deadline for process in self._processes if process.tasks or not process.ready]
        wait(self._processes, max(0.0, min(deadlines) - monotonic()) if deadlines else 0.0)
        for process in list(self._processes):
            was_ready = process.ready
            for task, verdict in process.receive():
                yield task, Grade(boxed=True, **verdict)
            if process.ready and not was_ready:
                self._failed_starts = 0
            if process.ended or process.overdue():
                yield from self._bury(process, pending)

    def _bury(self, process: GraderProcess, pending: deque[Task]) -> Iterator[tuple[Task, Grade]]:
        """Takes out a dead or overdue process; its answer in progress is settled, those behind it wait again."""
        overdue = not process.ended
        if overdue:
            process.kill()
        self._processes.remove(process)
        code = process.exit_code()
        process.kill()
        if not process.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"Grader processes do not start (exit code {code}, {MAX_FAILED_STARTS} times in a row): "
                    "see their messages above, or run `python -m meds_megatron.reward.worker 10`"
                )
        elif process.tasks and code != 0:
            task = process.tasks.popleft()
            if overdue or process.stopped_itself:
                detail = f"no verdict on {task[1]!r} in {self.timeout_seconds} seconds"
                yield task, Grade(False, True, "timeout", detail)
            else:
                yield task, Grade(False, True, "error", f"the grader died (exit code {code}) on {task[1]!r}")
        pending.extendleft(reversed(process.tasks))

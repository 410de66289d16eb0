import io
import logging

from rich.console import Console as RichConsole

from meds_megatron.config import Config
from meds_megatron.run.console import Console, ConsoleHandler

METRICS = {
    "accuracy/mean": 0.25,
    "reward/mean": 0.2,
    "reward/penalty_mean": 0.0312,
    "throughput/tokens_per_second": 4321.0,
    "time/rollout": 2.0,
    "time/update": 1.0,
    "time/checkpoint": 0.001,
    "time/step": 3.5,
}


def config_of(steps: int) -> Config:
    config = Config(name="my-run")
    config.train.steps = steps
    return config


def test_where_there_is_no_terminal_a_step_is_one_line():
    out = io.StringIO()
    with Console(config_of(80), file=out) as console:
        console.step(0, {"validation/accuracy": 0.125})
        console.phase("rollout")
        console.note("only 3 of 4 groups")
        console.step(1, METRICS)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 0/80  validation 0.125  after 0:00"
    assert lines[1] == "note: only 3 of 4 groups"
    assert lines[2] == (
        "step 1/80  accuracy 0.250  reward 0.200  penalty 0.0312  tokens/s 4,321  seconds 3.5"
        "  (rollout 2.0, update 1.0)  after 0:00, 4:36 left"
    )
    assert len(lines) == 3


def test_the_live_view_shows_the_run():
    rich = RichConsole(force_terminal=True, width=120, file=io.StringIO(), record=True)
    with Console(config_of(3), rich=rich) as console:
        console.step(0, {"validation/accuracy": 0.125})
        for step in (1, 2):
            console.step(step, METRICS)
        console.step(3, {**METRICS, "validation/accuracy": 0.75})
        console.note("a sentence")
        rich.print(console)
    shown = rich.export_text()
    for expected in ("my-run", "3/3", "0.0312", "4,321", "rollout 2.0s", "0.750 at step 3", "first 0.125"):
        assert expected in shown, expected


def test_a_step_without_numbers_is_shown_too():
    rich = RichConsole(force_terminal=True, width=120, file=io.StringIO())
    with Console(config_of(1), rich=rich) as console:
        console.step(1, {})
        rich.print(console)


def test_a_logged_warning_is_a_note():
    out = io.StringIO()
    with Console(config_of(1), file=out) as console:
        ConsoleHandler(console).handle(logging.makeLogRecord({"msg": "engine %d failed", "args": (3,)}))
    assert out.getvalue() == "note: engine 3 failed\n"

import subprocess
import sys
from pathlib import Path

import click
import pytest

from meds_megatron.cli import cli, main
from meds_megatron.commands.options import show
from tests.limits import HANG_SECONDS

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        inner = commands(command, (*path, name)) if isinstance(command, click.Group) else []
        found += [(*path, name), *inner]
    return found


@pytest.mark.parametrize("path", [(), *commands()], ids=" ".join)
def test_every_command_has_help_with_an_example(path, capsys):
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(" ".join(["Usage: meds", *path]))
    command = cli
    for name in path:
        command = command.commands[name]
    assert isinstance(command, click.Group) or f"Example:\n    meds {' '.join(path)} " in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", QUICKSTART, "penalti.alpha=0.1"], "did you mean `penalty`?"),
        (["train", QUICKSTART, "train.mini_batch_prompts=0"], "train.mini_batch_prompts"),
        (["train"], "CONFIG"),
        (["trian"], "No such command"),
        (["bench", "memory", "--keys", "none"], "--keys"),
        (["bench", "rollout", QUICKSTART, "rollout.tensr=2"], "rollout.tensor"),
    ],
)
def test_a_mistake_is_reported_without_a_traceback(arguments, expected, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert expected in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_an_interruption_has_exit_status_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("meds_megatron.config.load_config", interrupted)
    assert main(["train", QUICKSTART]) == 130
    assert capsys.readouterr().err.strip() == "meds: interrupted"


@pytest.mark.usefixtures("processes")
def test_help_and_config_errors_do_not_import_torch():
    program = f"""
import sys
from meds_megatron.cli import main
main(["--help"])
main(["convert", "verify", "--help"])
main(["train", {QUICKSTART!r}, "no.such=key"])
heavy = {{"torch", "ray", "vllm", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=HANG_SECONDS)


def test_results_are_printed_as_lines_and_tables(capsys):
    show({"keys": 512, "rows": [{"history": 16, "ours_s": 0.25}, {"history": 1600, "ours_s": 12.0}], "by": {"a": 1.5}})
    assert capsys.readouterr().out.splitlines() == [
        "keys                         512",
        "rows",
        "  history  ours_s",
        "       16    0.25",
        "     1600      12",
        "by",
        "  a                          1.5",
    ]

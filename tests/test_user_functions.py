"""Functions that a config names: found before anything starts, and saved with the run."""

import pickle

import pytest

from meds_megatron.config import Config, load_config
from meds_megatron.config.functions import function_digests, named_functions, resolve_functions
from meds_megatron.digests import file_digest
from meds_megatron.errors import UserError
from meds_megatron.run.directory import RunDirectory
from meds_megatron.user_functions import load_function

QUICKSTART = "configs/quickstart.yaml"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Made:\n    pass\n\ndef loss(inputs, config):\n    return Made()\n\nnumber = 3\n")
    return path


def test_a_file_is_executed_once_whatever_names_it(file):
    file.write_text("calls = []\ndef first():\n    return calls\ndef second():\n    return calls\n")
    first = load_function("policy.loss", f"{file}:first")
    assert load_function("filter.metric", f"{file}:second")() is first()


def test_a_function_of_a_file_and_of_a_module(file):
    made = load_function("policy.loss", f"{file}:loss")(None, None)
    assert type(pickle.loads(pickle.dumps(made))) is type(made)
    assert load_function("policy.loss", "json:dumps")([1]) == "[1]"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("other", None, "has no such name"),
        ("number", None, "has a int of that name"),
        ("loss", "import nowhere", r"mine\.py cannot be imported \(ModuleNotFoundError: No module named 'nowhere'\)"),
        ("loss", "def loss(:", r"cannot be imported \(SyntaxError"),
    ],
)
def test_one_that_cannot_be_had_is_one_sentence(file, name, text, expected):
    if text:
        file.write_text(text)
    with pytest.raises(UserError, match=rf"policy\.loss.*{expected}"):
        load_function("policy.loss", f"{file}:{name}")


def test_a_file_or_module_that_is_not_there_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("open('table.json')\n")
    with pytest.raises(UserError, match=r"mine\.py cannot be imported \(FileNotFoundError.*table\.json"):
        load_function("policy.loss", f"{tmp_path}/mine.py:loss")
    with pytest.raises(UserError, match=r"policy\.loss: .*none\.py does not exist"):
        load_function("policy.loss", f"{tmp_path}/none.py:loss")
    with pytest.raises(UserError, match=r"policy\.loss: no\.where cannot be imported"):
        load_function("policy.loss", "no.where:loss")


@pytest.mark.parametrize("key", ["policy.loss", "advantage.estimator", "filter.metric"])
def test_a_key_takes_its_names_and_functions_and_nothing_else(key, file):
    config = load_config(QUICKSTART, [f"{key}={file}:loss"])
    assert named_functions(config) == {key: f"{file}:loss"}
    assert named_functions(load_config(QUICKSTART)) == {}
    for wrong in ("ppp", 3):
        expected = rf"{key} is {wrong!r}, expected one of \w+, \w+.*, or a function of yours as file\.py:name"
        with pytest.raises(UserError, match=expected):
            load_config(QUICKSTART, [f"{key}={wrong}"])


def test_files_are_named_by_absolute_paths(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    config = Config()
    config.policy.loss = f"../{file.parent.name}/mine.py:loss"
    resolve_functions(config)
    assert config.policy.loss == f"{file}:loss" and function_digests(config)["policy.loss"] == file_digest(file)
    config.policy.loss = "none.py:loss"
    with pytest.raises(UserError, match="does not exist"):
        resolve_functions(config)


def test_a_run_is_not_resumed_with_another_version_of_the_file(file, tmp_path):
    def claim(*overrides: str) -> None:
        config = load_config(QUICKSTART, [f"run_dir={tmp_path}/run", f"policy.loss={file}:loss", *overrides])
        with RunDirectory(config.run_dir).claim(config) as run:
            run.metrics.write_text('{"step": 1}\n')

    claim()
    claim()
    config = load_config(QUICKSTART, [f"run_dir={tmp_path}/run", f"policy.loss={file}:loss"])
    with RunDirectory(config.run_dir).claim(config) as run:
        run.check_functions(config)
        before = file.read_text()
        file.write_text(before + "# edited while it trains\n")
        with pytest.raises(UserError, match=r"policy\.loss: the file of .* has changed while the run was under way"):
            run.check_functions(config)
        file.write_text(before)
    file.write_text(file.read_text() + "# another\n")
    with pytest.raises(UserError, match=r"policy\.loss: the file of .*mine\.py:loss has changed"):
        claim()
    claim("checkpoint.accept_changes=true")
    claim()

import subprocess
import sys
from pathlib import Path

import pytest

from meds_megatron.config import Config, load_config, save_config
from meds_megatron.config.load import nearest_key, schema_types
from meds_megatron.errors import UserError


def write(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_an_empty_file_gives_the_defaults(tmp_path):
    config = load_config(write(tmp_path, "a.yaml", ""))
    assert config == Config(run_dir="runs/meds")
    assert type(config) is Config


def test_later_layers_win(tmp_path):
    write(tmp_path, "common/root.yaml", "train: {steps: 1, seed: 1, mini_batch_prompts: 8}\nname: root\n")
    write(tmp_path, "common/middle.yaml", "base: root.yaml\ntrain: {steps: 2, seed: 2}\n")
    path = write(tmp_path, "top.yaml", "base: common/middle.yaml\ntrain:\n  steps: 3\n")
    config = load_config(path, ["train.prompts_per_step=64"])
    assert (config.train.steps, config.train.seed, config.train.mini_batch_prompts) == (3, 2, 8)
    assert config.train.prompts_per_step == 64
    assert config.run_dir == "runs/root"
    assert load_config(path, ["name=mine", "train.steps=9"]).run_dir == "runs/mine"


def test_the_base_of_the_first_file_can_be_overridden(tmp_path):
    write(tmp_path, "small.yaml", "name: small\n")
    write(tmp_path, "large.yaml", "base: small.yaml\ntrain: {steps: 7, seed: 7}\n")
    path = write(tmp_path, "methods/dapo.yaml", "base: ../small.yaml\ntrain: {seed: 3}\n")
    config = load_config(path, [f"base={tmp_path}/large.yaml", "train.prompts_per_step=64"])
    assert (config.name, config.train.steps, config.train.seed, config.train.prompts_per_step) == ("small", 7, 3, 64)


def test_lists_replace_and_nulls_switch_off(tmp_path):
    write(tmp_path, "base.yaml", "data: {train: [a.jsonl, b.jsonl]}\n")
    path = write(tmp_path, "a.yaml", "base: base.yaml\ndata:\n  train: [c.jsonl]\npolicy: {dual_clip: null}\nmemory:\n")
    config = load_config(path, ["data.validation=[x.jsonl, y.jsonl]"])
    assert config.data.train == ["c.jsonl"]
    assert config.data.validation == ["x.jsonl", "y.jsonl"]
    assert config.policy.dual_clip is None
    assert config.optimizer.lr == 1e-6


def test_numbers_and_bare_no_are_read_as_written(tmp_path):
    path = write(tmp_path, "a.yaml", "optimizer: {lr: 3e-5, weight_decay: 0}\nmodel: {make: no}\n")
    config = load_config(path, ["model.random.seed=7", "model.make=no"])
    assert config.optimizer.lr == 3e-5
    assert type(config.optimizer.weight_decay) is float
    assert config.model.make == "no"
    assert config.model.random.seed == 7


def test_saved_config_reads_back_the_same(tmp_path):
    config = load_config(write(tmp_path, "a.yaml", "name: x\npenalty: {target: both}\ndata: {train: [arithmetic]}\n"))
    save_config(config, tmp_path / "runs" / "config.yaml")
    assert load_config(tmp_path / "runs" / "config.yaml") == config
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("policy.clip_hi=1", "override `policy.clip_hi=1`: unknown key `policy.clip_hi`; did you mean `policy.clip_hi"),
        ("train.alpha=0.3", "did you mean `penalty.alpha`?"),
        ("lr=1", "did you mean `optimizer.lr`?"),
        ("polcy.clip_low=1", "unknown key `polcy`; did you mean `policy`?"),
        ("qqqqqq=1", "unknown key `qqqqqq`; see"),
        ("penalty.target=wrng", "penalty.target is 'wrng', expected one of wrong, right, both, none."),
        ("train.steps=many", "train.steps is 'many', expected a whole number."),
        ("train.steps=1.5", "train.steps is 1.5, expected a whole number."),
        ("train.steps=", "train.steps is None, expected a whole number."),
        ("policy.dual_clip=big", "policy.dual_clip is 'big', expected a number or null."),
        ("parallel.sequence=2", "parallel.sequence is 2, expected true or false."),
        ("data.train=a.jsonl", "data.train is 'a.jsonl', expected a list, each item a text."),
        ("data.train=[[a]]", "expected a list, each item a text."),
        ("name={a: 1}", "name is {'a': 1}, expected a text."),
        ("reward=3", "reward is 3, expected a section with the keys workers,"),
        ("train.steps.x=3", "expected a whole number"),
        ("train.steps", "expected key=value"),
        ("data.train=[a", "not readable as YAML"),
        ("name=${nam}", "override `name=${nam}`: name cannot be resolved"),
        ("base=other.yaml", "other.yaml: there is no such config file, named as `base` in"),
    ],
)
def test_bad_overrides_are_one_clear_sentence(tmp_path, override, expected):
    message = refusal(write(tmp_path, "a.yaml", ""), override)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {stepz: 1}\n", "a.yaml: unknown key `train.stepz`; did you mean `train.steps`?"),
        ("train: {steps: x}\n", "a.yaml: train.steps is 'x', expected a whole number."),
        ("train: [1]\n", "a.yaml: train is [1], expected a section"),
        ("- 1\n", "a.yaml: expected `key: value` lines"),
        ("just a text\n", "a.yaml"),
        ("name: a\ntrain: {steps: 1\n", "a.yaml line 3: not readable as YAML"),
        ("name: a\nname: b\n", "not readable as YAML"),
        ("base: [b.yaml]\n", "`base` is ['b.yaml'], expected the path of one YAML file"),
        ("base: gone.yaml\n", "gone.yaml: there is no such config file, named as `base` in"),
        ("base: a.yaml\n", "`base` is circular"),
    ],
)
def test_bad_files_are_one_clear_sentence(tmp_path, text, expected):
    message = refusal(write(tmp_path, "a.yaml", text))
    assert expected in message
    assert "\n" not in message


def test_a_cycle_of_two_bases_is_refused(tmp_path):
    write(tmp_path, "b.yaml", "base: sub/c.yaml\n")
    write(tmp_path, "sub/c.yaml", "base: ../a.yaml\n")
    assert "b.yaml" in refusal(write(tmp_path, "a.yaml", "base: b.yaml\n"))


def test_a_missing_file_is_named(tmp_path):
    assert "there is no such config file; give the path" in refusal(tmp_path / "nowhere.yaml")


def test_the_nearest_key_of_a_namesake_is_the_closest_section():
    assert nearest_key("rollouts.tensor") == "rollout.tensor"
    assert set(schema_types()) > {"model", "model.random.hidden_size", "reward.overlong.buffer"}


@pytest.mark.usefixtures("processes")
def test_reading_a_config_needs_no_torch():
    code = (
        "import sys, time; start = time.process_time();"
        "from meds_megatron.config import Config, load_config;"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; print(time.process_time() - start)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 2.0

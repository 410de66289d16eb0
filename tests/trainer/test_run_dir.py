import numpy as np
import pyarrow.parquet as pq
import pytest

from meds_megatron.config import Config, load_config
from meds_megatron.errors import UserError
from meds_megatron.trainer.run_dir import ROLLOUT_SCHEMA, RunDirectory


def columns_of(count: int) -> dict:
    return {
        "key": ["p1/wrong"] * count,
        "group": [0] * count,
        "source": ["sums"] * count,
        "prompt": ["1 + 1 = ?"] * count,
        "answer": ["2"] * count,
        "response": ["\\boxed{3}"] * count,
        "response_token_ids": [np.arange(4)] * count,
        "prompt_tokens": np.full(count, 7),
        "response_tokens": np.full(count, 4),
        "correct": np.zeros(count, dtype=bool),
        "outcome": ["graded"] * count,
        "score": np.zeros(count),
        "penalty": np.full(count, 0.1),
        "cluster_size": np.full(count, 3),
        "cluster_label": [-1] * count,
        "shaped_score": np.full(count, -0.1),
        "advantage": [None] * count,
        "fingerprint": [np.arange(4, dtype=np.float32)] + [None] * (count - 1),
        "policy_version": np.full(count, 5),
        "kept": np.zeros(count, dtype=bool),
    }


def test_create_saves_the_config(tmp_path):
    run = RunDirectory.create(Config(name="a", run_dir=str(tmp_path / "deep" / "a")))
    assert load_config(run.config).name == "a"
    assert run.checkpoint(50) == tmp_path / "deep" / "a" / "checkpoints" / "step_000050"
    assert run.hf_export(7).name == "step_000007"


def test_a_directory_is_not_given_to_a_second_run(tmp_path):
    RunDirectory.create(Config(run_dir=str(tmp_path)))
    with pytest.raises(UserError, match="name=") as error:
        RunDirectory.create(Config(run_dir=str(tmp_path)))
    assert str(tmp_path) in str(error.value)


def test_a_directory_with_foreign_files_can_hold_a_run(tmp_path):
    (tmp_path / "slurm-1.out").write_text("")
    assert RunDirectory.create(Config(run_dir=str(tmp_path))).config.exists()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir="):
        RunDirectory.create(Config(run_dir=str(tmp_path / "file" / "run")))


def test_rollouts_come_back_as_written(tmp_path):
    run = RunDirectory.create(Config(run_dir=str(tmp_path)))
    table = pq.read_table(run.save_rollouts(12, columns_of(2)))
    assert table.schema.equals(ROLLOUT_SCHEMA)
    assert table.column("step").to_pylist() == [12, 12]
    assert table.column("fingerprint").to_pylist() == [[0.0, 1.0, 2.0, 3.0], None]
    assert table.column("advantage").null_count == 2
    assert [path.name for path in run.rollouts.iterdir()] == ["step_000012.parquet"]


def test_a_run_without_metrics_leaves_its_name_free_and_may_keep_its_logs(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    run = RunDirectory.create(config)
    (run.path / "logs").mkdir()
    (run.path / "logs" / "driver.log").write_text("an error")
    run.discard_if_empty(keep_logs=True)
    assert [path.name for path in run.path.iterdir()] == ["logs"]
    run = RunDirectory.create(config)
    run.discard_if_empty()
    assert not run.path.exists()
    run = RunDirectory.create(config)
    run.metrics.write_text("{}")
    run.discard_if_empty()
    assert run.config.exists() and run.metrics.exists()


def test_a_missing_column_is_refused(tmp_path):
    run = RunDirectory.create(Config(run_dir=str(tmp_path)))
    columns = columns_of(2)
    del columns["penalty"]
    with pytest.raises(KeyError, match="penalty"):
        run.save_rollouts(1, columns)
    assert list(run.rollouts.iterdir()) == []

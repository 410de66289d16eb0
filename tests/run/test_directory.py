import resource
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import LeaseCompromise

from meds_megatron.config import Config, load_config, save_config
from meds_megatron.config.schema import CheckpointConfig, PenaltyConfig, TrainConfig
from meds_megatron.errors import UserError
from meds_megatron.run.checkpoint_files import mark_complete, remove, write_state
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.rollout_files import ROLLOUT_SCHEMA


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
        "given_tokens": [[]] * count,
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
        "later_versions": [[[6, 2], [7, 3]]] + [[]] * (count - 1),
        "kept": np.zeros(count, dtype=bool),
    }


def claim(path: Path, **settings) -> AbstractContextManager[RunDirectory]:
    return RunDirectory(path).claim(Config(run_dir=str(path), **settings))


def complete_checkpoint(run: RunDirectory, step: int, config: Config | None = None) -> None:
    path = run.checkpoint(step)
    path.mkdir(parents=True)
    save_config(config or Config(run_dir=str(run.path)), path / "config.yaml")
    write_state(path, {"step": step}, 0, {})
    mark_complete(path)


def test_a_claim_saves_the_config(tmp_path):
    with claim(tmp_path / "deep" / "a", name="a") as run:
        assert load_config(run.config).name == "a"
        assert run.checkpoint(50) == tmp_path / "deep" / "a" / "checkpoints" / "step_000050"
        assert run.hf_export(7).name == "step_000007"


@pytest.mark.usefixtures("processes")
def test_a_second_process_is_refused_and_changes_nothing(tmp_path):
    program = "import sys, time\nfrom meds_megatron.config import Config\n"
    program += "from meds_megatron.run.directory import RunDirectory\n"
    program += "with RunDirectory(sys.argv[1]).claim(Config(name='first', run_dir=sys.argv[1])):\n"
    program += "    print('claimed', flush=True)\n    time.sleep(100)\n"
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "claimed\n"
        message = f"process {holder.pid} on .* is training in this run directory"
        with pytest.raises(UserError, match=message), claim(tmp_path, name="second"):
            pass
        assert load_config(tmp_path / "config.yaml").name == "first"
    finally:
        holder.kill()
        holder.wait()
    # A process that was killed does not hold it.
    with claim(tmp_path, name="third") as run:
        assert load_config(run.config).name == "third"


def test_a_run_that_lost_its_lock_ends(tmp_path):
    with claim(tmp_path) as run:
        run.check_lock()
        lease = run._lock
        lease._claim.compromise = LeaseCompromise(str(lease.lock_file), "token", "owner-changed", None)
        with pytest.raises(UserError, match=r"lost .owner-changed.: another process may train in this directory"):
            run.check_lock()


def test_a_directory_with_foreign_files_can_hold_a_run(tmp_path):
    (tmp_path / "slurm-1.out").write_text("")
    with claim(tmp_path) as run:
        assert run.config.exists()
    assert (tmp_path / "slurm-1.out").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir="), claim(tmp_path / "file" / "run"):
        pass


def test_a_run_without_checkpoints_is_not_overwritten(tmp_path):
    with claim(tmp_path, checkpoint=CheckpointConfig(every=0)) as run:
        run.metrics.write_text('{"step": 1}\n')
    message = "without checkpoints; give this one a name"
    with pytest.raises(UserError, match=message), claim(tmp_path, checkpoint=CheckpointConfig(every=0)):
        pass
    assert run.metrics.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(("every", "steps", "last"), [(10, 100, 21), (10, 15, 15)], ids=["lost them", "finished"])
def test_a_run_whose_checkpoints_were_removed_is_not_overwritten(tmp_path, every, steps, last):
    settings = {"checkpoint": CheckpointConfig(every=every), "train": TrainConfig(steps=steps)}
    with claim(tmp_path, **settings) as run:
        run.metrics.write_text(f'{{"step": {last}}}\n')
        run.hf_export(last).mkdir(parents=True)
    with pytest.raises(UserError, match="without checkpoints; give this one a name"), claim(tmp_path, **settings):
        pass
    assert run.hf_export(last).is_dir() and run.last_logged_step() == last


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path):
    with claim(tmp_path) as run:
        run.metrics.write_text('{"step": 1}\n')
    with claim(tmp_path) as run:
        assert run.newest_checkpoint() is None
        run.rewind(None)
        assert run.metrics.read_text() == ""


def test_a_run_whose_only_checkpoint_is_damaged_is_kept(tmp_path):
    with claim(tmp_path) as run:
        run.metrics.write_text('{"step": 4}\n')
        complete_checkpoint(run, 4)
    (run.checkpoint(4) / "state.json").write_text("")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"no checkpoint is whole.*state\.json has 0 bytes"), claim(tmp_path):
        pass
    # Nor is it discarded where the damage comes while the run is claimed, before its first line of metrics.
    run.metrics.write_text("")
    remove(run.checkpoint(4))
    complete_checkpoint(run, 4)
    with claim(tmp_path) as run:
        (run.checkpoint(4) / "state.json").write_text("")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_lines_of_metrics_that_a_crash_left_are_dropped_and_others_named(tmp_path):
    with claim(tmp_path) as run:
        run.metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n' + bytes(8) + b"\n" + bytes(5))
        assert run.last_logged_step() == 2
        run.rewind(2)
        assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
        run.metrics.write_text('{"step": 1}\nxx\n{"step": 3}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl line 2: expected a JSON object with a `step`"):
            run.rewind(3)


def test_other_settings_are_refused_by_name_unless_accepted(tmp_path, capsys):
    with claim(tmp_path) as run:
        run.metrics.write_text('{"step": 4}\n')
        complete_checkpoint(run, 4)
    other = PenaltyConfig(alpha=0.5)
    with pytest.raises(UserError, match=r"penalty\.alpha: 0\.1 -> 0\.5"), claim(tmp_path, penalty=other):
        pass
    assert load_config(run.config).penalty.alpha == 0.1
    accepted = {"penalty": PenaltyConfig(alpha=0.5), "checkpoint": CheckpointConfig(accept_changes=True)}
    with claim(tmp_path, **accepted) as run:
        assert load_config(run.config).penalty.alpha == 0.5
        assert run.newest_checkpoint().step == 4
    assert "resuming with penalty.alpha: 0.1 -> 0.5" in capsys.readouterr().err


def test_rewinding_removes_what_later_steps_wrote(tmp_path):
    with claim(tmp_path) as run:
        run.metrics.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "to')
        for step in (1, 2, 3):
            run.save_rollouts(step, columns_of(1))
            run.hf_export(step).mkdir(parents=True)
        (run.rollouts / "step_000004.parquet.12.partial").write_text("")
        (run.exports / ".step_000004.writing").mkdir()
        complete_checkpoint(run, 1)
        run.checkpoint(2).mkdir()
        run.rewind(1)
        assert run.metrics.read_text() == '{"step": 0}\n{"step": 1}\n'
        assert [path.name for path in run.rollouts.iterdir()] == ["step_000001.parquet"]
        assert [path.name for path in run.exports.iterdir()] == ["step_000001"]
        assert [path.name for path in run.checkpoints.iterdir()] == ["step_000001"]
        run.rewind(None)
        assert run.metrics.read_text() == "" and list(run.rollouts.iterdir()) == []


def test_rollouts_come_back_as_written(tmp_path):
    run = RunDirectory(tmp_path)
    run.rollouts.mkdir()
    table = pq.read_table(run.save_rollouts(12, columns_of(2)))
    assert table.schema.equals(ROLLOUT_SCHEMA)
    assert table.column("step").to_pylist() == [12, 12]
    assert table.column("fingerprint").to_pylist() == [[0.0, 1.0, 2.0, 3.0], None]
    assert table.column("advantage").null_count == 2
    assert [path.name for path in run.rollouts.iterdir()] == ["step_000012.parquet"]


def test_a_run_without_metrics_leaves_its_name_free_and_may_keep_its_logs(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(RuntimeError), claim(path) as run:
        (run.path / "logs").mkdir()
        (run.path / "logs" / "driver.log").write_text("an error")
        raise RuntimeError
    assert [path.name for path in run.path.iterdir()] == ["logs"]
    with pytest.raises(UserError), claim(path):
        raise UserError
    assert not path.exists()
    with pytest.raises(UserError), claim(path) as run:
        run.metrics.write_text('{"step": 0}\n')
        raise UserError
    assert run.config.exists() and run.metrics.exists()


def test_a_missing_column_is_refused(tmp_path):
    run = RunDirectory(tmp_path)
    run.rollouts.mkdir()
    columns = columns_of(2)
    del columns["penalty"]
    with pytest.raises(KeyError, match="penalty"):
        run.save_rollouts(1, columns)
    assert list(run.rollouts.iterdir()) == []


def test_rollouts_on_a_full_disk_are_one_sentence_and_leave_no_file(tmp_path):
    run = RunDirectory(tmp_path)
    run.rollouts.mkdir()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, unlimited[1]))
    try:
        with pytest.raises(UserError, match=r"step_000003.parquet cannot be written \(.*\): make space"):
            run.save_rollouts(3, columns_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert list(run.rollouts.iterdir()) == []

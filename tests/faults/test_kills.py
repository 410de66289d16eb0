"""A run survives a kill of every kind of process; `bash tools/test.sh --faults` is the long form."""

from tests.faults.campaign import DRIVER, Run, plan


def test_a_run_with_five_kills_loses_nothing(tmp_path, run_meds, cpu_engines, small_model):
    kills = plan([DRIVER, "trainer rank", "memory shard", "engine", "grader"], seed=20)
    assert 0 < sum(kill.while_saving for kill in kills) < len(kills)
    run = Run(tmp_path / "run", small_model, kills)
    assert run.finish(print).total() == len(kills) + sum(kill.while_saving for kill in kills)

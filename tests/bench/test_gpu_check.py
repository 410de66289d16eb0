"""The checks for a first user's GPUs, without GPUs: all that is not speed, and what a failure looks like."""

import pytest


@pytest.fixture
def gpu_check():
    from meds_megatron.bench import gpu_check

    return gpu_check


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("check", "rows"), [("parity", 8), ("fingerprints", 1), ("weight_updates", 2), ("network", 3)])
def test_the_cpus_half_holds(gpu_check, check, rows):
    found = getattr(gpu_check, check)(0)
    assert len(found) == rows
    assert [row for row in found if not row.ok] == []


def test_speed_is_expected_of_gpus_only(gpu_check, monkeypatch):
    packed = {"mfu": 0.4, "forward_s": 1.0, "update_s": 3.0, "matrix_tflops": 700.0}
    of_model = {"packed": packed, "over_plain": 1.2}
    monkeypatch.setattr(gpu_check.step, "run", lambda names, **_: {"models": dict.fromkeys(names, of_model)})
    # An update has 3/4 of the operations, here in 3/4 of the time.
    assert gpu_check.speed(1)[0] == gpu_check.Row("update of Qwen2.5-7B layers, of 700 TFLOP/s", "40%", ">= 45%", False)
    assert [row.ok for row in gpu_check.speed(1)] == [False, False]
    assert [row.ok for row in gpu_check.speed(0)] == [True, True]


def test_a_check_that_fails_is_a_row_and_the_exit_status(gpu_check, monkeypatch, capsys):
    def broken(gpus):
        raise RuntimeError("Traceback\nNCCL is not here")

    def fine(gpus):
        return [gpu_check.Row("fine", "1", "1", True)]

    monkeypatch.setattr(gpu_check, "CHECKS", (broken, fine))
    monkeypatch.setattr(gpu_check.torch.cuda, "device_count", lambda: 0)
    assert gpu_check.main() == 1
    shown = capsys.readouterr().out
    assert "NCCL is not here" in shown and "FAILED" in shown and "fine" in shown
    monkeypatch.setattr(gpu_check, "CHECKS", (fine,))
    assert gpu_check.main() == 0

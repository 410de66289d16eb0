"""Checkpoints of the policy: whatever layout saves and whatever layout loads, model and optimizer are the same bits."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from meds_megatron.weights.conversion.checkpoint import read_metadata
from tests.actor import checkpoint_ranks as on_rank
from tests.model import qwen_cases as cases
from tests.pairwise import in_turn

LAYOUTS = {
    "one rank": {},
    "TP2": dict(tensor=2),
    "PP2": dict(pipeline=2),
    "PP2xVPP2": dict(pipeline=2, virtual_pipeline=2),
    "DP2": dict(data=2),
    "DP3": dict(data=3),
    "TP2xDP2": dict(tensor=2, data=2),
    "TP2xPP2": dict(tensor=2, pipeline=2),
    "CP2xDP2": dict(context=2, data=2),
}
CHANGES = [
    ("TP2", "PP2", "qwen3 tied"),
    ("PP2xVPP2", "TP2xDP2", "qwen3 tied"),
    ("DP2", "one rank", "qwen2 untied"),
    ("one rank", "DP3", "qwen2 tied"),
    ("DP3", "TP2", "qwen2 untied"),
    ("TP2xDP2", "PP2", "qwen2 tied"),
    ("TP2xPP2", "DP2", "qwen3 untied"),
    ("TP2xDP2", "TP2xDP2", "qwen3 tied"),
    ("CP2xDP2", "PP2", "qwen3 tied"),
    ("TP2", "CP2xDP2", "qwen2 untied"),
]


@pytest.mark.parametrize(("change", "dtype"), in_turn(CHANGES, ["float32", "bfloat16"]), ids=str)
def test_state_is_the_same_under_another_layout(ranks, tmp_path_factory, tmp_path, change, dtype):
    saved, loaded, model = change
    directory = str(cases.cached_model(tmp_path_factory, model))
    before, after = LAYOUTS[saved], LAYOUTS[loaded]
    expected = ranks.run(cases.world_size(before), on_rank.train_and_save, directory, before, str(tmp_path), 2, dtype)[
        0
    ]
    found = ranks.run(cases.world_size(after), on_rank.load_state, directory, after, str(tmp_path), dtype)
    assert expected["step"] == 4
    assert np.abs(expected["exp_avg model.layers.3.mlp.down_proj.weight"]).min() > 0
    assert not any(np.isnan(values).any() for values in expected.values())
    for state in found:
        assert state.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(state[name], values, err_msg=name)


@pytest.mark.parametrize("layout", ["TP2xDP2", "PP2xVPP2", "CP2xDP2"])
def test_training_continues_with_the_same_bits(cpu_ranks, tmp_path_factory, tmp_path, layout):
    directory, parallel = str(cases.cached_model(tmp_path_factory, "qwen3 tied")), LAYOUTS[layout]
    whole = cpu_ranks.run(cases.world_size(parallel), on_rank.losses_uninterrupted, directory, parallel, str(tmp_path))
    resumed = cpu_ranks.run(cases.world_size(parallel), on_rank.losses_resumed, directory, parallel, str(tmp_path))
    assert [losses[2:] for losses in whole] == resumed
    assert whole[0][2] != whole[0][3]


def test_random_states_continue_on_every_rank(ranks, tmp_path_factory, tmp_path):
    arguments = (str(cases.cached_model(tmp_path_factory, "qwen2 tied")), dict(tensor=2), str(tmp_path))
    expected = ranks.run(2, on_rank.random_numbers, *arguments, False)
    assert ranks.run(2, on_rank.random_numbers, *arguments, True) == expected


def test_a_rank_that_cannot_write_fails_the_save_on_all(cpu_ranks, tmp_path_factory, tmp_path):
    directory = str(cases.cached_model(tmp_path_factory, "qwen2 tied"))
    raised = cpu_ranks.run(2, on_rank.save_where_one_rank_cannot, directory, dict(tensor=2), str(tmp_path), 50_000)
    assert raised[1] == f"UserError: {tmp_path} cannot be written (File too large): make space or access there"
    assert raised[0].startswith(f"UserError: saving {tmp_path} failed on rank 1: ")
    assert not (tmp_path / "metadata.json").exists()


def cut_short(directory: Path) -> None:
    content = (directory / "__0_model_0.distcp").read_bytes()
    (directory / "__0_model_0.distcp").write_bytes(content[: len(content) // 2])


def altered(directory: Path) -> None:
    content = bytearray((directory / "__0_model_0.distcp").read_bytes())
    content[1000 : len(content) - 1000] = bytes(len(content) - 2000)
    (directory / "__0_model_0.distcp").write_bytes(content)


def with_an_object(directory: Path) -> None:
    metadata = read_metadata(directory / ".metadata")
    metadata.state_dict_metadata["optimizer.param.model.norm.weight"] = BytesStorageMetadata()
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def with_a_program(directory: Path) -> None:
    (directory / ".metadata").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")


class Evil:
    """A pickle that runs a program where it is read."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch owned",)


@pytest.mark.parametrize("file", ["common.pt", "rng/rank00000.pt"])
def test_a_program_in_a_file_of_values_is_refused_whatever_torchs_default_is(
    cpu_ranks, tmp_path_factory, tmp_path, file
):
    directory = str(cases.cached_model(tmp_path_factory, "qwen2 tied"))
    cpu_ranks.run(1, on_rank.train_and_save, directory, {}, str(tmp_path), 0)
    torch.save({"optimizer_step": Evil()}, tmp_path / file)
    (raised,) = cpu_ranks.run(1, on_rank.load_error_where_torch_unpickles, directory, {}, str(tmp_path))
    assert raised.startswith(f"UserError: {tmp_path / file} cannot be read (UnpicklingError)")
    assert not Path("owned").exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut_short, "cannot be loaded"),
        (altered, "cannot be loaded"),
        (with_an_object, "describes optimizer.param.model.norm.weight, which is not a tensor"),
        (with_a_program, "needs "),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_one_sentence(cpu_ranks, tmp_path_factory, tmp_path, damage, sentence):
    directory = str(cases.cached_model(tmp_path_factory, "qwen2 tied"))
    cpu_ranks.run(1, on_rank.train_and_save, directory, {}, str(tmp_path), 0)
    damage(tmp_path)
    (raised,) = cpu_ranks.run(1, on_rank.load_error, directory, {}, str(tmp_path))
    assert raised.startswith(f"UserError: {tmp_path}") and sentence in raised
    assert "\n" not in raised
    assert not Path("owned").exists()

import json

import pytest

from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import UserError
from meds_megatron.trainer.state import TrainerState


def advanced() -> TrainerState:
    state = TrainerState(PromptSampler(7, seed=3))
    state.sampler.next(10)
    state.step, state.prompts_seen, state.tokens_seen, state.wandb_id = 4, 60, 700, "ab12"
    return state


def test_a_restored_state_is_the_saved_one_and_continues_it():
    saved, restored = advanced(), TrainerState(PromptSampler(7, seed=3))
    restored.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert restored.state_dict() == saved.state_dict()
    assert restored.sampler.next(9) == saved.sampler.next(9)
    assert (restored.step, restored.wandb_id) == (4, "ab12")


def test_every_field_is_saved():
    assert set(advanced().state_dict()) == set(vars(advanced()))


def test_other_data_are_refused_and_change_nothing():
    state = TrainerState(PromptSampler(8, seed=3))
    with pytest.raises(UserError, match="number of problems was 7 and is 8"):
        state.load_state_dict(advanced().state_dict())
    assert state.step == 0


def test_a_state_that_lacks_a_key_is_refused():
    state = advanced().state_dict()
    del state["tokens_seen"]
    with pytest.raises(UserError, match=r"checkpoint of step 4 is not that of a run \(KeyError: 'tokens_seen'\)"):
        TrainerState(PromptSampler(7, seed=3)).load_state_dict(state)

"""Registration of the backend; tests/rollout/test_weight_update.py tests it in an engine."""

from importlib.metadata import entry_points


def test_every_vllm_process_finds_the_backend():
    (entry,) = entry_points(group="vllm.general_plugins", name="meds_weights")
    assert entry.value == "meds_megatron.weights.resharding.vllm_backend:register"

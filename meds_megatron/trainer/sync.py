"""New weights for the engines."""

from meds_megatron.trainer.parts import Parts
from meds_megatron.trainer.state import RunState


def sync_weights(parts: Parts, state: RunState) -> None:
    """Gives every engine the policy's weights as they are now, under the next version number."""
    state.weights_version += 1
    buckets = parts.policy.publish(str(parts.bucket_directory))
    parts.engines.begin_weight_update(state.weights_version)
    for bucket in buckets:
        parts.engines.load_bucket(bucket)
    parts.engines.finish_weight_update()

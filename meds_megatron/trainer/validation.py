"""How good the policy is on held-out problems."""

import numpy as np

from meds_megatron.rollout.sampling import Sampling
from meds_megatron.trainer.groups import failed_gradings, grade_groups
from meds_megatron.trainer.parts import Parts


def validate(parts: Parts, step: int) -> dict[str, float]:
    """Accuracy over all validation prompts, a mean over `rollout.validation_responses` responses each."""
    config, prompts = parts.config, parts.validation_prompts
    with parts.timer("validation"):
        sampling = Sampling.validation(config.rollout)
        # The same draws every time, so that two validations differ by the policy alone.
        responses = parts.engines.generate([p.token_ids for p in prompts], sampling, seed=config.train.seed)
        groups = grade_groups(prompts, responses, parts.graders, config)
    failed = failed_gradings(groups)
    if failed:
        parts.console.note(f"validation: grading failed for {failed} of {len(responses)} responses, counted as wrong")
    return {
        "validation/grading_failed": failed,
        "validation/accuracy": float(np.mean([np.mean(group.accuracy) for group in groups])),
        "validation/solved": float(np.mean([max(group.accuracy) for group in groups])),
        "validation/response_length_mean": float(np.mean([len(response.token_ids) for response in responses])),
    }

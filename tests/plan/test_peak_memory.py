"""The predicted memory of the quickstart's ranks against real ranks that compute its largest micro-batches."""

import os
from pathlib import Path

import numpy as np
import pytest

from meds_megatron.config import Config, ParallelLayout, load_config
from meds_megatron.plan.plan import make_plan

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def test_the_quickstarts_ranks_need_what_is_predicted(cpu_ranks, tmp_path):
    from meds_megatron.toy_tasks import arithmetic_model

    tokenizer = arithmetic_model.build_tokenizer()
    arithmetic_model.build_model(tokenizer, 0).save_pretrained(tmp_path)
    config = load_config(QUICKSTART, ["cluster.device=cpu"])
    memory = make_plan(config).memory
    found = cpu_ranks.run(2, peak_bytes, config, str(tmp_path))
    for stage, measured in enumerate(found):
        predicted = max(demand.total for demand in memory.demands if demand.device.stage == stage)
        assert predicted == pytest.approx(measured, rel=0.25)
    assert memory.limit is None


def peak_bytes(rank: int, config: Config, directory: str) -> int:
    """Largest resident size of this process after the forward pass and update of a mini-batch of longest responses."""
    # What a Ray actor has loaded and a rank of a test has not.
    import ray  # noqa: F401

    from meds_megatron.actor.policy import Policy
    from meds_megatron.actor.process_group import form_groups
    from meds_megatron.actor.schedule import schedule
    from meds_megatron.actor.train_batch import TrainBatch

    form_groups(config.parallel, seed=0)
    policy = Policy(config, directory, "cpu")
    rows = config.train.mini_batch_prompts * config.rollout.responses_per_prompt
    prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
    batch = TrainBatch.of_responses(
        [[5] * prompt] * rows,
        [[7] * response] * rows,
        logprobs=[[0.0] * response] * rows,
        answer_positions=[3] * rows,
        groups=[row // config.rollout.responses_per_prompt for row in range(rows)],
    )
    layout, one_minibatch = ParallelLayout.from_config(config), np.zeros(rows, dtype=np.int64)

    def micro_batches(tokens: int) -> list[np.ndarray]:
        work = schedule(batch.lengths_B, batch.lengths_B, one_minibatch, layout.data, tokens)
        return work.micro_batches[0][0]

    policy.forward(batch, micro_batches(config.train.forward_tokens))
    batch.advantages_B = np.ones(rows, dtype=np.float32)
    batch.loss_weights_B = np.ones(rows, dtype=np.float32)
    batch.logprobs_R = batch.entropy_R = np.zeros(rows * response, dtype=np.float32)
    policy.update(batch, [micro_batches(config.train.micro_batch_tokens)], step=0)
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))

"""Diversity of responses by their fingerprints: one forward pass of the evaluated model in a trainer rank of its own.

The rank needs the memory that one needs in training, optimizer included.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from meds_megatron.actor.schedule import schedule
from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.actor.worker import PolicyWorker, rank_env_vars
from meds_megatron.cluster.placement import Place
from meds_megatron.cluster.ray_cluster import reserve_nodes
from meds_megatron.config import Config
from meds_megatron.evaluation.statistics import top_eigenvalue_ratio
from meds_megatron.evaluation.summary import RATIO
from meds_megatron.faults.supervised import CONCURRENCY_GROUPS

TOKENS = "tokens"
"""Field of an unfinished row: token ids of `prompt` and `responses`, and `answer_positions`."""
BATCH_PROBLEMS = 64


def add_ratios(rows: Sequence[dict[str, Any]], config: Config, model: Path) -> None:
    """Replaces the TOKENS of each row by the RATIO of its responses with an answer, over the last
    `memory.last_n_layers` layers; None for fewer than two.

    The caller has started Ray, and `config` is that of the engines, which have ended.
    """
    import ray

    config = deepcopy(config)
    config.cluster.nodes, config.rollout.nodes = 1, None
    placement = reserve_nodes(config, config.cluster.device == "cuda", paths=[model])
    options = placement.options(Place(0, (0,)), rank_env_vars(config))
    worker = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(PolicyWorker).options(**options).remote(config, 0)
    try:
        store = ray.get(worker.open_store.remote(1))
        ray.get(worker.start.remote(store, 1, str(model)))
        for first in range(0, len(rows), BATCH_PROBLEMS):
            part = rows[first : first + BATCH_PROBLEMS]
            batch = train_batch(part)
            one_minibatch_B = np.zeros(len(batch), dtype=np.int64)
            packed = schedule(batch.lengths_B, batch.lengths_B, one_minibatch_B, 1, config.train.forward_tokens)
            output = ray.get(worker.forward.remote(batch, packed.micro_batches[0][0]))
            for number, row in enumerate(part):
                own_B = (batch.groups_B == number) & (batch.answer_positions_B >= 0)
                ratio = top_eigenvalue_ratio(output.fingerprints_BL[own_B, -config.memory.last_n_layers :])
                row[RATIO] = None if np.isnan(ratio) else ratio
                del row[TOKENS]
    finally:
        ray.kill(worker)
        placement.close()


def train_batch(rows: Sequence[dict[str, Any]]) -> TrainBatch:
    """The responses of several rows; group i is row i."""
    tokens = [row[TOKENS] for row in rows]
    responses = [response for own in tokens for response in own["responses"]]
    return TrainBatch.of_responses(
        prompts=[own["prompt"] for own in tokens for _ in own["responses"]],
        responses=responses,
        logprobs=[np.zeros(len(response), dtype=np.float32) for response in responses],
        answer_positions=[position for own in tokens for position in own["answer_positions"]],
        groups=[number for number, own in enumerate(tokens) for _ in own["responses"]],
    )

"""All engines of a run as the driver sees them: one object that generates and takes new weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import ray

from meds_megatron.config import Config
from meds_megatron.launch.placement import Placement, engine_places
from meds_megatron.rollout.engine import RolloutEngine
from meds_megatron.rollout.environment import engine_environment
from meds_megatron.rollout.response import Response
from meds_megatron.rollout.sampling import Sampling
from meds_megatron.weights.shared_memory import BucketInfo, remove_bucket

CLOSE_SECONDS = 10


@dataclass(frozen=True)
class PendingResponses:
    """Responses that engines are at work on; `result` waits for them."""

    parts: list[ray.ObjectRef]

    def result(self) -> list[Response]:
        """All responses, in the order of the prompts and, of one prompt, in the order they were drawn."""
        responses = [response for part in ray.get(self.parts) for response in part]
        return sorted(responses, key=lambda response: response.prompt_index)


class EngineGroup:
    """Starts a Ray actor an engine and speaks to them together.

    The constructor returns at once, so that engines and trainer ranks can start side by side; `start` waits.
    """

    def __init__(self, config: Config, model_dir: str, use_gpu: bool, placement: Placement):
        actor = ray.remote(RolloutEngine)
        environment = engine_environment(config, use_gpu)
        self.engines = [
            actor.options(**placement.options(place, environment)).remote(config, model_dir, use_gpu, index)
            for index, place in enumerate(engine_places(config.cluster, config.rollout))
        ]
        self._starting = [engine.start.remote() for engine in self.engines]

    def start(self, disk_weights_version: int | None = None) -> None:
        """Returns when all engines have loaded the model.

        With a version, the weights that they loaded from the model's directory are declared to be that version;
        without, the engines wait for their first weight update. Raises UserError when the machine cannot run the model.
        """
        ray.get(self._starting)
        if disk_weights_version is not None:
            self._on_all("trust_disk_weights", disk_weights_version)

    def submit(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> PendingResponses:
        """Sets the engines to work on `prompts` (token ids), shared out evenly, and returns at once.

        `seed` makes the responses repeatable: give every call of a step its own.
        """
        parts = []
        for number, engine in enumerate(self.engines):
            indices = list(range(number, len(prompts), len(self.engines)))
            if indices:
                parts.append(engine.generate.remote([prompts[i] for i in indices], indices, sampling, seed))
        return PendingResponses(parts)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Response]:
        """Responses to `prompts`, `sampling.responses` of each, in their order."""
        return self.submit(prompts, sampling, seed).result()

    def begin_weight_update(self, version: int) -> None:
        """Makes all engines stale, ready for the buckets of `version`."""
        self._on_all("begin_weight_update", version)

    def load_bucket(self, bucket: BucketInfo) -> None:
        """Loads a bucket into every engine and removes it."""
        try:
            self._on_all("load_bucket", bucket.path)
        finally:
            remove_bucket(bucket)

    def finish_weight_update(self) -> None:
        """Makes the new weights the ones in use, with nothing left of the old ones in the prefix caches."""
        self._on_all("finish_weight_update")

    def close(self) -> None:
        """Ends the engines; one that is still at work after CLOSE_SECONDS is killed."""
        ray.wait([e.close.remote() for e in self.engines], num_returns=len(self.engines), timeout=CLOSE_SECONDS)
        for engine in self.engines:
            ray.kill(engine)

    def _on_all(self, method: str, *args) -> list:
        return ray.get([getattr(engine, method).remote(*args) for engine in self.engines])

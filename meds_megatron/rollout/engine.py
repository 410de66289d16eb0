"""One vLLM engine in a Ray actor.

Importing this module imports neither vLLM nor Ray; vLLM is imported when an engine starts, in a process with the
variables of `rollout.settings.engine_env_vars`.
"""

import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from meds_megatron.cluster.device import require_gpu
from meds_megatron.config import Config
from meds_megatron.data.tokenizer import load_tokenizer
from meds_megatron.faults.supervised import SupervisedActor, ignore_stop_signals
from meds_megatron.lean_imports import lean_vllm
from meds_megatron.logs import configure_process_logging
from meds_megatron.rollout.answer_position import AnswerLocator
from meds_megatron.rollout.llm import check_cpu_can_run, make_llm, stop_token_ids
from meds_megatron.rollout.samples import Completion, Segment
from meds_megatron.rollout.settings import Sampling
from meds_megatron.shared_memory import (
    PREFIX,
    SHARED_MEMORY,
    claim,
    list_files,
    mapped_files,
    remove,
    remove_unclaimed,
)

if TYPE_CHECKING:
    from vllm import SamplingParams

    from meds_megatron.weights.resharding.types import Checksums, Rendezvous, StagedBucket, SyncSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A prompt to be answered `sampling.responses` times."""

    number: int
    """Unique among the requests of a pool."""
    prompt: Sequence[int]
    """Token ids."""
    sampling: Sampling
    batch: int = 0
    """Requests that were submitted together have one number."""
    seed: int | None = None
    """Seed of the batch; None where it need not be repeatable."""


@dataclass(frozen=True)
class _Finished:
    number: int
    outputs: Any
    """vLLM's `CompletionOutput`s."""


def engine_log(index: int) -> str:
    """Name of an engine's log."""
    return f"engine{index:03d}"


MAY_WAIT = {"connect", "load_bucket"}
"""Methods in which an engine waits for the trainer's ranks: it need not be the cause of a hang."""


def import_without_gpu() -> None:
    """Imports what an engine without a GPU needs; a fork server does it ahead of the engines."""
    with lean_vllm():
        import vllm.v1.executor.uniproc_executor
        import vllm.v1.worker.cpu_worker  # noqa: F401
        from transformers import AutoTokenizer  # noqa: F401
        from vllm import LLM  # noqa: F401

        import meds_megatron.weights.resharding.vllm_backend  # noqa: F401


class RolloutEngine(SupervisedActor):
    """Generates completions with the weights of its last weight update, or those on disk.

    All calls of vLLM are made on one thread, decode steps included. A decode step queues the next one behind the calls
    that arrived meanwhile, so that a call waits for one step at most and none overlaps another.

    With `rollout.on_update: continue` a weight update interrupts the requests under way between two tokens. Nothing
    that old weights computed is used with the new ones: the prefix cache is emptied and the requests' own KV cache is
    recomputed when they continue.

    The actor is neither asynchronous nor has it several threads for its calls, since Ray would then not keep their
    order, which weights on the network need. `take_finished`, which waits, has a concurrency group of its own, and so
    have the methods of any supervised actor.
    """

    waiting_methods = ("watch", "take_finished")

    def __init__(
        self,
        config: Config,
        model_dir: str,
        use_gpu: bool,
        index: int = 0,
        disk_version: int | None = None,
        evaluation: bool = False,
    ) -> None:
        """`disk_version` is the version of the weights in `model_dir`. Without it they are not read, and the engine
        refuses requests until the end of a weight update. `index` is the engine's number in its pool. With `evaluation`
        completions have no log-probabilities, and seeds of requests may be used on any device."""
        ignore_stop_signals()
        self._config, self._model_dir, self._use_gpu, self._index = config, model_dir, use_gpu, index
        self._disk_version, self._evaluation = disk_version, evaluation
        self._version: int | None = None
        self._next_version: int | None = None
        self._update_failed = False
        overlaps = config.train.max_staleness > 0 and config.rollout.on_update == "continue"
        self._may_interrupt = overlaps and not evaluation
        self._interrupted = False
        """Whether unfinished requests wait for the end of a weight update."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        self._numbers: dict[str, int] = {}
        """Numbers of the unfinished requests by vLLM's name for them."""
        self._finished: SimpleQueue[_Finished | Exception] = SimpleQueue()

    def start(self, restarts: int = 0) -> None:
        """Loads the model. `restarts` is how often the engine was started before. Raises UserError when this machine
        cannot run it, and what vLLM raises otherwise."""
        configure_process_logging(self._config.run_dir, engine_log(self._index))
        for left_over in remove_unclaimed():
            logger.info("removed %s, which a killed process left", left_over)
        self.on_vllm_thread(self._start, restarts)
        logger.info("engine %d has loaded %s", self._index, self._model_dir)

    def on_vllm_thread(self, function: Callable, *arguments: Any, **keywords: Any) -> Any:
        """Calls a function between two decode steps and returns its result."""
        return self._thread.submit(function, *arguments, **keywords).result()

    def add(self, requests: Sequence[Request], seed: int | None = None) -> None:
        """Starts requests, in the order given.

        With a seed, the engine must have no unfinished ones. It then returns the same completions for the same seed,
        requests, weights and engine number. Raises RuntimeError when the weights are stale; whatever is raised here
        is raised by `take_finished` too.
        """
        try:
            self.on_vllm_thread(self._add, requests, seed)
        except Exception as error:
            logger.info("requests were not added", exc_info=True)
            self._finished.put(error)
            raise

    def take_finished(self) -> dict[int, list[Completion]]:
        """Waits until requests are finished and returns their completions by request number.

        Raises what vLLM raised while it decoded.
        """
        taken = [self._finished.get()]
        while not self._finished.empty():
            taken.append(self._finished.get())
        finished: list[_Finished] = []
        for request in taken:
            if isinstance(request, Exception):
                raise request
            finished.append(request)
        return {request.number: self._completions(request) for request in finished}

    def connect(self, spec: "SyncSpec", rendezvous: "Rendezvous | None", senders: dict[tuple[int, int], int]) -> None:
        """Gives the engine's ranks the sources of their weights; returns when the transfer group has formed."""
        self._on_ranks("init_weight_transfer_engine", init_info=dict(spec=spec, rendezvous=rendezvous, senders=senders))

    def begin_weight_update(self, version: int) -> None:
        """Makes the weights stale and interrupts unfinished requests; the buckets of `version` follow. Raises
        RuntimeError after a failed update, and for unfinished requests that may not be interrupted."""
        if self._update_failed:
            raise RuntimeError(f"engine {self._index} failed in a weight update: restart it")
        if self._numbers and not self._may_interrupt:
            raise RuntimeError(f"engine {self._index} has unfinished requests: wait for them before a weight update")
        self.on_vllm_thread(self._interrupt)
        self._version, self._next_version = None, version
        self._update("start_weight_update")

    def load_bucket(self, bucket: int, checksums: bool, *staged: "StagedBucket") -> "Checksums":
        """Loads a bucket of the reshard plan from the memory of this node and from the network.

        Returns the checksums of what was received if `checksums`. Raises an error that names the tensor when the model
        has no such parameter or has received it in this update. The engine can then only be closed.
        """
        handles = {key: handle for part in staged for key, handle in part.handles.items()}
        self._update("update_weights", update_info=dict(bucket=bucket, handles=handles, checksums=checksums))
        if not checksums:
            return {}
        return {key: value for part in self._on_ranks(_weight_checksums) for key, value in part.items()}

    def finish_weight_update(self) -> None:
        """Makes the new weights those in use.

        Raises an error that names the parameters that were not received. The engine can then only be closed.
        """
        self._update("finish_weight_update")
        self.on_vllm_thread(self._use_version, self._next_version)
        logger.info("weights of policy version %d are in use", self._version)

    def sleep(self, keep_weights: bool) -> None:
        """Frees the GPU's memory: the weights move to host memory, or are dropped and stale until the end of a weight
        update; the KV cache is dropped."""
        if not keep_weights:
            self._version = None
        self.on_vllm_thread(lambda: self.llm.sleep(level=1 if keep_weights else 2))

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes the memory back, first for the weights, then for the KV cache."""
        self.on_vllm_thread(lambda: self.llm.wake_up(tags=[part]))

    def random_states(self) -> dict[str, np.ndarray]:
        """States of the generators that the engine's ranks sample from: bytes by `rank0.cpu` and the like."""
        ranks = self._on_ranks(_random_states)
        return {f"rank{rank}.{name}": state for rank, states in enumerate(ranks) for name, state in states.items()}

    def set_random_states(self, states: dict[str, np.ndarray], salt: int) -> bool:
        """Continues from `random_states` of an engine with the same ranks and devices; False otherwise, and the seed
        is then another for each `salt`."""
        if states.keys() != self.random_states().keys():
            self.on_vllm_thread(self._seed_sampling, self._config.train.seed, salt)
            return False
        self._on_ranks(_set_random_states, states=states)
        return True

    def close(self) -> None:
        """Ends vLLM's own processes and frees the memory shared with them."""
        self._numbers.clear()
        if hasattr(self, "llm"):
            self.on_vllm_thread(self.llm.llm_engine.engine_core.shutdown)
            # vLLM leaves its files when one of its processes was killed.
            remove(self._shared)

    def _start(self, restarts: int) -> None:
        # vLLM logs warnings while it is imported, before it applies the level that its environment sets.
        logging.getLogger("vllm").setLevel(logging.ERROR)
        if self._use_gpu:
            require_gpu()
        else:
            import_without_gpu()
            check_cpu_can_run(self._model_dir)
        self._tokenizer = load_tokenizer(self._model_dir)
        self._answers = AnswerLocator(self._tokenizer)
        self._stop_token_ids = stop_token_ids(self._model_dir, self._tokenizer.eos_token_id)
        self._shared = SHARED_MEMORY / f"{PREFIX}engine-{secrets.token_hex(8)}"
        self._claim = claim(self._shared)
        read_weights = self._disk_version is not None
        self.llm = make_llm(self._config, self._model_dir, self._use_gpu, read_weights, self._evaluation)
        # vLLM logs through the process's handlers instead of its own.
        vllm_logger = logging.getLogger("vllm")
        vllm_logger.handlers.clear()
        vllm_logger.propagate = True
        list_files(self._shared, {*mapped_files(), *itertools.chain(*self.llm.collective_rpc(_mapped_files))})
        # Engines are built with one seed, with which all, and each after every restart, would draw alike.
        self._seed_sampling(self._config.train.seed, restarts)
        if self._disk_version is not None:
            self._use_version(self._disk_version)

    def _add(self, requests: Sequence[Request], seed: int | None) -> None:
        from vllm import TokensPrompt

        if self._version is None:
            raise RuntimeError(f"engine {self._index} has stale weights: finish a weight update first")
        idle = not self._numbers
        if seed is not None:
            self._seed_sampling(seed)
            # A prefix cached by earlier requests would change what is computed, and so the order of samples.
            self._reset_prefix_cache()
        names = self.llm.enqueue(
            [TokensPrompt(prompt_token_ids=list(request.prompt)) for request in requests],
            [self._sampling_params(request.sampling) for request in requests],
            use_tqdm=False,
        )
        # vLLM appends a random suffix to the names that its outputs have.
        self._numbers |= {
            name.rpartition("-")[0]: request.number for name, request in zip(names, requests, strict=True)
        }
        if idle and self._numbers:
            self._thread.submit(self._decode_step)

    def _interrupt(self) -> None:
        self._interrupted = bool(self._numbers)
        if self._interrupted:
            # Waits for the device and leaves the requests in vLLM's scheduler.
            self.llm.sleep(level=0, mode="keep")

    def _use_version(self, version: int) -> None:
        """Begins to generate with weights that have been loaded, with requests that were interrupted first of all."""
        self._reset_prefix_cache()
        # vLLM notes it for every token.
        self.llm.llm_engine.set_weight_version(str(version))
        self._version = version
        if self._interrupted:
            self._interrupted = False
            self.llm.wake_up(tags=["scheduling"])
            self._thread.submit(self._decode_step)

    def _decode_step(self) -> None:
        if self._interrupted:
            return
        self.work += 1
        try:
            for output in self.llm.llm_engine.step():
                self._finished.put(_Finished(self._numbers.pop(output.request_id), output.outputs))
        except Exception as error:
            logger.info("a decode step failed", exc_info=True)
            self._finished.put(error)
            return
        if self._numbers:
            self._thread.submit(self._decode_step)

    def _sampling_params(self, sampling: Sampling) -> "SamplingParams":
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.responses,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            ignore_eos=not sampling.stop,
            stop_token_ids=self._stop_token_ids if sampling.stop else None,
            # 0: of the sampled token only.
            logprobs=None if self._evaluation else 0,
            flat_logprobs=not self._evaluation,
            detokenize=False,
        )

    def _completions(self, finished: _Finished) -> list[Completion]:
        texts = self._tokenizer.batch_decode([c.token_ids for c in finished.outputs], skip_special_tokens=True)
        completions = []
        for output, text in zip(finished.outputs, texts, strict=True):
            token_ids = list(output.token_ids)
            logprobs = np.array(output.logprobs.logprobs, dtype=np.float32) if output.logprobs else None
            versions = [(int(span.version), span.start) for span in output.weight_versions]
            segment = Segment.drawn(np.array(token_ids, dtype=np.int64), logprobs, versions)
            answer = self._answers.locate(token_ids)
            completions.append(Completion((segment,), text, output.finish_reason, *answer))
        return completions

    def _seed_sampling(self, *seeds: int) -> None:
        (engine_seed,) = np.random.SeedSequence([*seeds, self._index]).generate_state(1)
        self.llm.collective_rpc(_seed_sampling, args=(int(engine_seed),))

    def _reset_prefix_cache(self) -> None:
        """Empties the prefix cache; requests that were interrupted lose their KV cache."""
        if not self.llm.reset_prefix_cache(reset_running_requests=self._interrupted):
            raise RuntimeError(f"engine {self._index} could not reset its prefix cache: a request is still running")

    def _on_ranks(self, method: str | Callable, **arguments) -> list:
        return self.on_vllm_thread(self.llm.collective_rpc, method, kwargs=arguments)

    def _update(self, method: str, **arguments) -> None:
        self.work += 1
        try:
            self._on_ranks(method, **arguments)
        except Exception:
            logger.info("the weight update failed in %s", method, exc_info=True)
            self._update_failed = True
            raise


def _seed_sampling(worker, seed: int) -> None:
    """Seeds the generators that a rank samples from. Tensor-parallel ranks need the same seed: each of them samples."""
    from vllm.utils.torch_utils import set_random_seed

    set_random_seed(seed)


def _mapped_files(worker) -> list[Path]:
    """Files in shared memory that a rank has mapped."""
    return mapped_files()


def _random_states(worker) -> dict[str, np.ndarray]:
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.numpy() for name, state in states.items()}


def _set_random_states(worker, states: dict[str, np.ndarray]) -> None:
    import torch

    torch.set_rng_state(torch.from_numpy(states[f"rank{worker.rank}.cpu"].copy()))
    if f"rank{worker.rank}.cuda" in states:
        torch.cuda.set_rng_state(torch.from_numpy(states[f"rank{worker.rank}.cuda"].copy()))


def _weight_checksums(worker) -> "Checksums":
    """Checksums of the bucket that a rank received last."""
    return worker.weight_transfer_engine.checksums

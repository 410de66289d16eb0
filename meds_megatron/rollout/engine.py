"""One vLLM engine, as it lives in a Ray actor.

Importing this module does not import vLLM: that happens when an engine is made, in a process whose environment
`rollout.environment` has set.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.rollout.boxed import BoxedLocator
from meds_megatron.rollout.response import Response
from meds_megatron.rollout.sampling import Sampling

if TYPE_CHECKING:
    from vllm import CompletionOutput

    from meds_megatron.weights.resharding.messages import Checksums, Staged, SyncSpec
    from meds_megatron.weights.resharding.transport.network import Meeting


class RolloutEngine:
    """Generates responses with the weights it was last given.

    Its weights are stale until `trust_disk_weights` or a whole weight update says which version they are, and again
    from the beginning of an update to its end; a stale engine refuses to generate. `index` tells the engines of a run
    apart.
    """

    def __init__(self, config: Config, model_dir: str, use_gpu: bool, index: int = 0, read_weights: bool = True):
        """Without `read_weights` the engine does not read the model's weights from disk, only what kind it is: a weight
        update has to bring them."""
        self._config, self._model_dir, self._use_gpu, self._index = config, model_dir, use_gpu, index
        self._read_weights = read_weights
        self._version: int | None = None
        self._next_version: int | None = None
        self._failed = self._started = False

    def start(self) -> None:
        """Loads the model. Raises UserError when this machine cannot run it, and what vLLM raises otherwise."""
        from transformers import AutoTokenizer

        # vLLM warns while it is imported, before it applies the level that its environment asks for.
        logging.getLogger("vllm").setLevel(logging.ERROR)
        if not self._use_gpu:
            check_cpu_can_run(self._model_dir)
        self._tokenizer = AutoTokenizer.from_pretrained(self._model_dir)
        self._boxed = BoxedLocator(self._tokenizer)
        self._stop_token_ids = stop_token_ids(self._model_dir, self._tokenizer.eos_token_id)
        self.llm = make_llm(self._config, self._model_dir, self._use_gpu, self._read_weights)
        self._started = True

    def weights_version(self) -> int | None:
        """Version of the weights, None while they are stale."""
        return self._version

    def trust_disk_weights(self, version: int = 0) -> None:
        """Declares that the weights read from the model's directory are `version`."""
        self._version = version

    def generate(self, prompts: list[list[int]], indices: list[int], sampling: Sampling, seed: int) -> list[Response]:
        """Responses to `prompts` (token ids), `sampling.responses` of each, in the order of the prompts.

        `indices` are the prompts' numbers, which the responses carry. The same engine with the same weights gives the
        same responses for the same arguments. Raises RuntimeError when the weights are stale.
        """
        if self._version is None:
            raise RuntimeError(
                f"engine {self._index} has stale weights: finish a weight update, or trust the ones on disk, first"
            )
        from vllm import SamplingParams, TokensPrompt

        (engine_seed,) = np.random.SeedSequence([seed, self._index]).generate_state(1)
        self._on_ranks("seed_sampling", seed=int(engine_seed))
        parameters = SamplingParams(
            n=sampling.responses,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=self._stop_token_ids,
            # 0: of the sampled token only.
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )
        # A prefix that another call left in the cache would change what is computed, and so the order of samples.
        self._forget_prefixes()
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
        numbered = [
            (index, completion) for index, output in zip(indices, outputs, strict=True) for completion in output.outputs
        ]
        texts = self._tokenizer.batch_decode([c.token_ids for _, c in numbered], skip_special_tokens=True)
        return [
            self._response(index, completion, text) for (index, completion), text in zip(numbered, texts, strict=True)
        ]

    def connect(self, spec: "SyncSpec", meeting: "Meeting | None", senders: dict[tuple[int, int], int]) -> None:
        """Tells the engine's ranks where their weights come from; returns when those they meet over the network are
        there."""
        self._on_ranks("init_weight_transfer_engine", init_info=dict(spec=spec, meeting=meeting, senders=senders))

    def begin_weight_update(self, version: int) -> None:
        """Makes the engine stale, ready for the groups of `version`."""
        if self._failed:
            raise RuntimeError(f"engine {self._index} failed in a weight update: start it anew")
        self._version, self._next_version = None, version
        self._update("start_weight_update")

    def load_group(self, group: int, checksums: bool, *staged: "Staged") -> "Checksums":
        """Loads one group of the resharding plan, what is staged on this node and what comes over the network.

        Returns the checksums of what was received, where they are wanted. Raises an error that names the tensor when
        the model has no such parameter or got it before in this update. The engine can then only be ended.
        """
        handles = {place: handle for part in staged for place, handle in part.handles.items()}
        self._update("update_weights", update_info=dict(group=group, handles=handles, checksums=checksums))
        if not checksums:
            return {}
        return {key: value for part in self._on_ranks("weight_checksums") for key, value in part.items()}

    def finish_weight_update(self) -> None:
        """Makes the new weights the ones in use.

        Raises an error that names the parameters that never came. The engine can then only be ended.
        """
        self._update("finish_weight_update")
        self._forget_prefixes()
        self._version = self._next_version

    def sleep(self) -> None:
        """Gives the GPU's memory to others: the weights wait in the machine's memory, the KV cache is thrown away."""
        self.llm.sleep(level=1)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes the memory back, first for the weights, then for the KV cache."""
        self.llm.wake_up(tags=[part])

    def close(self) -> None:
        """Ends vLLM's own processes and gives back the shared memory they speak through."""
        if self._started:
            self.llm.llm_engine.engine_core.shutdown()

    def _on_ranks(self, method: str, **arguments) -> list:
        return self.llm.collective_rpc(method, kwargs=arguments)

    def _update(self, method: str, **arguments) -> None:
        try:
            self._on_ranks(method, **arguments)
        except Exception:
            self._failed = True
            raise

    def _response(self, index: int, completion: "CompletionOutput", text: str) -> Response:
        token_ids = list(completion.token_ids)
        boxed = self._boxed.locate(token_ids)
        return Response(
            prompt_index=index,
            token_ids=token_ids,
            logprobs=completion.logprobs.logprobs,
            text=text,
            finish_reason=completion.finish_reason,
            weights_version=self._version,
            boxed_token=boxed.token,
            no_fingerprint_reason=boxed.reason,
        )

    def _forget_prefixes(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(f"engine {self._index} could not reset its prefix cache: a request is still running")


def make_llm(config: Config, model_dir: str, use_gpu: bool, read_weights: bool = True):
    """A `vllm.LLM` that takes our weight updates and gives the log-probabilities that samples were drawn with.

    Without `read_weights` its weights are random until the first update.
    """
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from meds_megatron.weights.resharding.vllm_backend import BACKEND

    rollout = config.rollout
    memory = (
        {"gpu_memory_utilization": rollout.gpu_memory_utilization} | {"enable_sleep_mode": rollout.nodes is None}
        if use_gpu
        else {"kv_cache_memory_bytes": int(rollout.cpu_kv_cache_gib * 2**30)}
    )
    return LLM(
        model=model_dir,
        load_format="auto" if read_weights else "dummy",
        dtype=engine_dtype(config),
        seed=config.train.seed,
        max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens,
        max_num_seqs=rollout.max_num_seqs,
        tensor_parallel_size=rollout.tensor,
        # An engine's ranks are processes of its own machine; on CPU vLLM has no other way.
        distributed_executor_backend="uni" if rollout.tensor == 1 else "mp",
        enforce_eager=rollout.enforce_eager,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        # Prompts come as tokens and all responses are decoded together, which costs less than one by one.
        skip_tokenizer_init=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        worker_extension_cls="meds_megatron.rollout.vllm_worker.EngineRank",
        **memory,
    )


def engine_dtype(config: Config) -> str:
    """Type of the engines' weights, without the `torch.`."""
    return config.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype


def check_cpu_can_run(model_dir: str) -> None:
    """Raises UserError for attention heads of a size that vLLM's CPU kernels do not have.

    vLLM itself notices only when it generates.
    """
    from transformers import AutoConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = AutoConfig.from_pretrained(model_dir)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise UserError(
            f"{model_dir}/config.json gives attention heads of size {size}, and vLLM without CUDA has only "
            f"{', '.join(map(str, sizes))}: choose another model, or a machine with GPUs"
        )


def stop_token_ids(model_dir: str | Path, tokenizer_eos: int | None) -> list[int]:
    """The tokens that end a response: the tokenizer's own and those that the model's files name."""
    stops = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        eos = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if eos is not None:
            stops.update(eos if isinstance(eos, list) else [eos])
            break
    return sorted(stops)

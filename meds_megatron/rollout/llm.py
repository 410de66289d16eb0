"""The vLLM model of an engine: its arguments from the config, and what this package knows of the model's files.

Importing this module does not import vLLM.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from meds_megatron.config import Config, RolloutConfig
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.config.schema import CPU_KV_CACHE_GIB
from meds_megatron.errors import UserError
from meds_megatron.json_text import parse_json

if TYPE_CHECKING:
    from vllm import LLM

STEP_TOKENS = 4096
"""Prompt tokens of a step in evaluations without CUDA: vLLM's own default there."""
FREE_SHARE = 0.01
"""Share of the GPU that has to be free when vLLM starts. Where the size of the KV cache is given it has no other use,
and vLLM's default would refuse a GPU on which a trainer rank is."""


def make_llm(
    config: Config, model_dir: str, use_gpu: bool, read_weights: bool = True, evaluation: bool = False
) -> "LLM":
    """A `vllm.LLM` with this package's weight transfer and the log-probabilities that samples were drawn with.

    Without `read_weights` its weights are random until the first update. With `evaluation` it has no log-probabilities
    and does not sleep, and without CUDA it never divides a prompt over two steps, where vLLM fails with seeds of
    requests.
    """
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    from meds_megatron.weights.resharding.vllm_backend import BACKEND

    rollout = config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    purpose = (
        {"logprobs_mode": "raw_logprobs"}
        | ({} if use_gpu else {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, STEP_TOKENS)})
        if evaluation
        else {"logprobs_mode": "processed_logprobs"}
    )
    return LLM(
        model=model_dir,
        trust_remote_code=False,
        load_format="auto" if read_weights else "dummy",
        dtype=engine_dtype(config),
        seed=config.train.seed,
        max_model_len=longest,
        max_num_seqs=rollout.max_num_seqs,
        tensor_parallel_size=rollout.tensor,
        # An engine's ranks are processes of its own machine; on CPU vLLM has no other way.
        distributed_executor_backend="uni" if rollout.tensor == 1 else "mp",
        enforce_eager=rollout.enforce_eager,
        enable_prefix_caching=True,
        # Prompts are token ids, and finished responses are decoded whole, which costs less than token by token.
        skip_tokenizer_init=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        enable_sleep_mode=use_gpu and rollout.nodes is None and not evaluation,
        **purpose,
        **kv_cache_arguments(rollout, use_gpu),
    )


def kv_cache_arguments(rollout: RolloutConfig, use_gpu: bool) -> dict[str, Any]:
    """vLLM's arguments for the KV cache. Where neither config nor plan gives its size, vLLM finds what is free."""
    size = rollout.kv_cache_gib or (None if use_gpu else CPU_KV_CACHE_GIB)
    return {} if size is None else {"kv_cache_memory_bytes": int(size * 2**30), "gpu_memory_utilization": FREE_SHARE}


def engine_dtype(config: Config) -> Literal["float32", "bfloat16"]:
    """Data type of the engines' weights, without `torch.`."""
    return config.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype


def check_cpu_can_run(model_dir: str) -> None:
    """Raises UserError for a size of attention heads that vLLM's CPU kernels lack: vLLM itself fails in generation."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = ModelShape.from_hf(model_dir).head_dim
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise UserError(
            f"{model_dir}/config.json gives attention heads of size {size}, and vLLM without CUDA has only "
            f"{', '.join(map(str, sizes))}: choose another model, or a machine with GPUs"
        )


def stop_token_ids(model_dir: str | Path, tokenizer_eos: int | None) -> list[int]:
    """Tokens that end a response: the tokenizer's end-of-sequence token and those named in the model's files.

    Raises UserError for a file that is not JSON.
    """
    stops = set() if tokenizer_eos is None else {tokenizer_eos}
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        try:
            eos = parse_json(path.read_text()).get("eos_token_id") if path.is_file() else None
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is not JSON of a model ({error}): download the model again") from error
        if eos is not None:
            stops.update(eos if isinstance(eos, list) else [eos])
            break
    return sorted(stops)

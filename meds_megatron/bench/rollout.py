"""Tokens a second of our engine against plain `vllm.LLM.generate`, in one run on the same prompts."""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

import ray

from meds_megatron.config import Config
from meds_megatron.launch.placement import Placement, engine_places
from meds_megatron.rollout.environment import engine_environment
from meds_megatron.rollout.group import EngineGroup
from meds_megatron.rollout.sampling import Sampling


def run(config: Config, model_dir: str, prompts: Sequence[list[int]], use_gpu: bool, rounds: int = 5) -> dict:
    """Generates responses to `prompts` (token ids) with an engine of each kind in turn, `rounds` times after a warm-up.

    Both have the same model, dtype, memory, threads and batch size, and give log-probabilities of the sampled tokens;
    the plain one is otherwise as vLLM makes it. It is timed inside its process, ours where the driver has the
    responses in hand, graded text and fingerprint positions included. Ray has been started by the caller.

    Keys: `plain_tokens_per_s`, `ours_tokens_per_s` (medians over the rounds), `ratio` (median of the rounds' own),
    `ours_start_s`, `prompts`, `responses`, `mean_tokens` and the `sampling`.
    """
    config = copy.deepcopy(config)
    config.rollout.engines = 1
    # Two engines share what a run gives to one.
    config.rollout.gpu_memory_utilization /= 2
    sampling = Sampling.training(config.rollout)
    placement = Placement(config.cluster, use_gpu)
    (place,) = engine_places(config.cluster, config.rollout)
    options = placement.options(place, engine_environment(config, use_gpu))
    plain = ray.remote(PlainEngine).options(**options).remote(config, model_dir, use_gpu)
    ray.get(plain.ready.remote())
    began = time.perf_counter()
    ours = EngineGroup(config, model_dir, use_gpu, placement)
    ours.start(disk_weights_version=0)
    start_s = time.perf_counter() - began

    plain_rates, our_rates, tokens = [], [], 0
    for number in range(rounds + 1):
        plain_tokens, plain_s = ray.get(plain.generate.remote(prompts, sampling))
        began = time.perf_counter()
        responses = ours.generate(prompts, sampling, seed=number)
        our_s = time.perf_counter() - began
        our_tokens = sum(len(response.token_ids) for response in responses)
        if number > 0:
            plain_rates.append(plain_tokens / plain_s)
            our_rates.append(our_tokens / our_s)
            tokens += our_tokens
    ours.close()
    ray.get(plain.close.remote())
    ray.kill(plain)
    responses = len(prompts) * sampling.responses
    return {
        "plain_tokens_per_s": median(plain_rates),
        "ours_tokens_per_s": median(our_rates),
        "ratio": median(our / plain for our, plain in zip(our_rates, plain_rates, strict=True)),
        "ours_start_s": start_s,
        "prompts": len(prompts),
        "responses": responses,
        "mean_tokens": tokens / rounds / responses,
        "rounds": rounds,
        "sampling": asdict(sampling),
    }


class PlainEngine:
    """`vllm.LLM` with nothing of ours."""

    def __init__(self, config: Config, model_dir: str, use_gpu: bool):
        from vllm import LLM

        rollout = config.rollout
        self._llm = LLM(
            model=model_dir,
            dtype=config.model.dtype if rollout.dtype == "auto" else rollout.dtype,
            max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens,
            max_num_seqs=rollout.max_num_seqs,
            tensor_parallel_size=rollout.tensor,
            distributed_executor_backend="uni" if rollout.tensor == 1 else "mp",
            enforce_eager=rollout.enforce_eager,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            kv_cache_memory_bytes=None if use_gpu else int(rollout.cpu_kv_cache_gib * 2**30),
        )

    def ready(self) -> None:
        pass

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling) -> tuple[int, float]:
        """Number of tokens and seconds."""
        from vllm import SamplingParams, TokensPrompt

        parameters = SamplingParams(
            n=sampling.responses,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            logprobs=0,
        )
        began = time.perf_counter()
        tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self._llm.generate(tokens, parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs), seconds

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

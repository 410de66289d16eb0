"""Tokens a second of an engine pool: against plain vLLM, against a static split, and with a seed for each request."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import median

import numpy as np
import ray

from meds_megatron.cluster.placement import Placement, engine_places
from meds_megatron.cluster.ray_cluster import reserve_nodes
from meds_megatron.config import Config
from meds_megatron.rollout.llm import kv_cache_arguments
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.samples import Completion
from meds_megatron.rollout.settings import Sampling, engine_env_vars

SEEDED_PROMPT_TOKENS = 2048
"""Most prompt tokens where seeds are compared: without CUDA, vLLM fails when a step's token budget cuts a seeded
prompt."""


def run(config: Config, model_dir: str, prompts: Sequence[list[int]], use_gpu: bool, rounds: int = 5) -> dict:
    """Generates completions of `prompts` (token ids), `rounds` times after a warm-up, in alternation with the rivals.

    One engine against plain vLLM: both have the same model, dtype, memory, threads and batch size, and return
    log-probabilities of the sampled tokens; the plain one is otherwise vLLM's default. It is timed inside its process,
    ours where the driver has the completions, text and answer positions included. Then two engines with completions of
    very unequal lengths. The caller has started Ray.

    Keys: `plain_tokens_per_s`, `ours_tokens_per_s`, `ratio` (ours to plain); `unseeded_tokens_per_s` and
    `seeded_tokens_per_s` (both of `seeded_responses`, without and with a seed for each request), `seeded_ratio`;
    `two_engines`, see there (None without GPUs for two); `ours_start_s`, `prompts`, `responses`, `mean_tokens`,
    `rounds` and the `sampling`. Rates and ratios are medians over the rounds.
    """
    config = copy.deepcopy(config)
    config.rollout.engines, config.rollout.nodes = 1, None
    # Two engines share the memory that a run gives to one.
    if use_gpu and config.rollout.kv_cache_gib:
        config.rollout.kv_cache_gib /= 2
    sampling = Sampling.training(config.rollout)
    placement = reserve_nodes(config, use_gpu)
    (place,) = engine_places(config.cluster, config.rollout)
    options = placement.options(place, engine_env_vars(config, use_gpu))
    plain = ray.remote(PlainEngine).options(**options).remote(config, model_dir, use_gpu)
    ray.get(plain.ready.remote())
    pool, start_s = started_pool(config, model_dir, use_gpu, placement)
    rates: dict[str, list[float]] = {"plain": [], "ours": [], "unseeded": [], "seeded": []}
    few = prompts[: max(1, SEEDED_PROMPT_TOKENS // (sampling.responses * max(map(len, prompts))))]
    tokens = 0
    for number in range(rounds + 1):
        plain_tokens, plain_s = ray.get(plain.generate.remote(prompts, sampling))
        rates["plain"].append(plain_tokens / plain_s)
        completions, our_s = timed(lambda: pool.generate(prompts, sampling))
        rates["ours"].append(count_tokens(completions) / our_s)
        seeds = [replace(sampling, seed=number * len(prompts) + index) for index in range(len(few))]
        for kind, samplings in (("unseeded", [sampling] * len(few)), ("seeded", seeds)):
            made, seconds = timed(partial(pool.generate, few, samplings))
            rates[kind].append(count_tokens(made) / seconds)
        tokens += count_tokens(completions) if number > 0 else 0
    pool.close()
    ray.get(plain.close.remote())
    ray.kill(plain)
    enough_gpus = not use_gpu or 2 * config.rollout.tensor <= config.cluster.ranks_per_node
    plain_rates, our_rates, unseeded_rates, seeded_rates = (values[1:] for values in rates.values())
    return {
        "plain_tokens_per_s": median(plain_rates),
        "ours_tokens_per_s": median(our_rates),
        "ratio": median(our / plain for our, plain in zip(our_rates, plain_rates, strict=True)),
        "unseeded_tokens_per_s": median(unseeded_rates),
        "seeded_tokens_per_s": median(seeded_rates),
        "seeded_ratio": median(seeded / other for seeded, other in zip(seeded_rates, unseeded_rates, strict=True)),
        "seeded_responses": len(few) * sampling.responses,
        "ours_start_s": start_s,
        "prompts": len(prompts),
        "responses": len(prompts) * sampling.responses,
        "mean_tokens": tokens / rounds / (len(prompts) * sampling.responses),
        "rounds": rounds,
        "sampling": asdict(sampling),
        "two_engines": two_engines(config, model_dir, prompts, use_gpu, placement, rounds) if enough_gpus else None,
    }


def two_engines(
    config: Config, model_dir: str, prompts: Sequence[list[int]], use_gpu: bool, placement: Placement, rounds: int
) -> dict:
    """Two engines with four times as many responses as run at once, of log-normal lengths from 1/50 of the limit to it.

    The limit of a prompt is that of all its responses, and end-of-sequence tokens are ignored, so that both ways
    generate the same numbers of tokens. Keys: `static_s` (prompts assigned to the engines in turn beforehand:
    `rollout.deterministic`), `least_loaded_s` (each to the least loaded engine), medians; `speedup`, the median of the
    rounds' own; `responses`, `mean_tokens`, `max_tokens`.
    """
    config = copy.deepcopy(config)
    rollout = config.rollout
    rollout.engines = 2
    training = Sampling.training(rollout)
    count = max(2, 8 * rollout.max_num_seqs // training.responses)
    longest = training.max_tokens
    lengths = np.random.default_rng(0).lognormal(np.log(longest / 8), 1.2, count).clip(max(1, longest // 50), longest)
    many = [prompts[index % len(prompts)] for index in range(count)]
    samplings = [replace(training, max_tokens=int(length), stop=False) for length in lengths]
    pool, _ = started_pool(config, model_dir, use_gpu, placement)
    static: list[float] = []
    least_loaded: list[float] = []
    for number in range(rounds + 1):
        for seed, seconds in ((number, static), (None, least_loaded)):
            completions, elapsed = timed(partial(pool.generate, many, samplings, seed))
            seconds.append(elapsed)
    pool.close()
    static, least_loaded = static[1:], least_loaded[1:]
    return {
        "static_s": median(static),
        "least_loaded_s": median(least_loaded),
        "speedup": median(old / new for old, new in zip(static, least_loaded, strict=True)),
        "responses": count * training.responses,
        "mean_tokens": count_tokens(completions) / (count * training.responses),
        "max_tokens": int(lengths.max()),
    }


def started_pool(config: Config, model_dir: str, use_gpu: bool, placement: Placement) -> tuple[EnginePool, float]:
    """A pool of engines with the weights in `model_dir`, and the seconds that its start took."""
    began = time.perf_counter()
    pool = EnginePool(config, model_dir, use_gpu, placement, disk_version=0)
    pool.start()
    return pool, time.perf_counter() - began


def timed(generate: Callable[[], list[list[Completion]]]) -> tuple[list[list[Completion]], float]:
    began = time.perf_counter()
    return generate(), time.perf_counter() - began


def count_tokens(completions: list[list[Completion]]) -> int:
    return sum(len(completion.token_ids_S) for of_prompt in completions for completion in of_prompt)


class PlainEngine:
    """`vllm.LLM` with its defaults."""

    def __init__(self, config: Config, model_dir: str, use_gpu: bool):
        from vllm import LLM

        rollout = config.rollout
        self._llm = LLM(
            model=model_dir,
            trust_remote_code=False,
            dtype=config.model.dtype if rollout.dtype == "auto" else rollout.dtype,
            max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens,
            max_num_seqs=rollout.max_num_seqs,
            tensor_parallel_size=rollout.tensor,
            distributed_executor_backend="uni" if rollout.tensor == 1 else "mp",
            enforce_eager=rollout.enforce_eager,
            **kv_cache_arguments(rollout, use_gpu),
        )

    def ready(self) -> None:
        pass

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling | Sequence[Sampling], logprobs: int | None = 0
    ) -> tuple[int, float]:
        """Number of tokens and seconds; `sampling` is that of all prompts or of each."""
        from vllm import SamplingParams, TokensPrompt

        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        parameters = [
            SamplingParams(
                n=own.responses,
                max_tokens=own.max_tokens,
                temperature=own.temperature,
                top_p=own.top_p,
                top_k=own.top_k,
                seed=own.seed,
                logprobs=logprobs,
            )
            for own in samplings
        ]
        began = time.perf_counter()
        tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self._llm.generate(tokens, parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs), seconds

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

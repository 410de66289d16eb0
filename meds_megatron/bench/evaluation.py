"""Tokens a second of `meds eval` against plain vLLM, and the time that grading takes."""

import copy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import ray

from meds_megatron.bench.rollout import PlainEngine
from meds_megatron.cluster.device import resolve_device
from meds_megatron.cluster.placement import engine_places
from meds_megatron.cluster.ray_cluster import ray_cluster, reserve_nodes
from meds_megatron.config import Config, DataConfig, ModelConfig, RewardConfig
from meds_megatron.data.prompts import Prompt, encode
from meds_megatron.data.tokenizer import load_tokenizer
from meds_megatron.evaluation.evaluate import model_dtype
from meds_megatron.evaluation.generate import engine_config, generate, size_to_machine
from meds_megatron.evaluation.settings import EngineOptions, request_seed
from meds_megatron.reward.grading import GraderPool
from meds_megatron.reward.rules import RULES
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling, engine_env_vars
from meds_megatron.toy_tasks.arithmetic import arithmetic_problems
from meds_megatron.toy_tasks.make import ensure_model

MAX_TOKENS = 40
"""Most tokens of a response of the arithmetic model."""


def run(
    responses: int = 8,
    rounds: int = 3,
    answers: int = 2000,
    workers: int = 2,
    problems: int = 200,
    model: Path | None = None,
) -> dict:
    """Generates `responses` to each arithmetic problem, `rounds` times after a warm-up, in alternation with plain vLLM,
    and grades `answers`. `model` is a Hugging Face directory, None the arithmetic model.

    One engine each, with the same model, dtype, memory, threads and batch size. Plain vLLM is `LLM.generate` with its
    defaults, once with the seeds that `meds eval` gives to every response and once without any, as LIMO calls it; it is
    timed inside its process, and `meds eval` where the driver has the graded responses. Keys: `eval_tokens_per_s`,
    `plain_tokens_per_s`, `plain_unseeded_tokens_per_s`, `ratio` and `unseeded_ratio` (eval to plain), medians over the
    rounds; `grading_s` by grader for `answers` answers in `workers` processes, their start included; `responses`,
    `mean_tokens`, `rounds`, `answers`, `workers`.
    """
    model = model or ensure_model(ModelConfig(make="arithmetic"), DataConfig(), Config.cache_dir)
    found = arithmetic_problems("validation", "shared", problems)
    data = DataConfig(system_prompt=None)
    token_ids = encode(found, load_tokenizer(model), data)
    prompts = [Prompt(problem, ids) for problem, ids in zip(found, token_ids, strict=True)]
    options = EngineOptions(engines=1, enforce_eager=True, kv_cache_gib=1.0)
    config = engine_config(model, model_dtype(model), max(map(len, token_ids)), MAX_TOKENS, options)
    config.cluster.device = resolve_device(config.cluster)
    seeded = [Sampling(responses, MAX_TOKENS, seed=request_seed(0, problem.dataset, problem.id)) for problem in found]
    with ray_cluster(config.cluster):
        size_to_machine(config, engines=1)
        rates, mean_tokens = _rates(config, model, prompts, seeded, rounds)
    pairs = _answers(answers)
    return {
        **{f"{name}_tokens_per_s": median(values) for name, values in rates.items()},
        "ratio": median(ours / plain for ours, plain in zip(rates["eval"], rates["plain"], strict=True)),
        "unseeded_ratio": median(
            ours / plain for ours, plain in zip(rates["eval"], rates["plain_unseeded"], strict=True)
        ),
        "grading_s": {grader: _grading_seconds(pairs, grader, workers) for grader in RULES},
        "responses": responses * len(prompts),
        "mean_tokens": mean_tokens,
        "rounds": rounds,
        "answers": answers,
        "workers": workers,
    }


def _rates(
    config: Config, model: Path, prompts: list[Prompt], seeded: list[Sampling], rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Tokens a second of every round by kind, and the mean length of a response."""
    use_gpu = config.cluster.device == "cuda"
    placement = reserve_nodes(config, use_gpu)
    (place,) = engine_places(config.cluster, config.rollout)
    actor_options = placement.options(place, engine_env_vars(config, use_gpu))
    plain = ray.remote(PlainEngine).options(**actor_options).remote(copy.deepcopy(config), str(model), use_gpu)
    ray.get(plain.ready.remote())
    token_ids = [prompt.token_ids for prompt in prompts]
    unseeded = [Sampling(sampling.responses, sampling.max_tokens) for sampling in seeded]
    rates: dict[str, list[float]] = {"eval": [], "plain": [], "plain_unseeded": []}
    lengths: list[int] = []
    pool = EnginePool(config, str(model), use_gpu, placement, disk_version=0, evaluation=True)
    pool.start()
    with GraderPool(1, RewardConfig.timeout_seconds) as graders:
        for _ in range(rounds + 1):
            for name, samplings in (("plain", seeded), ("plain_unseeded", unseeded)):
                tokens, seconds = ray.get(plain.generate.remote(token_ids, samplings, logprobs=None))
                rates[name].append(tokens / seconds)
            lengths.clear()
            began = time.perf_counter()
            generate(prompts, seeded, pool, graders, config, partial(_count, lengths))
            rates["eval"].append(sum(lengths) / (time.perf_counter() - began))
    pool.close()
    ray.get(plain.close.remote())
    ray.kill(plain)
    return {name: values[1:] for name, values in rates.items()}, sum(lengths) / len(lengths)


def _count(lengths: list[int], _number: int, group: PromptGroup) -> None:
    lengths += [len(sample.completion.token_ids_S) for sample in group.samples]


def _answers(count: int) -> list[tuple[str, str]]:
    """Distinct (response, truth) pairs: of five, three whole numbers, a decimal for a fraction, and an expression in
    another form, about as in MATH500."""
    pairs = []
    for number in range(count):
        answer, truth = {
            3: (str((number + 1) / 8), f"\\frac{{{number + 1}}}{{8}}"),
            4: (f"(x+{number})(x+\\sqrt{{3}})", f"x^2+({number}+\\sqrt{{3}})x+{number}\\sqrt{{3}}"),
        }.get(number % 5, (str(number), str(number)))
        pairs.append((f"So the answer is $\\boxed{{{answer}}}$.", truth))
    return pairs


def _grading_seconds(pairs: Sequence[tuple[str, str]], grader: str, workers: int) -> float:
    began = time.perf_counter()
    with GraderPool(workers, RewardConfig.timeout_seconds, grader=grader) as pool:
        pool.grade([response for response, _ in pairs], [truth for _, truth in pairs])
        return time.perf_counter() - began

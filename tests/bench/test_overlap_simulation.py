"""Runs in simulated time: small ones computed by hand, an engine against a loop over single decode steps, and what must
hold for every schedule of generation and training."""

import heapq
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.bench.overlap_simulation import METHODS, run
from meds_megatron.bench.simulation.clock import Clock
from meds_megatron.bench.simulation.engine import SimulatedEngine
from meds_megatron.bench.simulation.rates import EngineRates, TrainerRates
from meds_megatron.bench.simulation.run import simulate
from meds_megatron.bench.simulation.workload import MATH500_QUANTILES, Workload, read_lengths
from meds_megatron.cli import main
from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.rollout.engine import Request
from meds_megatron.rollout.settings import Sampling
from tests.examples import examples

PROMPT = 10
LENGTH = 1000
DECODE = EngineRates(
    step_seconds=0.01,
    weight_seconds=0.0,
    cached_seconds=0.0,
    product_seconds=0.0,
    attention_seconds=0.0,
    kv_tokens=10**9,
    max_num_seqs=256,
)
TRAINER = TrainerRates(forward_seconds=1e-4, update_seconds=5e-4, sync_seconds=1.0)


def config_of(staleness: int, on_update: str = "continue", steps: int = 6, prompts: int = 4, **filter_settings):
    config = Config()
    config.run_dir = "/nonexistent"
    config.cluster.device = "cuda"
    config.rollout.engines, config.rollout.nodes, config.rollout.responses_per_prompt = 1, 1, 2
    config.rollout.on_update = on_update
    config.train.steps, config.train.prompts_per_step, config.train.mini_batch_prompts = steps, prompts, 2
    config.train.max_staleness = staleness
    config.filter.metric = "none"
    config.reward.overlong.enabled = False
    for name, value in filter_settings.items():
        setattr(config.filter, name, value)
    return config


def workload_of(quantiles, mean, most=8192, prompts=2000, responses=2, kept_share=1.0, correlation=0.5, seed=0):
    return Workload(quantiles, mean, most, prompts, responses, PROMPT, kept_share, correlation, seed)


EQUAL = workload_of([1, 1], LENGTH)
TOKENS = 4 * 2 * (PROMPT + LENGTH)


def test_a_synchronous_step_takes_generation_training_and_weight_update():
    found = simulate(config_of(staleness=0), DECODE, TRAINER, EQUAL)
    generation = LENGTH * 0.01
    training = TOKENS * (1e-4 + 5e-4)
    assert [step["time/step"] for step in found.log.steps] == pytest.approx([generation + training + 1.0] * 6)
    assert [step["time/rollout"] for step in found.log.steps] == pytest.approx([generation] * 6)
    assert found.trainer_busy == pytest.approx(6 * (training + 1.0))
    assert found.engines_busy == pytest.approx(6 * (generation + 1.0))


@pytest.mark.parametrize("update_seconds", [5e-4, 5e-3], ids=["generation is longer", "training is longer"])
def test_a_step_one_off_takes_the_longer_of_generation_and_training_and_the_weight_update(update_seconds):
    rates = replace(TRAINER, update_seconds=update_seconds)
    found = simulate(config_of(staleness=1, on_update="finish"), DECODE, rates, EQUAL)
    generation, training = LENGTH * 0.01, TOKENS * (1e-4 + update_seconds)
    # From the second step on, its responses are there, and those of the next are generated while it trains.
    expected = [generation + training] + 4 * [max(generation, training)] + [training]
    assert [step["time/step"] - 1.0 for step in found.log.steps] == pytest.approx(expected)
    assert [step["staleness/mean"] for step in found.log.steps] == [0, 1, 1, 1, 1, 1]
    assert all(step["staleness/mixed_share"] == 0 for step in found.log.steps)


def test_engines_on_the_trainers_gpus_wait_for_the_copies_of_its_memory():
    config = config_of(staleness=0)
    config.rollout.nodes = None
    found = simulate(config, DECODE, replace(TRAINER, copy_seconds=4.0), EQUAL)
    expected = LENGTH * 0.01 + TOKENS * (1e-4 + 5e-4) + 1.0 + 4.0
    assert [step["time/step"] for step in found.log.steps] == pytest.approx([expected] * 6)


def test_grading_delays_the_step_once():
    found = simulate(config_of(staleness=0), DECODE, replace(TRAINER, grading_seconds=3.0), EQUAL)
    assert [step["time/reward"] for step in found.log.steps] == pytest.approx([3.0] * 6)


def engine_with(rates: EngineRates, workload: Workload) -> tuple[Clock, SimulatedEngine]:
    clock = Clock()
    return clock, SimulatedEngine(clock, rates, workload, 0, disk_version=0)


def request_of(number: int, responses: int = 1) -> Request:
    return Request(number, [number] + [0] * (PROMPT - 1), Sampling(responses, 8192))


def test_an_update_in_flight_stops_between_two_tokens_and_computes_the_cache_anew():
    rates = replace(DECODE, product_seconds=0.001)
    clock, engine = engine_with(rates, workload_of([1, 1], 100))
    engine.add([request_of(0)])
    # The prompt takes 0.01 s, each token 0.01 s and its product 0.001 s.
    clock.pass_seconds(0.01 + 30.5 * 0.011)
    clock.wait_for_any(engine.begin_weight_update(1))
    assert clock.now == pytest.approx(0.01 + 31 * 0.011)
    clock.wait_for_any(engine.load_bucket(5.0))
    engine.finish_weight_update()
    finished = engine.take_finished()
    clock.wait_for_any(finished)
    assert clock.now == pytest.approx(0.01 + 31 * 0.011 + 5.0 + (PROMPT + 31) * 0.001 + 69 * 0.011)
    (completion,) = finished.result()[0]
    assert completion.version_changes == [(0, 0), (1, 31)]
    assert len(completion.token_ids_S) == 100


def test_responses_that_wait_or_have_no_token_belong_to_the_new_version_alone():
    clock, engine = engine_with(replace(DECODE, max_num_seqs=1), workload_of([1, 1], 100))
    engine.add([request_of(0), request_of(1)])
    clock.pass_seconds(0.5)
    clock.wait_for_any(engine.begin_weight_update(1))
    engine.finish_weight_update()
    completions = take(clock, engine, 2)
    assert completions[0].version_changes == [(0, 0), (1, 50)]
    assert completions[1].version_changes == [(1, 0)]


def take(clock: Clock, engine: SimulatedEngine, requests: int) -> dict:
    found = {}
    while len(found) < requests:
        clock.wait_for_any(finished := engine.take_finished())
        found |= {number: completions[0] for number, completions in finished.result().items()}
    return found


def single_steps(rates: EngineRates, lengths_PN: np.ndarray, arrivals: list[float]) -> list[float]:
    """Time at which each request is finished, one decode step after the other."""
    now, order, waiting, running = 0.0, 0, [], []
    coming = [(time, number) for number, time in enumerate(arrivals)]
    computed, left, ends = set(), dict.fromkeys(range(len(arrivals)), lengths_PN.shape[1]), {}
    heapq.heapify(coming)
    while coming or waiting or running:
        # An engine that is idle when requests come begins with the first at once. Those that came during the step that
        # made it idle begin together.
        idle = not waiting and not running and coming[0][0] >= now
        if idle:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now and not (idle and waiting):
            _, number = heapq.heappop(coming)
            for length in lengths_PN[number]:
                waiting.append([order, number, 0, int(length)])
                order += 1
        prefill = 0.0
        while waiting and len(running) < rates.max_num_seqs:
            _, number, done, _ = waiting[0]
            cached = sum(PROMPT + entry[2] for entry in running)
            if running and cached + len(running) + PROMPT + done + 1 > rates.kv_tokens:
                break
            running.append(waiting.pop(0))
            tokens = done if number in computed else done + PROMPT
            computed.add(number)
            prefill += rates.prefill_seconds(tokens, PROMPT + done)
        while len(running) > 1 and sum(PROMPT + entry[2] + 1 for entry in running) > rates.kv_tokens:
            newest = max(running)
            running.remove(newest)
            waiting.insert(0, newest)
        now += prefill + rates.decode_seconds(len(running), sum(PROMPT + entry[2] for entry in running))
        for entry in list(running):
            entry[2] += 1
            if entry[2] == entry[3]:
                running.remove(entry)
                left[entry[1]] -= 1
                if not left[entry[1]]:
                    ends[entry[1]] = now
                    computed.discard(entry[1])
    return [ends[number] for number in range(len(arrivals))]


ARRIVALS = [0.0, 0.00317, 0.41237, 0.41339, 1.70711]
"""Seconds at which no decode step ends: which of the two comes first would depend on rounding."""


@examples(60)
@given(
    kv_tokens=st.sampled_from([60, 200, 10**6]),
    max_num_seqs=st.integers(1, 8),
    arrivals=st.lists(st.sampled_from(ARRIVALS), min_size=1, max_size=6),
    seed=st.integers(0, 100),
)
def test_an_engine_takes_as_long_as_its_decode_steps_one_by_one(kv_tokens, max_num_seqs, arrivals, seed):
    # Reads take longer than products at every size, as on GPUs.
    rates = EngineRates(0.004, 0.014, 5e-5, 1e-5, 1e-7, kv_tokens, max_num_seqs)
    workload = workload_of([1, 10, 40, 120], 30, responses=3, prompts=len(arrivals), seed=seed)
    clock, engine = engine_with(rates, workload)
    arrivals = sorted(arrivals)
    for number, time in enumerate(arrivals):
        clock.after(time, lambda number=number: engine.add([request_of(number, responses=3)]))
    ends = {}
    while len(ends) < len(arrivals):
        clock.wait_for_any(finished := engine.take_finished())
        ends |= dict.fromkeys(finished.result(), clock.now)
    expected = single_steps(rates, workload.lengths_PN, arrivals)
    assert [ends[number] for number in range(len(arrivals))] == pytest.approx(expected)


LONG_TAIL = workload_of(MATH500_QUANTILES, 200, most=800, kept_share=0.6, responses=2)


@pytest.mark.parametrize("deaths", [(), ((10.0, 0), (11.0, 2), (30.0, 1))], ids=["all engines live", "engines die"])
@pytest.mark.parametrize("method", METHODS)
def test_no_response_is_lost_trained_on_twice_or_too_old(method, deaths):
    config = config_of(staleness=0, steps=12, prompts=6, metric="accuracy", generation_prompts=8)
    config.rollout.engines = 3
    for key, value in METHODS[method].items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)
    rates = replace(DECODE, max_num_seqs=8)
    found = simulate(config, rates, TRAINER, LONG_TAIL, deaths)
    seen = [*found.log.trained, *found.log.dropped, *map(str, found.unfinished)]
    assert sorted(map(int, seen)) == list(range(found.drawn)), "every prompt is in one place"
    assert {*found.log.trained.values(), *found.log.dropped.values()} == {1}
    assert all(LONG_TAIL.kept_P[int(prompt)] for prompt in found.log.trained)
    assert found.updates and all(responses == 6 * 2 for responses, _ in found.updates)
    assert max(step.get("staleness/max", 0) for step in found.log.steps) <= config.train.max_staleness
    assert sum(step["rollout/engine_restarts"] for step in found.log.steps) == len(deaths)
    assert found.trainer_busy <= found.seconds and found.engines_busy <= found.seconds
    again = simulate(config, rates, TRAINER, LONG_TAIL, deaths)
    assert again.log.steps == found.log.steps and again.seconds == found.seconds


def test_lengths_keep_their_distribution_whatever_the_correlation():
    for correlation in (0.0, 0.5, 1.0):
        workload = workload_of(MATH500_QUANTILES, 500, responses=8, prompts=4000, correlation=correlation)
        scale = 500 / np.mean(MATH500_QUANTILES)
        found = np.quantile(workload.lengths_PN, [0.1, 0.5, 0.9, 0.99])
        assert found == pytest.approx(np.quantile(MATH500_QUANTILES, [0.1, 0.5, 0.9, 0.99]) * scale, rel=0.05)
        ranks_PN = np.argsort(np.argsort(workload.lengths_PN, axis=None)).reshape(workload.lengths_PN.shape)
        # Spearman's of a Gaussian copula.
        expected = 6 / np.pi * np.arcsin(correlation / 2)
        assert np.corrcoef(ranks_PN[:, 0], ranks_PN[:, 1])[0, 1] == pytest.approx(expected, abs=0.05)


def test_lengths_of_a_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("10\n20\n30\n")
    quantiles = read_lengths(path)
    assert (quantiles[0], quantiles[500], quantiles[-1]) == (10, 20, 30)
    path.write_text("10\n2.5\n")
    with pytest.raises(UserError, match="line 2"):
        read_lengths(path)
    with pytest.raises(UserError, match="rollouts"):
        read_lengths(tmp_path)


def test_a_comparison_of_a_large_cluster_has_a_row_for_each_method():
    found = run(None, ["train.prompts_per_step=32", "filter.generation_prompts=64"], answers=1000)
    assert found["simulated"] and found["steps"] == 2
    assert [row["method"] for row in found["rows"]] == list(METHODS)
    assert [row["gpus"] for row in found["rows"]] == [128] * 5
    assert all(row["answers"] == 1024 and 0 <= row["engines_idle"] < 1 for row in found["rows"])
    assert found["rows"][1]["speed"] == 1.0 and not found["left_out"]


def test_a_cluster_whose_gpus_cannot_be_shared_has_no_row_for_it():
    found = run(None, ["rollout.nodes=7", "rollout.engines=28", "train.prompts_per_step=32"], answers=500)
    assert [row["method"] for row in found["rows"]] == list(METHODS)[1:]
    assert "make the number of ranks a multiple of 16" in found["left_out"]["sync, shared GPUs"]


def test_the_command_prints_json_and_names_the_setting_that_it_lacks(capsys):
    command = ["bench", "overlap-simulation", "--answers", "500", "--json", "train.prompts_per_step=32"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 1
    assert main([*command, "rollout.nodes=null"]) != 0
    assert "rollout.nodes is not set" in capsys.readouterr().err

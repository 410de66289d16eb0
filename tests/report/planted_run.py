"""A run directory with planted mistakes, written by the code that writes those of real runs."""

import json
from pathlib import Path

import numpy as np

from meds_megatron.config import Config, save_config
from meds_megatron.run.directory import RunDirectory

LAYERS = 6
RESPONSES = 16
HABITS = [("drops the carry", 3), ("ignores precedence", 7)]
"""Planted mistakes of every problem, and what each adds to the right answer; the first is made twice as often."""
HOSTILE = [
    "<script>window.ran = true</script><img src=x onerror='window.ran = true'>",
    "\\frac{1}{2} & $x_1^{2}$ \\boxed{<b>1</b>}",
    "\ufffd broken \u202e bidi \x00 nul </script><!-- <script> \U0001f600",
]
"""Texts that a model may write."""


def write_planted_run(
    directory: Path, steps: int = 12, problems: int = 6, prompts_per_step: int = 4, seed: int = 0, **settings
) -> Path:
    """Runs `steps` steps of `prompts_per_step` groups of RESPONSES responses; a quarter of them are right, one in
    eight wrong ones has no answer. The wrong responses to problem 0 say what HOSTILE says first."""
    random = np.random.default_rng(seed)
    config = Config(name=settings.get("name", "planted"), run_dir=str(directory))
    run = RunDirectory(directory)
    run.rollouts.mkdir(parents=True)
    save_config(config, run.config)
    centres = random.normal(size=(problems, len(HABITS), LAYERS))
    lines = [{"step": 0, "validation/accuracy": 0.1, "validation/sums/accuracy": 0.1, "time/step": 2.0}]
    for step in range(1, steps + 1):
        chosen = [(step * prompts_per_step + place) % problems for place in range(prompts_per_step)]
        run.save_rollouts(step, _columns([row for problem in chosen for row in _group(problem, centres, step, random)]))
        lines.append({"step": step, **_metrics(step, steps, random)})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def question(problem: int) -> str:
    return f"What is {problem} + {problem + 1}? (problem {problem})"


def _group(problem: int, centres: np.ndarray, step: int, random: np.random.Generator) -> list[dict]:
    return [_response(problem, number, centres, step, random) for number in range(RESPONSES)]


def _response(problem: int, number: int, centres: np.ndarray, step: int, random: np.random.Generator) -> dict:
    right = number < RESPONSES // 4
    answered = number % 8 != 7
    habit = number % 3 // 2
    added = 0 if right else HABITS[habit][1]
    text = f"{problem} + {problem + 1}: {'' if right else HABITS[habit][0]}"
    if problem == 0 and not right:
        text = HOSTILE[number % len(HOSTILE)] + text
    if answered:
        text += f", so \\boxed{{{2 * problem + 1 + added}}}"
    fingerprint = centres[problem, habit] + 0.01 * random.normal(size=LAYERS)
    return {
        "key": f"p{problem}|{'right' if right else 'wrong'}",
        "group": problem,
        "source": "sums",
        "prompt": question(problem),
        "answer": str(2 * problem + 1),
        "response": text,
        "response_token_ids": [1, 2, 3],
        "given_tokens": [],
        "prompt_tokens": 5,
        "response_tokens": 3 + number,
        "correct": right,
        "outcome": "graded" if answered else "no_answer",
        "score": float(right),
        "penalty": 0.0 if right else 0.01 * step,
        "cluster_size": 0 if right else step,
        "cluster_label": None if right else habit,
        "shaped_score": float(right),
        "advantage": 1.0 if right else -1.0,
        "fingerprint": fingerprint if answered else None,
        "policy_version": step - 1,
        "later_versions": [],
        "kept": True,
    }


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _metrics(step: int, steps: int, random: np.random.Generator) -> dict[str, float]:
    progress = step / steps
    metrics = {
        "accuracy/mean": 0.2 + 0.6 * progress,
        "accuracy/solved": 0.5 + 0.4 * progress,
        "reward/mean": 0.1 + 0.5 * progress,
        "reward/shaped_mean": 0.05 + 0.5 * progress,
        "reward/penalty_mean": 0.1 * progress,
        "policy/entropy": 1.0 - 0.7 * progress,
        "policy/kl": 0.001 * random.random(),
        "policy/clip_fraction": 0.01 * random.random(),
        "response/length_mean": 20 + 5 * progress,
        "response/truncated_share": 0.01,
        "mismatch/logprob_abs_mean": 1e-6,
        "memory/keys": 4.0 * step,
        "memory/clusters": 7.0 * step,
        "memory/hit_share": progress,
        "memory/top_eigenvalue_share": 0.6,
        "throughput/tokens_per_second": 3000 + 100 * random.random(),
        "time/rollout": 3.0,
        "time/update": 2.0,
        "time/step": 5.5,
    }
    if step % 4 == 0:
        metrics |= {"validation/accuracy": 0.1 + 0.5 * progress, "validation/sums/accuracy": 0.1 + 0.5 * progress}
    return metrics

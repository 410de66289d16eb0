"""A finished run's mistakes, remembered again by memories of other settings: what each would have looked up.

    python tools/study/study_memories.py RUN_DIR                                 # those of MEMORIES
    python tools/study/study_memories.py RUN_DIR --memory window=64 noise=cluster     # and one more

The run is of a toy task (`data.arithmetic_rules: per_kind` or `remainder`), whose workings show the mistakes. It
should have fingerprints of all wrong responses (`memory.remember_filtered: true`). Prints a Markdown table of what the
lookups of the second half of the steps gave:

- `saturated`: share of the lookups whose penalty is the largest;
- `spread`: standard deviation of the penalties, with alpha 1, of the responses to a problem in a step; mean over
  problems and steps;
- `rank`: Spearman's correlation, over the same responses, between the penalty and how often the memory holds the same
  true mistake; 0 where all penalties are equal, left out where all counts are;
- `ari`: adjusted Rand index between the clusters of a problem and the true mistakes, weighted by vectors.

All workings that follow no rule count as one true mistake.
"""

import argparse
import sys
from collections import defaultdict, deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score
from study_measures import responses_of, separate_noise

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.memory import MemoryShard
from meds_megatron.reward.scores import LOG_SIZE_CAP, penalties
from meds_megatron.run.reader import SavedRun, read_run

KEEPS_ALL = {"window": None, "half_life_steps": None}
MEMORIES: tuple[dict[str, Any], ...] = (
    {},
    *({"window": window} for window in (64, 32, 16, 8)),
    *({"half_life_steps": steps} for steps in (5.0, 2.5)),
    {"half_life_steps": 2.5, "noise": "cluster"},
)
"""Settings in which the compared memories differ from one like the run's that keeps everything."""


NO_RULE = "no rule"
"""Habit of a working that follows none."""


class Mistake(NamedTuple):
    key: str
    rule: str
    fingerprint_L: np.ndarray


def mistakes_of(files: SavedRun) -> list[list[Mistake]]:
    """The wrong responses with a fingerprint, by step."""
    return [
        [
            Mistake(response.key, response.rule or NO_RULE, response.fingerprint_L)
            for response in responses_of(path)
            if response.is_wrong and response.has_fingerprint
        ]
        for path in files.rollouts
    ]


def looked_up(steps: list[list[Mistake]], config: MemoryConfig) -> dict[str, float]:
    """The measures of one memory; NaN for one that no lookup counts in."""
    shard = MemoryShard(config)
    remembered: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=config.window))
    given, spreads, ranks, agreements, vectors = [], [], [], [], []
    for number, mistakes in enumerate(steps):
        keys = [mistake.key for mistake in mistakes]
        if mistakes:
            fingerprints_NL = np.stack([mistake.fingerprint_L for mistake in mistakes])
            penalties_N = penalties(shard.lookup(keys, fingerprints_NL), alpha=1.0)
            for key in set(keys) if number >= len(steps) // 2 else ():
                rows = [row for row, other in enumerate(keys) if other == key]
                counts = [remembered[key].count(mistakes[row].rule) for row in rows]
                given += penalties_N[rows].tolist()
                spreads.append(np.std(penalties_N[rows]))
                if len(set(counts)) > 1:
                    ranks.append(spearmanr(counts, penalties_N[rows])[0] if len(set(penalties_N[rows])) > 1 else 0.0)
                if len(remembered[key]) > 1:
                    labels = separate_noise(shard.labels(key).tolist(), config)
                    agreements.append(adjusted_rand_score(list(remembered[key]), labels))
                    vectors.append(len(labels))
            shard.remember(keys, fingerprints_NL)
            for mistake in mistakes:
                remembered[mistake.key].append(mistake.rule)
        shard.recluster()
    return {
        "saturated": float(np.mean(np.array(given) == LOG_SIZE_CAP)) if given else np.nan,
        "spread": float(np.mean(spreads)) if spreads else np.nan,
        "rank": float(np.mean(ranks)) if ranks else np.nan,
        "ari": float(np.average(agreements, weights=vectors)) if vectors else np.nan,
    }


def table_of(files: SavedRun, more: list[dict[str, Any]]) -> str:
    own = replace(files.config.memory, **KEEPS_ALL)
    steps = mistakes_of(files)
    lines = ["| memory | saturated | spread | rank | ari |", "|---|---|---|---|---|"]
    for changed in (*MEMORIES, *more):
        name = ", ".join(f"{key}={value}" for key, value in changed.items()) or "keeps everything"
        cells = [f"{value:.2f}" for value in looked_up(steps, replace(own, **changed)).values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_settings(settings: list[str]) -> dict[str, Any]:
    changed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in asdict(MemoryConfig()):
            raise UserError(f"--memory {setting}: expected key=value, with a key of `memory`.")
        try:
            changed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--memory {setting}: the value is not readable as YAML; quote it.") from error
    return changed


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--memory", nargs="+", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(arguments)
    try:
        print(table_of(read_run(given.run), [memory_settings(settings) for settings in given.memory]))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

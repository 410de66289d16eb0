"""Responses of a simulated run: how long they are and which groups the filter keeps, drawn before the run."""

from collections.abc import Sequence
from math import erfc, sqrt
from pathlib import Path

import numpy as np

from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.errors import UserError
from meds_megatron.rollout.engine import Request
from meds_megatron.rollout.samples import Completion, Segment

# fmt: off
MATH500_QUANTILES = (
    18, 34, 39, 42, 46, 50, 52, 55, 58, 62, 63, 65, 69, 71, 74, 75, 76, 78, 80, 81, 82, 86, 88, 89, 93, 95, 98, 99, 102,
    104, 105, 107, 109, 113, 115, 118, 121, 123, 125, 130, 133, 136, 138, 145, 148, 150, 152, 155, 160, 163, 165, 166,
    171, 174, 177, 180, 184, 188, 193, 195, 201, 206, 211, 219, 221, 225, 230, 236, 242, 247, 251, 255, 264, 275, 278,
    286, 292, 296, 300, 307, 320, 326, 337, 348, 359, 366, 378, 395, 406, 436, 469, 498, 517, 540, 572, 595, 617, 667,
    757, 825, 1389,
)
# fmt: on
"""Tokens (Qwen2.5) of the written solutions of MATH-500 (arXiv 2305.20050), at 0 %, 1 %, ... 100 %: standard deviation
0.8 of the mean, longest 6.3 times the mean."""
RIGHT, WRONG = "right", "wrong"
CORRELATION = 0.5


class Workload:
    """Prompts, lengths of their responses and outcomes of the group filter, the same for every way of scheduling them.

    Lengths have the given distribution, whatever the correlation: response i to prompt p has that quantile which
    belongs to sqrt(c) z_p + sqrt(1 - c) z_pi, with z standard normal and c the correlation (a Gaussian copula). In a
    group that the filter keeps one response is right, in others none; that is independent of the lengths.
    """

    def __init__(
        self,
        quantiles: Sequence[float],
        mean: float,
        most: int,
        prompts: int,
        responses: int,
        prompt_tokens: int,
        kept_share: float,
        correlation: float = CORRELATION,
        seed: int = 0,
    ) -> None:
        """`quantiles`, at equal distances from 0 to 1, are scaled to `mean`, and responses are cut at `most` tokens."""
        generator = np.random.default_rng(seed)
        z_P1, z_PN = generator.standard_normal((prompts, 1)), generator.standard_normal((prompts, responses))
        shares_PN = _normal_shares(sqrt(correlation) * z_P1 + sqrt(1 - correlation) * z_PN)
        lengths_PN = np.interp(shares_PN, np.linspace(0, 1, len(quantiles)), quantiles)
        scale = mean / mean_of(quantiles)
        self.lengths_PN = np.clip(np.rint(lengths_PN * scale), 1, most).astype(np.int64)
        """[prompt, response]"""
        self.kept_P = generator.random(prompts) < kept_share
        self._most = most
        self._token_ids = np.zeros(most, dtype=np.int64)
        self._logprobs = np.zeros(most, dtype=np.float32)
        self.prompts = [
            Prompt(Problem(str(number), "", RIGHT, "simulated"), [number] + [0] * (prompt_tokens - 1))
            for number in range(prompts)
        ]

    def lengths(self, request: Request) -> list[int]:
        """Lengths of the responses to a request."""
        return self.lengths_PN[request.prompt[0], : request.sampling.responses].tolist()

    def completion(self, request: Request, index: int, versions: Sequence[tuple[int, int]]) -> Completion:
        """Response `index`; `versions` are (policy version, first token that it drew)."""
        prompt = request.prompt[0]
        length = int(self.lengths_PN[prompt, index])
        # Views of one array: nobody changes them.
        segment = Segment.drawn(self._token_ids[:length], self._logprobs[:length], versions)
        text = RIGHT if self.kept_P[prompt] and index == 0 else WRONG
        return Completion((segment,), text, "length" if length == self._most else "stop")


def _normal_shares(z: np.ndarray) -> np.ndarray:
    """The standard normal distribution's share below each value."""
    return np.vectorize(lambda value: erfc(-value / sqrt(2)) / 2)(z)


def mean_of(quantiles: Sequence[float]) -> float:
    """Mean of the distribution that has these quantiles at equal distances from 0 to 1, straight lines between them."""
    return float(np.trapezoid(quantiles, dx=1 / (len(quantiles) - 1)))


def read_lengths(path: str | Path) -> list[float]:
    """Quantiles of measured response lengths: of a text file with a length in each line, or of the rollout files in a
    run's directory. Raises UserError for a file without lengths."""
    path = Path(path)
    lengths = _of_run(path) if path.is_dir() else _of_text(path)
    if len(lengths) < 2 or min(lengths) < 1:
        raise UserError(f"{path}: expected the lengths of at least two responses, each of 1 or more tokens")
    return np.quantile(lengths, np.linspace(0, 1, 1001)).tolist()


def _of_text(path: Path) -> list[int]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected a file with a length in each line, or a run's directory")
    lengths = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip().isdecimal():
            raise UserError(f"{path}, line {number}: expected a number of tokens, found {line[:40]!r}")
        lengths.append(int(line))
    return lengths


def _of_run(path: Path) -> list[int]:
    import pyarrow.parquet as parquet

    files = sorted((path / "rollouts").glob("*.parquet"))
    if not files:
        raise UserError(f"{path}: there are no rollouts/*.parquet files; give a run's directory or a file of lengths")
    return [length for file in files for length in parquet.read_table(file, columns=["response_tokens"])[0].to_pylist()]

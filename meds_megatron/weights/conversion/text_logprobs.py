"""Log-probabilities that the model in a Hugging Face directory gives to a text, as plain transformers computes them."""

from pathlib import Path

import torch
from torch import Tensor

from meds_megatron.errors import UserError

WINDOW = 256
"""Tokens of one forward pass. The text is read in windows, each without what came before it."""

SAMPLE_TEXT = r"""A train leaves the station at 9:40 and travels 84 kilometres in an hour and ten minutes. What is its
average speed? Please reason step by step, and put your final answer within \boxed{}.

An hour and ten minutes are 70 minutes, or 7/6 of an hour. The speed is 84 / (7/6) = 84 * 6 / 7 = 72 kilometres per
hour, so the answer is \boxed{72}.

def primes(limit: int) -> list[int]:
    found = []
    for number in range(2, limit + 1):
        if all(number % prime for prime in found):
            found.append(number)
    return found

Let $f(x) = x^3 - 3x + 1$. Then $f'(x) = 3x^2 - 3$ vanishes at $x = \pm 1$, where $f(-1) = 3$ and $f(1) = -1$; since
the signs differ, $f$ has three real roots. La somme de ces racines est nulle. 三个根的乘积等于负一。
Das folgt aus dem Satz von Vieta: the sum of the roots is minus the coefficient of $x^2$, and their product is minus the
constant term.
"""


def text_tokens(directory: str | Path, text: str) -> list[int]:
    """The text in the tokens of the directory's tokenizer, which is all of it that is read.

    Raises UserError when there is no readable tokenizer, or not enough text.
    """
    from transformers import AutoTokenizer

    if not text.strip():
        raise UserError("the text to compare log-probs on is empty: give a longer one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:
        # What a broken tokenizer raises depends on its kind, and may go over many lines.
        raise _no_tokenizer(directory) from error
    if not tokens:
        # transformers makes an empty tokenizer of a directory without one.
        raise _no_tokenizer(directory)
    if len(tokens) == 1:
        raise UserError(f"the text to compare log-probs on is a single token to {directory}: give a longer one")
    return tokens


def _no_tokenizer(directory: str | Path) -> UserError:
    return UserError(
        f"{directory} has no tokenizer that transformers can read: add the model's tokenizer files, or compare with"
        " --weights-only"
    )


@torch.no_grad()
def token_logprobs(directory: str | Path, tokens: list[int]) -> Tensor:
    """Natural log-probabilities [T'] of all tokens but the first of each window, computed in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    parts = []
    for begin in range(0, len(tokens), WINDOW):
        window_T = torch.tensor(tokens[begin : begin + WINDOW])
        logprobs_TV = model(window_T[None]).logits[0, :-1].log_softmax(-1)
        parts.append(logprobs_TV.gather(1, window_T[1:, None])[:, 0])
    return torch.cat(parts)

"""The toy model: a small Qwen3 with its own tokenizer, warm-started on the arithmetic task.

It is a Hugging Face directory that transformers and vLLM load. It is trained on worked answers under the correct and
the wrong rules, in the shares of `toy_tasks.arithmetic`. Afterwards it computes each rule well and samples rules in
those shares; reinforcement learning has to find the correct one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from meds_megatron.config import RandomModelConfig
from meds_megatron.toy_tasks import arithmetic, remainder
from meds_megatron.toy_tasks.random_model import build_qwen

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

END, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
BOX = " \\boxed{"
WORDS = (BOX, "user\n", "assistant\n", "system\n", *arithmetic.KINDS)
"""Each becomes one token; everything else is single bytes."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPE = RandomModelConfig(
    architecture="qwen3", hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=512
)
ROWS_MULTIPLE = 16
MAX_POSITIONS = 512
INIT_STD = 0.06
"""Larger than Qwen's 0.02: a model this narrow learns faster with it."""


@dataclass(frozen=True)
class WarmUp:
    """Hyperparameters of the warm-up."""

    steps: int = 1200
    batch: int = 32
    lr: float = 3e-3
    lr_warmup: int = 30
    seed: int = 0
    threads: int = 1


def make_arithmetic_model(
    directory: Path,
    rules: arithmetic.Variant,
    warm_up: WarmUp,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Write the warm-started model into the existing `directory`. `report` is called with each step and its loss."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, warm_up.seed)
    train(model, tokenizer, rules, warm_up, report)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE: 256 bytes, merges that make each of WORDS one token, three special tokens."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {PAD: 0, START: 1, END: 2}
    merges: list[tuple[str, str]] = []
    for piece in alphabet:
        vocabulary[piece] = len(vocabulary)
    for word in WORDS:
        letters = word.replace(" ", "Ġ").replace("\n", "Ċ")
        for end in range(1, len(letters)):
            pair = (letters[:end], letters[end])
            if pair not in merges:
                merges.append(pair)
                vocabulary[letters[: end + 1]] = len(vocabulary)
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: "PreTrainedTokenizerFast", seed: int) -> "PreTrainedModel":
    """A Qwen3 of about a million parameters whose layers and heads are divisible by two and four."""
    rows = -(-len(tokenizer) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    return build_qwen(replace(SHAPE, seed=seed), tokenizer, rows, INIT_STD, MAX_POSITIONS)


def train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    rules: arithmetic.Variant,
    warm_up: WarmUp,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Supervised steps on worked answers, loss on response tokens; the learning rate rises and falls linearly."""
    examples = ExampleStream(tokenizer, rules, warm_up.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=warm_up.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(warm_up.threads)
    model.train()
    for step in range(warm_up.steps):
        rise, fall = (step + 1) / warm_up.lr_warmup, (warm_up.steps - step) / warm_up.steps
        for group in optimizer.param_groups:
            group["lr"] = warm_up.lr * min(rise, fall)
        tokens_BT, labels_BT = examples.batch(warm_up.batch)
        loss = model(input_ids=tokens_BT, labels=labels_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if report:
            report(step, loss.item())
    model.eval()
    torch.set_num_threads(threads)


class ExampleStream:
    """Infinite warm-up answers: kind and expression at random, the rule in the kind's shares."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", rules: arithmetic.Variant, seed: int):
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._rules = rules
        self._shares = {kind: arithmetic.rule_shares(kind, rules) for kind in arithmetic.KINDS}

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels [B, T], padded on the right; labels are -100 outside the responses."""
        rows = [self._example() for _ in range(size)]
        length = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens_BT = torch.full((size, length), self._tokenizer.pad_token_id)
        labels_BT = torch.full((size, length), -100)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            tokens_BT[row, :end] = torch.tensor(prompt + answer)
            labels_BT[row, len(prompt) : end] = torch.tensor(answer)
        return tokens_BT, labels_BT

    def _example(self) -> tuple[list[int], list[int]]:
        kind = self._rng.choice(arithmetic.KINDS)
        expression = self._rng.choice(arithmetic.warm_up_expressions())
        shares = self._shares[kind]
        rule = self._rng.choices(list(shares), list(shares.values()))[0]
        prompt = f"{START}user\n{arithmetic.question(kind, expression)}{END}\n{START}assistant\n"
        if self._rules == "remainder":
            answer = remainder.warm_up_response(kind, expression, rule, self._rng)
        else:
            answer = arithmetic.response(expression, rule)
        return self._encode(prompt), self._encode(answer + END)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

r"""Position of a response's answer: the token that holds the `{` of its last `\boxed{`. The fingerprint is taken there.

The box is searched in the text of the tokens, not as a sequence of token ids: tokenizers merge the brace with its
neighbours (`{\`, `{-`, ` {`, ` \boxed{`), and may split `\boxed` in several ways.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from meds_megatron.latex import BOX_OPENING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_WINDOW = 64
"""Tokens searched first, from the end; each further search takes WINDOW_GROWTH times as many."""
WINDOW_GROWTH = 4

_OPENING = re.compile(BOX_OPENING.encode())


class AnswerPosition(NamedTuple):
    """Position of a response's answer.

    `token` is the index of the token that holds the `{` of the last `\\boxed{`, -1 without an answer, for the reason
    `reason`. The token after it is the answer's first; where the brace is merged with the beginning of the answer, it
    is still the next one, since that is what the model predicts there.
    """

    token: int
    reason: Literal["", "no_box", "box_at_end"]
    """`no_box`: the response has no box. `box_at_end`: only the end of the response or a special token follows the
    brace's token. An earlier box does not stand in for the last one."""


NO_BOX = AnswerPosition(-1, "no_box")
BOX_AT_END = AnswerPosition(-1, "box_at_end")


class AnswerLocator:
    """Finds answer positions in responses of one tokenizer; builds the tokenizer's table of token bytes once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._pieces_V = token_bytes(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)

    def locate(self, token_ids: Sequence[int]) -> AnswerPosition:
        """Position in the tokens of a response, with or without the end-of-sequence token."""
        size = FIRST_WINDOW
        while True:
            start = max(0, len(token_ids) - size)
            token = self._last_opening(token_ids, start)
            if token is not None:
                break
            if start == 0:
                return NO_BOX
            size *= WINDOW_GROWTH
        if token + 1 == len(token_ids) or token_ids[token + 1] in self._special:
            return BOX_AT_END
        return AnswerPosition(token, "")

    def _last_opening(self, token_ids: Sequence[int], start: int) -> int | None:
        """Index of the token with the brace of the last box that opens in the tokens from `start` on."""
        pieces = [self._piece(token_id) for token_id in token_ids[start:]]
        text = b"".join(pieces)
        command = text.rfind(b"\\boxed")
        while command >= 0 and not (opening := _OPENING.match(text, command)):
            command = text.rfind(b"\\boxed", 0, command)
        if command < 0 or opening is None:
            return None
        end = len(text)
        index = len(pieces)
        while end >= opening.end():
            index -= 1
            end -= len(pieces[index])
        return start + index

    def _piece(self, token_id: int) -> bytes:
        """The bytes of a token; a model's padded vocabulary has rows beyond the tokenizer's, which have none."""
        return self._pieces_V[token_id] if token_id < len(self._pieces_V) else b""


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """[V] text of each token id, in bytes; empty for an id without a token.

    Byte-level BPE tokens need not be whole characters, so they are translated byte by byte, added tokens as they are.
    Tokens of other kinds of tokenizer are decoded one by one.
    """
    vocabulary = tokenizer.get_vocab()
    pieces_V = [b""] * (max(vocabulary.values()) + 1)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "decoder", None)).__name__ != "ByteLevel":
        for token_id in vocabulary.values():
            text = tokenizer.decode([token_id])
            assert isinstance(text, str)
            pieces_V[token_id] = text.encode()
        return pieces_V
    to_latin1 = str.maketrans({character: chr(byte) for byte, character in enumerate(_byte_alphabet())})
    added = tokenizer.added_tokens_decoder
    for token, token_id in vocabulary.items():
        pieces_V[token_id] = token.encode() if token_id in added else token.translate(to_latin1).encode("latin-1")
    return pieces_V


def _byte_alphabet() -> list[str]:
    """[256] character of each byte in byte-level BPE: the byte's own where it is printable, else one from 256 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(prints)]
    stands_for = {byte: chr(byte) for byte in prints} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [stands_for[byte] for byte in range(256)]

r"""Where a response's fingerprint is taken: at the token that holds the `{` of its last `\boxed{`.

Found in the text that the tokens spell, not as a sequence of token ids: tokenizers merge the brace with what stands
beside it (`{\`, `{-`, ` {`, ` \boxed{`), and may spell `\boxed` in several ways.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from meds_megatron.latex import BOX_OPENING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_WINDOW = 64
"""Tokens looked at first, from the end; each further look takes WINDOW_GROWTH times as many."""
WINDOW_GROWTH = 4

_OPENING = re.compile(BOX_OPENING.encode())


@dataclass(frozen=True)
class BoxedPosition:
    """Indices into a response's tokens, -1 where `reason` says why there is no fingerprint.

    `token` holds the brace of the last box. `target` is the token that follows it, the answer's first: when the brace
    is merged with the beginning of the answer, still the next one, since that is what the model predicts at `token`.
    """

    token: int
    target: int
    reason: Literal["", "no_box", "box_at_end"]
    """`no_box`: nothing is boxed. `box_at_end`: nothing of an answer follows the brace's token, only the end of the
    response or a special token. An earlier box does not stand in for the last one."""


NO_BOX = BoxedPosition(-1, -1, "no_box")
BOX_AT_END = BoxedPosition(-1, -1, "box_at_end")


class BoxedLocator:
    """Finds the position in responses of one tokenizer, whose table of token bytes it builds once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._pieces_V = token_bytes(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)

    def locate(self, token_ids: Sequence[int]) -> BoxedPosition:
        """The position in a response's tokens, the end-of-sequence token included or not."""
        size = FIRST_WINDOW
        while True:
            start = max(0, len(token_ids) - size)
            token = self._last_opening(token_ids, start)
            if token is not None:
                break
            if start == 0:
                return NO_BOX
            size *= WINDOW_GROWTH
        target = token + 1
        if target == len(token_ids) or token_ids[target] in self._special:
            return BOX_AT_END
        return BoxedPosition(token, target, "")

    def _last_opening(self, token_ids: Sequence[int], start: int) -> int | None:
        """Index of the token with the brace of the last box that opens in the tokens from `start` on."""
        pieces = [self._piece(token_id) for token_id in token_ids[start:]]
        text = b"".join(pieces)
        command = text.rfind(b"\\boxed")
        while command >= 0 and not (opening := _OPENING.match(text, command)):
            command = text.rfind(b"\\boxed", 0, command)
        if command < 0:
            return None
        end = len(text)
        index = len(pieces)
        while end >= opening.end():
            index -= 1
            end -= len(pieces[index])
        return start + index

    def _piece(self, token_id: int) -> bytes:
        """The bytes of a token; a model's padded vocabulary has rows beyond the tokenizer's, which spell nothing."""
        return self._pieces_V[token_id] if token_id < len(self._pieces_V) else b""


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> list[bytes]:
    """[V] what each token id spells, in bytes; empty for an id without a token.

    Byte-level BPE tokens need not be whole characters, so they are spelled byte by byte, and added tokens as they read.
    Tokens of another kind of tokenizer are taken as it decodes them one by one.
    """
    vocabulary = tokenizer.get_vocab()
    pieces_V = [b""] * (max(vocabulary.values()) + 1)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "decoder", None)).__name__ != "ByteLevel":
        for token_id in vocabulary.values():
            pieces_V[token_id] = tokenizer.decode([token_id]).encode()
        return pieces_V
    to_latin1 = str.maketrans({character: chr(byte) for byte, character in enumerate(_byte_alphabet())})
    added = tokenizer.added_tokens_decoder
    for token, token_id in vocabulary.items():
        pieces_V[token_id] = token.encode() if token_id in added else token.translate(to_latin1).encode("latin-1")
    return pieces_V


def _byte_alphabet() -> list[str]:
    """[256] the character that stands for each byte in byte-level BPE: itself where it prints, else one from 256 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(prints)]
    stands_for = {byte: chr(byte) for byte in prints} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [stands_for[byte] for byte in range(256)]

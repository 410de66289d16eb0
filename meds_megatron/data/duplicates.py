"""Problems that are the same: in the same words, or in nearly the same words with the same numbers."""

import re
import unicodedata
from collections.abc import Iterator

SHINGLE_WORDS = 3
PERMUTATIONS = 128
NEAR = 0.7
"""Least Jaccard similarity of the shingles of near duplicates: one word in twenty may differ."""
PROPOSED = 0.5
"""Similarity from which pairs are proposed: far enough below NEAR that hashing hides few pairs that are near."""

_DROPPED = re.compile(r"\\(?:left|right|displaystyle|[!,;:\s])(?![a-zA-Z])|[\s${}~]")
_LATEX_SPACE = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;:]|[${}~]")
_WORD = re.compile(r"\\?[a-z]+|\d+(?:\.\d+)?|[^\sa-z\d]")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def same_words(question: str) -> str:
    """Text that is equal for questions in the same words: without case, white space, LaTeX spacing and dollar signs."""
    return _DROPPED.sub("", unicodedata.normalize("NFKC", question).lower())


def numbers(question: str) -> list[str]:
    """The numbers in a question, in order. Problems with other numbers are other problems, in whatever words."""
    return _NUMBER.findall(unicodedata.normalize("NFKC", question))


def shingles(question: str) -> frozenset[str]:
    """All SHINGLE_WORDS neighbouring words, numbers and signs of a question; the whole of a shorter one."""
    words = _WORD.findall(_LATEX_SPACE.sub(" ", unicodedata.normalize("NFKC", question).lower()))
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(" ".join(words[start : start + SHINGLE_WORDS]) for start in range(last))


class NearIndex:
    """Finds questions that are nearly the same as one given: MinHash-LSH proposes (datasketch), and the similarity of
    the shingles and the numbers decide."""

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._lsh = MinHashLSH(threshold=PROPOSED, num_perm=PERMUTATIONS)
        self._known: list[tuple[frozenset[str], list[str]]] = []

    def add(self, question: str) -> None:
        """Adds a question; its number is how many there were before."""
        own = shingles(question)
        self._lsh.insert(len(self._known), _min_hash(own), check_duplication=False)
        self._known.append((own, numbers(question)))

    def matches(self, question: str) -> Iterator[int]:
        """Numbers of the questions that are nearly the same, in order."""
        own, own_numbers = shingles(question), numbers(question)
        for number in sorted(self._lsh.query(_min_hash(own))):
            other, other_numbers = self._known[number]
            if own_numbers == other_numbers and len(own & other) >= NEAR * len(own | other):
                yield number


def _min_hash(words: frozenset[str]):
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS)
    sketch.update_batch([word.encode() for word in words])
    return sketch

"""Micro-batches as padded rectangles, the usual form, to compare packed ones with."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np

from meds_megatron.actor import pipeline
from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.config import ParallelLayout


@contextmanager
def padded_rectangles() -> Iterator[None]:
    """While open, every micro-batch of this process is a rectangle: each sequence has padding behind it.

    Causal attention keeps the padding from the tokens before it, but computes it.
    """
    with mock.patch.object(pipeline, "sequence_tokens", rectangle_tokens):
        yield


def rectangle_tokens(batch: TrainBatch, rows: np.ndarray, layout: ParallelLayout) -> np.ndarray:
    """Padded tokens of each of `rows`: those of the longest prompt and the longest response among them."""
    width = batch.prompt_lengths_B[rows].max(initial=0) + batch.response_lengths_B[rows].max(initial=0)
    return np.full(len(rows), -(-width // layout.sequence_multiple) * layout.sequence_multiple)

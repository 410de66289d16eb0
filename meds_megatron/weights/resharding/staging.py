"""Order of the buckets of a weight update, those under way together, and the places where a trainer rank stages
them."""

from collections.abc import Iterator
from itertools import pairwise

from meds_megatron.weights.resharding.plan import ReshardPlan

ALIGNMENT = 128
"""Elements: staged transfers begin at multiples of it, for fast copies."""


def interleaved(plan: ReshardPlan) -> list[int]:
    """The buckets in an order in which the pipeline stages take turns, so that they work in parallel."""
    stages = [plan.pipeline_stage(bucket) for bucket in plan.buckets]
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(stages), 1) if a != b), len(stages)]
    runs = [list(plan.buckets)[first:last] for first, last in pairwise(starts)]
    turns = range(max(map(len, runs)))
    return [run[turn] for turn in turns for run in runs if turn < len(run)]


def begins_and_ends(plan: ReshardPlan) -> Iterator[tuple[int, bool]]:
    """(bucket, True) where the transfer of a bucket begins, and (bucket, False) where it has to be finished.

    As many buckets are under way as are together no larger than the largest, and they end in the order in which they
    began.
    """
    under_way: list[int] = []
    for bucket in interleaved(plan):
        while under_way and sum(map(plan.elements, [*under_way, bucket])) > plan.largest_bucket:
            yield under_way.pop(0), False
        under_way.append(bucket)
        yield bucket, True
    yield from ((bucket, False) for bucket in under_way)


class BlockAllocator:
    """Parts of one block of memory by first fit; the parts of a weight update are few."""

    def __init__(self) -> None:
        self._taken: dict[int, int] = {}
        """End of each part by its begin."""

    def take(self, elements: int) -> int:
        """Begin of a new part."""
        begin = 0
        for taken, end in sorted(self._taken.items()):
            if begin + elements <= taken:
                break
            begin = end
        self._taken[begin] = begin + -(-max(elements, 1) // ALIGNMENT) * ALIGNMENT
        return begin

    def give_back(self, begin: int) -> None:
        del self._taken[begin]

    @property
    def end(self) -> int:
        """End of the last part: the block has to be as large."""
        return max(self._taken.values(), default=0)


def staging_elements(plan: ReshardPlan, stage: int, tensor: int) -> int:
    """Elements of the block in which the trainer rank of a pipeline stage and tensor-parallel rank stages an update."""
    allocator, most = BlockAllocator(), 0
    begins: dict[int, list[int]] = {}
    for bucket, is_begin in begins_and_ends(plan):
        if plan.pipeline_stage(bucket) != stage:
            continue
        if is_begin:
            mine = [transfer for transfer in plan.transfers(bucket) if transfer.trainer_rank == tensor]
            begins[bucket] = [allocator.take(transfer.elements) for transfer in mine]
            most = max(most, allocator.end)
        else:
            for begin in begins.pop(bucket):
                allocator.give_back(begin)
    return most

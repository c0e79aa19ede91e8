"""How ranks share an evaluation: chunk i of a set's images, or of the texts, is for rank i % world.

Chunks are the same whatever the number of ranks, and so are the batches that go through a tower or a text encoder: the
features do not depend on how many ranks there are.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

from .. import ranks
from ..errors import LiftFastError
from ..ranks import Rank

T = TypeVar("T")


class RankFailed(LiftFastError):
    """Raised on the ranks that wait for another one, when that one has ended with an error.

    said: whether that rank says what its error is. What to do: see its message.
    """

    def __init__(self, message: str, said: bool):
        super().__init__(message)
        self.said = said


def mine(chunks: Sequence[T], rank: Rank) -> Sequence[T]:
    """The chunks that are for this rank, in order."""
    return chunks[rank.number :: rank.world]


def rounds(chunks: int, rank: Rank) -> int:
    """The largest number of chunks that any rank has."""
    return -(-chunks // rank.world)


def cut(count: int, size: int) -> list[range]:
    """The numbers below `count` in chunks of `size`, of which the last may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def gathered(value: T, rank: Rank) -> list[T]:
    """The values of all ranks, in their order. A collective. Raises RankFailed when a rank does not answer."""
    return _answered(lambda: ranks.every(value), rank)


def agreed(work: Callable[[], T], rank: Rank) -> T:
    """Calls work on every rank and returns what it returns on this one. A collective.

    When it raises on a rank, so that this rank will not come to the next collective, all ranks raise: the first of
    those that failed its error, the others RankFailed.
    """
    value, error = None, None
    try:
        value = work()
    except (LiftFastError, OSError) as raised:
        error = raised
    errors = gathered(None if error is None else str(error), rank)
    failed = next((number for number, message in enumerate(errors) if message is not None), None)
    if failed is None:
        return value  # type: ignore[return-value]
    if failed == rank.number and error is not None:
        raise error
    raise RankFailed(f"rank {failed} of {rank.world} ended with an error: {errors[failed]}", said=True)


def of_first(work: Callable[[], T], rank: Rank) -> T:
    """Calls work on rank 0 alone and returns what it returns on all ranks. A collective. Raises as agreed does."""
    value = agreed(lambda: work() if rank.is_first else None, rank)
    return _answered(lambda: ranks.of_first(value), rank)  # type: ignore[return-value]


def in_order(features: Sequence[Tensor], rank: Rank) -> Tensor:
    """The features of all chunks in order, on every rank. A collective.

    features: of this rank's chunks in order, each [n, dim] on the CPU, where n may be 0. There is at least one chunk.
    """
    each = gathered((torch.cat(list(features)) if features else None, [len(part) for part in features]), rank)
    parts = [() if whole is None else whole.split(sizes) for whole, sizes in each]
    return torch.cat([part for one_round in zip_longest(*parts) for part in one_round if part is not None])


def _answered(collective: Callable[[], T], rank: Rank) -> T:
    try:
        return collective()
    except RuntimeError as error:
        raise RankFailed(
            f"{rank}: another rank has died or does not answer ({str(error).partition(chr(10))[0]}); run the same "
            "command again",
            said=False,
        ) from error

"""How ranks share an evaluation: chunk i of a set's images, or of the texts, is for rank i % world.

Chunks are the same whatever the number of ranks, and so are the batches that go through a tower or a text encoder: the
features do not depend on how many ranks there are.
"""

from collections.abc import Sequence
from typing import TypeVar

from ..ranks import Rank, every

T = TypeVar("T")


def mine(chunks: Sequence[T], rank: Rank) -> Sequence[T]:
    """The chunks that are for this rank, in order."""
    return chunks[rank.number :: rank.world]


def rounds(chunks: int, rank: Rank) -> int:
    """The largest number of chunks that any rank has."""
    return -(-chunks // rank.world)


def cut(count: int, size: int) -> list[range]:
    """The numbers below `count` in chunks of `size`, of which the last may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def in_order(own: Sequence[T]) -> list[T]:
    """What the ranks have made of all chunks, in the order of the chunks, on every rank. A collective.

    own: an item for each of this rank's chunks, in order.
    """
    each = every(list(own))
    return [items[number] for number in range(len(each[0])) for items in each if number < len(items)]

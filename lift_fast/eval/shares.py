"""How ranks share an evaluation: chunk i of a set's images, or of the texts, is for rank i % world.

Chunks are the same whatever the number of ranks, and so are the batches that go through a tower or a text encoder: the
features do not depend on how many ranks there are.
"""

from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor

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


def in_order(features: Sequence[Tensor]) -> Tensor:
    """The features of all chunks in order, on every rank. A collective.

    features: of this rank's chunks in order, each [n, dim] on the CPU, where n may be 0. There is at least one chunk.
    """
    each = every((torch.cat(list(features)) if features else None, [len(part) for part in features]))
    parts = [() if whole is None else whole.split(sizes) for whole, sizes in each]
    return torch.cat([part for one_round in zip_longest(*parts) for part in one_round if part is not None])

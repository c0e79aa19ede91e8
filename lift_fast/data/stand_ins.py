"""Which sample stands in for a bad one: a function of the order and of which samples are bad, the same for any ranks.

A global batch of `batch` slots begins somewhere in the order of an epoch's `samples` positions. Counted cyclically from
that beginning, positions 0 … batch - 1 are the batch's own. Slot i takes the first good sample of

    candidates:  i, i + batch, i + 2 batch, …  below samples

that is its own position, then the same slot of the batches after it. Each position is a candidate of one slot alone, so
that no sample stands in a batch twice, and a rank decides on its slots without regard to the others'.

A slot without a good candidate takes what is left over: the n-th such slot takes the n-th good sample, by position,
that no slot takes as its candidate. There is one for each, unless fewer than `batch` samples are good. A rank finds it
by judging samples of other ranks' slots, too. That happens where samples / batch bad ones come together: in sets of few
batches, or of hardly a good sample.
"""

from collections.abc import Callable
from functools import cache
from itertools import islice


def candidates(slot: int, batch: int, samples: int) -> range:
    """The positions, counted from the batch's beginning, of which a slot takes the first with a good sample."""
    return range(slot, samples, batch)


def left_over(slot: int, batch: int, samples: int, good: Callable[[int], bool]) -> int | None:
    """The position, counted from the batch's beginning, that a slot without a good candidate takes.

    None if there is none, since fewer than `batch` samples are good. good: whether the sample at a position is good.
    """

    @cache
    def taken(slot: int) -> int | None:
        return next((position for position in candidates(slot, batch, samples) if good(position)), None)

    before = sum(taken(other) is None for other in range(slot))
    free = (other for other in range(batch, samples) if good(other) and taken(other % batch) != other)
    return next(islice(free, before, None), None)

"""data/stand_ins.py: what each slot of a batch takes, for every small set and every choice of bad samples."""

import random
from itertools import islice

import pytest

from lift_fast.data.stand_ins import candidates, left_over


def taken(batch, samples, good):
    """What the slots take, by position from the batch's beginning; None for a slot that gets nothing."""
    first = [next((p for p in candidates(slot, batch, samples) if good(p)), None) for slot in range(batch)]
    return [left_over(slot, batch, samples, good) if p is None else p for slot, p in enumerate(first)]


def check(batch, samples, good):
    found = taken(batch, samples, good.__contains__)
    some = [position for position in found if position is not None]
    assert len(some) == len(set(some)) == min(batch, len(good)) and good.issuperset(some)
    assert all(found[slot] == slot for slot in range(batch) if slot in good)


@pytest.mark.parametrize("samples", range(1, 10))
def test_every_choice_of_bad_samples(samples):
    """No sample twice, a good one in its own place, and all slots filled unless fewer samples than slots are good."""
    for batch in range(1, samples + 1):
        for bits in range(1 << samples):
            check(batch, samples, {position for position in range(samples) if bits >> position & 1})


def test_larger_sets():
    rng = random.Random(7)
    for _ in range(600):
        samples = rng.randrange(1, 150)
        batch, share = rng.randrange(1, samples + 1), rng.choice([0.02, 0.5, 0.9, 1])
        check(batch, samples, {position for position in range(samples) if rng.random() > share})


def test_positions_are_candidates_of_one_slot():
    for samples in range(1, 40):
        for batch in range(1, samples + 1):
            everything = [position for slot in range(batch) for position in candidates(slot, batch, samples)]
            assert sorted(everything) == list(range(samples))


def test_the_first_candidates_come_soon():
    """In an order that reads shards one after another, a stand-in is among what is read next."""
    assert list(islice(candidates(3, 10, 1000), 3)) == [3, 13, 23]


def test_only_what_decides_is_judged():
    judged = set()

    def good(position):
        judged.add(position)
        return position not in (2, 12, 22)

    assert left_over(2, 10, 30, good) == 10
    assert judged <= {0, 1, 2, 12, 22, 10}

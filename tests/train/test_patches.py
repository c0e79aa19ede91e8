"""train/patches.py: which patches an image keeps is a function of seed, step and sample."""

import numpy as np
import pytest
import torch

from lift_fast.train.patches import patches_kept


@pytest.mark.parametrize(
    ("patches", "rate", "count"), [(196, 0.5, 98), (9, 0.7, 2), (9, 0.99, 1), (1, 0.5, 1), (7, 0, 7)]
)
def test_a_subset_of_each_image(patches, rate, count):
    kept = patches_kept(3, 5, range(13), patches, rate)
    assert kept.shape == (13, count) and kept.dtype == torch.int64
    assert kept.min() >= 0 and kept.max() < patches
    assert (kept.diff(dim=1) > 0).all()


def test_ranks_and_micro_batches_see_the_same():
    whole = patches_kept(1, 7, range(24), 36, 0.5)
    for parts in ((5, 24), (8, 16, 24), (1, 2, 24)):
        begun = [0, *parts[:-1]]
        pieces = [patches_kept(1, 7, range(a, b), 36, 0.5) for a, b in zip(begun, parts, strict=True)]
        assert torch.equal(torch.cat(pieces), whole)
    places = np.array([20, 3, 11])
    assert torch.equal(patches_kept(1, 7, places, 36, 0.5), whole[places])


def test_seed_step_and_sample_matter():
    kept = [patches_kept(seed, step, range(2), 196, 0.5) for seed in (0, 1) for step in (0, 1)]
    rows = {tuple(row.tolist()) for each in kept for row in each}
    assert len(rows) == 8


def test_every_subset_is_equally_likely():
    """20 subsets of 3 of 6 patches, 10,000 draws: chi-squared with 19 degrees of freedom is below 43.8 in 999 of 1000
    samples."""
    kept = torch.cat([patches_kept(0, step, range(100), 6, 0.5) for step in range(100)])
    counts = (1 << kept).sum(dim=1).unique(return_counts=True)[1].double()
    assert len(counts) == 20
    assert ((counts - 500) ** 2 / 500).sum() < 43.8


def test_the_subsets_are_those_of_earlier_versions():
    """A checkpoint goes on with the patches that its run would have kept."""
    assert patches_kept(0, 0, range(3), 9, 0.5).tolist() == [[0, 3, 5, 8], [0, 1, 4, 7], [1, 3, 6, 8]]
    assert patches_kept(2**63 - 1, 10**9, range(2**40, 2**40 + 1), 9, 0.7).tolist() == [[4, 5]]

"""Patch dropout (FLIP, arXiv 2212.00794) as a function: which patches an image keeps depends on no random state."""

import numpy as np
import torch
from torch import Tensor

from ..data.order import uniform
from ..nn.vit import patches_left

_STREAM = 1  # crops have the keys (seed, epoch, row): a fourth part separates these random numbers from theirs


def patches_kept(seed: int, step: int, samples: np.ndarray | range, patches: int, rate: float) -> Tensor:
    """The patches that each sample keeps: int64 [rows, n] on the CPU, ascending, for `kept` of `Vit.tokens`.

    samples: the numbers of the rows in the global batch of `step`, so that the result does not depend on ranks or
    micro-batches. patches: of an image. rate: the fraction that is left out; n is `patches_left(patches, rate)`. Every
    subset of n patches is equally likely.
    """
    draws = uniform(patches, seed, step, np.asarray(samples, dtype=np.int64), _STREAM)
    count = patches_left(patches, rate)
    chosen = np.argpartition(draws, count - 1, axis=1)[:, :count]
    return torch.from_numpy(np.sort(chosen, axis=1))

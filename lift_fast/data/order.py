"""The order of samples as a function, position -> row number, that needs no table and no state.

An epoch's order is a permutation keyed by (seed, epoch): a Feistel network over the next power of four, applied again
until its output falls into the range, known as cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002). A resumed run computes its position, and a billion samples need no memory.
"""

from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014), uint64 -> uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """Combines non-negative integers, each below 2**63, into one 64-bit key; arrays broadcast."""
    key = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix(key + np.uint64(_GOLDEN) + np.asarray(part).astype(np.uint64))
    return np.asarray(key)


def uniform(count: int, *parts: int | np.ndarray) -> np.ndarray:
    """`count` random numbers in [0, 1) for each key_of(*parts), float64 [..., count], as augmentations use them."""
    key = key_of(*parts)
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        return (mix(key[..., None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(index: np.ndarray, size: int, key: np.ndarray | int) -> np.ndarray:
    """Applies the permutation of range(size) that `key` selects to each index (int64, below size); key broadcasts."""
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    out = np.array(index, dtype=np.uint64)
    left = np.arange(out.size) if out.size else np.empty(0, dtype=np.int64)
    flat, flat_keys = out.reshape(-1), keys.reshape(-1)
    while len(left):
        x, k = flat[left], flat_keys[left]
        high, low = x >> shift, x & mask
        for turn in range(_ROUNDS):
            high, low = low, high ^ (key_of(k >> np.uint64(1), low, turn) & mask)
        flat[left] = high << shift | low
        left = left[flat[left] >= size]
    return flat.reshape(index.shape).astype(np.int64)


class Order:
    """The rows of each epoch, in order, and which of them rank `rank` of `world` ranks has.

    shard_sizes: samples of each shard, in row order. shuffle_buffer: None shuffles all samples of an epoch; a number
    puts the shards in random order and shuffles within windows of that many samples, so that a disk or a network reads
    a shard at a time. The order of an epoch depends on the seed and the epoch alone, not on the ranks: global batch g
    is its positions [g * global_batch, (g + 1) * global_batch), and rank r has the r-th part of them.

    Attributes: samples, the number of samples of all ranks; global_batch, world * batch_size; batches, the number of
    full global batches in an epoch. The remainder is a different random subset in each epoch.

    Raises ConfigError when a global batch is larger than the data, and for a rank or buffer out of range.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        shuffle_buffer: int | None = None,
    ):
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(sizes.sum())
        if batch_size * world > self.samples:
            most = self.samples // world
            remedy = f"lower --batch-size to at most {most}" if most else f"{world} ranks need a sample each"
            raise ConfigError(
                f"a batch of {batch_size * world} is larger than the data ({self.samples} samples); {remedy}"
            )
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world} ranks: ranks are counted from 0")
        if shuffle_buffer is not None and shuffle_buffer < 1:
            raise ConfigError(f"shuffle_buffer must be at least 1 sample, not {shuffle_buffer}")
        self.seed, self.batch_size, self.rank, self.world = seed, batch_size, rank, world
        self.shuffle_buffer = shuffle_buffer
        self.global_batch = batch_size * world
        self.batches = self.samples // self.global_batch
        self._sizes = sizes
        self._starts = np.cumsum(sizes) - sizes
        self._of_epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def positions(self, batches: np.ndarray) -> np.ndarray:
        """Positions of this rank's samples in global batches: int64 [n] -> int64 [n, batch_size]."""
        first = batches * self.global_batch + self.rank * self.batch_size
        return first[:, None] + np.arange(self.batch_size)

    def rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Row numbers of the samples at positions of an epoch, of any ranks: int64 -> int64 of the same shape."""
        if self.shuffle_buffer is None:
            return permuted(positions, self.samples, key_of(self.seed, epoch))
        order, ends = self._shards(epoch)
        window = positions // self.shuffle_buffer
        first = window * self.shuffle_buffer
        inside, last = positions - first, self.samples // self.shuffle_buffer
        size = np.where(window == last, self.samples - first, self.shuffle_buffer)
        place = positions.copy()
        for some in np.unique(size):
            chosen = size == some
            keys = key_of(self.seed, epoch, 1 + window[chosen])
            place[chosen] = first[chosen] + permuted(inside[chosen], int(some), keys)
        number = np.searchsorted(ends, place, side="right")
        shard = order[number]
        return self._starts[shard] + place - (ends[number] - self._sizes[shard])

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the position at which each ends."""
        kept = self._of_epoch  # threads that ask for another epoch replace it
        if kept is None or kept[0] != epoch:
            count = len(self._sizes)
            order = permuted(np.arange(count), count, key_of(self.seed, epoch, 0))
            kept = self._of_epoch = epoch, order, np.cumsum(self._sizes[order])
        return kept[1:]

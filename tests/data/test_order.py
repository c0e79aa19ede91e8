"""data/order.py: every sample once an epoch, whatever the ranks; a position tells its row."""

import hashlib

import numpy as np
import pytest

from lift_fast.data.order import Order, key_of, permuted, uniform
from lift_fast.errors import ConfigError

SIZES = [10, 0, 5, 33, 100, 1]  # 149 samples


def orders(world, **options):
    options = {"seed": 1, "batch_size": 4, **options}
    return [Order(SIZES, rank=rank, world=world, **options) for rank in range(world)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097])
def test_permuted_is_a_permutation(size):
    for key in (0, 1, 2**63, 2**64 - 1):
        assert sorted(permuted(np.arange(size), size, key)) == list(range(size))


def test_permuted_takes_any_shape_and_a_key_each():
    index = np.arange(12).reshape(3, 4)
    keys = key_of(5, np.arange(3))[:, None]
    got = permuted(index, 12, keys)
    for row in range(3):
        assert (got[row] == permuted(index[row], 12, keys[row, 0])).all()
    assert permuted(np.empty(0, dtype=np.int64), 7, 3).shape == (0,)


def test_permutations_look_random():
    """Where position 0 goes, over many keys: each of 16 places about as often; so with pairs of neighbours."""
    keys = key_of(9, np.arange(16_000))
    for position in (0, 7):
        counts = np.bincount(permuted(np.full(len(keys), position), 16, keys), minlength=16)
        assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-squared of 15 degrees: once in 10 000
    steps = np.diff(permuted(np.arange(100_000), 100_000, key_of(3)))
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.01  # of independent draws: -1/2


def test_uniform_draws():
    draws = uniform(40, 3, 1, np.arange(5000))
    assert draws.shape == (5000, 40) and draws.dtype == np.float64
    assert 0 <= draws.min() < 1e-4 and 1 - 1e-4 < draws.max() < 1
    assert np.abs(np.histogram(draws, 20, (0, 1))[0] / 10_000 - 1).max() < 0.06
    assert np.abs(np.corrcoef(draws[:, :8].T) - np.eye(8)).max() < 0.07
    assert (uniform(40, 3, 1, 17) == draws[17]).all()
    for other in (uniform(40, 3, 2, 17), uniform(40, 4, 1, 17), uniform(40, 1, 3, 17)):
        assert not np.intersect1d(other, draws).size


def share(order, epoch):
    """The rows of this rank in an epoch, int64 [batches, batch_size]."""
    return order.rows(epoch, order.positions(np.arange(order.batches)))


@pytest.mark.parametrize("shuffle_buffer", [None, 1, 7, 64, 149, 10_000])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_sample_once_an_epoch(world, shuffle_buffer):
    for epoch in range(3):
        ranks = orders(world, shuffle_buffer=shuffle_buffer)
        whole = ranks[0].rows(epoch, np.arange(149))
        assert sorted(whole) == list(range(149))
        used = 149 - 149 % (4 * world)
        together = np.stack([share(order, epoch) for order in ranks], axis=1)
        assert (together.reshape(-1) == whole[:used]).all()


@pytest.mark.parametrize("shuffle_buffer", [None, 30])
def test_a_global_batch_is_the_same_for_any_ranks(shuffle_buffer):
    def global_batches(world):
        found = orders(world, batch_size=12 // world, shuffle_buffer=shuffle_buffer)
        assert {(order.batches, order.global_batch) for order in found} == {(149 // 12, 12)}
        return np.concatenate([share(order, 2) for order in found], axis=1).tolist()

    assert global_batches(1) == global_batches(2) == global_batches(3) == global_batches(4)


def test_rows_of_some_positions():
    for shuffle_buffer in (None, 20):
        (order,) = orders(1, shuffle_buffer=shuffle_buffer)
        whole = order.rows(5, np.arange(149))
        some = np.array([[148, 0, 30], [31, 7, 7]])
        assert (order.rows(5, some) == whole[some]).all()
        assert order.rows(5, np.empty(0, dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize(
    "shuffle_buffer, rows, digest",
    [(None, [117, 43, 134, 78, 95, 29], "5c41834ced2acd92"), (30, [59, 51, 61, 2, 53, 14], "16e8f646230b9396")],
)
def test_the_order_stays_from_version_to_version(shuffle_buffer, rows, digest):
    """A checkpoint's position means the same samples to the version that resumes it."""
    (order,) = orders(1, shuffle_buffer=shuffle_buffer)
    assert order.rows(1, np.arange(6)).tolist() == rows
    found = hashlib.sha256()
    for epoch in range(3):
        batches = share(order, epoch)
        found.update(batches.tobytes() + uniform(3, 1, epoch, batches).tobytes())
    assert found.hexdigest()[:16] == digest


def test_epochs_and_seeds_differ():
    for shuffle_buffer in (None, 64):
        (a,), (b,) = orders(1, shuffle_buffer=shuffle_buffer), orders(1, seed=2, shuffle_buffer=shuffle_buffer)
        rows = [order.rows(epoch, np.arange(149)) for order, epoch in ((a, 0), (a, 1), (b, 0))]
        assert all((rows[i] != rows[j]).mean() > 0.9 for i in range(3) for j in range(i))


def test_a_buffer_reads_a_few_shards_at_a_time():
    order = Order([100] * 50, seed=0, batch_size=10, shuffle_buffer=300)
    for window in range(16):
        shards = np.unique(order.rows(0, np.arange(300 * window, 300 * (window + 1))) // 100)
        assert len(shards) == 3
    first = [order.rows(epoch, np.arange(300)) // 100 for epoch in range(20)]
    assert len(np.unique(np.concatenate(first))) > 25  # other shards first in every epoch


def test_a_billion_samples_cost_nothing():
    order = Order(np.full(100_000, 10_000), seed=0, batch_size=256, rank=3, world=64)
    rows = order.rows(7, order.positions(np.arange(order.batches - 4, order.batches)))
    assert len(np.unique(rows)) == 1024 and rows.max() < 10**9 and rows.min() >= 0


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"a batch of 152 is larger than the data \(149 samples\)"):
        orders(2, batch_size=76)
    with pytest.raises(ConfigError, match="counted from 0"):
        Order(SIZES, seed=0, batch_size=1, rank=2, world=2)
    with pytest.raises(ConfigError, match="shuffle_buffer must be at least 1"):
        orders(1, shuffle_buffer=0)

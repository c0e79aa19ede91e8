"""Conditioning: the formula, the statistics and the fit, the file, and caches of conditioned vectors."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from support.damage import flip_bit
from support.judged import judged
from support.tiny_caches import ENCODER, contents, data_of, rotation_for, vectors_of, write

from lift_fast.cache import Cache, CacheWriter, Conditioning, encode, tools
from lift_fast.cache import conditioning as core
from lift_fast.cache.conditioning import CONDITIONING, Statistics, effective_rank, fit, mean_cosine
from lift_fast.cache.tools import condition, convert, merge, statistics_of
from lift_fast.errors import CacheError, CacheMismatch, ConfigError
from lift_fast.ops.rows.codecs import CODECS

EPS = 2.0**-24  # of float32
SIZES = [5, 0, 7, 3]


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def some(rng, source_dim, dim=None, power=0.5, spread=100.0):
    """A conditioning with random axes and a random mean; spread: the largest deviation over the smallest."""
    axes = np.linalg.qr(rng.normal(size=(source_dim, source_dim)))[0][: dim or source_dim]
    mean = rng.normal(size=source_dim)
    deviations = np.geomspace(0.1, 0.1 / spread, source_dim)
    mean *= 0.8 / np.linalg.norm(mean)
    return Conditioning(
        torch.from_numpy(mean), torch.from_numpy(axes).float(), torch.from_numpy(deviations), power, {"rows": [9]}
    )


def formula(c, x):
    """The module's formula in float64, an element after the other; and the length of y, by which errors are divided."""
    mean, axes, deviations = c.mean.numpy(), c.axes.double().numpy(), c.deviations.numpy()
    out, lengths = np.zeros((len(x), len(axes))), np.ones(len(x))
    for row, vector in enumerate(np.asarray(x, np.float64)):
        if not vector.any():
            continue
        unit = vector / np.abs(vector).max()
        unit = unit / np.sqrt((unit**2).sum())
        y = [
            float(s**-c.power * (a @ (unit - mean))) if s > 0 else 0.0
            for a, s in zip(axes, deviations[: len(axes)], strict=True)
        ]
        lengths[row] = np.sqrt(np.sum(np.square(y))) or 1
        out[row] = np.array(y) / lengths[row]
    return out, lengths


def assert_conditioned(c, x, got, eps=EPS):
    """Compares with the formula. The rounding of unit vectors and of the mean is amplified by the largest factor."""
    truth, lengths = formula(c, x.double().numpy())
    kept = c.deviations[: c.dim]
    factor = (kept[kept > 0] ** -c.power).max().item()
    error = np.linalg.norm(got.double().numpy() - truth, axis=1)
    assert (error <= 8 * eps * (1 + factor / lengths)).all(), (error / (eps * (1 + factor / lengths))).max()


# the formula


@pytest.mark.parametrize(("source_dim", "dim"), [(1, 1), (2, 1), (3, 2), (37, 37), (37, 11), (129, 64), (384, 96)])
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_apply_is_the_formula(rng, source_dim, dim, power, rows):
    c = some(rng, source_dim, dim, power)
    x = torch.from_numpy(rng.normal(size=(rows, source_dim)) + 3 * c.mean.numpy()).float()
    got = c.apply(x)
    assert got.shape == (rows, dim) and got.dtype == torch.float32
    assert_conditioned(c, x, got)
    wide = c.apply(x.double())
    assert wide.dtype == torch.float64
    assert_conditioned(c, x, wide, EPS**2)
    for half in (torch.bfloat16, torch.float16):
        assert c.apply(x.to(half)).dtype == torch.float32
        assert torch.equal(c.apply(x.to(half)), c.apply(x.to(half).float()))


@pytest.mark.parametrize("length", [1e-44, 1e-30, 1e-20, 1e-15, 1e-3, 1.0, 1e15, 1e20, 1e30, 3e38])
def test_the_length_of_a_vector_does_not_matter(rng, length):
    c = some(rng, 65, 33)
    # numbers of few bits: even those that are near 0 hold them
    x = torch.from_numpy(rng.integers(-1, 2, size=(9, 65))).float()
    scaled = x * length
    assert scaled.isfinite().all() and (scaled != 0).any(dim=1).all()
    assert_conditioned(c, x, c.apply(scaled))


def test_rows_are_conditioned_alone(rng, monkeypatch):
    c = some(rng, 33, 9)
    x = torch.from_numpy(rng.normal(size=(20, 33))).float()
    x[3], x[7], x[8], x[9], x[10] = 0, torch.nan, 1e-30 * x[7], x[0], x[0]
    x[11, 5], x[12] = torch.inf, -x[0]
    x[7] = torch.nan
    fine = torch.tensor([row for row in range(20) if row not in (7, 8, 11)])
    x[8] = c.mean.float() * 1e-20
    monkeypatch.setattr(core, "_BLOCK", 3 * 33)  # three rows at a time
    got = c.apply(x)
    assert got[[7, 11]].isnan().any(dim=1).all() and got[fine].isfinite().all()
    assert_conditioned(c, x[fine], got[fine])
    assert_conditioned(c, c.mean[None], got[8:9])
    assert not got[3].any()
    assert torch.allclose(got[fine[fine != 3]].norm(dim=1), torch.ones(len(fine) - 1), atol=1e-6)


def test_a_vector_at_the_mean_gives_zeros(rng):
    mean = torch.zeros(5).double()
    mean[2] = 1
    c = replace(some(rng, 5), mean=mean)
    x = torch.zeros(3, 5)
    x[0, 2], x[1, 1] = 7, 1
    got = c.apply(x)
    assert not got[0].any() and not got[2].any() and got[1].norm().item() == pytest.approx(1)


def test_shapes_and_strides(rng):
    c = some(rng, 12, 5)
    x = torch.from_numpy(rng.normal(size=(4, 3, 24))).float()
    rows = x[..., ::2].contiguous()
    once = c.apply(rows.view(12, 12)).view(4, 3, 5)
    for got in (
        c.apply(x[..., ::2]),
        c.apply(rows.transpose(0, 1)).transpose(0, 1),
        torch.stack(list(map(c.apply, rows))),
    ):
        assert torch.allclose(got, once, atol=1e-6, rtol=0)
    assert c.apply(rows[1, 2]).shape == (5,) and torch.allclose(c.apply(rows[1, 2]), once[1, 2], atol=1e-6, rtol=0)
    assert c.apply(rows[:0]).shape == (0, 3, 5)
    before = rows.clone()
    c.apply(rows)
    assert torch.equal(rows, before)
    for wrong in (11, 13):
        with pytest.raises(ValueError, match="for vectors of 12"):
            c.apply(torch.zeros(2, wrong))


def test_inference_mode_and_gradients(rng):
    c = some(rng, 6, 4)
    x = torch.from_numpy(rng.normal(size=(3, 6))).float()
    with torch.inference_mode():
        first = c.apply(x)
        weight = c.weight()
    for again in (c.apply(x), c.apply(x.clone().requires_grad_())):
        assert torch.equal(again, first) and not again.requires_grad and not again.is_inference()
    assert weight.shape == (4, 6)


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_the_weight(rng, power):
    c = some(rng, 21, 8, power)
    x = torch.from_numpy(rng.normal(size=(30, 21)))
    weight = c.weight()
    assert weight.dtype == torch.float64
    y = (x / x.norm(dim=1, keepdim=True) - c.mean) @ weight.T
    assert np.allclose((y / y.norm(dim=1, keepdim=True)).numpy(), formula(c, x.numpy())[0], rtol=0, atol=1e-13)


def test_axes_without_variance_give_zeros(rng):
    c = some(rng, 9)
    deviations = c.deviations.clone()
    deviations[5:] = 0
    for power in (0, 0.5, 1):
        c = replace(c, deviations=deviations, power=power)
        x = torch.from_numpy(rng.normal(size=(4, 9))).float()
        got = c.apply(x)
        assert not got[:, 5:].any() and torch.allclose(got.norm(dim=1), torch.ones(4), atol=1e-6)
        assert_conditioned(c, x, got)


# statistics


def cone(rng, rows, dim, decay=1.0):
    """Vectors in a cone with axes of unequal variance, of lengths 0.1 to 10: float32 [rows, dim]."""
    x = rng.normal(size=(rows, dim)) * np.arange(1, dim + 1) ** -decay @ np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    x += 2 * rng.normal(size=dim) / dim**0.5
    return torch.from_numpy(x * 10 ** rng.uniform(-1, 1, size=(rows, 1))).float()


def statistics_from(*parts):
    found = Statistics(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found


@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (1, 5), (700, 1), (5000, 7), (64, 33)])
def test_statistics(rng, rows, dim, monkeypatch):
    x = cone(rng, rows, dim)
    unit = x.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    whole = statistics_from(x)
    assert whole.rows == rows
    assert np.allclose(whole.mean().numpy(), unit.mean(axis=0), rtol=0, atol=1e-14)
    assert np.allclose(whole.second_moment().numpy(), unit.T @ unit / rows, rtol=0, atol=1e-14)
    # at most 2 048 rows, evenly spread from the first one on
    every = 1
    while -(-rows // every) > 2048:
        every *= 2
    assert np.allclose(whole.sample.numpy(), unit[::every], rtol=0, atol=2 * EPS)
    for sizes in ([1] * min(rows, 30) + [max(0, rows - 30)], [0, rows // 3, rows - rows // 3]):
        split = statistics_from(*x.split(sizes))
        assert split.rows == rows and torch.equal(split.sample, whole.sample)
        assert torch.allclose(split.mean(), whole.mean(), rtol=0, atol=1e-12)
        assert torch.allclose(split.second_moment(), whole.second_moment(), rtol=0, atol=1e-12)
    monkeypatch.setattr(core, "_BLOCK", 3 * dim)
    small = statistics_from(x)
    assert torch.equal(small.sample, whole.sample)
    assert torch.allclose(small.second_moment(), whole.second_moment(), rtol=0, atol=1e-12)


def test_rows_of_zeros_are_passed_over(rng):
    x = cone(rng, 40, 6)
    holes = torch.cat([torch.zeros(3, 6), x[:20], torch.zeros(2, 6), x[20:], torch.zeros(1, 6)])
    found, plain = statistics_from(holes[:17], holes[17:]), statistics_from(x)
    assert found.rows == 40 and torch.equal(found.sample, plain.sample)
    assert torch.allclose(found.second_moment(), plain.second_moment(), rtol=0, atol=1e-14)
    assert statistics_from(torch.zeros(3, 6)).rows == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite(bad):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(CacheError, match="is not finite"):
        statistics_from(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_of_other_dtypes(rng, dtype):
    x = cone(rng, 50, 8).to(dtype)
    assert torch.equal(statistics_from(x).mean(), statistics_from(x.double()).mean())
    assert statistics_from(x).sample.dtype == torch.float32


# fit


def by_numpy(parts, shares):
    """mean, deviations (descending) and axes (rows) of unit vectors, float64."""
    units = [x.double().numpy() for x in parts]
    units = [u / np.linalg.norm(u, axis=1, keepdims=True) for u in units]
    weight = np.concatenate([np.full(len(u), share / len(u)) for u, share in zip(units, shares, strict=True)])
    whole = np.concatenate(units)
    mean = weight @ whole
    variances, vectors = np.linalg.eigh((whole - mean).T @ ((whole - mean) * weight[:, None]))
    return mean, np.sqrt(variances[::-1].clip(0)), vectors.T[::-1]


@pytest.mark.parametrize(("rows", "dim", "kept"), [(30, 2, 1), (40, 7, 7), (400, 33, 5), (300, 65, None)])
@pytest.mark.parametrize("power", [0, 0.25, 1, "auto"])
def test_fit_is_numpys(rng, rows, dim, kept, power):
    x = cone(rng, rows, dim)
    c = fit([statistics_from(x)], power=power, dim=kept, about={"seed": 3})
    mean, deviations, axes = by_numpy([x], [1])
    assert (c.source_dim, c.dim) == (dim, kept or dim) and c.axes.shape == (kept or dim, dim)
    assert np.allclose(c.mean.numpy(), mean, rtol=0, atol=1e-14)
    assert np.allclose(c.deviations.numpy(), deviations, rtol=1e-8, atol=0)
    assert np.allclose(np.abs((c.axes.double().numpy() * axes[: c.dim]).sum(axis=1)), 1, rtol=0, atol=1e-6)
    assert torch.allclose(c.axes.double() @ c.axes.double().T, torch.eye(c.dim).double(), rtol=0, atol=1e-6)
    largest = c.axes.gather(1, c.axes.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()
    if power != "auto":
        assert c.power == power
    # Before they are scaled, the sample's vectors have mean 0, and the variance s^(2 - 2p) along each axis.
    weight = c.weight().numpy()
    unit = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    y = (unit - c.mean.numpy()) @ weight.T * deviations[: c.dim] ** (c.power - 1)
    assert np.allclose(y.mean(axis=0), 0, atol=1e-6 / deviations[c.dim - 1])
    assert np.allclose(y.T @ y / rows, np.eye(c.dim), atol=1e-5)
    about = c.about
    assert (about["rows"], about["weights"], about["seed"]) == ([rows], [1.0], 3)
    conditioned = formula(c, statistics_from(x).sample.numpy())[0]
    for name, vectors in (("before", unit), ("after", conditioned)):
        cosines = vectors @ vectors.T
        expected = (cosines.sum() - np.trace(cosines)) / (rows * (rows - 1))
        assert about["mean_cosine"][name] == pytest.approx(expected, abs=1e-5)


def test_sets_and_weights(rng):
    parts = [cone(rng, 60, 9), cone(rng, 300, 9)]
    sets = [statistics_from(part) for part in parts]
    for weights, shares in ((None, [1 / 6, 5 / 6]), ([1, 1], [0.5, 0.5]), ([3, 1], [0.75, 0.25])):
        c = fit(sets, weights, power=0.5)
        mean, deviations, _ = by_numpy(parts, shares)
        assert np.allclose(c.mean.numpy(), mean, rtol=0, atol=1e-14)
        assert np.allclose(c.deviations.numpy(), deviations, rtol=1e-8)
        assert c.about["rows"] == [60, 300] and c.about["weights"] == pytest.approx(shares)
    together = fit([statistics_from(torch.cat(parts))], power=0.5)
    assert torch.allclose(fit(sets, power=0.5).deviations, together.deviations, rtol=1e-10)
    assert torch.allclose(fit(sets, [60, 300], power=0.5).axes, together.axes, atol=1e-5)


def test_a_sample_without_variance_along_some_axes(rng):
    """Vectors of a subspace of 5 of 20 dimensions, and the same as float32 of any length."""
    x = cone(rng, 200, 5) @ torch.from_numpy(np.linalg.qr(rng.normal(size=(20, 20)))[0][:5]).float()
    for power in (0, 0.5, 1, "auto"):
        c = fit([statistics_from(x)], power=power)
        assert (c.deviations[:5] > 0).all() and not c.deviations[5:].any()
        got = c.apply(x)
        assert got.isfinite().all() and not got[:, 5:].any()
        assert_conditioned(c, x, got)
        assert c.report()["variance_kept"] == 1
    assert fit([statistics_from(x)], dim="auto").dim == 20  # 32 at the least, of the 20 that there are


def test_fewer_vectors_than_axes(rng):
    x = cone(rng, 6, 9)
    few = statistics_from(x)
    for dim in (6, 9, None):
        with pytest.raises(ConfigError, match=f"6 captions do not determine {dim or 9} axes"):
            fit([few], dim=dim)
    c = fit([few], dim=5, power=0)
    assert c.dim == 5 and (c.deviations[:5] > 0).all() and not c.deviations[5:].any()
    assert_conditioned(c, x, c.apply(x))


@pytest.mark.parametrize("length", [1.0, 0.1])
@pytest.mark.parametrize("rows", [1, 2, 500, 20_000])
def test_equal_vectors_have_no_axes(rng, rows, length):
    x = torch.from_numpy(rng.normal(size=(1, 7))).float().expand(rows, 7) * length
    for dim in (1, None):
        with pytest.raises(ConfigError, match="are the same"):
            fit([statistics_from(x.clone())], dim=dim)
        with pytest.raises(ConfigError, match="are the same"):
            fit([statistics_from(x * torch.linspace(1, 1.5, rows)[:, None].double())], dim=dim)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"power": -0.1}, "power of conditioning must be from 0 to 1"),
        ({"power": 1.01}, "power of conditioning must be from 0 to 1"),
        ({"power": float("nan")}, "power of conditioning must be from 0 to 1"),
        ({"power": "0.5"}, "power of conditioning must be from 0 to 1"),
        ({"dim": 0}, "at least 1 axis"),
        ({"dim": -3}, "at least 1 axis"),
        ({"dim": "8"}, "at least 1 axis"),
        ({"dim": 2.0}, "at least 1 axis"),
        ({"dim": 10}, "at most the 9 axes"),
        ({"weights": [1.0]}, "weights must be 2 numbers above 0"),
        ({"weights": [1.0, 0.0]}, "weights must be 2 numbers above 0"),
        ({"weights": [1.0, float("nan")]}, "weights must be 2 numbers above 0"),
        ({"weights": [1.0, float("inf")]}, "weights must be 2 numbers above 0"),
        ({"weights": [-1.0, 2.0]}, "weights must be 2 numbers above 0"),
    ],
)
def test_settings_out_of_range(rng, settings, words):
    sets = [statistics_from(cone(rng, 30, 9)) for _ in range(2)]
    with pytest.raises(ConfigError, match=words):
        fit(sets, **settings)


def test_sets_that_do_not_belong_together(rng):
    x = statistics_from(cone(rng, 30, 9))
    with pytest.raises(ConfigError, match=r"vectors of lengths \[9, 8\]"):
        fit([x, statistics_from(cone(rng, 30, 8))])
    with pytest.raises(ConfigError, match="has no vectors"):
        fit([x, Statistics(9)])


def test_the_effective_rank(rng):
    assert effective_rank(torch.ones(17)) == pytest.approx(17)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([4.0])) == pytest.approx(1)
    values = rng.uniform(0, 5, size=23)
    shares = values / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(torch.from_numpy(values)) == pytest.approx(expected, rel=1e-12)
    assert effective_rank(torch.from_numpy(values) * 1e-9) == pytest.approx(expected, rel=1e-12)


def test_the_mean_cosine(rng):
    x = torch.from_numpy(rng.normal(size=(9, 4))) * torch.logspace(-8, 8, 9)[:, None]
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i in range(9) for j in range(i)]
    assert mean_cosine(x) == pytest.approx(np.mean(cosines), abs=1e-12)
    assert mean_cosine(x[:1]) is None and mean_cosine(x[:0]) is None
    assert mean_cosine(x[:2].float()) == pytest.approx(cosines[0], abs=1e-6)


def made(deviations, rows=4096):
    """A sample whose covariance about 0 has exactly these deviations, but for one factor: pairs x and -x along axes."""
    n = len(deviations)
    found = Statistics(n)
    found.rows = rows
    found._products = torch.diag(torch.from_numpy(deviations**2)) * rows
    found.sample = torch.eye(n)
    return found


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5, 0.8, 1.2, 2.0, 4.0])
@pytest.mark.parametrize("n", [1, 2, 50, 301])
def test_the_power_that_auto_chooses(rng, n, decay):
    """It brings the effective rank to half of the axes, as near as a power from 0 to 0.75 can, to two digits."""
    deviations = np.sort(np.arange(1, n + 1) ** -decay * rng.uniform(0.9, 1.1, size=n))[::-1].copy()
    deviations = np.where(deviations > 1e-5 * deviations[0], deviations, 0)

    def rank(power):
        shares = deviations[deviations > 0] ** (2 - 2 * power)
        shares /= shares.sum()
        return np.exp(-(shares * np.log(shares)).sum())

    grid = np.linspace(0, 0.75, 7501)
    half = (deviations > 0).sum() / 2
    best = grid[np.argmin([abs(rank(power) - half) if rank(0) < half else power for power in grid])]
    c = fit([made(deviations)], dim=1)
    assert 0 <= c.power <= 0.75 and c.power == round(c.power, 2)
    assert c.power == pytest.approx(best, abs=0.0051)


@pytest.mark.parametrize(("n", "decay"), [(300, 1.0), (300, 0.5), (20, 1.0), (64, 3.0), (96, 0.0)])
def test_the_axes_that_auto_keeps(n, decay):
    deviations = np.arange(1, n + 1) ** -decay
    share = np.cumsum(deviations**2) / np.sum(deviations**2)
    fewest = next(k for k in range(1, n + 1) if share[k - 1] >= 0.99)
    expected = next(k for k in (*range(32, n, 32), n) if k >= fewest)
    c = fit([made(deviations)], dim="auto")
    assert c.dim == expected
    assert c.report()["variance_kept"] == pytest.approx(share[expected - 1])


def test_the_report(rng):
    x = cone(rng, 200, 40)
    c = fit([statistics_from(x)], power=0.5, dim=16)
    _, deviations, _ = by_numpy([x], [1])

    def rank(variances):
        shares = variances / variances.sum()
        return np.exp(-(shares * np.log(shares)).sum())

    report = c.report()
    assert (report["rows"], report["power"], report["dim"]) == ([200], 0.5, {"before": 40, "after": 16})
    assert report["mean_cosine"] == c.about["mean_cosine"]
    assert report["mean_cosine"]["before"] > 0.3 > 0.1 > abs(report["mean_cosine"]["after"])
    assert report["effective_rank"]["before"] == pytest.approx(rank(deviations**2))
    assert report["effective_rank"]["after"] == pytest.approx(rank(deviations[:16]))
    assert report["variance_kept"] == pytest.approx((deviations[:16] ** 2).sum() / (deviations**2).sum())
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("rows", ["\x1b[31m", ["\x1b[31m"], [None], 7, [True], None])
@pytest.mark.parametrize("cosine", ["0.5", [0.5, 0], {"before": 0.5}, {"before": 0.5, "after": None}, None])
def test_the_report_of_a_file_that_another_program_wrote(rng, rows, cosine):
    """Its metadata are printed: they are numbers or left out."""
    c = replace(fit([statistics_from(cone(rng, 60, 8))]), about={"rows": rows, "mean_cosine": cosine})
    assert (c.report()["rows"], c.report()["mean_cosine"]) == (None, None)


def test_the_same_vectors_give_the_same_bytes(rng):
    x = cone(rng, 300, 33)
    files = {fit([statistics_from(*x.split(100))], dim=20).to_bytes() for _ in range(3)}
    assert len(files) == 1


# the file


def store(folder, c):
    folder.mkdir(exist_ok=True)
    (folder / CONDITIONING).write_bytes(c.to_bytes())
    return folder


def test_a_file_is_read_as_it_was_written(rng, tmp_path):
    c = fit([statistics_from(cone(rng, 300, 33))], dim=20, about={"captions": "ünïcode", "n": [1, None]})
    found = Conditioning.load(store(tmp_path / "c", c), c.as_dict(), 20)
    for name in ("mean", "axes", "deviations"):
        assert torch.equal(getattr(found, name), getattr(c, name))
    assert (found.power, found.about, found.report()) == (c.power, c.about, c.report())
    assert found.to_bytes() == c.to_bytes() and found.as_dict() == c.as_dict()
    Conditioning.check(c.as_dict())
    x = cone(rng, 9, 33)
    assert torch.equal(found.apply(x), c.apply(x))
    Conditioning.load(tmp_path / "c")
    with pytest.raises(CacheError, match="keeps 20 axes, not 19"):
        Conditioning.load(tmp_path / "c", c.as_dict(), 19)


def test_every_flipped_bit_is_caught(rng, tmp_path):
    c = some(rng, 3, 2)
    folder = store(tmp_path / "c", c)
    whole = (folder / CONDITIONING).read_bytes()
    for at in range(len(whole)):
        for bit in (1, 128):
            damaged = bytearray(whole)
            damaged[at] ^= bit
            (folder / CONDITIONING).write_bytes(damaged)
            with pytest.raises(CacheError, match="checksum is wrong; copy it from"):
                Conditioning.load(folder, c.as_dict())
            try:  # without an entry: a typed error, or numbers that are valid
                found = Conditioning.load(folder)
            except CacheError:
                continue
            assert found.axes.shape == (2, 3) and 0 <= found.power <= 1 and found.mean.isfinite().all()
    for length in (0, 7, 8, 100, len(whole) - 1):
        (folder / CONDITIONING).write_bytes(whole[:length])
        for entry in (c.as_dict(), None):
            with pytest.raises(CacheError, match=r"conditioning\.safetensors is damaged"):
                Conditioning.load(folder, entry)


def test_a_file_that_another_program_wrote_keeps_its_bytes(rng, tmp_path):
    """The checksum is that of the file, also where a safetensors library arranges the header in another way."""
    c = some(rng, 5, 3)
    data = with_header(c.to_bytes(), lambda text: text + 64 * b" ")
    (tmp_path / CONDITIONING).write_bytes(data)
    entry = c.as_dict() | {"sha256": core.hashlib.sha256(data).hexdigest()}
    found = Conditioning.load(tmp_path, entry)
    assert found.to_bytes() == data != c.to_bytes() and found.as_dict() == entry and torch.equal(found.axes, c.axes)
    conditioned(tmp_path / "c", found)
    assert (tmp_path / "c" / CONDITIONING).read_bytes() == data


def with_header(data, change):
    """The bytes of a safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def hostile_files(c):
    good = {"mean": c.mean, "axes": c.axes, "deviations": c.deviations}
    settings = {"power": c.power, "about": {}}

    def file(tensors=None, metadata=None, **changed):
        text = {"conditioning": json.dumps(settings | changed)} if metadata is None else metadata
        return save({k: t.contiguous() for k, t in (good | (tensors or {})).items() if t is not None}, text or None)

    n = c.source_dim
    bad_number = c.mean.clone()
    bad_number[0] = torch.nan
    infinite = c.axes.clone()
    infinite[-1, -1] = -torch.inf
    negative = c.deviations.clone()
    negative[-1] = -1e-3
    yield "mean of float32", file({"mean": c.mean.float()})
    yield "axes of float64", file({"axes": c.axes.double()})
    yield "axes of bfloat16", file({"axes": c.axes.bfloat16()})
    yield "deviations of integers", file({"deviations": torch.ones(n, dtype=torch.int64)})
    yield "axes that are a vector", file({"axes": torch.ones(n)})
    yield "more axes than numbers", file({"axes": torch.ones(n + 1, n)})
    yield "no axes", file({"axes": torch.ones(0, n)})
    yield "axes of another length", file({"axes": torch.ones(2, n - 1)})
    yield "a mean of another length", file({"mean": torch.ones(n + 1).double()})
    yield "a mean that is a number", file({"mean": torch.tensor(1.0).double()})
    yield (
        "a mean and deviations of two dimensions",
        file({"mean": torch.ones(n, 2).double(), "deviations": torch.ones(n, 2).double()}),
    )
    yield (
        "no numbers",
        file({"mean": torch.ones(0).double(), "deviations": torch.ones(0).double(), "axes": torch.ones(0, 0)}),
    )
    yield "a mean that is not finite", file({"mean": bad_number})
    yield "an axis that is not finite", file({"axes": infinite})
    yield "deviations that are not finite", file({"deviations": bad_number})
    yield "a negative deviation", file({"deviations": negative})
    yield "ascending deviations", file({"deviations": c.deviations.flip(0)})
    yield "axes that are too long", file({"axes": c.axes * 1e38})
    yield (
        "a deviation that is too small",
        file({"deviations": c.deviations * torch.tensor([1, 1e-300, 0], dtype=torch.float64)}),
    )
    yield "no variance", file({"deviations": torch.zeros(n).double()})
    yield "no mean", file({"mean": None})
    yield "no axes at all", file({"axes": None})
    yield "no metadata", file(metadata=False)
    yield "metadata of another name", file(metadata={"conditioned": "{}"})
    yield "metadata that is no JSON", file(metadata={"conditioning": "power"})
    yield "metadata that is a list", file(metadata={"conditioning": "[1, 2]"})
    yield "metadata without a power", file(metadata={"conditioning": '{"about": {}}'})
    yield "metadata without about", file(metadata={"conditioning": '{"power": 0.5}'})
    yield "deep nesting", file(metadata={"conditioning": 100_000 * "["})
    yield "a power above 1", file(power=1.5)
    yield "a power below 0", file(power=-0.5)
    yield "a power that is not finite", file(power=float("nan"))
    yield "a power that is text", file(power="0.5")
    yield "a power that is true", file(power=True)
    yield "about that is a list", file(about=[["rows", 3]])
    yield "about that is null", file(about=None)
    data = file()
    yield "an endless header", (1 << 62).to_bytes(8, "little") + data[8:]
    yield "a header of a gigabyte", (1 << 30).to_bytes(8, "little") + data[8:]
    yield "a nested header", with_header(data, lambda text: 100_000 * b"[")
    yield "a shape that overflows", with_header(data, lambda text: text.replace(b"[2,3]", b"[9223372036854775807,3]"))
    yield "an unknown dtype", with_header(data, lambda text: text.replace(b'"F32"', b'"F99"'))
    yield "offsets outside", with_header(data, lambda text: text.replace(b'data_offsets":[0,', b'data_offsets":[8,'))
    yield "bytes after the end", data + b"\0"
    yield "not a safetensors file", b"PK\3\4" + bytes(100)


def test_hostile_files(rng, tmp_path):
    c = some(rng, 3, 2)
    folder = store(tmp_path / "c", c)
    count = 0
    for name, data in hostile_files(c):
        (folder / CONDITIONING).write_bytes(data)
        entry = c.as_dict() | {"sha256": core.hashlib.sha256(data).hexdigest()}
        for known in (entry, None):
            with pytest.raises(CacheError) as caught:
                Conditioning.load(folder, known)
            words = str(caught.value)
            assert "conditioning.safetensors is damaged (" in words and "copy it from" in words, name
            assert len(words) < 2000, name
        count += 1
    assert count == 44


def test_a_file_that_is_missing_or_is_a_folder(rng, tmp_path):
    c = some(rng, 3, 2)
    with pytest.raises(CacheError, match="cannot be read .*no text can be compared"):
        Conditioning.load(tmp_path, c.as_dict())
    (tmp_path / CONDITIONING).mkdir()
    with pytest.raises(CacheError, match="cannot be read"):
        Conditioning.load(tmp_path, c.as_dict())


def test_a_file_must_be_the_one_of_the_entry(rng, tmp_path):
    c, other = some(rng, 3, 2), some(rng, 3, 2)
    store(tmp_path / "c", other)
    with pytest.raises(CacheError, match="damaged or another cache's: its checksum"):
        Conditioning.load(tmp_path / "c", c.as_dict())
    for changed in ({"power": 0.25}, {"source_dim": 4}):
        with pytest.raises(CacheError, match="its settings are not those of"):
            Conditioning.load(tmp_path / "c", other.as_dict() | changed)


BAD_ENTRIES = [
    {},
    [],
    "auto",
    0.5,
    {"power": 0.5, "source_dim": 4},
    {"power": 0.5, "source_dim": 4, "sha256": "0" * 64, "more": 1},
    {"power": 1.5, "source_dim": 4, "sha256": "0" * 64},
    {"power": True, "source_dim": 4, "sha256": "0" * 64},
    {"power": "0.5", "source_dim": 4, "sha256": "0" * 64},
    {"power": None, "source_dim": 4, "sha256": "0" * 64},
    {"power": 0.5, "source_dim": 0, "sha256": "0" * 64},
    {"power": 0.5, "source_dim": 4.0, "sha256": "0" * 64},
    {"power": 0.5, "source_dim": 1 << 40, "sha256": "0" * 64},
    {"power": 0.5, "source_dim": 4, "sha256": "0" * 63},
    {"power": 0.5, "source_dim": 4, "sha256": None},
]


@pytest.mark.parametrize("entry", BAD_ENTRIES, ids=str)
def test_an_entry_that_is_none(rng, tmp_path, entry):
    with pytest.raises(CacheError, match="does not know the conditioning"):
        Conditioning.check(entry)
    cache = conditioned(tmp_path / "c", some(rng, 4, 3))
    path = cache.folder / "manifest.json"
    path.write_bytes(replace(cache.manifest, conditioning=entry).to_json())
    message = r"manifest.json(: this version of lift-fast does not know the | .*it\.)conditioning"
    with pytest.raises(CacheError, match=message):
        Cache(cache.folder)


# caches


def writer_of(folder, c, sizes=SIZES, codec="int8", dim=None):
    source = [{"name": f"{k:05d}.tar", "samples": size} for k, size in enumerate(sizes)]
    rotation = rotation_for(codec, dim or c.dim)
    return CacheWriter(folder, dim or c.dim, codec, ENCODER, source, "txt", rotation, None, c)


def conditioned(folder, c, sizes=SIZES, codec="int8", seed=0):
    """Writes a cache of conditioned random vectors of data_of(sizes)."""
    writer, data = writer_of(folder, c, sizes, codec), data_of(sizes)
    vectors = c.apply(vectors_of(sum(sizes), c.source_dim, seed))
    starts = np.cumsum([0, *sizes])
    for k in writer.missing():
        part = encode(vectors[starts[k] : starts[k + 1]], codec, rotation_for(codec, c.dim))
        writer.write_shard(k, part, data.shard_hashes(k).tolist())
    writer.finish()
    return Cache(folder)


def test_a_conditioned_cache(rng, tmp_path):
    c = some(rng, 9, 5)
    cache = conditioned(tmp_path / "c", c)
    manifest = cache.manifest
    assert (manifest.format, manifest.dim, manifest.conditioning) == (4, 5, c.as_dict())
    assert sorted(path.name for path in cache.folder.iterdir()) == [
        "conditioning.safetensors", "manifest.json", *(f"text-{k:05d}.safetensors" for k in range(4)),
    ]  # fmt: skip
    assert manifest.to_json() == (cache.folder / "manifest.json").read_bytes()
    assert cache.conditioning.to_bytes() == c.to_bytes() and cache.conditioning is cache.conditioning
    cache.verify()
    x = vectors_of(15, 9)
    assert torch.allclose(cache.vectors(torch.arange(15)), c.apply(x), atol=0.01)
    assert torch.equal(cache.transform(x), c.apply(x)) and cache.transform(x.bfloat16()).dtype == torch.bfloat16
    assert tools.info(cache)["conditioning"] == c.as_dict()
    assert tools.info(cache)["bytes"] == sum(path.stat().st_size for path in cache.folder.iterdir())
    assert writer_of(tmp_path / "c", c).size_on_disk() + 6 * 64 >= tools.info(cache)["bytes"]
    with pytest.raises(ValueError, match="do not come from a conditioning that keeps 5"):
        writer_of(tmp_path / "d", c, dim=9)


@pytest.mark.parametrize("codec", ["int8r", "int4r"])
def test_a_query_is_conditioned_before_it_is_rotated(rng, tmp_path, codec):
    c = some(rng, 9, 6)
    cache = conditioned(tmp_path / "c", c, codec=codec)
    query = vectors_of(4, 9, seed=1)
    expected = rotation_for(codec, 6).apply(c.apply(query))
    assert torch.equal(cache.transform(query), expected)
    half = query.bfloat16()
    assert torch.equal(cache.transform(half), rotation_for(codec, 6).apply(c.apply(half)).bfloat16())
    rows = torch.arange(15)
    assert torch.allclose(cache.widen(rows) @ expected.T, cache.vectors(rows) @ c.apply(query).T, atol=1e-5)


@pytest.mark.parametrize("codec", ["f32", "int8r"])
@pytest.mark.parametrize("power", [0, 0.5])
def test_the_example_of_docs_cache_md(rng, tmp_path, codec, power):
    names = {}
    page = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        exec(block, names)
    c = some(rng, 13, 6, power)
    deviations = c.deviations.clone()
    deviations[4:] = 0
    c = replace(c, deviations=deviations)
    cache = conditioned(tmp_path / "c", c, codec=codec)
    x = vectors_of(5, 13, seed=1)
    query = names["condition"](x.numpy(), tmp_path / "c")
    assert query.dtype == np.float32
    assert_conditioned(c, x, torch.from_numpy(query))
    if codec == "int8r":
        query = names["rotate"](query, cache.manifest.rotation["seed"])
    assert np.allclose(query, cache.transform(x).numpy(), rtol=0, atol=1e-5)
    expected = cache.vectors(torch.arange(5, 12)) @ c.apply(x).T
    assert np.allclose(names["read"](tmp_path / "c", 2)[1] @ query.T, expected.numpy(), rtol=0, atol=1e-5)


def test_the_identity_depends_on_the_conditioning(rng, tmp_path):
    c = some(rng, 4, 4)
    write(tmp_path / "plain", [3], 4)
    plain = Cache(tmp_path / "plain").manifest
    settings = [3, 4, "int8", None, "txt", ENCODER]
    assert plain.format == 3 and "conditioning" not in json.loads(plain.to_json())
    assert plain.identity == blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
    entries = [c.as_dict(), some(rng, 4, 4).as_dict(), replace(c, power=0.25).as_dict()]
    entries += [replace(c, about={"rows": [8]}).as_dict(), None]
    found = {replace(plain, format=4, conditioning=entry).identity for entry in entries}
    assert len(found | {plain.identity}) == 6


def test_format_and_conditioning_belong_together(rng, tmp_path):
    cache = conditioned(tmp_path / "c", some(rng, 4, 3))
    path = cache.folder / "manifest.json"
    path.write_bytes(replace(cache.manifest, conditioning=None).to_json())
    with pytest.raises(CacheError, match="does not know the conditioning None"):
        Cache(cache.folder)
    manifest = json.loads(cache.manifest.to_json())
    del manifest["checksum"]
    manifest["format"] = 3
    text = json.dumps(manifest, sort_keys=True).encode()
    manifest["checksum"] = blake2b(text, digest_size=16).hexdigest()
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="format version 3 has no conditioning"):
        Cache(cache.folder)


def test_a_missing_or_damaged_file_is_found(rng, tmp_path):
    c = some(rng, 4, 3)
    cache = conditioned(tmp_path / "c", c)
    path = cache.folder / CONDITIONING
    whole = path.read_bytes()
    flip_bit(path, len(whole) // 2)
    for use in (Cache(tmp_path / "c").verify, lambda: Cache(tmp_path / "c").transform(vectors_of(2, 4))):
        with pytest.raises(CacheError, match="its checksum is wrong"):
            use()
    path.unlink()
    for use in (Cache(tmp_path / "c").verify, lambda: Cache(tmp_path / "c").transform(vectors_of(2, 4))):
        with pytest.raises(CacheError, match="cannot be read"):
            use()
    assert len(Cache(tmp_path / "c").rows(torch.arange(3)).codes) == 3  # training needs the codes alone
    writer = writer_of(tmp_path / "c", c)  # the same command again restores it
    assert writer.missing() == [] and path.read_bytes() == whole
    writer.finish()
    Cache(tmp_path / "c").verify()


def test_a_run_killed_before_partial_json(rng, tmp_path, monkeypatch):
    c, other = some(rng, 4, 3), some(rng, 4, 3)
    conditioned(tmp_path / "whole", c)
    real = CacheWriter._write

    def killed(self, name, data):
        if name == "partial.json":
            raise KeyboardInterrupt
        return real(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            writer_of(tmp_path / "c", other).missing()
    assert [path.name for path in (tmp_path / "c").iterdir()] == [CONDITIONING]
    conditioned(tmp_path / "c", c)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_an_unfinished_cache_that_lost_its_conditioning(rng, tmp_path):
    c = some(rng, 4, 3)
    conditioned(tmp_path / "whole", c)
    writer_of(tmp_path / "c", c).missing()
    assert sorted(contents(tmp_path / "c")) == [CONDITIONING, "partial.json"]
    flip_bit(tmp_path / "c" / CONDITIONING, -1)
    conditioned(tmp_path / "c", c)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_a_pipe_in_the_place_of_a_conditioning_is_an_error_at_once(rng, tmp_path):
    c = some(rng, 4, 3)
    writer_of(tmp_path / "c", c).missing()
    (tmp_path / "c" / CONDITIONING).unlink()
    os.mkfifo(tmp_path / "c" / CONDITIONING)
    found = judged(writer_of(tmp_path / "c", c).missing, seconds=20)
    assert found.outcome == "error" and f"cannot write {tmp_path / 'c' / CONDITIONING}: it is a pipe" in found.message


def test_the_space_for_a_conditioning_counts_once(rng, tmp_path, monkeypatch):
    c = some(rng, 40, 30)
    whole = conditioned(tmp_path / "whole", c)
    rest = sum(len(data) for name, data in contents(whole.folder).items() if name != CONDITIONING)
    needed = {"free": rest + len(c.to_bytes())}
    monkeypatch.setattr("lift_fast.cache.writer.free_bytes", lambda path: needed["free"])
    writer = writer_of(tmp_path / "c", c)
    writer.check_space()
    needed["free"] = len(c.to_bytes()) - 1
    with pytest.raises(CacheError, match=f"its disk has {needed['free']} bytes"):
        writer.check_space()
    writer.missing()  # writes the conditioning
    needed["free"] = rest
    writer_of(tmp_path / "c", c).check_space()
    needed["free"] = rest // 2
    with pytest.raises(CacheError, match=f"its disk has {rest // 2} bytes"):
        writer_of(tmp_path / "c", c).check_space()


def test_a_finished_cache_on_a_disk_that_cannot_be_written(rng, tmp_path, monkeypatch):
    c = some(rng, 4, 3)
    conditioned(tmp_path / "c", c)

    def refused(self, *arguments, **options):  # as the system does, also for a file that is not there
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", refused)
    writer = writer_of(tmp_path / "c", c)
    assert writer.missing() == []
    writer.finish()


def test_a_writer_with_another_conditioning_is_refused(rng, tmp_path):
    c = some(rng, 4, 4)
    conditioned(tmp_path / "c", c)
    write(tmp_path / "plain", SIZES, 4)
    before = contents(tmp_path / "c"), contents(tmp_path / "plain")
    with pytest.raises(CacheMismatch, match="conditioning is"):
        writer_of(tmp_path / "c", replace(c, power=0.25))
    with pytest.raises(CacheMismatch, match="conditioning is None"):
        writer_of(tmp_path / "plain", c)
    with pytest.raises(CacheMismatch, match="conditioning is"):
        write(tmp_path / "c", SIZES, 4)
    assert (contents(tmp_path / "c"), contents(tmp_path / "plain")) == before


# cache condition


def source_of(folder, codec, dim=24, sizes=SIZES, skipped=None):
    """A cache of random vectors of data_of(sizes); skipped: shard -> numbers of rows without a vector."""
    data, x = data_of(sizes), vectors_of(sum(sizes), dim)
    source = [{"name": f"{k:05d}.tar", "samples": n, "stamp": f"s{k}"} for k, n in enumerate(sizes)]
    writer = CacheWriter(folder, dim, codec, ENCODER, source, "txt", rotation_for(codec, dim), {"key": "id"})
    for k, part in enumerate(x.split(sizes)):
        out = (skipped or {}).get(k, [])
        part = part.clone()
        part[out] = 0
        rows = encode(part, codec, rotation_for(codec, dim))
        writer.write_shard(k, rows, data.shard_hashes(k).tolist(), out)
    writer.finish()
    return Cache(folder)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("to", [None, "f32", "int8", "int4r"])
def test_condition_is_the_formula(rng, tmp_path, codec, to):
    source, c = source_of(tmp_path / "a", codec, skipped={2: [0, 3]}), some(rng, 24, 13)
    condition(source, tmp_path / "out", c, to, progress=False)
    cache = Cache(tmp_path / "out")
    cache.verify()
    assert (cache.manifest.codec, cache.dim, cache.manifest.format) == (to or codec, 13, 4)
    for name in ("field", "encoder", "read"):
        assert getattr(cache.manifest, name) == getattr(source.manifest, name)
    for mine, theirs in zip(cache.manifest.shards, source.manifest.shards, strict=True):
        assert replace(mine, sha256="") == replace(theirs, sha256="")
    assert cache.find(["key-0007"]).tolist() == [7] and cache.skipped(2).tolist() == [0, 3]
    rows = torch.arange(15)
    x, got = source.vectors(rows), cache.vectors(rows)
    assert not got[[5, 8]].any() and (got != 0).any(dim=1).sum() == 13
    if cache.manifest.codec == "f32":
        assert_conditioned(c, x, got)
    # The error of the codec is that of the same codec on the true vectors.
    truth = torch.from_numpy(formula(c, x.double().numpy())[0]).float()
    rotation = rotation_for(cache.manifest.codec, 13)
    expected = encode(truth, cache.manifest.codec, rotation).widen()
    step = expected.abs().amax(dim=1, keepdim=True) / {"int8": 127, "int8r": 127}.get(cache.manifest.codec, 4)
    close = (cache.widen(rows) - expected).abs() <= 1.01 * step  # a rounding may go the other way
    assert close.all() and ((cache.widen(rows) - expected).abs() <= 1e-5).double().mean() > 0.95


def test_blocks_are_the_whole(rng, tmp_path, monkeypatch):
    source, c = source_of(tmp_path / "a", "int8", sizes=[50, 23]), some(rng, 24, 13)
    condition(source, tmp_path / "whole", c, "f32", progress=False)
    monkeypatch.setattr(tools, "CONDITIONED", 7 * 24)
    condition(source, tmp_path / "blocks", c, "f32", progress=False)
    rows = torch.arange(73)
    both = [Cache(tmp_path / name).vectors(rows) for name in ("whole", "blocks")]
    assert torch.allclose(*both, rtol=0, atol=1e-6)


def test_a_stopped_run_continues_to_the_same_bytes(rng, tmp_path, monkeypatch):
    source, c = source_of(tmp_path / "a", "int8"), some(rng, 24, 13)
    condition(source, tmp_path / "whole", c, progress=False)
    real, left = CacheWriter.write_shard, [2]

    def stops(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(self, *arguments)

    monkeypatch.setattr(CacheWriter, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        condition(source, tmp_path / "out", c, progress=False)
    with pytest.raises(CacheError, match="is unfinished"):
        Cache(tmp_path / "out")
    left[0] = 99
    condition(source, tmp_path / "out", c, progress=False)
    assert left[0] == 97
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    condition(source, tmp_path / "out", c, progress=False)
    assert left[0] == 97 and contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import sys
from pathlib import Path
from lift_fast.cache import Cache, Conditioning
from lift_fast.cache.tools import condition
source, out, with_conditioning = map(Path, sys.argv[1:])
c = Conditioning.load(with_conditioning)
print("begins", flush=True)
condition(Cache(source), out, c, progress=False)
print("ended", flush=True)
"""


def test_a_killed_process_continues_to_the_same_bytes(rng, tmp_path):
    sizes = [40] * 60
    source, c = source_of(tmp_path / "a", "int8", sizes=sizes), some(rng, 24, 13)
    store(tmp_path / "c", c)
    condition(source, tmp_path / "whole", c, progress=False)
    command = [sys.executable, "-c", KILLED, tmp_path / "a", tmp_path / "out", tmp_path / "c"]
    kills = 0
    for _ in range(50):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begins\n"
        if kills < 3:
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert kills and process.returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_condition_refuses(rng, tmp_path):
    source, c = source_of(tmp_path / "a", "int8"), some(rng, 24, 13)
    with pytest.raises(CacheMismatch, match="have length 24, and this conditioning is for 23"):
        condition(source, tmp_path / "out", some(rng, 23), progress=False)
    with pytest.raises(CacheError, match="codec"):
        condition(source, tmp_path / "out", c, "int9", progress=False)
    assert not (tmp_path / "out").exists()
    condition(source, tmp_path / "out", c, progress=False)
    with pytest.raises(ConfigError, match="is conditioned already"):
        condition(Cache(tmp_path / "out"), tmp_path / "again", c, progress=False)
    with pytest.raises(ConfigError, match="is conditioned already"):
        statistics_of(Cache(tmp_path / "out"), 10, progress=False)
    with pytest.raises(CacheMismatch, match="holds a cache of another kind"):
        condition(source, tmp_path / "out", replace(c, power=0.25), progress=False)
    with pytest.raises(CacheMismatch, match="holds a cache of another kind"):
        condition(source, tmp_path / "a", c, progress=False)


def test_a_damaged_source_is_not_conditioned(rng, tmp_path):
    source, c = source_of(tmp_path / "a", "int8"), some(rng, 24, 13)
    flip_bit(tmp_path / "a" / "text-00002.safetensors", -1)
    with pytest.raises(CacheError, match=r"text-00002.safetensors is damaged: its checksum"):
        condition(source, tmp_path / "out", c, progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_convert_and_merge_keep_the_conditioning(rng, tmp_path):
    c = some(rng, 9, 6)
    cache = conditioned(tmp_path / "a", c, codec="f32")
    convert(cache, tmp_path / "int8", "int8", progress=False)
    convert(cache, tmp_path / "int4r", "int4r", progress=False)
    for codec in ("int8", "int4r"):
        found = Cache(tmp_path / codec)
        found.verify()
        assert found.manifest.conditioning == c.as_dict() and found.conditioning.to_bytes() == c.to_bytes()
        expected = encode(cache.vectors(torch.arange(15)), codec, rotation_for(codec, 6)).widen()
        assert torch.equal(found.widen(torch.arange(15)), expected)
    other = conditioned(tmp_path / "b", c, sizes=[4], codec="f32", seed=1)
    merge([cache, other], tmp_path / "both", progress=False)
    both = Cache(tmp_path / "both")
    both.verify()
    assert both.manifest.format == 4 and both.conditioning.to_bytes() == c.to_bytes()
    expected = torch.cat([cache.vectors(torch.arange(15)), other.vectors(torch.arange(4))])
    assert torch.equal(both.vectors(torch.arange(19)), expected)
    strange = conditioned(tmp_path / "s", replace(c, power=0.25), sizes=[4], codec="f32")
    write(tmp_path / "plain", [4], 6, codec="f32")
    for second in (strange, Cache(tmp_path / "plain")):
        for pair in ([cache, second], [second, cache]):
            with pytest.raises(CacheMismatch, match="cannot be merged with .* its conditioning is"):
                merge(pair, tmp_path / "no", progress=False)
    assert not (tmp_path / "no").exists()
    (tmp_path / "a" / CONDITIONING).unlink()
    for work in (lambda: convert(Cache(tmp_path / "a"), tmp_path / "no", "int8", progress=False),
                 lambda: merge([Cache(tmp_path / "a"), other], tmp_path / "no", progress=False)):  # fmt: skip
        with pytest.raises(CacheError, match="cannot be read"):
            work()
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("codec", ["f32", "int8r"])
def test_the_statistics_of_a_cache(rng, tmp_path, codec, monkeypatch):
    source = source_of(tmp_path / "a", codec, skipped={0: [1], 3: [0, 2]})
    monkeypatch.setattr(tools, "CONDITIONED", 4 * 24)
    whole = statistics_of(source, 99, progress=False)
    assert whole.rows == 12
    kept = [row for row in range(15) if row not in (1, 12, 14)]
    expected = statistics_from(source.vectors(torch.tensor(kept)))
    assert torch.allclose(whole.second_moment(), expected.second_moment(), rtol=0, atol=1e-12)
    some_rows = [statistics_of(source, 6, seed, progress=False) for seed in (3, 3, 4)]
    assert torch.equal(some_rows[0].second_moment(), some_rows[1].second_moment())
    assert not torch.equal(some_rows[0].second_moment(), some_rows[2].second_moment())
    assert 3 <= some_rows[0].rows <= 6
    chosen = tools.sample_of(15, 6, 3)
    assert len(set(chosen.tolist())) == 6 and (np.diff(chosen) > 0).all() and chosen.min() >= 0 and chosen.max() < 15
    assert torch.equal(some_rows[0].mean(), statistics_from(*source.vectors(torch.from_numpy(chosen)).split(4)).mean())
    with pytest.raises(ConfigError, match="at least 2 captions, not 1"):
        statistics_of(source, 1)


def test_an_imported_cache_is_conditioned(rng, tmp_path):
    """From the parquet files of LIFT's authors, by a fit to it."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from lift_fast.cache.parquet import import_parquet

    x = cone(rng, 80, 12)
    for k, part in enumerate(x.split(40)):
        folder = tmp_path / "p" / f"train-{k:05d}-of-00002"
        folder.mkdir(parents=True)
        keys = pa.array([f"{i:012d}.jpg" for i in range(40)])
        rows = pa.array(part.tolist(), type=pa.list_(pa.float32()))
        pq.write_table(pa.Table.from_arrays([keys, rows], names=["key", "embedding"]), folder / "0.parquet")
    import_parquet(tmp_path / "p", tmp_path / "a", "f32", {"id": "x"}, "txt", progress=False)
    source = Cache(tmp_path / "a")
    c = fit([statistics_of(source, 80, progress=False)], power=0.5, dim=7)
    condition(source, tmp_path / "out", c, progress=False)
    cache = Cache(tmp_path / "out")
    cache.verify()
    assert_conditioned(c, x, cache.vectors(torch.arange(80)))
    assert [shard.source for shard in cache.manifest.shards] == ["train-00000-of-00002", "train-00001-of-00002"]


def test_caches_without_a_conditioning_are_as_before(tmp_path):
    """Byte for byte those of the version before conditioning."""
    write(tmp_path / "c", [3, 2], 6, codec="int8r", rotation_seed=5)
    digest = core.hashlib.sha256(b"".join(contents(tmp_path / "c").values())).hexdigest()
    assert Cache(tmp_path / "c").manifest.identity == "87e1a56aaa6ff3ae7d4685e9a5d47a18"
    assert digest == "7cb52e29358d34e306dc553b3e538353eeb61a6aa474a47506251ad5bcfc9dcf"
    assert sorted(contents(tmp_path / "c")) == ["manifest.json", "text-00000.safetensors", "text-00001.safetensors"]

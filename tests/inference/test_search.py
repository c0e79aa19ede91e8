"""inference/search.py: exact, compared with a float64 search of the stored features."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lift_fast.cache.codec import encode
from lift_fast.errors import ConfigError
from lift_fast.inference import search as searching
from lift_fast.inference.search import search
from lift_fast.inference.store import Part, Store


def store_of(*parts: torch.Tensor) -> Store:
    """A store of these float features, a part each."""
    made, first = [], 0
    for features in parts:
        n = len(features)
        keys = torch.from_numpy(np.frombuffer(b"k" * n, np.uint8).copy())
        made.append(Part(first, encode(features, "int8"), torch.arange(n), keys, torch.arange(1, n + 1), []))
        first += n
    return Store(made)


def features(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def brute(store: Store, queries: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and rows in float64; of equal scores, the first row first."""
    codes = torch.cat([part.features.codes for part in store.parts]).double()
    scales = torch.cat([part.features.scales for part in store.parts]).double()
    scores = (codes[None] * queries.double()[:, None]).sum(dim=2) * scales
    order = scores.float().sort(dim=1, descending=True, stable=True).indices[:, :top]
    return scores.gather(1, order), order


def check(store: Store, queries: torch.Tensor, top: int) -> None:
    found = search(store, queries, top)
    scores, rows = brute(store, queries, top)
    assert found.scores.dtype == torch.float32 and torch.equal(found.rows, rows)
    torch.testing.assert_close(found.scores, scores.float(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dim", [1, 3, 64, 385])
@pytest.mark.parametrize("sizes", [(1,), (7,), (1000, 1, 250), (3, 0, 5)])
@pytest.mark.parametrize("top", [1, 10, 5000])
def test_the_top_is_that_of_a_float64_search(dim, sizes, top):
    store = store_of(*(features(n, dim, seed) for seed, n in enumerate(sizes)))
    check(store, features(3, dim, 99), top)
    check(store, store.parts[0].features.widen()[:5], top)


def test_many_chunks_and_many_queries(monkeypatch):
    monkeypatch.setattr(searching, "_CHUNK", 100)
    check(store_of(features(301, 17), features(40, 17, 1)), features(70, 17, 2), 9)
    ascending = features(1, 17) * torch.linspace(0.1, 1, 400)[:, None]  # each chunk has all of the top so far
    check(store_of(ascending), features(1, 17), 5)
    check(store_of(ascending.flip(0)), features(1, 17), 5)


def test_equal_features_are_found_in_their_order(monkeypatch):
    monkeypatch.setattr(searching, "_CHUNK", 64)
    same = features(1, 33).expand(50, 33)
    store = store_of(features(20, 33, 1), same, features(1, 33, 2), same)
    found = search(store, same[:1], 60)
    assert found.rows[0].tolist() == [*range(20, 70), *range(71, 81)]
    check(store, features(4, 33, 5), 121)


def test_scores_that_differ_by_less_than_the_rounding_of_the_query():
    """Only the second pass can put these in order."""
    base = features(1, 256)
    near = F.normalize(base + 1e-3 * torch.randn(3000, 256, generator=torch.Generator().manual_seed(1)), dim=1)
    check(store_of(near), base, 100)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 70), st.sampled_from([1e-30, 1.0, 1e30]), st.integers())
def test_any_size_and_scale(n, dim, top, scale, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    rows = torch.randint(-3, 4, (n, dim), generator=generator).float() * torch.rand(n, 1, generator=generator)
    queries = torch.randint(-2, 3, (2, dim), generator=generator).float()
    found = search(store_of(rows), queries * scale, top)
    scores, order = brute(store_of(rows), queries * scale, top)
    torch.testing.assert_close(found.scores / scale, (scores / scale).float(), rtol=1e-6, atol=1e-6)
    assert all(len(set(rows)) == min(n, top) for rows in found.rows.tolist())


def test_the_first_pass_errs_by_less_than_its_margin():
    """A tenth of it, in fact: the margin is for the worst codes."""
    rows, queries = encode(features(500, 384), "int8"), features(20, 384, 1).double()
    planes, steps = searching._digits(queries)
    assert planes.abs().max() <= 64 and planes.shape == (384, 40)
    exact = rows.codes.double() @ queries.T * rows.scales[:, None]
    margin = 64 * 384 * steps * rows.scales.max()
    assert ((searching._scores(rows, planes, steps) - exact).abs() < margin / 10).all()


def test_the_codec_loses_little():
    rows, queries = features(2000, 384), features(20, 384, 1)
    found = search(store_of(rows), queries, 2000)
    exact = (queries @ rows.T).gather(1, found.rows)
    assert (found.scores - exact).abs().max() < 2e-3 and (found.scores - exact).pow(2).mean().sqrt() < 5e-4


def test_products_without_int8_instructions(monkeypatch):
    """What a CPU does whose int8 products saturate."""
    exact = searching._int_mm_is_exact()
    monkeypatch.setattr(searching, "_int_mm_is_exact", lambda: not exact)
    for dim in (65, 2500):
        check(store_of(features(300, dim), torch.ones(2, dim), -torch.ones(1, dim)), torch.ones(1, dim), 7)


@pytest.mark.parametrize("saturates", [lambda x: x.clamp(-(2**15), 2**15 - 1), lambda x: x])
def test_int8_products_are_checked(monkeypatch, saturates):
    real = torch._int_mm
    searching._int_mm_is_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: saturates((a.long() @ b.long()).int()))
    assert searching._int_mm_is_exact() == (saturates(torch.tensor(2**20)) == 2**20)
    searching._int_mm_is_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", real)


def test_nothing_to_search():
    empty = store_of(torch.empty(0, 4))
    assert search(empty, torch.ones(2, 4)).rows.shape == search(empty, torch.ones(2, 4)).scores.shape == (2, 0)
    some = store_of(features(3, 4))
    assert search(some, torch.empty(0, 4)).scores.shape == (0, 3)
    assert search(store_of(torch.zeros(5, 4)), torch.ones(1, 4), 3).rows.tolist() == [[0, 1, 2]]
    zero = search(some, torch.zeros(1, 4), 2)
    assert zero.scores.tolist() == [[0, 0]] and zero.rows.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("queries", "top", "reason"),
    [
        (torch.ones(4), 1, r"float \[queries, 4\]"),
        (torch.ones(1, 5), 1, r"float \[queries, 4\]"),
        (torch.ones(1, 4, dtype=torch.int8), 1, r"float \[queries, 4\]"),
        (torch.tensor([[0, 1, torch.nan, 0]]), 1, "must be finite"),
        (torch.tensor([[0, 1, torch.inf, 0]]), 1, "must be finite"),
        (torch.ones(1, 4), 0, "at least 1 image"),
    ],
)
def test_what_is_refused(queries, top, reason):
    with pytest.raises(ConfigError, match=reason):
        search(store_of(features(3, 4)), queries, top)


def test_half_precision_queries():
    store = store_of(features(30, 12))
    check(store, features(2, 12, 1).half(), 4)

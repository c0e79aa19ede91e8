"""benchmarks/bench_retrieval.py at a tiny size: every row and target is there."""

import pytest
import torch

from benchmarks import bench_retrieval
from benchmarks.harness import Suite


def test_rows_and_targets(monkeypatch):
    for name, size in {"QUICK_IMAGES": 1100, "DIM": 24, "EVERY": 2, "NOISE": 0.1}.items():
        monkeypatch.setattr(bench_retrieval, name, size)
    suite = Suite("retrieval", quick=True)
    bench_retrieval.run(suite)
    trained, random, collapsed = suite.rows
    assert [row["model"] for row in suite.rows] == ["trained", "random", "collapsed"]
    for row in suite.rows:
        assert row["over_mm"] == pytest.approx(row["ns_a_score"] / row["mm_ns_a_score"]) and row["over_mm"] > 0
        assert row["seconds"] == pytest.approx(row["ns_a_score"] * 1100 * 5500 / 1e9)
        assert row["peak_mib"] > 10
    assert trained["i2t_r1"] > 0.9 > 0.1 > random["i2t_r1"] and collapsed["i2t_r1"] == 0
    assert len(suite.bars) == 6 and all(bar["value"] > 0 for bar in suite.bars)


def test_the_products_that_are_timed():
    products = bench_retrieval.Products()
    x, y = torch.randn(5, 3), torch.randn(3, 4)
    for _ in range(33):
        out = torch.full((5, 4), torch.nan)
        assert products(x, y, out=out) is out
        torch.testing.assert_close(out, x @ y)
    assert products.scores == 3 * 3 * 20 and products.seconds > 0


def test_no_time_is_left():
    suite = Suite("retrieval", quick=True, seconds=-1)
    bench_retrieval.run(suite)
    assert not suite.rows and len(suite.notes) == 3

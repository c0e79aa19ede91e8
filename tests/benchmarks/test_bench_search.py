"""benchmarks/bench_search.py at tiny sizes: every row and target is there."""

import pytest

from benchmarks import bench_search
from benchmarks.harness import Suite


@pytest.mark.parametrize(("part", "bars"), [("stored", 4), ("encode", 2), ("first", 2)])
def test_parts(part, bars, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_SHORT", "1")
    suite = Suite("search", quick=True)
    suite.repeats = 2
    bench_search.PARTS[part](suite)
    assert suite.rows and len(suite.bars) == bars and all(bar["value"] > 0 for bar in suite.bars)

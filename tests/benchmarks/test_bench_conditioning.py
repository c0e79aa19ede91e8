"""benchmarks/bench_conditioning.py at tiny sizes: every row and target is there."""

import pytest
import torch

from benchmarks import bench_conditioning
from benchmarks.harness import Suite


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"SOURCE_DIM": 64, "DIMS": (64, 16), "QUICK_ROWS": 700, "SHARD": 300, "FITTED": 200, "BLOCK": 65, "B": 32}
    for name, size in sizes.items():
        monkeypatch.setattr(bench_conditioning, name, size)
    monkeypatch.setattr(bench_conditioning, "TOWERS", {24: (32, 16, 8), 12: (12, 6)})


def test_condition(tiny):
    suite = Suite("conditioning", quick=True)
    bench_conditioning.PARTS["condition"](suite)
    assert [row["dim"] for row in suite.rows] == [64, 16]
    for row in suite.rows:
        parts = [row[name] for name in ("statistics_s", "fit_s", "condition_s")]
        assert min(parts) > 0 and row["in_all_s"] == pytest.approx(sum(parts)) and row["of_gemm"] > 0
        assert row["peak_mib"] > row["without_mapped_files_mib"] > 10
        assert row["dim"] + 12 <= row["bytes a row"] < row["dim"] + 40
    assert len(suite.bars) == 5 and all(bar["value"] > 0 for bar in suite.bars)


def test_dims(tiny):
    suite = Suite("conditioning", quick=True)
    suite.repeats = 2
    bench_conditioning.PARTS["dims"](suite)
    assert [row["bytes a row"] for row in suite.rows] == [44, 28, 20, 44, 28, 20, 24, 18, 24, 18]
    assert all(row["median_ms"] > 0 for row in suite.rows)
    assert len(suite.bars) == 9 and all(bar["value"] > 0 for bar in suite.bars)


def test_the_memory_of_a_block():
    with bench_conditioning.Memory() as memory:
        x = torch.ones(100 << 18)
        bench_conditioning.time.sleep(0.1)
        least = x.nbytes
        del x
    with bench_conditioning.Memory() as after:
        pass
    assert memory.anonymous > least and memory.resident >= memory.anonymous - (1 << 20)
    assert after.resident < memory.resident

"""benchmarks/bench_demo_text.py at tiny sizes: every row and target is there."""

from functools import partial

from benchmarks import bench_demo_text
from benchmarks.harness import Suite
from lift_fast.cli import demo
from lift_fast.demo import scenes


def drawings(out, heldout, seed):
    """Stands in for the command that writes the drawings, of which there are thousands."""

    def write():
        captions = scenes.write(out / "train", 64, seed + 1, px=72)
        scenes.write(out / "heldout", heldout, seed + 1, 64, px=72, exclude_captions=set(captions))

    return write


def test_rows_and_targets(monkeypatch):
    small = partial(demo.Demo, steps=2, batch_size=8, scenes=400, heldout=12)
    monkeypatch.setattr(bench_demo_text, "Demo", small)
    monkeypatch.setattr(demo, "DataOpenMoji", drawings)
    suite = Suite("demo_text", quick=True)
    bench_demo_text.run(suite)
    assert [row["text"] for row in suite.rows] == ["as it is", "conditioned"]
    assert all(0 <= value <= 1 for row in suite.rows for name, value in row.items() if "R@1" in name)
    assert suite.rows[0]["loss"] != suite.rows[1]["loss"]
    assert [bar["bar"] for bar in suite.bars] == [1.3, 1.0]

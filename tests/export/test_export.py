"""export/__init__.py and inference/exports.py: every target leaves a whole folder or nothing, and comes back."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_models import ENCODER, small_model

import lift_fast
from lift_fast import run_folder
from lift_fast.errors import ConfigError
from lift_fast.export import TARGETS, export, safetensors
from lift_fast.export.description import described
from lift_fast.inference.exports import is_export, read

ROOT = Path(__file__).parents[2]
BACK = ["safetensors", "open_clip", "timm", "hf", "sentence-transformers"]  # targets that lift-fast loads again
ONE_WAY = ["onnx", "torch-export"]
KINDS = ["lift", "clip"]


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    torch.manual_seed(11)
    return small_model(tmp_path_factory.mktemp("run"), request.param)


@pytest.fixture(scope="module")
def folder_of(model, tmp_path_factory):
    """Target -> the folder of an export to it, which is made once."""
    root = tmp_path_factory.mktemp("exports")

    def made(to):
        if not (root / to).exists():
            export(model, to, root / to)
        return root / to

    return made


def test_targets():
    assert set(TARGETS) == {*BACK, *ONE_WAY}


@pytest.mark.parametrize("to", BACK)
def test_round_trip(model, folder_of, to):
    assert is_export(folder_of(to)) and not is_export(folder_of(to).parent)
    module, run = read(folder_of(to))
    assert not module.training and run["preprocessing"] == json.loads(json.dumps(model.preprocess.as_dict()))
    expected = model.module.state_dict()
    assert module.state_dict().keys() == expected.keys()
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("to", BACK)
def test_load(model, folder_of, to):
    loaded = lift_fast.load(folder_of(to), device="cpu")
    pixels = torch.randn(3, 3, 42, 42)
    torch.testing.assert_close(loaded.encode_image(pixels), model.encode_image(pixels), rtol=1e-5, atol=1e-5)
    texts = ["a red ball", "two dogs"]
    torch.testing.assert_close(loaded.encode_text(texts), model.encode_text(texts), rtol=1e-5, atol=1e-5)
    assert loaded.logit_scale == model.logit_scale
    assert json.dumps(loaded.preprocess.as_dict()) == json.dumps(model.preprocess.as_dict())


@pytest.mark.parametrize("to", ONE_WAY)
def test_graphs_are_not_read_back(to, tmp_path):
    (tmp_path / "lift_fast.json").write_text(json.dumps({"format": to, "version": "0", "run": {}}))
    with pytest.raises(ConfigError, match=f"an export to {to}, which lift-fast does not read back"):
        lift_fast.load(tmp_path)


@pytest.mark.parametrize("to", TARGETS)
def test_a_failed_export_leaves_nothing(to, tmp_path, monkeypatch):
    """The card is written after the target's own files."""
    model = small_model(tmp_path / "run", "lift", layers=1)

    def fail(*args):
        assert any(next((tmp_path / "deep").iterdir()).iterdir())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lift_fast.export.model_card", fail)
    with pytest.raises(ConfigError, match="the export .* cannot be written .No space"):
        export(model, to, tmp_path / "deep" / "out")
    assert not any((tmp_path / "deep").iterdir())


@pytest.mark.parametrize("to", TARGETS)
def test_no_path_of_this_machine(model, folder_of, to):
    """open_clip_config.json, which may have to say where the folder is, says where it is now."""
    folder = folder_of(to)
    for file in folder.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        if file.name == "open_clip_config.json":
            content = content.replace(str(folder).encode(), b"")
        for path in (str(folder.parent), str(ROOT), sys.prefix, model.source):
            assert path.encode() not in content, file


def test_an_empty_folder_is_taken_and_has_the_usual_mode(model, tmp_path):
    (tmp_path / "out").mkdir()
    export(model, "safetensors", tmp_path / "out")
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    files = {"README.md", "config.json", "lift_fast.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files


def test_an_empty_folder_stays_the_same_one(model, tmp_path, monkeypatch):
    """It may be a mount point, or the working folder of a shell, which would be left in a folder that is gone."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    export(model, "safetensors", "")
    assert (Path.cwd() / "lift_fast.json").is_file()
    shutil.rmtree(tmp_path / "real")
    (tmp_path / "real").mkdir()
    export(model, "safetensors", tmp_path / "link")
    assert read(tmp_path / "real") and (tmp_path / "link").is_symlink()
    (tmp_path / "dangling").symlink_to("new")
    export(model, "safetensors", tmp_path / "dangling")
    assert read(tmp_path / "new")


def test_of_two_exports_to_one_folder_one_is_refused(model, tmp_path, monkeypatch):
    def meanwhile(*_):
        other = tmp_path / "out"
        other.mkdir(exist_ok=True)
        (other / "theirs").write_text("1")
        return []

    monkeypatch.setattr(safetensors, "write", meanwhile)
    for exists in (False, True):
        if exists:
            (tmp_path / "out").mkdir()
        with pytest.raises(ConfigError, match="exists already"):
            export(model, "safetensors", tmp_path / "out")
        assert [file.name for file in tmp_path.rglob("*")] == ["out", "theirs"]
        shutil.rmtree(tmp_path / "out")


def test_what_is_there_is_kept(model, tmp_path):
    for out in (tmp_path / "full", tmp_path / "file"):
        if out.name == "full":
            out.mkdir()
            (out / "mine").write_text("1")
        else:
            out.write_text("1")
        with pytest.raises(ConfigError, match="exists already; remove it or name another --out"):
            export(model, "safetensors", out)
    assert (tmp_path / "full" / "mine").read_text() == "1" and len(list(tmp_path.iterdir())) == 2


def test_unknown_target(model, tmp_path):
    with pytest.raises(ConfigError, match="no target 'tflite'; choose one of open_clip, timm"):
        export(model, "tflite", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_model_of_another_project(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "module", torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="model of another project"):
        export(model, "safetensors", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_half_precision_is_exported_in_float32_and_stays_half(tmp_path):
    small_model(tmp_path / "run", "lift")
    model = lift_fast.load(tmp_path / "run", device="cpu", dtype=torch.bfloat16)
    export(model, "safetensors", tmp_path / "out")
    assert model.dtype == next(model.module.parameters()).dtype == torch.bfloat16
    module, _ = read(tmp_path / "out")
    for (name, ours), theirs in zip(module.named_parameters(), model.module.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float()), name


def test_classes(model, tmp_path):
    export(model, "safetensors", tmp_path / "out", names=["dog", "Fuß"], templates=["a {}", "the {}"])
    classes = np.load(tmp_path / "out" / "classes.npz")
    assert classes["names"].tolist() == ["dog", "Fuß"] and float(classes["logit_scale"]) == pytest.approx(
        model.logit_scale
    )
    expected = model.zero_shot(["dog", "Fuß"], ["a {}", "the {}"]).weights
    torch.testing.assert_close(torch.from_numpy(classes["weights"]), expected)


def test_bad_classes_leave_nothing(model, tmp_path):
    with pytest.raises(ConfigError, match="two different names"):
        export(model, "safetensors", tmp_path / "out", names=["dog"])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["", "[]", '{"format": "safetensors"}', '{"format": "safetensors", "run": 3}'])
def test_a_damaged_description(model, damage, tmp_path):
    export(model, "safetensors", tmp_path / "out")
    (tmp_path / "out" / "lift_fast.json").write_text(damage)
    with pytest.raises(ConfigError, match="lift_fast.json is damaged .*; export the run again"):
        read(tmp_path / "out")


@pytest.mark.parametrize("to", BACK)
def test_damaged_weights(folder_of, to, tmp_path):
    shutil.copytree(folder_of(to), tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConfigError):
        read(tmp_path / "out")
    for file in (tmp_path / "out").rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConfigError):
        read(tmp_path / "out")


def test_the_description_holds_no_path_loss_or_machine(tmp_path):
    model = small_model(tmp_path / "run", "lift")
    folder = str(tmp_path / "encoders" / "e5")
    model.description |= {
        "encoder": ENCODER | {"name": folder},
        "config": {"data": [str(tmp_path / "cc3m" / "train"), str(tmp_path / "laion")], "out": str(tmp_path), "lr": 0.1}
        | {"init_from": str(tmp_path / "first"), "eval_data": [str(tmp_path)], "pictures": [str(tmp_path)]},
        "loss": [1.0, 2.0],
        "machine": {"cpu": "x"},
        "problems": [{"where": str(tmp_path)}],
        "skipped": [{"sample": str(tmp_path)}],
        "steps_ms": 2,
    }
    run = described(model)
    assert str(tmp_path) not in json.dumps(run) and not {"loss", "machine", "problems", "skipped"} & run.keys()
    assert run["encoder"]["name"] == "e5"
    assert run["config"] == {"data": ["cc3m/train", "laion"], "lr": 0.1, "init_from": "first"}
    assert run["vit"] == asdict(model.module.visual.config)
    run_folder.build(run).load_state_dict(model.module.state_dict())


def test_config_of_safetensors(model, tmp_path):
    """It says all that the weights' shapes do not."""
    export(model, "safetensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    vision = config["vision"]
    assert (vision["mlp_dim"], vision["heads"], vision["pool"], vision["activation"]) == (192, 3, "avg", "gelu")
    assert config["logit_scale"] == pytest.approx(model.logit_scale)
    assert config["preprocessing"]["image_size"] == 42 and config == json.loads(json.dumps(safetensors.config(model)))
    if config["model"] == "lift":
        assert config["head"] == {"layers": [48, 384, 384], "activation": "gelu"}
        assert config["embed_dim"] == 384 and config["encoder"] == ENCODER and "text" not in config
    else:
        assert config["embed_dim"] == 20 and config["text"]["context"] == 9 and "encoder" not in config
        assert (config["text"]["mlp_dim"], config["text"]["activation"]) == (64, "gelu")

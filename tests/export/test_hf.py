"""export/hf.py and nn/weights/whole_hf.py: loaded by transformers' own classes, compared with lift-fast's features."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.small_models import small_model

import lift_fast
from lift_fast import run_folder
from lift_fast.data.pixels import STD
from lift_fast.errors import ConfigError
from lift_fast.export import export, hf
from lift_fast.inference import Model, Preprocessing, exports
from lift_fast.nn.weights import whole_hf
from lift_fast.text.tokenizer import ClipTokenizer

SIZES = {"image_size": 40, "patch_size": 8, "heads": 4, "mlp_dim": 80}
TOWERS = {
    "clip": {},
    "clip, norm after": {"norm_after_pool": True, "norm_eps": 1e-3, "activation": "gelu_tanh"},
    "clip, cls": {"pool": "cls", "norm_eps": 1e-3, "activation": "quick_gelu"},
    "vit": {"pre_norm": False, "patch_bias": True, "norm_eps": 1e-3},
    "vit, cls": {"pre_norm": False, "patch_bias": True, "pool": "cls"},
}
LEVELS = 2.001 / 255 / min(STD)  # two, of a normalised pixel
TEXTS = ["a photo of a dog", "A Photo of two small, red dogs' corners 1234!", "naïve ÉCOLE 東京 🐶", "word " * 200]


def made(folder: Path, kind: str, vit: dict | None = None) -> Model:
    """A small model whose images are resized to 48 and cropped to 40."""
    torch.manual_seed(3)
    model = small_model(folder, kind, **SIZES, **(vit or {}))
    if kind == "clip":  # with a text tower of another activation
        text = model.description.get("text", {}) | {"activation": "quick_gelu"}
        run_folder.save(folder, model.module, model.description | {"text": text})
        model = lift_fast.load(folder, device="cpu")
    model.preprocess = Preprocessing(40, 48)
    return model


def drawn(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(params=[(kind, tower) for kind in ("lift", "clip") for tower in TOWERS], ids=str, scope="module")
def exported(request, tmp_path_factory) -> tuple[Model, Path, list[str]]:
    kind, tower = request.param
    folder = tmp_path_factory.mktemp("hf")
    model = made(folder / "run", kind, TOWERS[tower])
    return model, folder / "out", export(model, "hf", folder / "out")


def test_features(exported, tmp_path, monkeypatch):
    """The lines of the model card, run with transformers, give lift-fast's features."""
    model, out, remarks = exported
    monkeypatch.chdir(tmp_path)
    drawn(48, 48).save("image.png")
    code = hf.use(model).replace("FOLDER", str(out)).replace("image.jpg", "image.png")
    names: dict = {}
    exec(code, names)
    torch.testing.assert_close(names["features"], model.encode_image("image.png"), rtol=0, atol=1e-5)
    if "head" in names:  # no CLIPModel
        assert names["head"]["logit_scale"] == model.module.logit_scale
        pooled = hf.pooling(model.module.visual.config)
        assert pooled in code and any(pooled in remark for remark in remarks)
    else:
        assert names["model"].logit_scale == model.module.logit_scale
    if "text_features" in names:
        torch.testing.assert_close(names["text_features"], model.encode_text(TEXTS[:1]), rtol=0, atol=1e-5)


def test_loaded_by_transformers(exported):
    """Every weight is found, none is left over, and the tokens after every block are the tower's."""
    import transformers

    model, out, _ = exported
    visual = model.module.visual
    name = json.loads((out / "config.json").read_text())["architectures"][0]
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    theirs, report = getattr(transformers, name).from_pretrained(out, output_loading_info=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        p.numel() for p in (model.module if name == "CLIPModel" else visual).parameters()
    )
    pixels = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        states = getattr(theirs, "vision_model", theirs)(pixels, output_hidden_states=True).hidden_states
        blocks = visual.transformer.blocks
        for count in range(len(blocks) + (name != "ViTModel")):  # ViTModel's last state is normalised
            visual.transformer.blocks = blocks[:count]
            torch.testing.assert_close(states[count], visual.tokens(pixels), rtol=1e-5, atol=1e-5)
        visual.transformer.blocks = blocks


def test_round_trip(exported):
    model, out, _ = exported
    again, _ = exports.read(out)
    state = model.module.state_dict()
    assert set(state) == set(again.state_dict())
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("size", [(40, 40), (48, 48), (96, 120), (300, 225), (20, 30)])
def test_preprocessing(size, tmp_path):
    """Where the margins of the crop are even, pixels differ by two levels at most."""
    theirs, ours = preprocessed(drawn(*size), tmp_path)
    assert theirs.shape == ours.shape and (theirs - ours).abs().max() <= LEVELS


def test_preprocessing_of_an_odd_margin(tmp_path):
    theirs, ours = preprocessed(drawn(300, 212), tmp_path)
    assert (theirs[:, 1:] - ours[:, :-1]).abs().max() <= LEVELS


def preprocessed(image: Image.Image, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels that transformers and lift-fast make of an image."""
    from transformers import AutoImageProcessor

    hf.write_preprocessor(Preprocessing(40, 48), folder)
    theirs = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]
    return theirs[0], Preprocessing(40, 48)(image)


def test_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    ours = ClipTokenizer(13)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    ends = ours(TEXTS).argmax(dim=1)
    for row, (a, b) in enumerate(zip(ours(TEXTS), ids, strict=True)):
        assert torch.equal(a[: ends[row] + 1], b[: ends[row] + 1]), TEXTS[row]
        assert (b[ends[row] :] == 49407).all()


@pytest.mark.parametrize(
    "vit",
    [
        {"class_token": False},
        {"pre_norm": False},
        {"patch_bias": True},
        {"pre_norm": False, "patch_bias": True, "norm_after_pool": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("to", ["hf", "sentence-transformers"])
def test_towers_that_transformers_does_not_compute(to, vit, tmp_path):
    model = made(tmp_path / "run", "lift", vit)
    with pytest.raises(ConfigError, match="no model of Hugging Face computes this tower: .*patch_bias is"):
        export(model, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_exports(tmp_path):
    model = made(tmp_path / "run", "lift")
    out = tmp_path / "out"
    export(model, "hf", out)
    file = out / "lift_head.safetensors"
    good = load_file(file)
    bads = [
        {key: tensor for key, tensor in good.items() if key != "logit_scale"},
        good | {"more": torch.ones(2)},
        good | {"head.fc_1.weight": good["head.fc_1.weight"].T.contiguous()},
    ]
    for bad in bads:
        save_file(bad, file)
        with pytest.raises(ConfigError, match="its weights do not fit"):
            exports.read(out)
    file.unlink()
    with pytest.raises(ConfigError, match="its weights do not fit"):
        exports.read(out)


def test_saved_tensors_are_copies(tmp_path):
    module = made(tmp_path / "run", "clip").module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for tensors in whole_hf.save(module).values():
        for tensor in tensors.values():
            tensor.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())

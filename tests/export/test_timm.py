"""Target timm: stock timm loads the folder strictly and computes our features; the way back is bit-equal."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import peers
from support.random_models import random_model
from torch.nn import functional as F

from lift_fast.errors import ConfigError
from lift_fast.export import timm as target
from lift_fast.inference import Model
from lift_fast.nn.weights import whole_timm

CASES = {
    "lift": ("lift", {}),
    "clip": ("clip", {}),
    "no class token, norm after the pooling": ("lift", {"class_token": False, "norm_after_pool": True}),
    "as timm's own": ("clip", {"pool": "cls", "patch_bias": True, "pre_norm": False, "norm_eps": 1e-6}),
    "quick_gelu": ("lift", {"activation": "quick_gelu", "pool": "cls", "norm_after_pool": True, "mlp_dim": 37}),
    "gelu_tanh": ("clip", {"activation": "gelu_tanh", "mlp_dim": 101, "patch_dropout": 0.5}),
}

STOCK = """
from pathlib import Path
import json
from PIL import Image
from safetensors.torch import load_file, save_file

pixels = load_file(sys.argv[1] + "/pixels.safetensors")["pixels"]
for folder in map(Path, sys.argv[2:]):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        found = {"features": model(pixels)}
        model.reset_classifier(0)
        found["pooled"] = model(pixels)
    config = timm.data.resolve_model_data_config(model)
    found["preprocessed"] = timm.data.create_transform(**config)(Image.open(sys.argv[1] + "/image.png"))
    save_file({key: value.contiguous() for key, value in found.items()}, folder / "found.safetensors")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    timm.models.save_for_hf(again, folder / "again", safe_serialization=True)
"""


def same(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= bound, f"relative error {error:.2e}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[Model, Path]]:
    """Of each case the model and its folder, after stock timm computed found.safetensors and saved itself in again/."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("timm")
    drawn = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    Image.fromarray(drawn).resize((67, 41), Image.Resampling.BICUBIC).save(root / "image.png")
    save_file({"pixels": torch.randn(2, 3, 24, 24)}, root / "pixels.safetensors")
    made = {}
    for i, (case, (kind, vit)) in enumerate(CASES.items()):
        model, folder = random_model(kind, **vit), root / str(i)
        folder.mkdir()
        target.write(model, folder)
        made[case] = model, folder
    peers.run(STOCK, root, *(folder for _, folder in made.values()))
    return made


@pytest.mark.parametrize("case", CASES)
def test_stock_timm_computes_our_features(exported, case):
    model, folder = exported[case]
    pixels = load_file(folder.parent / "pixels.safetensors")["pixels"]
    found = load_file(folder / "found.safetensors")
    module = model.module
    with torch.no_grad():
        same(found["pooled"], module.visual(pixels))
        if CASES[case][0] == "clip":
            same(found["features"], module.encode_image(pixels))
        else:
            head = load_file(folder / "lift_head.safetensors")
            hidden = F.gelu(F.linear(found["features"], head["head.fc_1.weight"], head["head.fc_1.bias"]))
            same(F.linear(hidden, head["head.fc_2.weight"], head["head.fc_2.bias"]), module.encode_image(pixels))


def test_stock_timm_makes_our_pixels(exported):
    model, folder = exported["lift"]
    found = load_file(folder / "found.safetensors")["preprocessed"]
    ours = model.preprocess(folder.parent / "image.png")
    levels = (found - ours).abs() * torch.tensor(model.preprocess.std)[:, None, None] * 255
    assert levels.max() < 3.5 and levels.mean() < 0.5


@pytest.mark.parametrize("rewritten", [False, True], ids=["ours", "rewritten by timm"])
@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_bit_equal(exported, case, rewritten, tmp_path):
    model, folder = exported[case]
    kind, vit = CASES[case]
    rest = whole_timm.rest_file(model.module)
    shutil.copy(folder / rest, tmp_path)
    shutil.copy((folder / "again" if rewritten else folder) / "model.safetensors", tmp_path)
    other = random_model(kind, **vit)
    whole_timm.load(other.module, tmp_path)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[name], tensor), name


def test_another_tower_and_a_missing_file_are_refused(exported, tmp_path):
    _, folder = exported["lift"]
    with pytest.raises(ConfigError, match="width is 24, not 48"):
        whole_timm.load(random_model("lift", width=48).module, folder)
    with pytest.raises(RuntimeError, match="in the model"):
        whole_timm.load(random_model("lift", dim=15).module, folder)
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(OSError):
        whole_timm.load(random_model("lift").module, tmp_path)
    state = load_file(folder / "model.safetensors") | {"head.weight": torch.zeros(3, 24)}
    save_file(state, tmp_path / "model.safetensors")
    shutil.copy(folder / "lift_head.safetensors", tmp_path)
    with pytest.raises(RuntimeError, match="head.weight"):
        whole_timm.load(random_model("lift").module, tmp_path)


def test_a_projection_that_got_a_bias_is_refused(exported, tmp_path):
    model, folder = exported["clip"]
    shutil.copy(folder / "clip_text.safetensors", tmp_path)
    state = load_file(folder / "model.safetensors")
    state["head.bias"][0] = 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="has a bias"):
        whole_timm.load(model.module, tmp_path)


@pytest.mark.parametrize(
    ("vit", "reason"),
    [({"patch_bias": True}, "pre_norm is True, not False"), ({"norm_eps": 1e-4}, "norm_eps is 0.0001")],
    ids=str,
)
def test_towers_that_timm_does_not_compute(vit, reason, tmp_path):
    with pytest.raises(ConfigError, match=f"no model of timm computes this tower: {reason}"):
        target.write(random_model("lift", **vit), tmp_path)
    assert not list(tmp_path.iterdir())


def test_configuration():
    config = target.config(random_model("lift"))
    assert json.loads(json.dumps(config)) == config
    for hidden in (4304, 6144, 101, 1):
        for width in (1152, 1408, 24, 49):
            assert int(width * target.mlp_ratio(hidden, width)) == hidden


def test_our_readers_of_towers_against_the_stock_models():
    """The tests of nn/weights with the models of open_clip and timm, which are skipped without them."""
    code = "import pytest; sys.exit(pytest.main(['-q', '-rs', '-p', 'no:cacheprovider', 'tests/nn/test_weights.py', "
    code += "'-k', 'test_real']))"
    told = peers.run(code, ours=True)
    assert "passed" in told and "skipped" not in told, told

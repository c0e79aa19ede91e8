"""Target open_clip: stock open_clip loads the folder strictly and computes our features; the way back is bit-equal."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import peers
from support.random_models import TEXT, random_model

from lift_fast import run_folder
from lift_fast.errors import ConfigError
from lift_fast.export import open_clip as target
from lift_fast.inference import Model, Preprocessing
from lift_fast.nn import Clip, Lift, VitConfig, preset
from lift_fast.nn.weights import whole_open_clip
from lift_fast.text.spec import EncoderSpec
from lift_fast.text.tokenizer import ClipTokenizer

COMMIT = 40 * "0"
TEXTS = ["a photo of a dog", "two red BALLS, by the sea!", "x", ", ".join(200 * ["many words"])]
NAMED = {"image_size": 224, "patch_size": 16, "width": 256, "layers": 10, "heads": 4}
FOREIGN = {"pool": "cls", "pre_norm": False, "activation": "gelu_tanh", "norm_eps": 1e-3, "mlp_dim": 101}
QUICK = replace(TEXT, activation="quick_gelu")
CASES = {
    "lift": ("lift", {}),
    "lift, with a name of timm's": ("lift", NAMED),
    "lift, no class token, norm after the pooling": ("lift", {"class_token": False, "norm_after_pool": True}),
    "lift, as timm's own, class token": ("lift", {"patch_bias": True, "pre_norm": False, "pool": "cls"}),
    "lift, with MiniLM": ("lift", {}),
    "lift, with MiniLM, rotated": ("lift", {}),
    "clip": ("clip", {}),
    "clip, norm after the pooling": ("clip", {"norm_after_pool": True, "patch_dropout": 0.5}),
    "clip, class token": ("clip", FOREIGN),
    "clip, quick_gelu": ("clip", {"activation": "quick_gelu", "mlp_dim": 37}),
    "clip, quick_gelu in both": ("clip", {"activation": "quick_gelu", "text": QUICK}),
    "clip, quick_gelu in the text tower": ("clip", {"text": QUICK}),
    "clip, gelu_tanh in the text tower": ("clip", {"text": replace(TEXT, activation="gelu_tanh")}),
}
# Whose tower is open_clip's own; the others' is timm's.
NATIVE = {case for case in CASES if case.startswith("clip")} - {
    "clip, quick_gelu",
    "clip, quick_gelu in the text tower",
}

STOCK = """
import json
from pathlib import Path
from PIL import Image
from safetensors.torch import load_file, save_file

def save_weights(model, folder):  # as open_clip's save_for_hf does it
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")

root = Path(sys.argv[1])
texts = json.loads(sys.argv[2])
for folder in map(Path, sys.argv[4:]):
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    tokens = tokenizer(texts)
    image = Image.open(root / "image.png")
    with torch.no_grad():
        found = {
            "image": model.encode_image(load_file(root / "pixels.safetensors")[str(model.visual.image_size[0])]),
            "text": model.encode_text(tokens),
            "tokens": tokens,
            "logit_scale": model.logit_scale.exp(),
            "preprocessed": preprocess(image),
        }
    found = {key: value.contiguous() for key, value in found.items()}
    save_file(found, folder / "found.safetensors")
    save_weights(model, folder / "again")
    if hasattr(model.visual, "trunk"):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.encode_image(torch.randn(2, 3, *model.visual.image_size)).square().sum().backward()
        optimizer.step()
        save_weights(model, folder / "trained")

model, _, _ = open_clip.create_model_and_transforms("hf-hub:owner/model")
tokens = open_clip.get_tokenizer("hf-hub:owner/model")(texts)
with torch.no_grad():
    image = model.eval().encode_image(load_file(root / "pixels.safetensors")["24"])
    save_file({"image": image, "text": model.encode_text(tokens)}, root / "hub.safetensors")

for name, expected in json.loads(sys.argv[3]).items():
    model = timm.create_model(name, device="meta")
    blocks, patch, norms = model.blocks, model.patch_embed, {"norm_pre.weight", "norm.weight"}
    assert type(model) is timm.models.VisionTransformer
    assert norms | {"cls_token"} <= set(model.state_dict()) and patch.proj.bias is None
    assert all(block.norm1.eps == model.norm.eps == 1e-5 and type(block.mlp.act) is torch.nn.GELU for block in blocks)
    assert model.pos_embed.shape[1] == 1 + patch.num_patches and blocks[0].mlp.fc1.out_features == 4 * model.embed_dim
    found = [patch.img_size[0], patch.patch_size[0], model.embed_dim, len(blocks), blocks[0].attn.num_heads]
    assert found == expected, name
"""


def same(ours: torch.Tensor, theirs: torch.Tensor, bound: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= bound, f"relative error {error:.2e}"


def made(case: str) -> Model:
    kind, vit = CASES[case]
    size = vit.get("image_size", 24)
    preprocessing = Preprocessing(size, size, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    model = random_model(kind, 384 if "MiniLM" in case else 14, preprocessing, **vit)
    if "MiniLM" in case:
        model.description["encoder"] = EncoderSpec().as_dict()
        model.description["rotation"] = {"kind": "hadamard", "seed": 5} if "rotated" in case else None
    return model


def named() -> dict[str, list[int]]:
    """Every name in the table of names, with the sizes that it stands for."""
    found = {}
    for (width, layers, heads), (_, sizes) in target._NAMES.items():
        for patch, image in sizes:
            vit = VitConfig(image_size=image, patch_size=patch, width=width, layers=layers, heads=heads)
            found[target.timm_name(vit)] = [image, patch, width, layers, heads]
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[Model, Path]]:
    """Of each case the model and its folder, after stock open_clip computed found.safetensors, saved itself in again/
    and, with a tower of timm, after a step of training in trained/."""
    torch.manual_seed(4)
    root = tmp_path_factory.mktemp("open_clip")
    drawn = np.random.default_rng(0).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    Image.fromarray(drawn).resize((67, 41), Image.Resampling.BICUBIC).save(root / "image.png")
    save_file({str(size): torch.randn(2, 3, size, size) for size in (24, 224)}, root / "pixels.safetensors")
    models = {}
    for i, case in enumerate(CASES):
        model, folder = made(case), root / f"moved-{i}"
        (root / str(i)).mkdir()
        target.write(model, root / str(i))
        (root / str(i)).rename(folder)
        target.place(folder, f"local-dir:{folder}")
        models[case] = model, folder
    # The hub's cache, as if owner/model had been downloaded.
    hub = root / "hub" / "models--owner--model"
    shutil.copytree(models["lift, with MiniLM, rotated"][1], hub / "snapshots" / COMMIT)
    target.place(hub / "snapshots" / COMMIT, "hf-hub:owner/model")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(COMMIT)
    folders = [folder for _, folder in models.values()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(root / "hub"))
        peers.run(STOCK, root, json.dumps(TEXTS), json.dumps(named()), *folders, cwd=root)
    return models


def found_in(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict]:
    """What open_clip computed, the pixels it got, and its configuration."""
    config = json.loads((folder / "open_clip_config.json").read_text())
    pixels = load_file(folder.parent / "pixels.safetensors")
    size = config["model_cfg"]["vision_cfg"]["image_size"]
    return load_file(folder / "found.safetensors"), pixels[str(size)], config["model_cfg"]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_stock_open_clip_computes_our_features(exported, case):
    model, folder = exported[case]
    module = model.module
    found, pixels, config = found_in(folder)
    same(found["image"], module.encode_image(pixels))
    same(found["logit_scale"], torch.tensor(model.logit_scale), 1e-6)
    if isinstance(module, Clip):
        tokens = ClipTokenizer(TEXT.context)(TEXTS)
        assert torch.equal(found["tokens"], tokens)
        same(found["text"], module.encode_text(tokens))
    elif "MiniLM" in case:
        found["text"] = torch.nn.functional.normalize(found["text"], dim=-1)
        same(found["text"], run_folder.text_encoder(module, model.description, torch.device("cpu"))(TEXTS))
    else:
        assert found["text"].shape == (len(TEXTS), 14) and found["text"].isnan().all()
    name = config["vision_cfg"].get("timm_model_name", "none")
    if "name of timm" in case:
        assert name == "vit_xsmall_patch16_clip_224" and not (folder / "config.json").exists()
    else:
        assert name == ("none" if case in NATIVE else f"local-dir:{folder}")


def test_from_the_hub(exported):
    folder = exported["lift, with MiniLM, rotated"][1]
    local, hub = load_file(folder / "found.safetensors"), load_file(folder.parent / "hub.safetensors")
    assert torch.equal(local["image"], hub["image"]) and torch.equal(local["text"], hub["text"])


@pytest.mark.parametrize("case", ["lift", "clip"])
def test_stock_open_clip_makes_our_pixels(exported, case):
    model, folder = exported[case]
    found, _, _ = found_in(folder)
    ours = model.preprocess(folder.parent / "image.png")
    levels = (found["preprocessed"] - ours).abs() * torch.tensor(model.preprocess.std)[:, None, None] * 255
    assert levels.max() < 3.5 and levels.mean() < 0.5


@pytest.mark.parametrize("rewritten", [False, True], ids=["ours", "rewritten by open_clip"])
@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_bit_equal(exported, case, rewritten):
    model, folder = exported[case]
    other = made(case)
    whole_open_clip.load(other.module, folder / "again" if rewritten else folder)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[name], tensor), name


@pytest.mark.parametrize("case", ["lift", "lift, with a name of timm's", "clip, quick_gelu"])
def test_trained_by_open_clip_and_back(exported, case):
    """The zeros of the head stay zeros, so that what open_clip trained is still a Lift."""
    model, folder = exported[case]
    other = made(case).module
    whole_open_clip.load(other, folder / "trained")
    state = model.module.state_dict()
    head = "head.fc_1.weight" if isinstance(other, Lift) else "visual_projection.weight"
    for name in (head, "visual.transformer.blocks.1.fc_2.bias"):
        moved = (other.state_dict()[name] - state[name]).abs()
        assert moved.min() > 1e-3, name  # AdamW's first step moves every weight by the learning rate


def test_a_wider_head_another_tower_and_a_damaged_file_are_refused(exported, tmp_path):
    _, folder = exported["lift"]
    state = load_file(folder / "open_clip_model.safetensors")
    fc1, name = state["visual.head.mlp.fc1.weight"].clone(), tmp_path / "open_clip_model.safetensors"
    fc1[14, 3] = 1e-9
    save_file(state | {"visual.head.mlp.fc1.weight": fc1}, name)
    with pytest.raises(ConfigError, match="no longer the exported weights"):
        whole_open_clip.load(made("lift").module, tmp_path)
    with pytest.raises(ConfigError, match="width is 24, not 48"):
        whole_open_clip.load(random_model("lift", width=48).module, folder)
    save_file(state | {"visual.head.more": fc1}, name)
    with pytest.raises(ConfigError, match="unknown: visual.head.more|head.more"):
        whole_open_clip.load(made("lift").module, tmp_path)
    del state["visual.head.mlp.fc2.bias"]
    save_file(state, name)
    with pytest.raises(KeyError):
        whole_open_clip.load(made("lift").module, tmp_path)
    clip = load_file(exported["clip"][1] / "open_clip_model.safetensors")
    save_file(clip | {"transformer.resblocks.2.ln_1.bias": torch.zeros(20)}, name)
    with pytest.raises(RuntimeError, match="resblocks.2"):
        whole_open_clip.load(made("clip").module, tmp_path)


def test_towers_that_neither_computes(tmp_path):
    with pytest.raises(ConfigError, match="no model of timm computes this tower: pre_norm is True, not False"):
        target.write(random_model("lift", patch_bias=True), tmp_path)
    with pytest.raises(ConfigError, match="no model of timm computes this tower: norm_eps is 0.0001"):
        target.write(random_model("lift", norm_eps=1e-4), tmp_path)


def test_the_place_of_the_folder(exported, tmp_path):
    for case, names in {
        "lift, with MiniLM": {"timm_model_name": "hf-hub:a/b", "hf_model_name": "a/b", "hf_tokenizer_name": "a/b"},
        "lift, with a name of timm's": {"timm_model_name": "vit_xsmall_patch16_clip_224"},
        "clip": {},
    }.items():
        file = Path(shutil.copy(exported[case][1] / "open_clip_config.json", tmp_path))
        before = json.loads(file.read_text())
        target.place(tmp_path, "hf-hub:a/b")
        after = json.loads(file.read_text())
        parts = after["model_cfg"]["vision_cfg"] | after["model_cfg"]["text_cfg"]
        assert {key: value for key, value in parts.items() if key.endswith("_name")} == names
        assert before["preprocess_cfg"] == after["preprocess_cfg"]


def test_names_of_the_presets():
    names = {name: target.timm_name(preset(name).vit) for name in ("vit-b16", "vit-b32", "vit-l14", "vit-h14", "tiny")}
    kinds = ("base_patch16", "base_patch32", "large_patch14", "huge_patch14")
    assert list(names.values()) == [*(f"vit_{kind}_clip_224" for kind in kinds), None]
    usual = asdict(preset("vit-b16").vit)
    others = {"patch_bias": True, "pre_norm": False, "class_token": False, "norm_eps": 1e-6, "mlp_dim": 3000}
    others |= {"norm_after_pool": True, "activation": "quick_gelu"}
    for field, value in others.items():
        assert target.timm_name(VitConfig(**usual | {field: value})) is None, field
    assert target.timm_name(VitConfig(**usual | {"pool": "cls", "norm_after_pool": True}))


@pytest.mark.parametrize(
    "changes",
    [{"prompt": "query: "}, {"trust_remote_code": True}, {"name": "owner/unknown"}, {"name": "none"}]
    + [{"pooling": "last"}, {"end_token": "[SEP]"}],
    ids=str,
)
def test_encoders_that_open_clip_does_not_compute(changes, tmp_path):
    model = made("lift, with MiniLM")
    assert "encode_text(tokens" in target.use(model)
    model.description["encoder"] |= changes
    remarks = target.write(model, tmp_path)
    assert any("returns NaN" in remark for remark in remarks) and "lift_fast.load" in target.use(model)
    assert not list(tmp_path.glob("tokenizer*"))


def test_what_is_said(tmp_path):
    [resized, *more] = target.write(random_model("clip"), tmp_path)
    assert "resizes the shorter side of an image to 24, this model's to 29" in resized and not more

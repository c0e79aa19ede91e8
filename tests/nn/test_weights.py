"""nn/weights: loading and saving in every layout, against Hugging Face's classes, and against the key lists and
formulas of open_clip, LIFT and timm; files and state dicts that must be refused; the examples of docs/weights.md."""

import importlib
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.open_clip_layout import (
    CLIP_TEXT,
    CONFIG,
    CUSTOM_TEXT,
    GRID,
    LAYERS,
    LIFT_HEAD,
    MLP,
    PATCH,
    WIDTH,
    lift_features,
    open_clip_features,
    open_clip_shapes,
    random_state,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lift_fast.errors import ConfigError
from lift_fast.nn import Head, Lift, TextConfig, Vit, VitConfig
from lift_fast.nn.config import Preset
from lift_fast.nn.vit import resized
from lift_fast.nn.weights import load, read, save

# Its own tests are in test_weight_files.py.
pytestmark = pytest.mark.filterwarnings("ignore:these weights do not show whether their activation")


def randomise(module: nn.Module) -> nn.Module:
    """Makes every parameter random: biases of zero or norm weights of one could hide a mistake."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=0.3)
            if "norm" in name or "layrnorm" in name:
                p += name.endswith("weight")
    return module.eval()


def same(ours: Tensor, theirs: Tensor, bound: float) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= bound, f"relative error {error:.2e}"


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


# Hugging Face, against its own classes.

HF_SIZES = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
HF_SIZES |= {"patch_size": 8, "image_size": 24}


def hf_vit(cls: str, **changes):
    import transformers

    arguments = {"add_pooling_layer": changes.pop("pooler")} if "pooler" in changes else {}
    model = getattr(transformers, cls)(transformers.ViTConfig(**(HF_SIZES | changes)), **arguments)
    return randomise(model)


def hf_clip(cls: str, **changes):
    import transformers

    vision = HF_SIZES | {"projection_dim": 20} | changes
    if cls != "CLIPModel":
        return randomise(getattr(transformers, cls)(transformers.CLIPVisionConfig(**vision)))
    text = {key: value for key, value in HF_SIZES.items() if key not in ("patch_size", "image_size")}
    text |= {"vocab_size": 60, "max_position_embeddings": 9, "bos_token_id": 0, "eos_token_id": 59}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    return randomise(transformers.CLIPModel(config))


HF_MODELS = {
    "ViTModel": lambda **changes: hf_vit("ViTModel", pooler=True, **changes),
    "ViTModel without pooler": lambda **changes: hf_vit("ViTModel", pooler=False, **changes),
    "ViTForImageClassification": lambda **changes: hf_vit("ViTForImageClassification", **changes),
    "CLIPVisionModel": lambda **changes: hf_clip("CLIPVisionModel", **changes),
    "CLIPVisionModelWithProjection": lambda **changes: hf_clip("CLIPVisionModelWithProjection", **changes),
    "CLIPModel": lambda **changes: hf_clip("CLIPModel", **changes),
}


@torch.no_grad()
def hf_features(model, pixels: Tensor) -> Tensor:
    """The features before any projection, pooler or classifier."""
    if model.config.model_type == "vit":
        return getattr(model, "vit", model)(pixels).last_hidden_state[:, 0]
    return getattr(model, "vision_model", model)(pixels).pooler_output


OTHERS = {
    "ViTModel": {"pooler.dense.weight", "pooler.dense.bias"},
    "ViTForImageClassification": {"classifier.weight", "classifier.bias"},
}


@pytest.mark.parametrize("kind", HF_MODELS)
def test_hugging_face(kind):
    model = HF_MODELS[kind]().double()
    state, pixels = model.state_dict(), torch.randn(3, 3, 24, 24, dtype=torch.float64)
    loaded = load(state, heads=4, dtype=torch.float64)
    assert loaded.layout == ("hf_clip" if "CLIP" in kind else "hf_vit")
    assert loaded.visual.config.hidden == 72 and loaded.head is None
    features = loaded.visual(pixels)
    same(features, hf_features(model, pixels), 1e-12)
    same(load(state, heads=4).visual(pixels.float()).double(), hf_features(model, pixels), 1e-5)
    if kind in ("CLIPVisionModelWithProjection", "CLIPModel"):
        theirs = (
            model(pixels).image_embeds if kind != "CLIPModel" else model.visual_projection(hf_features(model, pixels))
        )
        same(features @ loaded.projection.T, theirs, 1e-12)
    else:
        assert loaded.projection is None
    if kind == "CLIPModel":
        assert loaded.logit_scale.shape == () and loaded.logit_scale == model.logit_scale
        text = {key for key in state if key.startswith("text_")}
        assert text and set(loaded.left_out) == text
    else:
        assert set(loaded.left_out) == OTHERS.get(kind, set())

    # Back: bit for bit, and strictly into another model of the class, whose other parts are kept.
    extras = {"projection": loaded.projection, "logit_scale": loaded.logit_scale}
    blank = HF_MODELS[kind]().double()
    back = save(loaded.visual, loaded.layout, into=blank.state_dict(), **extras)
    for key, tensor in back.items():
        assert torch.equal(tensor, (blank.state_dict() if key in loaded.left_out else state)[key]), key
    blank.load_state_dict(back, strict=True)
    same(hf_features(blank, pixels), features, 1e-12)


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "CLIPModel"])
@pytest.mark.parametrize("hidden_act", ["gelu", "quick_gelu", "gelu_pytorch_tanh"])
def test_hugging_face_folders(kind, hidden_act, tmp_path):
    """A folder as save_pretrained writes it: its configuration has heads, epsilon and activation."""
    eps = 0.01
    model = HF_MODELS[kind](hidden_act=hidden_act, layer_norm_eps=eps, image_size=40)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    ours = {"gelu_pytorch_tanh": "gelu_tanh"}.get(hidden_act, hidden_act)
    config = loaded.visual.config
    assert (config.heads, config.norm_eps, config.activation, config.image_size) == (4, eps, ours, 40)
    pixels = torch.randn(2, 3, 40, 40)
    same(loaded.visual(pixels), hf_features(model, pixels), 1e-5)
    assert not torch.allclose(load(tmp_path, norm_eps=1.0).visual(pixels), loaded.visual(pixels))
    assert load(tmp_path, activation="gelu").visual.config.activation == "gelu"

    # Back, with the keys of files.
    extras = {"projection": loaded.projection, "logit_scale": loaded.logit_scale}
    file = load_file(tmp_path / "model.safetensors")
    back = save(loaded.visual, loaded.layout, into=file, **extras)
    same_bits(back, file)
    save_file(back, tmp_path / "model.safetensors", {"format": "pt"})
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_bits(again.state_dict(), model.state_dict())


def test_hugging_face_names_by_default():
    """Without `into`: the keys of files, which from_pretrained of every version of transformers accepts."""
    tower = load(HF_MODELS["ViTModel"]().state_dict(), heads=4).visual
    back = save(tower, "hf_vit")
    assert "encoder.layer.1.attention.attention.query.bias" in back and len(back) == 6 + 2 * 16
    same_bits(dict(load(back, heads=4).visual.state_dict()), dict(tower.state_dict()))
    tower = load(HF_MODELS["CLIPVisionModel"]().state_dict(), heads=4).visual
    back = save(tower, "hf_clip")
    assert "vision_model.encoder.layers.1.self_attn.k_proj.weight" in back and len(back) == 7 + 2 * 16
    # With a buffer that transformers wrote until 4.30.
    back["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    loaded = load(back, heads=4)
    assert loaded.left_out == ("vision_model.embeddings.position_ids",)
    same_bits(save(loaded.visual, "hf_clip", into=back), back)


# open_clip and LIFT, against their key lists and formulas.


@pytest.mark.parametrize("text", [CLIP_TEXT, CUSTOM_TEXT], ids=["clip", "custom_text"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "quick_gelu"},
        {"activation": "gelu_tanh", "norm_eps": 0.01},
        {"pool": "avg"},
        {"pool": "avg", "norm_after_pool": True},
    ],
    ids=str,
)
def test_open_clip(text, changes):
    shapes = open_clip_shapes() | {"visual.proj": (WIDTH, 20)}
    state = random_state(text | shapes | {"logit_scale": ()})
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    loaded = load(state, dtype=torch.float64, **changes)
    rename = {"norm_after_pool": "ln_after", "norm_eps": "eps"}
    theirs = open_clip_features(state, pixels, **{rename.get(key, key): value for key, value in changes.items()})
    same(loaded.visual(pixels), theirs, 1e-12)
    same(loaded.visual(pixels) @ loaded.projection.T, theirs @ state["visual.proj"], 1e-12)
    same(load(state, **changes).visual(pixels.float()).double(), theirs, 1e-5)
    assert loaded.layout == "open_clip" and loaded.left_out == tuple(text)
    assert loaded.visual.config == replace(CONFIG, **({"pool": "cls"} | changes))

    extras = {"projection": loaded.projection, "logit_scale": loaded.logit_scale}
    same_bits(save(loaded.visual, "open_clip", into=state, **extras), state)
    back = save(loaded.visual, "open_clip", **extras)
    same_bits(back, {key: tensor for key, tensor in state.items() if key not in text})


@pytest.mark.parametrize("pre_norm", [True, False])
def test_open_clip_tower_alone(pre_norm):
    """VisionTransformer's own state dict, with and without ln_pre."""
    shapes = open_clip_shapes("", pre_norm) | {"proj": (WIDTH, 20)}
    state = random_state(shapes)
    loaded = load(state, dtype=torch.float64)
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    usual = {} if pre_norm else {"pool": "avg", "ln_after": True}  # CLIPA's
    same(loaded.visual(pixels), open_clip_features(state, pixels, prefix="", **usual), 1e-12)
    assert loaded.left_out == ()
    same_bits(save(loaded.visual, "open_clip", projection=loaded.projection, into=state), state)


def test_nonscalar_logit_scale():
    state = random_state(open_clip_shapes() | {"visual.proj": (WIDTH, 20), "logit_scale": (1,)})
    loaded = load(state, dtype=None)
    assert loaded.logit_scale.shape == ()
    extras = {"projection": loaded.projection, "logit_scale": loaded.logit_scale}
    same_bits(save(loaded.visual, "open_clip", into=state, **extras), state)


def test_openai_archive_keys():
    """The state dicts in OpenAI's archives also have three numbers, and are float16."""
    sizes = {name: torch.tensor(12) for name in ("input_resolution", "context_length", "vocab_size")}
    state = random_state(CLIP_TEXT | open_clip_shapes() | {"visual.proj": (WIDTH, 20)}, torch.float16) | sizes
    loaded = load(state, activation="quick_gelu")
    assert {p.dtype for p in loaded.visual.parameters()} == {torch.float32}
    assert set(loaded.left_out) == {*CLIP_TEXT, *sizes}


@pytest.mark.parametrize("logit_scale", [True, False])
def test_lift(logit_scale):
    """The authors' layout with all its parts, which are those of our Lift."""
    state = random_state(open_clip_shapes() | LIFT_HEAD | ({"logit_scale": ()} if logit_scale else {}))
    loaded = load(state, dtype=torch.float64)
    assert loaded.layout == "lift" and loaded.left_out == () and loaded.projection is None
    assert loaded.visual.config == CONFIG  # LIFT's convention: the mean over the patches, after the norm
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    same(loaded.visual(pixels), open_clip_features(state, pixels, pool="avg"), 1e-12)
    same(loaded.head(loaded.visual(pixels)), lift_features(state, pixels), 1e-12)
    back = save(loaded.visual, "lift", head=loaded.head, logit_scale=loaded.logit_scale)
    same_bits(back, state)
    if logit_scale:
        model = Lift(Preset(CONFIG, TextConfig(), 8, 24)).double()
        model.visual.load_state_dict(loaded.visual.state_dict())
        model.head.load_state_dict(loaded.head.state_dict())
        model.logit_scale.data = loaded.logit_scale
        same_bits(save(model.visual, "lift", head=model.head, logit_scale=model.logit_scale), state)


def test_lift_with_embed_dim():
    """The authors' class can also have a projection before the head."""
    head = LIFT_HEAD | {"mlp_projector.projector.0.weight": (24, 20)}
    state = random_state(open_clip_shapes() | {"visual.proj": (WIDTH, 20)} | head)
    loaded = load(state, dtype=None)
    assert loaded.projection.shape == (20, WIDTH) and loaded.head.fc_1.in_features == 20
    same_bits(save(loaded.visual, "lift", projection=loaded.projection, head=loaded.head), state)


def test_a_head_is_of_gelu():
    state = random_state(open_clip_shapes() | LIFT_HEAD)
    with pytest.raises(ConfigError, match="quick_gelu"):
        load(state, activation="quick_gelu")
    with pytest.raises(ConfigError, match="quick_gelu"):
        save(Vit(replace(CONFIG, activation="quick_gelu")), "lift", head=Head(WIDTH, 24))


# timm, against its key list and formula.


def timm_shapes(
    prefix: str = "", *, class_token=True, pre_norm=False, fc_norm=False, no_embed_class=False
) -> dict[str, tuple[int, ...]]:
    shapes = {"cls_token": (1, 1, WIDTH)} if class_token else {}
    shapes["pos_embed"] = (1, GRID**2 + (class_token and not no_embed_class), WIDTH)
    shapes["patch_embed.proj.weight"] = (WIDTH, 3, PATCH, PATCH)
    if pre_norm:
        shapes |= {"norm_pre.weight": (WIDTH,), "norm_pre.bias": (WIDTH,)}
    else:
        shapes["patch_embed.proj.bias"] = (WIDTH,)
    for n in range(LAYERS):
        block = {
            "norm1.weight": (WIDTH,),
            "norm1.bias": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.qkv.bias": (3 * WIDTH,),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "norm2.weight": (WIDTH,),
            "norm2.bias": (WIDTH,),
            "mlp.fc1.weight": (MLP, WIDTH),
            "mlp.fc1.bias": (MLP,),
            "mlp.fc2.weight": (WIDTH, MLP),
            "mlp.fc2.bias": (WIDTH,),
        }
        shapes |= {f"blocks.{n}.{key}": shape for key, shape in block.items()}
    last = "fc_norm" if fc_norm else "norm"
    shapes |= {f"{last}.weight": (WIDTH,), f"{last}.bias": (WIDTH,)}
    return {prefix + key: shape for key, shape in shapes.items()}


TIMM_HEAD = {"head.weight": (7, WIDTH), "head.bias": (7,)}


@torch.no_grad()
def timm_features(s: dict[str, Tensor], pixels: Tensor, *, pool: str, eps: float) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        if f"{name}.weight" not in s:
            return x
        return F.layer_norm(x, (WIDTH,), s[f"{name}.weight"], s[f"{name}.bias"], eps)

    x = F.conv2d(pixels, s["patch_embed.proj.weight"], s.get("patch_embed.proj.bias"), PATCH).flatten(2).mT
    no_embed_class = s["pos_embed"].shape[1] == x.shape[1]
    if no_embed_class:
        x = x + s["pos_embed"]
    if "cls_token" in s:
        x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x], dim=1)
    if not no_embed_class:
        x = x + s["pos_embed"]
    x = norm(x, "norm_pre")
    for n in range(LAYERS):
        block = f"blocks.{n}"
        qkv = F.linear(norm(x, f"{block}.norm1"), s[f"{block}.attn.qkv.weight"], s[f"{block}.attn.qkv.bias"])
        q, k, v = qkv.reshape(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT * (WIDTH // 2) ** -0.5).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(y, s[f"{block}.attn.proj.weight"], s[f"{block}.attn.proj.bias"])
        y = F.gelu(F.linear(norm(x, f"{block}.norm2"), s[f"{block}.mlp.fc1.weight"], s[f"{block}.mlp.fc1.bias"]))
        x = x + F.linear(y, s[f"{block}.mlp.fc2.weight"], s[f"{block}.mlp.fc2.bias"])
    x = norm(x, "norm")
    x = x[:, 0] if pool == "cls" else x[:, int("cls_token" in s) :].mean(dim=1)
    return norm(x, "fc_norm")


TIMM_KINDS = {
    "classifier": ({}, "cls", 1e-6),
    "clip": ({"pre_norm": True}, "cls", 1e-5),
    "avg": ({"fc_norm": True}, "avg", 1e-6),
    "clip avg": ({"fc_norm": True, "pre_norm": True}, "avg", 1e-5),
    "no class token": ({"class_token": False}, "avg", 1e-6),
    "no class token, fc_norm": ({"class_token": False, "fc_norm": True}, "avg", 1e-6),
    "no_embed_class": ({"no_embed_class": True}, "cls", 1e-6),
}


@pytest.mark.parametrize("kind", TIMM_KINDS)
@pytest.mark.parametrize("head", [True, False])
def test_timm(kind, head):
    changes, pool, eps = TIMM_KINDS[kind]
    state = random_state(timm_shapes(**changes) | (TIMM_HEAD if head else {}))
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64) / 50  # so small that epsilon is seen
    for key in ("pos_embed", "cls_token"):
        state |= {key: state[key] / 50} if key in state else {}
    loaded = load(state, dtype=torch.float64)
    assert loaded.layout == "timm" and loaded.left_out == (tuple(TIMM_HEAD) if head else ())
    theirs = timm_features(state, pixels, pool=pool, eps=eps)
    same(loaded.visual(pixels), theirs, 1e-12)
    same(load(state).visual(pixels.float()).double(), theirs, 1e-5)
    same_bits(save(loaded.visual, "timm", into=state), state)
    back = save(loaded.visual, "timm")
    same(load(back, dtype=None, pool=pool).visual(pixels), theirs, 1e-12)
    if kind != "no_embed_class":
        same_bits(back, {key: tensor for key, tensor in state.items() if key not in TIMM_HEAD})


def test_timm_convention_that_no_key_shows():
    """A class token, the norm before the pooling, and the mean over the patches: LIFT's tower in timm."""
    state = random_state(timm_shapes(pre_norm=True))
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    loaded = load(state, pool="avg", dtype=None)
    assert loaded.visual.config == CONFIG
    same(loaded.visual(pixels), timm_features(state, pixels, pool="avg", eps=1e-5), 1e-12)
    same_bits(save(loaded.visual, "timm"), state)


def test_no_embed_class_after_training():
    """The position that the class token got in training is added to the token, which gives the same function."""
    state = random_state(timm_shapes(no_embed_class=True))
    tower = load(state, dtype=None).visual
    with torch.no_grad():
        tower.positional_embedding[0] += torch.randn(WIDTH)
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    back = save(tower, "timm", into=state)
    same(timm_features(back, pixels, pool="cls", eps=1e-6), tower(pixels), 1e-12)


def test_timm_inside_open_clip():
    tower = timm_shapes("visual.trunk.")
    state = random_state(CUSTOM_TEXT | tower | {"visual.head.proj.weight": (20, WIDTH), "logit_scale": ()})
    loaded = load(state, dtype=None)
    assert loaded.layout == "timm" and set(loaded.left_out) == set(state) - set(tower)
    same_bits(save(loaded.visual, "timm", into=state), state)


# The real models, if they are installed with a torchvision that works.


def imported(name: str):
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name}: {error!r}"[:200])


@pytest.mark.parametrize(
    "changes", [{}, {"pool_type": "avg"}, {"pool_type": "avg", "final_ln_after_pool": True}], ids=str
)
def test_real_open_clip(changes):
    module = imported("open_clip.transformer")
    sizes = {"image_size": 12, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "heads": 2, "mlp_ratio": 1.5}
    theirs = randomise(module.VisionTransformer(**sizes, output_dim=20, **changes)).double()
    state = theirs.state_dict()
    pool = {"tok": "cls"}.get(changes.get("pool_type", "tok"), "avg")
    loaded = load(state, pool=pool, norm_after_pool=bool(changes.get("final_ln_after_pool")), dtype=None)
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        same(loaded.visual(pixels) @ loaded.projection.T, theirs(pixels), 1e-12)
    theirs.load_state_dict(save(loaded.visual, "open_clip", projection=loaded.projection, into=state), strict=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False, "class_token": False},
        {"no_embed_class": True},
        {"pre_norm": True, "num_classes": 0},
    ],
    ids=str,
)
def test_real_timm(changes):
    module = imported("timm.models.vision_transformer")
    sizes = {"img_size": 12, "patch_size": PATCH, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": 2, "mlp_ratio": 1.5}
    theirs = randomise(module.VisionTransformer(**sizes, **changes)).double()
    state = theirs.state_dict()
    loaded = load(state, norm_eps=1e-6, dtype=None)
    pixels = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        features = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
        same(loaded.visual(pixels), features, 1e-12)
    back = save(loaded.visual, "timm", into=state)
    theirs.load_state_dict(back, strict=True)
    same_bits(back, dict(state))


# What is refused.

GOOD = {
    "open_clip": lambda: random_state(open_clip_shapes()),
    "timm": lambda: random_state(timm_shapes()),
    "hf_vit": lambda: HF_MODELS["ViTModel"](hidden_size=128, num_attention_heads=2).state_dict(),
    "hf_clip": lambda: HF_MODELS["CLIPModel"](hidden_size=128, num_attention_heads=2).state_dict(),
}

NOT_COMPUTED = [
    ("timm", "blocks.0.ls1.gamma", "layer scale"),
    ("timm", "blocks.0.gamma_1", "layer scale"),
    ("timm", "blocks.0.attn.q_norm.weight", "queries and keys"),
    ("timm", "attn_pool.latent", "attention pooling"),
    ("timm", "reg_token", "register"),
    ("timm", "dist_token", "distillation"),
    ("timm", "rope.freqs", "rotary"),
    ("timm", "blocks.0.mlp.fc1_g.weight", "SwiGLU"),
    ("timm", "blocks.0.attn.relative_position_bias_table", "relative positions"),
    ("timm", "blocks.0.attn.norm.weight", "norms inside"),
    ("open_clip", "visual.transformer.resblocks.0.ls_1.gamma", "layer scale"),
    ("open_clip", "visual.transformer.resblocks.0.attn.ln_q.weight", "queries and keys"),
    ("open_clip", "visual.attn_pool.query", "attention pooling"),
    ("open_clip", "visual.transformer.resblocks.1.ln_attn.weight", "norms inside"),
    ("open_clip", "visual.transformer.resblocks.1.attn.head_scale", "scaled heads"),
    ("hf_vit", "embeddings.distillation_token", "distillation"),
    ("hf_vit", "embeddings.register_tokens", "register"),
    ("hf_vit", "encoder.layer.0.layer_scale1.lambda1", "layer scale"),
    ("hf_clip", "vision_model.head.probe", "attention pooling"),
]


@pytest.mark.parametrize(("layout", "key", "reason"), NOT_COMPUTED)
def test_what_the_tower_does_not_compute(layout, key, reason):
    state = GOOD[layout]() | {key: torch.ones(WIDTH)}
    with pytest.raises(ConfigError, match=reason) as refused:
        load(state)
    assert key in str(refused.value)


def test_packed_swiglu():
    state = random_state(timm_shapes())
    for n in range(LAYERS):
        state[f"blocks.{n}.mlp.fc2.weight"] = torch.ones(WIDTH, MLP // 2)
    with pytest.raises(ConfigError, match="SwiGLU"):
        load(state)


@pytest.mark.parametrize("layout", GOOD)
def test_every_key_is_used_or_named(layout):
    """load names any key that is missing or has another shape."""
    state = GOOD[layout]()
    left_out = set(load(state).left_out)
    optional = {"visual_projection.weight", "logit_scale"}
    for key in state:
        if re.search(r"[a-z]\.1\.", key):  # block 0 covers both
            continue
        without = {k: tensor for k, tensor in state.items() if k != key}
        if key in left_out | optional:
            load(without)
            continue
        with pytest.raises(ConfigError, match=re.escape(key.rpartition(".")[0] or key)):
            load(without, layout)
        with pytest.raises(ConfigError, match=re.escape(key)):
            load(state | {key: state[key][None]}, layout)


@pytest.mark.parametrize("layout", GOOD)
def test_unknown_keys(layout):
    state = GOOD[layout]()
    prefix = next(iter(state)).split("class_embedding")[0] if layout == "open_clip" else ""
    with pytest.raises(ConfigError, match="unknown: .*surprise and 2 more"):
        load(state | {f"{prefix}{name}surprise": torch.ones(3) for name in ("", "a", "b", "c", "d", "e")})


def test_blocks_are_counted_by_their_keys():
    """A gap in the numbers is a missing block, and an absurd number takes no time."""
    state = random_state(timm_shapes())
    far = {key.replace("blocks.1.", "blocks.999999999."): tensor for key, tensor in state.items()}
    with pytest.raises(ConfigError, match=r"missing: blocks\.1\..*unknown: blocks\.999999999\."):
        load(far)


def test_what_cannot_be_seen():
    state = random_state(timm_shapes())
    narrow = HF_MODELS["ViTModel"]().state_dict()
    with pytest.raises(ConfigError, match="pass heads="):
        load(narrow)
    with pytest.raises(ConfigError, match="multiple of its 3 heads"):
        load(narrow, heads=3)
    with pytest.raises(ConfigError, match="11 positions"):
        load(state | {"pos_embed": torch.ones(1, 11, WIDTH)})
    with pytest.raises(ConfigError, match="square patches"):
        load(state | {"patch_embed.proj.weight": torch.ones(WIDTH, 3, 4, 2)})
    with pytest.raises(ConfigError, match="square patches"):
        load(state | {"patch_embed.proj.weight": torch.ones(WIDTH, 1, 4, 4)})
    with pytest.raises(ConfigError, match="no activation"):
        load(state, activation="relu")
    with pytest.raises(ConfigError, match="class token"):
        load(random_state(timm_shapes(class_token=False)), pool="cls")
    with pytest.raises(ConfigError, match="int8"):
        load(state | {"norm.weight": torch.ones(WIDTH, dtype=torch.int8)})
    with pytest.raises(ConfigError, match="sparse"):
        load(state | {"norm.weight": torch.ones(WIDTH).to_sparse()})
    with pytest.raises(ConfigError, match="not tensors: epoch"):
        load(state | {"epoch": 3})


def test_layouts_that_are_not_there():
    with pytest.raises(ConfigError, match="not an image tower of any known layout"):
        load({"conv1.bias": torch.ones(3)})
    with pytest.raises(ConfigError, match="none"):
        load({})
    with pytest.raises(ConfigError, match="not an image tower of timm"):
        load(GOOD["open_clip"](), "timm")
    with pytest.raises(ConfigError, match="open_clip, lift, timm"):
        load(GOOD["timm"](), "dino")
    with pytest.raises(ConfigError, match="open_clip, lift, timm"):
        save(Vit(CONFIG), "dino")


@pytest.mark.parametrize(("width", "heads"), [(1280, 16), (1152, 16), (64, 1), (768, 12)])
def test_heads_of_published_widths(width, heads):
    """The head_dim is 80 for ViT-H, 72 for SO400M, else 64."""
    tower = Vit(VitConfig(16, 16, width, 1, heads, mlp_dim=8))
    assert load(save(tower, "open_clip"), pool="avg").visual.config == tower.config


# Configurations.


def test_config():
    """A config gives the fields that shapes do not show, and its sizes are compared with the shapes."""
    state = random_state(open_clip_shapes())
    config = replace(CONFIG, heads=4, activation="quick_gelu", norm_eps=0.1, patch_dropout=0.5)
    assert load(state, config=config).visual.config == config
    assert load(state, config=config, heads=2).visual.config == replace(config, heads=2)
    assert load(state, config=replace(config, mlp_dim=MLP)).visual.config == config
    for wrong, match in (
        ({"layers": 3}, "layers is 2, not 3"),
        ({"mlp_dim": None}, "mlp_dim"),
        ({"width": 64}, "width"),
    ):
        with pytest.raises(ConfigError, match=match):
            load(state, config=replace(config, **wrong))
    four = VitConfig(8, 4, 64, 1, 1, mlp_dim=256)
    assert load(save(Vit(four), "lift"), "lift", config=replace(four, mlp_dim=None)).visual.config.mlp_dim is None


def test_another_image_size():
    state = random_state(open_clip_shapes(), torch.float32)
    loaded = load(state, image_size=20)
    assert loaded.visual.config == replace(CONFIG, image_size=20, pool="cls")
    positions = state["visual.positional_embedding"]
    grid = positions[1:].view(1, 3, 3, WIDTH).permute(0, 3, 1, 2)
    wider = F.interpolate(grid, (5, 5), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(25, WIDTH)
    ours = loaded.visual.positional_embedding
    assert ours.requires_grad and torch.equal(ours, torch.cat([positions[:1], wider]))
    pixels = torch.randn(2, 3, 20, 20)
    theirs = open_clip_features(state | {"visual.positional_embedding": ours.detach()}, pixels)
    same(loaded.visual(pixels), theirs, 1e-5)
    assert load(state, config=replace(CONFIG, image_size=20)).visual.config.image_size == 20
    assert load(state, config=replace(CONFIG, image_size=20), image_size=8).visual.config.image_size == 8
    with pytest.raises(ConfigError, match="image_size 21"):
        load(state, image_size=21)
    with pytest.raises(ConfigError, match="other shapes than `into`'s: visual.positional_embedding"):
        save(loaded.visual, "open_clip", into=state)


def test_hugging_face_interpolates_otherwise():
    """Its interpolate_pos_encoding does not antialias, so that its bicubic kernel, and the result, differ from ours."""
    model = HF_MODELS["ViTModel without pooler"]()
    state = model.state_dict()
    positions = state["embeddings.position_embeddings"][0]
    theirs = model.embeddings.interpolate_pos_encoding(torch.ones(1, 26, 32), 40, 40)[0]
    plain = F.interpolate(positions[1:].view(1, 3, 3, 32).permute(0, 3, 1, 2), (5, 5), mode="bicubic")
    torch.testing.assert_close(theirs[1:], plain.permute(0, 2, 3, 1).reshape(25, 32))
    ours = resized(positions, (3, 3), (5, 5))
    torch.testing.assert_close(load(state, heads=4, image_size=40).visual.positional_embedding.detach(), ours)
    assert 1e-3 < (ours - theirs).norm() / theirs.norm() < 0.2


# Numbers and memory.


def test_nan_passes_unchanged():
    state = random_state(open_clip_shapes(), torch.float32)
    state["visual.conv1.weight"][0, 0, 0, 0] = torch.nan
    state["visual.ln_post.bias"][:] = torch.tensor(float("inf"))
    back = save(load(state).visual, "open_clip")
    for key in state:
        assert torch.equal(back[key].view(torch.int32), state[key].view(torch.int32)), key


@pytest.mark.parametrize("layout", ["open_clip", "hf_clip"])
def test_dtypes(layout):
    """bfloat16 becomes float32, as training needs, unless dtype=None."""
    state = {key: tensor.bfloat16() for key, tensor in GOOD[layout]().items()}
    wide, own = load(state, layout), load(state, layout, dtype=None)
    assert {p.dtype for p in wide.visual.parameters()} == {torch.float32}
    assert {p.dtype for p in own.visual.parameters()} == {torch.bfloat16}
    back = save(wide.visual, layout)
    same_bits(back, {key: state[key].float() for key in back})
    back = save(own.visual, layout)
    same_bits(back, {key: state[key] for key in back})
    mixed = state | {key: tensor.float() for key, tensor in state.items() if "ln_" in key or "norm" in key}
    back = save(load(mixed, layout, dtype=None).visual, layout)
    same_bits(back, {key: mixed[key] for key in back})


@pytest.mark.parametrize("layout", GOOD)
def test_nothing_is_shared(layout, tmp_path):
    """Training the tower changes neither the state dict that was loaded nor the one that was saved."""
    state = {key: tensor.float() for key, tensor in GOOD[layout]().items()}
    before = {key: tensor.clone() for key, tensor in state.items()}
    loaded = load(state)
    back = save(loaded.visual, layout, projection=loaded.projection)
    kept = {key: tensor.clone() for key, tensor in back.items()}
    with torch.no_grad():
        for p in loaded.visual.parameters():
            assert p.requires_grad and p.is_contiguous()
            p.add_(1)
    same_bits(state, before)
    same_bits(back, kept)
    save_file(back, tmp_path / "model.safetensors")  # refuses tensors that share memory
    assert load(tmp_path / "model.safetensors", layout).layout == layout


def test_gradients_reach_every_weight():
    visual = load(random_state(open_clip_shapes()), pool="avg").visual
    visual(torch.randn(2, 3, 12, 12)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in visual.parameters())


# Refused by `save`.


def test_save_refuses_what_the_other_model_does_not_compute():
    with pytest.raises(ConfigError, match="pool is 'avg', not 'cls'"):
        save(Vit(CONFIG), "hf_clip")
    with pytest.raises(ConfigError, match="patch_bias is False"):
        save(Vit(replace(CONFIG, pool="cls")), "hf_vit")
    with pytest.raises(ConfigError, match="class_token"):
        save(Vit(replace(CONFIG, class_token=False)), "open_clip")
    with pytest.raises(ConfigError, match="pre_norm is True, not False"):
        save(Vit(replace(CONFIG, patch_bias=True)), "timm")
    into = random_state(timm_shapes(pre_norm=True))
    with pytest.raises(ConfigError, match="norm_after_pool is True, not False"):
        save(Vit(replace(CONFIG, norm_after_pool=True)), "timm", into=into)
    for pool in ("cls", "avg"):
        save(Vit(replace(CONFIG, norm_after_pool=pool == "cls", pool=pool)), "timm", into=into)


def test_save_refuses_what_has_no_place():
    cls = Vit(replace(CONFIG, pool="cls"))
    for arguments in ({"projection": torch.ones(20, WIDTH)}, {"logit_scale": torch.ones(())}, {"head": Head(WIDTH, 5)}):
        with pytest.raises(ConfigError, match=f"timm has no place for {next(iter(arguments))}"):
            save(cls, "timm", **arguments)
    with pytest.raises(ConfigError, match="open_clip has no place for head"):
        save(cls, "open_clip", head=Head(WIDTH, 5))
    with pytest.raises(ConfigError, match=r"\[dim, 128\], not \[128, 20\]"):
        save(cls, "open_clip", projection=torch.ones(WIDTH, 20))
    into = random_state(open_clip_shapes())
    with pytest.raises(ConfigError, match="keys that `into` does not have: visual.proj"):
        save(cls, "open_clip", projection=torch.ones(20, WIDTH), into=into)
    without = Vit(replace(CONFIG, pre_norm=False))
    with pytest.raises(
        ConfigError, match="the model of `into` does not compute this tower: pre_norm is False, not True"
    ):
        save(without, "open_clip", into=into)
    with pytest.raises(ConfigError, match="keys that only `into` has: visual.ln_pre.weight, visual.ln_pre.bias"):
        save(without, "lift", into=into)
    with pytest.raises(ConfigError, match="keys that `into` does not have: .* and 8 more"):
        save(Vit(replace(CONFIG, layers=3)), "open_clip", into=into)
    with pytest.raises(ConfigError, match="other shapes than `into`'s: visual.transformer.resblocks.0.mlp.c_fc.weight"):
        save(Vit(replace(CONFIG, mlp_dim=8)), "open_clip", into=into)


# Files.


class Code:
    """Unpickling it creates the file at `path`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.attack
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused(legacy, tmp_path):
    state = random_state(timm_shapes())
    bad, made = tmp_path / "bad.pt", tmp_path / "made"
    torch.save(state | {"x": Code(made)}, bad, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConfigError, match="could run code"):
        read(bad)
    bad.write_bytes(pickle.dumps(Code(made), protocol=2))
    with pytest.raises(ConfigError, match="could run code"):
        load(bad)
    assert not made.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_cut_short(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    state = random_state(timm_shapes())
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    same_bits(read(path), state)
    whole = path.read_bytes()
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=path.name):
            read(path)


@pytest.mark.parametrize("outer", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_checkpoints(outer, prefix, tmp_path):
    state = random_state(open_clip_shapes())
    wrapped = {prefix + key: tensor for key, tensor in state.items()}
    wrapped = {outer: wrapped, "epoch": 3, "optimizer": {"lr": [0.1]}} if outer else wrapped
    for name in ("epoch_3.pt", "weights.pth", "pytorch_model.bin", "last.ckpt"):
        torch.save(wrapped, tmp_path / name)
        same_bits(read(tmp_path / name), state)
    same_bits(read(tmp_path), state)  # the folder's pytorch_model.bin


def test_files_that_are_none(tmp_path):
    for name, match in (
        ("no.pt", "no such file"),
        ("there.txt", "must be .safetensors"),
        ("", "none of model.safetensors"),
    ):
        (tmp_path / "there.txt").touch()
        with pytest.raises(ConfigError, match=match):
            read(tmp_path / name)
    for content in (torch.ones(3), [torch.ones(3)], {"epoch": 3}, {"state_dict": {"epoch": 3}}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ConfigError, match="neither a state dict"):
            read(tmp_path / "x.pt")


def test_open_clip_folder(tmp_path):
    state = random_state(open_clip_shapes(), torch.float32)
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 12, "layers": 2, "width": WIDTH, "patch_size": PATCH, "mlp_ratio": MLP / WIDTH}
    vision |= {"head_width": 32, "pool_type": "avg", "final_ln_after_pool": True, "norm_kwargs": {"eps": 0.01}}
    config = {"model_cfg": {"embed_dim": 0, "quick_gelu": True, "vision_cfg": vision, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    changes = {"heads": 4, "pool": "avg", "norm_after_pool": True, "norm_eps": 0.01, "activation": "quick_gelu"}
    assert load(tmp_path).visual.config == replace(CONFIG, **changes)
    config["model_cfg"] |= {"quick_gelu": False, "vision_cfg": {"width": WIDTH, "act_kwargs": {"approximate": "tanh"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert load(tmp_path).visual.config == replace(CONFIG, pool="cls", activation="gelu_tanh")
    # For a file, the configuration in its folder is not read.
    assert load(tmp_path / "open_clip_model.safetensors").visual.config == replace(CONFIG, pool="cls")


def test_timm_folder(tmp_path):
    save_file(random_state(timm_shapes(pre_norm=True), torch.float32), tmp_path / "model.safetensors")
    assert load(tmp_path).visual.config.pool == "cls"
    settings = {"architecture": "vit_base_patch16_clip_224", "num_features": WIDTH, "global_pool": "avg"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path).visual.config == CONFIG
    (tmp_path / "config.json").write_text(json.dumps(settings | {"global_pool": "map"}))
    with pytest.raises(ConfigError, match="config.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"model_cfg": 3}',
        '{"model_cfg": {"vision_cfg": {"pool_type": "none"}}}',
        '{"model_cfg": {"vision_cfg": {"head_width": 0}}}',
        '{"model_cfg": {"vision_cfg": {"norm_kwargs": {"eps": "x"}}}}',
        '{"model_cfg": {"vision_cfg": {"width": 1}}}',
        '{"model_type": "no such model"}',
        '{"model_type": "vit", "hidden_act": "relu"}',
        '{"model_type": "bert", "hidden_act": "swish"}',
    ],
)
def test_configurations_that_are_none(text, tmp_path):
    save_file(random_state(timm_shapes(), torch.float32), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        load(tmp_path)


# The document.


def test_docs(tmp_path, monkeypatch):
    """Runs all code blocks of docs/weights.md, in a folder with the files that they name."""
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    HF_MODELS["CLIPModel"](hidden_size=128, num_attention_heads=2).save_pretrained("clip-vit-base-patch32")
    torch.save(
        {"state_dict": random_state(open_clip_shapes() | LIFT_HEAD | {"logit_scale": ()}, torch.float32)}, "lift.pt"
    )
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3
    hf = names["CLIPVisionModelWithProjection"].from_pretrained("clip-vit-base-patch32").eval()
    pixels = torch.randn(2, 3, 24, 24)
    same(names["clip"].visual(pixels), hf.vision_model(pixels).pooler_output, 1e-5)
    same_bits(names["theirs"].state_dict(), hf.state_dict())
    same_bits(load_file("lift-back.safetensors"), read("lift.pt"))
    same(
        names["model"].encode_image(pixels[..., :12, :12]),
        names["lift"].head(names["lift"].visual(pixels[..., :12, :12])),
        0,
    )

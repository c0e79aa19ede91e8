"""Target open_clip: a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`, or for hf-hub.

A Clip is open_clip's CLIP with its two transformers. A Lift has a tower of timm with LIFT's head as the adapter's MLP
(nn/weights/whole_open_clip.py). open_clip knows such a tower by a name of timm's; where timm has none for the sizes,
timm reads them from the folder's config.json, whose place open_clip_config.json then says; see `place`.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from .. import foreign
from ..inference import Model
from ..nn import Clip, Lift, VitConfig
from ..nn.weights import whole_open_clip
from . import timm
from .open_clip_text import Text, encoder_of, text_of

_CONFIG = "open_clip_config.json"
# timm's names of towers like ours: class token, norm before the blocks, epsilon 1e-5, gelu, MLPs of four times the
# width. (width, layers, heads) -> name, and the patch and image sizes that there are.
_NAMES = {
    (256, 10, 4): ("vit_xsmall", {(16, 224)}),
    (512, 12, 8): ("vit_medium", {(16, 224), (32, 224)}),
    (640, 12, 10): ("vit_betwixt", {(32, 224)}),
    (768, 12, 12): ("vit_base", {(16, 224), (16, 384), (32, 224), (32, 256), (32, 384), (32, 448)}),
    (1024, 24, 16): ("vit_large", {(14, 224), (14, 336)}),
    (1280, 32, 16): ("vit_huge", {(14, 224), (14, 336), (14, 378)}),
}

_TEXT = """\
    tokens = open_clip.get_tokenizer("local-dir:FOLDER")(["a dog", "a cat"])
    text = model.encode_text(tokens, normalize=True)
"""
_NO_TEXT = """
import lift_fast  # open_clip's text tower in the folder is a stand-in

text = lift_fast.load("FOLDER", device="cpu").encode_text(["a dog", "a cat"])
"""


def write(model: Model, out: Path) -> list[str]:
    """Writes open_clip_config.json and open_clip_model.safetensors; for a tower that timm has no name for, or a text
    encoder of transformers, also config.json, and the tokenizer's files. `place` completes open_clip_config.json.

    Raises ConfigError for a tower that neither open_clip's nor timm's VisionTransformer computes, and EncoderError for
    a text encoder that does not load.
    """
    module = model.module
    assert isinstance(module, Lift | Clip)
    vision, has_name = _vision(module)
    config = {} if has_name else timm.config(model)
    text = None if isinstance(module, Clip) else text_of(model, out)
    [(name, tensors)] = whole_open_clip.save(module, text.state if text else None).items()
    (out / name).write_bytes(save(tensors, {"format": "pt"}))
    if config or text:
        # One file for both: timm and transformers look for this name, and each finds its own keys in it.
        content = (text.config if text else {}) | config
        (out / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    shown = model.preprocess
    about = {
        "model_cfg": {
            "embed_dim": _dim(module),
            "quick_gelu": isinstance(module, Clip) and module.text.config.activation == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": _text(module, text),
        },
        "preprocess_cfg": {
            "size": shown.image_size,
            "mode": "RGB",
            "mean": list(shown.mean),
            "std": list(shown.std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
    }
    (out / _CONFIG).write_text(json.dumps(about, indent=1), encoding="utf-8")
    return _remarks(model, has_name, text)


def place(folder: Path, address: str) -> None:
    """Says in open_clip_config.json where the folder is, if it has to say it: "local-dir:PATH", or "hf-hub:OWNER/NAME".

    open_clip hands these names on to timm and transformers as they are, and finds nothing relative to its own file.
    """
    about = foreign.read_json(folder / _CONFIG)
    vision, text = (about["model_cfg"][key] for key in ("vision_cfg", "text_cfg"))
    if ":" in vision.get("timm_model_name", ""):
        vision["timm_model_name"] = address
    if "hf_model_name" in text:
        text |= dict.fromkeys(("hf_model_name", "hf_tokenizer_name"), address.partition(":")[2])
    (folder / _CONFIG).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _dim(module: Lift | Clip) -> int:
    return module.head.fc_2.out_features if isinstance(module, Lift) else module.visual_projection.out_features


def _vision(module: Lift | Clip) -> tuple[dict[str, Any], bool]:
    """vision_cfg, and whether open_clip or timm knows the tower's sizes without a config.json."""
    vit = module.visual.config
    if whole_open_clip.is_native(module):
        return {
            "image_size": vit.image_size,
            "patch_size": vit.patch_size,
            "width": vit.width,
            "layers": vit.layers,
            "head_width": vit.width // vit.heads,
            "mlp_ratio": timm.mlp_ratio(vit.hidden, vit.width),
            "no_ln_pre": not vit.pre_norm,
            "pool_type": "avg" if vit.pool == "avg" else "tok",
            "final_ln_after_pool": vit.norm_after_pool,
            "act_kwargs": _act_kwargs(vit.activation),
            "norm_kwargs": {"eps": vit.norm_eps},
        }, True
    name = timm_name(vit)
    return {
        "image_size": vit.image_size,
        "timm_model_name": name or "local-dir:",
        "timm_model_pretrained": False,
        "timm_pool": "avg" if vit.pool == "avg" else "token",
        "timm_proj": "mlp" if isinstance(module, Lift) else "linear",
        "timm_proj_bias": isinstance(module, Lift),
    }, name is not None


def timm_name(vit: VitConfig) -> str | None:
    """The name of timm's model that computes a tower, None if there is none."""
    name, sizes = _NAMES.get((vit.width, vit.layers, vit.heads), ("", set()))
    usual = vit.class_token and not vit.patch_bias and vit.pre_norm and vit.hidden == 4 * vit.width
    usual = usual and vit.norm_eps == 1e-5 and vit.activation == "gelu"
    usual = usual and (vit.pool == "cls" or not vit.norm_after_pool)
    if not usual or (vit.patch_size, vit.image_size) not in sizes:
        return None
    return f"{name}_patch{vit.patch_size}_clip_{vit.image_size}"


def _text(module: Lift | Clip, text: Text | None) -> dict[str, Any]:
    """text_cfg."""
    if isinstance(module, Clip):
        own = module.text.config
        return {
            "context_length": own.context,
            "vocab_size": own.vocab_size,
            "width": own.width,
            "heads": own.heads,
            "layers": own.layers,
            "act_kwargs": _act_kwargs(own.activation),
        }
    if text is None:
        return dict(whole_open_clip.STAND_IN)
    return {"hf_model_name": "", "hf_tokenizer_name": "", **text.text_cfg}


def _act_kwargs(activation: str) -> dict[str, str] | None:
    """Of torch's GELU."""
    return {"approximate": "tanh"} if activation == "gelu_tanh" else None


def _remarks(model: Model, has_name: bool, text: Text | None) -> list[str]:
    module, shown = model.module, model.preprocess
    remarks = []
    if isinstance(module, Lift):
        remarks.append(
            "LIFT's head is open_clip's MLP of twice the hidden width, filled up with zeros, which is exact and stays "
            "so in training"
        )
        if text:
            remarks.append(
                "the text encoder and its tokenizer are in the folder, under their own licence, so that open_clip's "
                "encode_text returns the vectors that the model was trained against; open_clip cleans texts before "
                "(HTML entities, broken Unicode, runs of whitespace)"
            )
        else:
            why, other = "", ", or from the encoder's own project"
            if model.conditioning is not None:
                why, other = ", as open_clip cannot subtract the mean of conditioned vectors", ""
            remarks.append(
                f"the text encoder is not in the folder{why}: open_clip's encode_text runs a stand-in that returns "
                f"NaN. Take the texts' features from lift_fast.load(FOLDER).encode_text{other}"
            )
    if text or not has_name:
        remarks.append(
            "the address of the folder is in open_clip_config.json, as "
            + " and ".join(["timm_model_name"] * (not has_name) + ["hf_model_name"] * bool(text))
            + ", because the loaders that open_clip hands it to find nothing without it: change it there when the "
            "folder moves; lift-fast export --push writes the name on the hub"
        )
    if shown.resize_size != shown.image_size:
        remarks.append(
            f"open_clip's transform resizes the shorter side of an image to {shown.image_size}, this model's to "
            f"{shown.resize_size}, before the centre is cropped: to have that, resize images yourself"
        )
    return remarks


def use(model: Model) -> str:
    """The lines that load the folder with open_clip."""
    has_text = isinstance(model.module, Clip) or encoder_of(model) is not None
    return (
        """\
import open_clip, torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("a.jpg").convert("RGB"))[None], normalize=True)
"""
        + (_TEXT if has_text else _NO_TEXT)
        + """\
probabilities = (model.logit_scale.exp() * image @ text.T).softmax(dim=-1)
"""
    )

"""The models of other projects: LIFT's authors', CLIPs of open_clip and Hugging Face, and image towers alone."""

import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import foreign, run_folder
from ..errors import ConfigError
from ..nn import Clip, Lift, Vit, preset
from ..nn.config import CLIP_VOCAB_SIZE, TextConfig
from ..nn.models import INITIAL_LOGIT_SCALE
from ..nn.weights import Loaded, load
from ..nn.weights import read as read_state
from ..nn.weights.layouts import OPENAI, open_clip_text_key
from ..text.repository import TEXT_TOWERS
from ..text.spec import EncoderSpec
from .preprocessing import Preprocessing

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, and most that followed it
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Fields of open_clip's CLIPTextCfg: sizes, those without effect on our text tower's features, and values that it has.
_SIZES = {"context_length", "vocab_size", "width", "heads", "layers"}
_WITHOUT_EFFECT = {"eos_id", "pad_id", "output_tokens", "final_ln_after_pool", "block_type", "hf_proj_type"}
_WITHOUT_EFFECT |= {"hf_pooler_type", "hf_model_pretrained"}
_VALUES = {"mlp_ratio": 4.0, "pool_type": "argmax", "proj_type": "linear"}


class ImageTower(nn.Module):
    """An image tower and its projection into a joint space [dim, width]; None: its own features."""

    def __init__(self, visual: Vit, projection: Tensor | None, logit_scale: Tensor):
        super().__init__()
        self.visual = visual
        self.projection = None if projection is None else nn.Parameter(projection)
        self.logit_scale = nn.Parameter(logit_scale)  # the logarithm of the scale

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [batch, 3, H, W] -> features [batch, dim], not normalised."""
        features = self.visual(pixels)
        return features if self.projection is None else F.linear(features, self.projection)


def read(path: Path) -> tuple[Lift | Clip | ImageTower, dict[str, Any], str]:
    """The model of weights that `nn.weights.load` takes; its description, as in run.json if it is a Lift or a Clip,
    else "encoder", "text_dim" and "rotation" alone; and why its text encoder is not known, "" if it is.

    Raises ConfigError for weights, a configuration or a preprocessing that cannot be read, and for a tower with more
    after it than one projection.
    """
    loaded = load(path)
    if more := [key for key in loaded.left_out if key.startswith("visual.head.")]:
        raise ConfigError(f"{path}: after its image tower comes a head that lift-fast does not compute ({more[0]})")
    pixels = {"preprocessing": _preprocessing(path, loaded).as_dict()}
    if loaded.head is not None:
        lift, run = _lift(loaded)
        return lift, run | pixels, "the weights do not say which it was"
    config = _json(path / "open_clip_config.json").get("model_cfg")
    if config is None and set(loaded.left_out) >= OPENAI:
        config = {"quick_gelu": True}
    if config is not None and loaded.projection is not None and loaded.logit_scale is not None:
        why = _not_our_text(config)
        if not why:
            clip, run = _clip(path, loaded, config)
            return clip, run | pixels, ""
    else:
        why = "a file has weights alone; name its folder" if path.is_file() else "the folder has an image tower alone"
    scale = torch.tensor(INITIAL_LOGIT_SCALE) if loaded.logit_scale is None else loaded.logit_scale
    tower = ImageTower(loaded.visual, loaded.projection, scale)
    dim = loaded.visual.config.width if loaded.projection is None else len(loaded.projection)
    run = {"encoder": _hugging_face_text(path), "text_dim": dim, "rotation": None}
    return tower, run | pixels, why


def _lift(loaded: Loaded) -> tuple[Lift, dict[str, Any]]:
    """LIFT, with a projection before its head multiplied into the head's first matrix."""
    head = loaded.head
    assert head is not None
    run = {"model": "lift", "preset": "vit-b16", "vit": _vit(loaded.visual), "text_dim": head.fc_2.out_features}
    state = {f"visual.{name}": tensor for name, tensor in loaded.visual.state_dict().items()}
    state |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    if loaded.projection is not None:
        state["head.fc_1.weight"] = state["head.fc_1.weight"] @ loaded.projection
    scale = loaded.logit_scale
    state["logit_scale"] = torch.tensor(INITIAL_LOGIT_SCALE) if scale is None else scale
    with torch.device("meta"):
        model = run_folder.build(run)
    model.load_state_dict(state, assign=True)
    assert isinstance(model, Lift)
    return model, run | {"encoder": None, "rotation": None}


def _clip(path: Path, loaded: Loaded, config: dict[str, Any]) -> tuple[Clip, dict[str, Any]]:
    """A CLIP of open_clip whose text tower is ours. Sizes are read from the shapes, the number of heads from the
    config; without "text_cfg", as in OpenAI's archives, a head has 64 channels.

    Raises ConfigError when the weights are not those of such a text tower.
    """
    assert loaded.projection is not None and loaded.logit_scale is not None
    state = {key: tensor.float() for key, tensor in read_state(path).items()}
    prefix = "text." if "text.token_embedding.weight" in state else ""
    blocks = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    try:
        width = len(state[f"{prefix}ln_final.weight"])
        text = {"width": width, "layers": len({match[1] for match in map(blocks.match, state) if match})}
        heads = config["text_cfg"].get("heads", TextConfig().heads) if "text_cfg" in config else width // 64
        if type(heads) is not int or heads < 1:
            raise ValueError(f"{heads!r} heads")
        text["heads"] = heads
        text["vocab_size"] = len(state[f"{prefix}token_embedding.weight"])
        run: dict[str, Any] = {"model": "clip", "preset": "vit-b16", "vit": _vit(loaded.visual)}
        run["text"] = text | {"activation": "quick_gelu" if config.get("quick_gelu") else "gelu"}
        run |= {"embed_dim": len(loaded.projection), "context": len(state[f"{prefix}positional_embedding"])}
        with torch.device("meta"):
            model = run_folder.build(run)
        assert isinstance(model, Clip)
        ours = {f"text.{name}": state[prefix + open_clip_text_key(name)] for name in model.text.state_dict()}
        ours["text_projection.weight"] = state[f"{prefix}text_projection"].T.contiguous()
        ours |= {f"visual.{name}": tensor for name, tensor in loaded.visual.state_dict().items()}
        ours |= {"visual_projection.weight": loaded.projection, "logit_scale": loaded.logit_scale}
        model.load_state_dict(ours, assign=True)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path}: the text tower is not the one of its open_clip_config.json ({error!r})") from error
    return model, run


def _not_our_text(config: dict[str, Any]) -> str:
    """What of the text tower of an open_clip model lift-fast does not compute; "" for one like ours."""
    text = config.get("text_cfg", {})
    if not isinstance(text, dict):
        return f"text_cfg is {text!r:.60}"
    other = [
        f"{name} {value!r}"
        for name, value in text.items()
        if name not in _SIZES | _WITHOUT_EFFECT and value not in (None, False, _VALUES.get(name))
    ]
    if text.get("vocab_size", CLIP_VOCAB_SIZE) != CLIP_VOCAB_SIZE:
        other.append(f"vocab_size {text['vocab_size']}")
    if config.get("multimodal_cfg"):
        other.append("multimodal_cfg")
    return f"lift-fast does not compute this model's text tower ({', '.join(other)})" if other else ""


def _hugging_face_text(path: Path) -> dict[str, Any] | None:
    """The text encoder of a folder of Hugging Face's CLIPModel and its kin: the folder itself. None for others."""
    config = _json(path / "config.json")
    if config.get("model_type") not in TEXT_TOWERS:
        return None
    length = (config.get("text_config") or {}).get("max_position_embeddings", 77)  # CLIPTextConfig's default
    return EncoderSpec(str(path), "own", max_length=length).as_dict()


def _vit(visual: Vit) -> dict[str, Any]:
    """The fields of VitConfig that differ from the preset's, vit-b16."""
    usual = asdict(preset("vit-b16").vit)
    return {name: value for name, value in asdict(visual.config).items() if value != usual[name]}


def _preprocessing(path: Path, loaded: Loaded) -> Preprocessing:
    """What the model expects of its images, from the files in its folder, else as its project does by default.

    Warns of what is not computed, or not known. Raises ConfigError for a damaged file.
    """
    size = loaded.visual.config.image_size
    for name, part, understood in (
        ("open_clip_config.json", "preprocess_cfg", _of_open_clip),
        ("preprocessor_config.json", None, _of_hugging_face),
        ("processor_config.json", "image_processor", _of_hugging_face),
        ("config.json", "pretrained_cfg", _of_timm),
    ):
        settings = _json(path / name)
        settings = settings.get(part, {}) if part else settings
        if not settings:
            continue
        try:
            resize, mean, std, otherwise = understood(settings, size)
            found = Preprocessing(size, resize, _three(mean), _three(std))
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, ConfigError) as error:
            raise ConfigError(f"{path / name}: not the preprocessing of a model's images ({error!r})") from error
        if otherwise:
            warnings.warn(
                f"{path / name} says {', '.join(otherwise)}; lift-fast resizes the shorter side bicubically and crops "
                "the centre, so that features differ a little from that project's",
                stacklevel=2,
            )
        return found
    if loaded.layout == "lift":  # of LIFT's authors: the shorter side to 256, then 224
        return Preprocessing(size, round(size * 256 / 224))
    if loaded.layout in ("open_clip", "hf_clip"):
        return Preprocessing(size, size, OPENAI_MEAN, OPENAI_STD)
    if loaded.layout != "lift_fast":
        warnings.warn(
            f"{path} does not say how its images are normalised; ImageNet's mean and standard deviation are taken",
            stacklevel=2,
        )
    return Preprocessing(size, size)


# Each: (size that the shorter side is resized to, mean, std, what else the settings say that is not computed).


def _of_open_clip(settings: dict[str, Any], size: int) -> tuple[int, Any, Any, list[str]]:
    usual = {"interpolation": "bicubic", "resize_mode": "shortest"}
    other = [f"{name} {settings[name]}" for name in usual if settings.get(name) not in (None, usual[name])]
    return size, settings.get("mean", OPENAI_MEAN), settings.get("std", OPENAI_STD), other


def _of_hugging_face(settings: dict[str, Any], size: int) -> tuple[int, Any, Any, list[str]]:
    edge, crop = settings.get("size") or size, settings.get("crop_size") or size
    crop = crop["height"] if isinstance(crop, dict) else crop
    other = [] if settings.get("resample") in (None, 3) else [f"resample {settings['resample']}"]
    if isinstance(edge, dict) and "shortest_edge" not in edge:
        other.append(f"size {edge}")
        edge = size
    edge = edge["shortest_edge"] if isinstance(edge, dict) else edge
    # For another size of images the crop takes the same part.
    return round(edge * size / crop), settings["image_mean"], settings["image_std"], other


def _of_timm(settings: dict[str, Any], size: int) -> tuple[int, Any, Any, list[str]]:
    other = [] if settings.get("interpolation") in (None, "bicubic") else [f"interpolation {settings['interpolation']}"]
    other += [] if settings.get("crop_mode") in (None, "center") else [f"crop_mode {settings['crop_mode']}"]
    return int(size / settings.get("crop_pct", 0.875)), settings["mean"], settings["std"], other


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file. Raises ConfigError for a damaged one."""
    if not file.is_file():
        return {}
    try:
        content = foreign.read_json(file)
        foreign.check(content, dict[str, Any])
        return content
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is damaged ({error}); copy it again") from error

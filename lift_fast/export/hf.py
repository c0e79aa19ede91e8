"""Target hf: a folder that transformers' from_pretrained loads.

    LIFT, or CLIP that averages   CLIPVisionModel or ViTModel; what it does not compute in lift_head.safetensors;
                                  CLIP's text tower in text/, as a CLIPTextModelWithProjection with its tokenizer
    CLIP of the class token       CLIPModel with its tokenizer

A CLIPVisionModel is the vision tower that LLaVA takes (docs/llava.md).
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..inference import Model, Preprocessing
from ..nn import Clip, Lift, TextConfig, Vit, VitConfig
from ..nn.weights import whole_hf
from ..text.tokenizer import ClipTokenizer

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}  # ours -> hidden_act
PREPROCESSING = (
    "the image processor resizes, crops and normalises as lift-fast does, but a resized pixel may differ by two levels "
    "of 255, the crop of an odd margin begins up to a pixel earlier, the orientation in EXIF is not applied, and "
    "transparent pixels do not become white"
)
TOKENS = (
    "the tokenizer makes CLIP's tokens, but repairs no text first (curly quotes, HTML entities, full-width letters)"
)


def write(model: Model, out: Path) -> list[str]:
    """Writes weights, configuration, preprocessor and, for CLIP, tokenizer.

    Raises ConfigError for a tower that neither CLIPVisionModel nor ViTModel computes.
    """
    module = model.module
    assert isinstance(module, Lift | Clip)
    for name, tensors in whole_hf.save(module).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(save(tensors, {"format": "pt"}))
    write_preprocessor(model.preprocess, out)
    if whole_hf.is_clip_model(module):
        whole_config(module).save_pretrained(out)
        ClipTokenizer(module.text.config.context).save(out)
        return [PREPROCESSING, TOKENS]
    vision_config(module.visual).save_pretrained(out)
    tower, pooled = vision_class(module.visual.config), pooling(module.visual.config)
    what = "LIFT's head" if isinstance(module, Lift) else "the projection of images"
    remarks = [
        PREPROCESSING,
        f"the weights are those of a {tower}, out = tower(pixels); {what} takes {pooled}"
        + ("" if pooled == "out.pooler_output" else ", and not pooler_output")
        + (", where norm is the tower's post_layernorm" if "norm(" in pooled else ""),
        f"lift_head.safetensors holds {what}, and logit_scale, the logarithm of the scale; README.md shows its use",
    ]
    if isinstance(module, Lift):
        return [*remarks, "the text encoder is not in the folder"]
    text_config(module.text.config, module.text_projection.out_features).save_pretrained(out / "text")
    ClipTokenizer(module.text.config.context).save(out / "text")
    return [
        *remarks,
        "the text tower is a CLIPTextModelWithProjection in text/: no CLIPModel has such an image tower",
        TOKENS,
    ]


def use(model: Model) -> str:
    """The lines that compute features with transformers."""
    module = model.module
    assert isinstance(module, Lift | Clip)
    opened = 'image = Image.open("image.jpg").convert("RGB")'
    if whole_hf.is_clip_model(module):
        return f"""\
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

model = CLIPModel.from_pretrained("FOLDER").eval()
processor = CLIPImageProcessor.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=False)
{opened}
pixels = processor(images=image, return_tensors="pt")["pixel_values"]
tokens = tokenizer(["a photo of a dog"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    out = model(pixel_values=pixels, **tokens)
features, text_features = out.image_embeds, out.text_embeds
"""
    config = module.visual.config
    tower, pooled = vision_class(config), pooling(config)
    options = ", add_pooling_layer=False" if tower == "ViTModel" else ""
    lines = ["out = tower(pixels)"]
    if "norm(" in pooled:
        lines.append('norm = getattr(tower, "vision_model", tower).post_layernorm')
    if isinstance(module, Lift):
        lines.append(f"x = {pooled}")
        lines.append('x = F.gelu(F.linear(x, head["head.fc_1.weight"], head["head.fc_1.bias"]))')
        lines.append('x = F.linear(x, head["head.fc_2.weight"], head["head.fc_2.bias"])')
    else:
        lines.append(f'x = F.linear({pooled}, head["visual_projection.weight"])')
    computed = "\n".join(f"    {line}" for line in [*lines, "features = F.normalize(x, dim=-1)"])
    text = ""
    if isinstance(module, Clip):
        text = """\

from transformers import AutoTokenizer, CLIPTextModelWithProjection

text = CLIPTextModelWithProjection.from_pretrained("FOLDER", subfolder="text").eval()
tokenizer = AutoTokenizer.from_pretrained("FOLDER", subfolder="text", trust_remote_code=False)
tokens = tokenizer(["a photo of a dog"], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    text_features = F.normalize(text(**tokens).text_embeds, dim=-1)
"""
    return f"""\
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import CLIPImageProcessor, {tower}

tower = {tower}.from_pretrained("FOLDER"{options}).eval()
processor = CLIPImageProcessor.from_pretrained("FOLDER")
head = load_file("FOLDER/lift_head.safetensors")
{opened}
pixels = processor(images=image, return_tensors="pt")["pixel_values"]
with torch.no_grad():
{computed}
{text}"""


def pooling(config: VitConfig) -> str:
    """What the head takes, as an expression in `out`, what transformers' tower returns, and `norm`, its post_layernorm.

    Raises ConfigError as `whole_hf.layout_of`.
    """
    if whole_hf.layout_of(config) == "hf_vit":  # normalises all tokens
        return "out.last_hidden_state[:, 0]" if config.pool == "cls" else "out.last_hidden_state[:, 1:].mean(dim=1)"
    if config.pool == "cls":
        return "out.pooler_output"
    if config.norm_after_pool:
        return "norm(out.last_hidden_state[:, 1:].mean(dim=1))"
    return "norm(out.last_hidden_state)[:, 1:].mean(dim=1)"


def vision_class(config: VitConfig) -> str:
    """The name of transformers' class of a tower. Raises ConfigError as `whole_hf.layout_of`."""
    return "CLIPVisionModel" if whole_hf.layout_of(config) == "hf_clip" else "ViTModel"


def vision_config(visual: Vit, **options: Any) -> Any:
    """A tower's configuration: a CLIPVisionConfig or ViTConfig. options: other fields of it."""
    from transformers import CLIPVisionConfig, ViTConfig

    config = visual.config
    name = vision_class(config)
    return (CLIPVisionConfig if name == "CLIPVisionModel" else ViTConfig)(
        architectures=[name],
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.width,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        hidden_act=ACTIVATIONS[config.activation],
        layer_norm_eps=config.norm_eps,
        **options,
    )


def text_config(config: TextConfig, projection_dim: int) -> Any:
    """The configuration of CLIP's text tower."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        architectures=["CLIPTextModelWithProjection"],
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        projection_dim=projection_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context,
        hidden_act=ACTIVATIONS[config.activation],
        layer_norm_eps=1e-5,
    )


def whole_config(module: Clip) -> Any:
    """The configuration of a CLIPModel."""
    from transformers import CLIPConfig

    dim = module.visual_projection.out_features
    return CLIPConfig(
        architectures=["CLIPModel"],
        text_config=text_config(module.text.config, dim).to_dict(),
        vision_config=vision_config(module.visual, projection_dim=dim).to_dict(),
        projection_dim=dim,
        logit_scale_init_value=module.logit_scale.item(),
    )


def write_preprocessor(preprocessing: Preprocessing, folder: Path) -> None:
    """Writes preprocessor_config.json, for CLIPImageProcessor and AutoImageProcessor of every version."""
    side = preprocessing.image_size
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.resize_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

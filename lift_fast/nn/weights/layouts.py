"""Other projects' layouts as tables: where each module of our tower lies in their state dicts; what they compute."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Layout = Literal["open_clip", "lift", "timm", "hf_vit", "hf_clip"]


@dataclass(frozen=True)
class Names:
    """One layout's table. Modules stand without ".weight" and ".bias"; to one that ends in "_" these are a suffix."""

    layout: Layout
    prefixes: Mapping[str, str]
    """The tower's prefix in a whole model -> the keys there that are not the tower's (a regular expression, of names
    without ".weight" and the like). The first is what `save` writes by default."""
    outer: Mapping[str, str]
    blocks: str
    """What a block's keys begin with; {n}: its number."""
    inner: Mapping[str, tuple[str, ...]]
    """A block's modules, relative to `blocks`; several: their rows one below the other."""
    fixed: Mapping[str, Any]
    """What VitConfig must say for the other project's model to compute the same."""
    defaults: Mapping[str, Any]
    """What its models usually are, where the state dict does not say."""
    leading: Mapping[str, int] = field(default_factory=dict)
    """Leading dimensions of size one that a parameter has there and not here."""
    bare_positions: bool = False
    """Whether positions may be the patches' alone although there is a class token."""
    projection: str | None = None
    """The joint space's matrix; {prefix}: the tower's."""
    transposed: bool = False
    """Whether the projection is [width, dim], not a linear layer's [dim, width]."""
    head: Mapping[str, str] = field(default_factory=dict)
    logit_scale: str | None = None

    def keys(self, name: str) -> tuple[str, ...]:
        """Where one of our parameters lies, relative to the prefix."""
        found = re.fullmatch(r"(?:transformer\.blocks\.(\d+)\.)?(\w+?)(?:\.(weight|bias))?", name)
        assert found, name
        number, module, leaf = found.groups()
        stems = (
            [self.outer[module]] if number is None else [self.blocks.format(n=number) + s for s in self.inner[module]]
        )
        return tuple(stem + (leaf if stem[-1] == "_" else f".{leaf}") if leaf else stem for stem in stems)

    def projection_key(self, prefix: str) -> str | None:
        return self.projection and self.projection.format(prefix=prefix)

    def head_keys(self) -> dict[str, str]:
        """Ours -> theirs, of the head's parameters."""
        leaves = ("weight", "bias")
        return {f"{module}.{leaf}": f"{stem}.{leaf}" for module, stem in self.head.items() for leaf in leaves}

    def is_other(self, prefix: str, key: str) -> bool:
        """Whether a key of a whole model is another part's than the tower's."""
        return re.fullmatch(rf"(?:{self.prefixes[prefix]})(?:\..*)?", key) is not None

    def marks(self) -> list[str]:
        """Keys by which the table is recognised, relative to the prefix. The first must be there."""
        said = {"patch_bias": "patch_embed.bias", "pre_norm": "ln_pre.weight"}
        names = ["patch_embed.weight", *(name for key, name in said.items() if self.fixed.get(key))]
        names += ["ln_post.weight", "transformer.blocks.0.ln_1.weight", "transformer.blocks.0.qkv.weight"]
        return [key for name in names for key in self.keys(name)]


_TEXT = "text|text_decoder|transformer|token_embedding|positional_embedding|ln_final|text_projection|cls_emb|attn_mask"
_TEXT += "|logit_bias|input_resolution|context_length|vocab_size"  # the last three: OpenAI's archives

_OPEN_CLIP = Names(
    layout="open_clip",
    prefixes={"visual.": _TEXT, "": ""},
    outer={
        "patch_embed": "conv1",
        "class_embedding": "class_embedding",
        "positional_embedding": "positional_embedding",
        "ln_pre": "ln_pre",
        "ln_post": "ln_post",
    },
    blocks="transformer.resblocks.{n}.",
    inner={
        "ln_1": ("ln_1",),
        "qkv": ("attn.in_proj_",),
        "proj": ("attn.out_proj",),
        "ln_2": ("ln_2",),
        "fc_1": ("mlp.c_fc",),
        "fc_2": ("mlp.c_proj",),
    },
    fixed={"class_token": True, "patch_bias": False, "pre_norm": True},
    defaults={"norm_eps": 1e-5, "activation": "gelu", "pool": "cls"},
    projection="{prefix}proj",
    transposed=True,
    logit_scale="logit_scale",
)

# Of open_clip's models only CLIPA's are without ln_pre, and they average before the last norm.
_OPEN_CLIP_WITHOUT_PRE = replace(
    _OPEN_CLIP,
    fixed={"class_token": True, "patch_bias": False, "pre_norm": False},
    defaults={"norm_eps": 1e-5, "activation": "gelu", "pool": "avg", "norm_after_pool": True},
)

_LIFT = replace(
    _OPEN_CLIP,
    layout="lift",
    prefixes={"visual.": "logit_bias"},
    fixed={"class_token": True, "patch_bias": False},
    defaults={"norm_eps": 1e-5, "activation": "gelu", "pool": "avg"},
    head={"fc_1": "mlp_projector.projector.0", "fc_2": "mlp_projector.projector.2"},
)

_TIMM_OUTER = {
    "patch_embed": "patch_embed.proj",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre": "norm_pre",
}

# timm's VisionTransformer has a bias for the patches or a norm before the blocks (its CLIP towers, whose epsilon is
# 1e-5), and its last norm bears another name after the pooling than before it.
_TIMM = [
    Names(
        layout="timm",
        prefixes={"": "head|pre_logits", "visual.trunk.": _TEXT + r"|logit_scale|visual\.head"},
        outer={**_TIMM_OUTER, "ln_post": "fc_norm" if norm_after_pool else "norm"},
        blocks="blocks.{n}.",
        inner={
            "ln_1": ("norm1",),
            "qkv": ("attn.qkv",),
            "proj": ("attn.proj",),
            "ln_2": ("norm2",),
            "fc_1": ("mlp.fc1",),
            "fc_2": ("mlp.fc2",),
        },
        fixed={"pre_norm": pre_norm, "patch_bias": not pre_norm, "norm_after_pool": norm_after_pool},
        defaults={"norm_eps": 1e-5 if pre_norm else 1e-6, "activation": "gelu"}
        | ({"pool": "avg"} if norm_after_pool else {}),
        leading={"class_embedding": 2, "positional_embedding": 1},
        bare_positions=True,
    )
    for norm_after_pool in (False, True)
    for pre_norm in (False, True)
]

# The names that files have, from any transformers, and the models of transformers 4.
_HF_VIT = Names(
    layout="hf_vit",
    prefixes={
        "": r"pooler|embeddings\.mask_token",
        "vit.": r"classifier|decoder|vit\.pooler|vit\.embeddings\.mask_token",
    },
    outer={
        "patch_embed": "embeddings.patch_embeddings.projection",
        "class_embedding": "embeddings.cls_token",
        "positional_embedding": "embeddings.position_embeddings",
        "ln_post": "layernorm",
    },
    blocks="encoder.layer.{n}.",
    inner={
        "ln_1": ("layernorm_before",),
        "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        "proj": ("attention.output.dense",),
        "ln_2": ("layernorm_after",),
        "fc_1": ("intermediate.dense",),
        "fc_2": ("output.dense",),
    },
    fixed={"class_token": True, "patch_bias": True, "pre_norm": False, "pool": "cls"},
    defaults={"norm_eps": 1e-12, "activation": "gelu"},
    leading={"class_embedding": 2, "positional_embedding": 1},
)

# The names in memory since transformers 5; its save_pretrained writes those above.
_HF_VIT_5 = replace(
    _HF_VIT,
    blocks="layers.{n}.",
    inner={
        "ln_1": ("layernorm_before",),
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "proj": ("attention.o_proj",),
        "ln_2": ("layernorm_after",),
        "fc_1": ("mlp.fc1",),
        "fc_2": ("mlp.fc2",),
    },
)

_HF_CLIP = Names(
    layout="hf_clip",
    prefixes={
        # position_ids: a buffer until transformers 4.30.
        "vision_model.": r"text_model|text_projection|classifier|vision_model\.embeddings\.position_ids",
        "": r"embeddings\.position_ids",  # CLIPVisionModel since transformers 5
    },
    outer={
        "patch_embed": "embeddings.patch_embedding",
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_pre": "pre_layrnorm",  # sic
        "ln_post": "post_layernorm",
    },
    blocks="encoder.layers.{n}.",
    inner={
        "ln_1": ("layer_norm1",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "proj": ("self_attn.out_proj",),
        "ln_2": ("layer_norm2",),
        "fc_1": ("mlp.fc1",),
        "fc_2": ("mlp.fc2",),
    },
    fixed={"class_token": True, "patch_bias": False, "pre_norm": True, "pool": "cls"},
    defaults={"norm_eps": 1e-5, "activation": "quick_gelu"},
    projection="visual_projection.weight",
    logit_scale="logit_scale",
)

# Where marks speak for several equally, the first.
TABLES = (_OPEN_CLIP_WITHOUT_PRE, _OPEN_CLIP, _LIFT, *_TIMM, _HF_VIT, _HF_VIT_5, _HF_CLIP)

# What our tower does not compute, by the keys that show it.
REFUSED = {
    r"\.ls_?[12]\.gamma$|\.gamma_[12]$|layer_scale|\.lambda_?1$": "layer scale",
    r"\.[qk]_norm\.|\.ln_[qk]\.": "normalised queries and keys",
    r"(^|\.)attn_pool|(^|\.)head\.(probe|attention)": "attention pooling",
    r"reg_token|register_token": "register tokens",
    r"dist_token|distillation_token|head_dist": "a distillation token",
    r"rope|rotary|freqs": "rotary positions",
    r"\.mlp\.(w1|w2|w3|w12|fc1_g|fc1_x|gate_proj|up_proj|weights_in)\.": "SwiGLU",
    r"relative_position": "relative positions",
    r"\.(ln_attn|ln_inner|attn\.norm|mlp\.norm|mlp\.ln)\.": "norms inside its attention or MLP",
    r"\.attn\.(logit_scale|head_scale)$": "scaled heads or cosines in its attention",
}

# Published widths whose heads are not 64 wide: ViT-SO400M, H, g, gopt, G and e, by open_clip, timm and Hugging Face.
HEADS = {width: 16 for width in (1152, 1280, 1408, 1536, 1664, 1792)}

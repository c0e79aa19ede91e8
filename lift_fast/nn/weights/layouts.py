"""The layouts of other projects, and of our own runs, as tables: the keys of our modules, and their conventions.

Tables of related layouts repeat entries on purpose, so that each can be read on its own against its project's keys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Layout = Literal["open_clip", "lift", "timm", "hf_vit", "hf_clip", "lift_fast"]


@dataclass(frozen=True)
class LayoutTable:
    """The keys and conventions of one layout.

    Keys of modules are given without ".weight" and ".bias"; to a key that ends in "_" "weight" or "bias" is appended.
    """

    layout: Layout
    prefixes: Mapping[str, str]
    """A prefix that the tower's keys may have -> a regular expression for the keys of the model's other parts (without
    ".weight" and the like). `save` writes the first prefix by default."""
    outer: Mapping[str, str]
    """Our module or parameter outside the blocks -> its key, relative to the prefix."""
    blocks: str
    """The start of a block's keys, relative to the prefix; {n} stands for its number."""
    inner: Mapping[str, tuple[str, ...]]
    """Our module in a block -> its key, relative to `blocks`; several keys: their tensors are concatenated by rows."""
    fixed: Mapping[str, Any]
    """Values that these fields of VitConfig must have for our tower to compute what the layout's models compute."""
    defaults: Mapping[str, Any]
    """Usual values of fields of VitConfig that the state dict does not show."""
    other_activation: str | None = None
    """An activation that many published weights have in place of the default one."""
    head_activation: bool = False
    """Whether the head computes the tower's activation, and not always gelu."""
    leading_ones: Mapping[str, int] = field(default_factory=dict)
    """Our parameter -> the number of leading dimensions of size 1 that only the layout's tensor has."""
    patches_only: bool = False
    """Whether the positions may have none for the class token of a tower that has one."""
    projection: str | None = None
    """Key of the matrix into the joint space; {prefix} stands for the tower's prefix."""
    transposed: bool = False
    """Whether the projection is [width, dim], and not [dim, width] as in a linear layer."""
    head: Mapping[str, str] = field(default_factory=dict)
    """Module of our Head -> its key."""
    logit_scale: str | None = None
    """Key of the logit scale."""

    def keys(self, name: str) -> tuple[str, ...]:
        """The keys of one of our parameters, relative to the prefix."""
        found = re.fullmatch(r"(?:transformer\.blocks\.(\d+)\.)?(\w+?)(?:\.(weight|bias))?", name)
        assert found, name
        number, module, leaf = found.groups()
        stems = (
            [self.outer[module]] if number is None else [self.blocks.format(n=number) + s for s in self.inner[module]]
        )
        return tuple(stem + (leaf if stem[-1] == "_" else f".{leaf}") if leaf else stem for stem in stems)

    def projection_key(self, prefix: str) -> str | None:
        """The key of the projection for a prefix, None if the layout has no projection."""
        return self.projection and self.projection.format(prefix=prefix)

    def head_keys(self) -> dict[str, str]:
        """Parameter of our Head -> its key."""
        leaves = ("weight", "bias")
        return {f"{module}.{leaf}": f"{stem}.{leaf}" for module, stem in self.head.items() for leaf in leaves}

    def is_other_part(self, prefix: str, key: str) -> bool:
        """Whether a key of a model's state dict belongs to another part than the tower with this prefix."""
        return re.fullmatch(rf"(?:{self.prefixes[prefix]})(?:\..*)?", key) is not None

    def marks(self) -> list[str]:
        """Keys by which the layout is recognised, relative to the prefix. The first one is required."""
        optional = {"patch_bias": "patch_embed.bias", "pre_norm": "ln_pre.weight"}
        names = ["patch_embed.weight", *(name for key, name in optional.items() if self.fixed.get(key))]
        names += ["ln_post.weight", "transformer.blocks.0.ln_1.weight", "transformer.blocks.0.qkv.weight"]
        return [key for name in names for key in self.keys(name)]


_TEXT = "text|text_decoder|transformer|token_embedding|positional_embedding|ln_final|text_projection|cls_emb|attn_mask"
_TEXT += "|logit_bias|input_resolution|context_length|vocab_size"  # the last three: OPENAI

_OPEN_CLIP = LayoutTable(
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
    other_activation="quick_gelu",
    projection="{prefix}proj",
    transposed=True,
    logit_scale="logit_scale",
)


def open_clip_text_key(name: str) -> str:
    """The key, in open_clip's CLIP, of a parameter of our text tower: the blocks have the keys of the image tower's."""
    return _OPEN_CLIP.keys(name)[0] if name.startswith("transformer.") else name


# Of open_clip's models only CLIPA's have no ln_pre; they average before the last norm.
_OPEN_CLIP_WITHOUT_PRE = replace(
    _OPEN_CLIP,
    fixed={"class_token": True, "patch_bias": False, "pre_norm": False},
    defaults={"norm_eps": 1e-5, "activation": "gelu", "pool": "avg", "norm_after_pool": True},
    other_activation=None,
)

_LIFT = replace(
    _OPEN_CLIP,
    layout="lift",
    prefixes={"visual.": "logit_bias"},
    fixed={"class_token": True, "patch_bias": False},
    defaults={"norm_eps": 1e-5, "activation": "gelu", "pool": "avg"},
    other_activation=None,
    head_activation=True,
    head={"fc_1": "mlp_projector.projector.0", "fc_2": "mlp_projector.projector.2"},
)

_TIMM_OUTER = {
    "patch_embed": "patch_embed.proj",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre": "norm_pre",
}

# timm's VisionTransformer has either a bias in the patch embedding, or a norm before the blocks (its CLIP towers, whose
# epsilon is 1e-5). Its last norm is called fc_norm when it comes after pooling, else norm.
_TIMM = [
    LayoutTable(
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
        leading_ones={"class_embedding": 2, "positional_embedding": 1},
        patches_only=True,
    )
    for norm_after_pool in (False, True)
    for pre_norm in (False, True)
]

# The keys in files of any version of transformers, and in memory with transformers 4.
_HF_VIT = LayoutTable(
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
    leading_ones={"class_embedding": 2, "positional_embedding": 1},
)

# The keys in memory since transformers 5, whose save_pretrained still writes those above.
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

_HF_CLIP = LayoutTable(
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
    other_activation="gelu",
    projection="visual_projection.weight",
    logit_scale="logit_scale",
)

# Our own modules: the weights of a run, or of a Vit alone.
_LIFT_FAST = LayoutTable(
    layout="lift_fast",
    prefixes={"visual.": "text|text_projection", "": ""},
    outer={name: name for name in ("patch_embed", "class_embedding", "positional_embedding", "ln_pre", "ln_post")},
    blocks="transformer.blocks.{n}.",
    inner={name: (name,) for name in ("ln_1", "qkv", "proj", "ln_2", "fc_1", "fc_2")},
    fixed={},
    defaults={"norm_eps": 1e-5, "activation": "gelu", "pool": "avg"},
    projection="visual_projection.weight",
    head={"fc_1": "head.fc_1", "fc_2": "head.fc_2"},
    logit_scale="logit_scale",
)

# If several tables have the same number of marks among the keys, the first is chosen.
TABLES = (_OPEN_CLIP_WITHOUT_PRE, _OPEN_CLIP, _LIFT, *_TIMM, _HF_VIT, _HF_VIT_5, _HF_CLIP, _LIFT_FAST)

# Numbers in OpenAI's archives alone, whose activation is quick_gelu.
OPENAI = {"input_resolution", "context_length", "vocab_size"}

# Regular expressions for the keys of parts that our tower does not compute.
NOT_COMPUTED = {
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

# Widths of published models whose head_dim is not 64: ViT-SO400M, H, g, gopt, G and e, in open_clip, timm and Hugging
# Face.
HEADS = {width: 16 for width in (1152, 1280, 1408, 1536, 1664, 1792)}

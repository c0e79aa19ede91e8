"""The settings of known text encoders: a table with one row per family, from the models' cards.

To these models a caption is a document or passage, never a query, so most take no prompt. The sources are the cards at
huggingface.co/<owner>/<model> and LIFT's own code, github.com/Jingfeng0705/LIFT, utils/misc.py (`embed` below), which
takes precedence where the two differ:

    nv-embed     nvidia/NV-Embed-v2: `model.encode(passages, instruction="", max_length=…)`; `embed`: the same call.
                 nv_embed.py computes the same vectors, except that a truncated caption keeps its </s>. With
                 trust_remote_code its own code runs, which was written for transformers 4.42 and fails with 5
                 (github.com/embeddings-benchmark/mteb, issues 3287 and 4334).
    sfr, linq    Salesforce/SFR-Embedding-Mistral, Linq-AI-Research/Linq-Embed-Mistral: `last_token_pool`, "no need to
                 add instruction for retrieval documents". `embed`: the same.
    e5-mistral   intfloat/e5-mistral-7b-instruct: as the two above, which were trained from it.
    mistral      mistralai/Mistral-7B-v0.1: a language model whose card has no recipe. `embed`: appends `</s>`, which
                 its tokenizer does not, and takes the state of that token.
    vicuna       lmsys/vicuna-7b-v1.5: the same, with padding on the right, which `embed` relies on.
    qwen3        Qwen/Qwen3-Embedding-0.6B, -4B, -8B: `last_token_pool`, padding_side="left", no instruction for
                 documents. The last token is <|endoftext|> (github.com/QwenLM/Qwen3-Embedding, issues 54 and 122),
                 not the tokenizer's eos_token, <|im_end|>; the first published tokenizers did not append it.
    e5           intfloat/e5-base-v2, intfloat/multilingual-e5-base: `average_pool`, every text starts with "passage: "
                 or "query: ", at most 512 tokens.
    e5-instruct  intfloat/multilingual-e5-large-instruct: `average_pool`, documents without a prompt.
    sbert        sentence-transformers/*: what the repository's files declare; all-MiniLM-L6-v2's card: "longer than
                 256 word pieces is truncated".
    clip         openai/clip-vit-base-patch32, laion/CLIP-ViT-H-14-laion2B-s32B-b79K: the projected text features, of 77
                 tokens at most.
    siglip       google/siglip-base-patch16-224, google/siglip2-base-patch16-224: the text features of 64 tokens,
                 padding included ("padding=max_length since the model was trained with this").

SFR, Linq and E5-Mistral set `add_eos_token` in tokenizer_config.json, which transformers 5 ignores where tokenizer.json
contradicts it (github.com/embeddings-benchmark/mteb, pull request 5237), so their presets have an end_token.
The cards of the language models allow 4 096 to 32 768 tokens; their presets truncate at 323 as LIFT's authors do, which
is the longest caption that they embed (embed_label/configs). `padding` is the card's, or else the tokenizer class's.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .spec import EncoderSpec, Padding, Pooling


@dataclass(frozen=True)
class Preset:
    """names: a regular expression for the model's names in lower case, without the owner (sbert: with the owner).
    The other fields are EncoderSpec's."""

    names: str
    pooling: Pooling
    prompt: str = ""
    end_token: str = ""
    padding: Padding = "right"
    max_length: int = 323


PRESETS = {
    "nv-embed": Preset(r"nv-embed-v[12]", "own", end_token="</s>"),
    "sfr": Preset(r"sfr-embedding-(mistral|2_r)", "last", end_token="</s>", padding="left"),
    "linq": Preset(r"linq-embed-mistral", "last", end_token="</s>", padding="left"),
    "e5-mistral": Preset(r"e5-mistral-7b-instruct", "last", end_token="</s>", padding="left"),
    "mistral": Preset(r"mistral-7b(-instruct)?-v0\.[123]", "last", end_token="</s>", padding="left"),
    "vicuna": Preset(r"vicuna-(7|13)b-v1\.[135](-16k)?", "last", end_token="</s>"),
    "qwen3": Preset(r"qwen3-embedding-(0\.6|4|8)b", "last", end_token="<|endoftext|>", padding="left"),
    "e5": Preset(r"(multilingual-)?e5-(small|base|large)(-v2)?", "mean", prompt="passage: ", max_length=512),
    "e5-instruct": Preset(r"multilingual-e5-large-instruct", "mean", max_length=512),
    "sbert": Preset(r"sentence-transformers/.*", "own", max_length=256),
    "clip": Preset(
        r"clip-vit-(base|large)-patch\d+(-336)?|clip-vit-(b-16|b-32|l-14|h-14|g-14|bigg-14)-(laion2b|datacomp).*",
        "own",
        max_length=77,
    ),
    "siglip": Preset(r"siglip2?-(base|large|so400m|giant-opt)-patch\d+-.*", "own", max_length=64),
}


def preset_of(name: str) -> str | None:
    """The key in PRESETS for a hub name (owner/model) or for a folder with the model's name; None if there is none."""
    whole = name.lower()
    for key, preset in PRESETS.items():
        if re.fullmatch(preset.names, whole) or re.fullmatch(preset.names, Path(whole).name):
            return key
    return None


def spec_for(name: str, *, preset: str | None = None, **overrides: Any) -> EncoderSpec:
    """The spec of the encoder `name`, from its preset, or from EncoderSpec's defaults if it has none.

    preset: a key of PRESETS, for a folder that does not have the model's name. overrides: fields of EncoderSpec, which
    take precedence over the preset's; None leaves a field unchanged.

    Raises ConfigError for an unknown preset and for an invalid value.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    key = preset or preset_of(name)
    fields: dict[str, Any] = {"name": name}
    if key is not None:
        known = PRESETS[key]
        fields |= {
            field: getattr(known, field) for field in ("pooling", "prompt", "end_token", "padding", "max_length")
        }
    fields |= {field: value for field, value in overrides.items() if value is not None}
    return EncoderSpec(**fields)

"""The text encoder of a run of LIFT as open_clip's HFTextEncoder, where that computes it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import foreign
from ..cache import Rotation
from ..errors import EncoderError
from ..inference import Model
from ..nn import Clip
from ..text.encoder import Encoder
from ..text.repository import declared_pooling, locate, read_json
from ..text.spec import EncoderSpec, Pooling

_MODEL_TYPES = ("bert", "roberta", "xlm-roberta")
_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}


@dataclass
class Text:
    """A text tower of open_clip: text_cfg without hf_model_name and hf_tokenizer_name, which are the folder; the
    content of transformers' config.json; and its part of the state dict."""

    text_cfg: dict[str, Any]
    config: dict[str, Any]
    state: dict[str, Tensor]


def encoder_of(model: Model) -> EncoderSpec | None:
    """The encoder of a run of LIFT, if open_clip computes it: BERT or its kin with mean or cls pooling, no prompt.

    HFTextEncoder's projection is linear, without a bias, and takes a vector before it is scaled to unit length: it can
    rotate, but not subtract the mean, as conditioning does.

    None for others, and for one that is not on this machine: nothing is downloaded.
    """
    entry = model.description.get("encoder")
    if isinstance(model.module, Clip) or not entry or model.conditioning is not None:
        return None
    spec = EncoderSpec.of_dict(entry)
    if spec.prompt or spec.end_token or spec.trust_remote_code:
        return None
    try:
        path = locate(spec, download=False)[0]
        pooling: str = declared_pooling(spec, path) if spec.pooling == "own" else spec.pooling
    except EncoderError:
        return None
    config = read_json(Path(path) / "config.json", {})
    fits = config.get("model_type") in _MODEL_TYPES and config.get("hidden_size") == model.description["text_dim"]
    return replace(spec, pooling=cast(Pooling, pooling)) if fits and pooling in _POOLERS else None


def text_of(model: Model, out: Path) -> Text | None:
    """The text tower of a run of LIFT, whose tokenizer is written into `out`; None without `encoder_of`.

    Raises EncoderError when the encoder does not load.
    """
    spec = encoder_of(model)
    if spec is None:
        return None
    encoder = Encoder(spec, dtype=torch.float32, download=False)
    encoder.tokenizer.save_pretrained(str(out))
    encoder.model.config.save_pretrained(str(out))
    state = {
        f"text.transformer.{key}": tensor.contiguous()
        for key, tensor in encoder.model.state_dict().items()
        if not key.startswith("pooler.")  # transformers' own, which these poolings do not use
    }
    rotation = model.description.get("rotation")
    if rotation is not None:
        turned = Rotation.from_dict(rotation, encoder.dim).apply(torch.eye(encoder.dim))
        state["text.proj.weight"] = turned.T.contiguous()
    cfg = {
        "context_length": spec.max_length,
        "hf_pooler_type": _POOLERS[spec.pooling],
        "hf_proj_type": None if rotation is None else "linear",
    }
    return Text(cfg, foreign.read_json(out / "config.json"), state)

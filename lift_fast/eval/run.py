"""Evaluates one trained run on held-out sets: retrieval always, composition and zero-shot where a set has them."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import run_folder
from ..cache import Rotation
from ..data import dali, host
from ..data.open import open_data
from ..data.pixels import normalise
from ..errors import CacheMismatch, ConfigError
from ..nn import Clip, Lift
from ..text.encoder import Encoder
from ..text.spec import EncoderSpec
from ..text.tokenizer import ClipTokenizer
from ..train.loop import gpu_number
from . import composition, retrieval, zero_shot

EncodeText = Callable[[Sequence[str]], Tensor]


def text_side(
    model: Lift | Clip, run: dict[str, Any], device: torch.device, trust_remote_code: bool = False
) -> EncodeText:
    """captions -> unit vectors float32 [captions, dim]: LIFT's fixed encoder, rotated as the text was that it was
    trained on, or CLIP's tower.

    Raises EncoderError; ConfigError when the encoder's code is not trusted; CacheMismatch when the encoder's dim
    is not the head's.
    """
    if isinstance(model, Lift):
        # A run's own word is no permission to run code: it may come from somebody else.
        spec = replace(EncoderSpec(**run["encoder"]), trust_remote_code=trust_remote_code)
        if run["encoder"]["trust_remote_code"] and not trust_remote_code:
            raise ConfigError(f"{spec.name} runs code from its repository; allow it with --trust-remote-code")
        encoder = Encoder(spec, device=device)
        if encoder.dim != run["text_dim"]:
            raise CacheMismatch(
                f"{encoder.spec.name} gives vectors of dim {encoder.dim}, the head of this run {run['text_dim']}"
            )
        if run.get("rotation") is None:
            return lambda captions: encoder.encode(captions).cpu()
        rotation = Rotation.from_dict(run["rotation"], encoder.dim)
        return lambda captions: rotation.apply(encoder.encode(captions)).cpu()
    tokenizer = ClipTokenizer(run["context"])

    def encode(captions: Sequence[str]) -> Tensor:
        parts = [model.encode_text(tokenizer(captions[i : i + 256]).to(device)) for i in range(0, len(captions), 256)]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    return encode


@torch.no_grad()
def evaluate(
    folder: Path,
    sets: dict[str, Path],
    device: torch.device,
    *,
    loader: str = "auto",
    trust_remote_code: bool = False,
    examples: int = 8,
) -> dict[str, Any]:
    """folder: a trained run; sets: name -> a held-out data set; loader: what decodes, as of TrainConfig.

    Returns {"retrieval": {name: …}, "composition": …, "zero_shot": …, "pictures": […]}; composition and
    zero_shot are null when no set has foils or groups. `pictures` holds the first `examples` of each set
    with the caption this model ranks first among the set's captions.
    Raises ConfigError when two sets have foils, or two have groups: a figure belongs to one set.
    """
    held_out = {name: open_data(path) for name, path in sets.items()}
    model, run = run_folder.load(folder, device)
    encode_text = text_side(model, run, device, trust_remote_code)
    result: dict[str, Any] = {
        "retrieval": {},
        "composition": None,
        "zero_shot": None,
        "pictures": [],
        "skipped": {},
    }
    for name, data in held_out.items():
        size = model.visual.config.image_size
        if dali.wanted(loader, device.type == "cuda"):
            pixels, samples = dali.load_pictures(data, size, gpu_number(device))
        else:
            pixels, samples = host.load_pictures(data, size)
        result["skipped"][name] = len(data) - len(samples)
        image = torch.cat([model.encode_image(normalise(part.to(device))).float().cpu() for part in pixels.split(256)])
        image = F.normalize(image, dim=-1)
        captions = [data.caption(sample) for sample in samples]
        text = encode_text(captions)
        result["retrieval"][name] = retrieval.retrieval(image, text)

        best = (image[:examples] @ text.T).argmax(dim=1).tolist()
        for place, first in enumerate(best):
            result["pictures"].append(
                {
                    "set": name,
                    "png_base64": base64.b64encode(data.image_bytes(samples[place])).decode(),
                    "caption": captions[place],
                    "first": captions[first],
                    "right": first == place,
                }
            )

        metas = [data.meta(sample) for sample in samples]
        if all("composition" in meta for meta in metas):
            _once(result, "composition", name)
            sides = composition.pairs(metas)
            # Several tasks share a sample's caption: each text is embedded once.
            texts = list(dict.fromkeys(text for side in sides for task in side.values() for text in task))
            number = {text: i for i, text in enumerate(texts)}
            vectors = encode_text(texts)
            true, false = (
                {task: vectors[[number[text] for text in task_texts]] for task, task_texts in side.items()}
                for side in sides
            )
            result["composition"] = composition.composition(image, true, false)
        groups = sorted({meta["group"] for meta in metas if meta.get("group")})
        if len(groups) > 1:
            _once(result, "zero_shot", name)
            chosen = [place for place, meta in enumerate(metas) if meta.get("group")]
            labels = torch.tensor([groups.index(metas[place]["group"]) for place in chosen])
            templates = [prompt for group in groups for prompt in zero_shot.prompts(group)]
            classes = encode_text(templates).view(len(groups), len(zero_shot.TEMPLATES), -1)
            result["zero_shot"] = zero_shot.zero_shot(image[chosen], classes, labels)
    return result


def _once(result: dict[str, Any], task: str, name: str) -> None:
    if result[task] is not None:
        raise ConfigError(f"{name} is the second set for {task}; evaluate the sets one at a time")

"""Evaluates one trained run on held-out sets: retrieval always, composition and zero-shot where a set has them."""

import base64
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .. import run_folder
from ..data import dali, host
from ..data.open import open_data
from ..data.pixels import normalise
from ..devices import gpu_index
from ..errors import ConfigError
from . import composition, retrieval, zero_shot


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
    encode_text = run_folder.text_encoder(model, run, device, trust_remote_code)
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
            pixels, samples = dali.load_images(data, size, gpu_index(device))
        else:
            pixels, samples = host.load_images(data, size)
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

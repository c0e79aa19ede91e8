"""Figures that the paper publishes (arXiv 2506.04209), to be shown with ours and never as ours.

Its scores belong to what the authors' evaluation code asks (github.com/Jingfeng0705/LIFT at b76da7b, the folder
evaluation/evaluate): of COCO the 5 000 images of val2017, of Flickr30K the 1 000 of the test split, each with its
first caption alone, the right answer being the one of the same row; of ImageNet-1K the 50 000 of val, one prompt,
"It is a photo of a {}", and the names of imagenet_class_index.json; of SugarCrepe all choices, a tie being a miss.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..sugarcrepe import TASKS


class Savings(NamedTuple):
    """Fractions of CLIP's cost that LIFT saves."""

    flops: float
    memory: float


# By CLIP's context in tokens: 77 for short captions, 128 for long ones.
SAVINGS = {77: Savings(0.255, 0.068), 128: Savings(0.357, 0.126)}

# The size of all the models whose scores the paper publishes, as a preset and in words.
PRESET = "vit-b16"
SIZE = "ViT-B/16"


class Published(NamedTuple):
    """A row of a table of the paper. scores: fractions, by the names that the scores have in eval.json."""

    model: str
    data: str
    scores: dict[str, float]


class _Protocol(NamedTuple):
    """What the paper evaluates on. part: the key of eval.json where such scores stand. n: how many queries there are.
    rows: columns of the table below."""

    part: str
    n: int
    names: tuple[str, ...]
    first: int


# ViT-B/16, accuracy in percent: SugarCrepe's tasks, then ImageNet-1K top-1, then R@1 of COCO and Flickr30K.
_ROWS = (
    ("CLIP", "DataComp", (82.3, 73.7, 91.7, 79.4, 61.2, 59.6, 56.9, 58.4, 31.0, 27.2, 62.9, 59.6)),
    ("LIFT", "DataComp", (89.0, 86.1, 93.2, 86.0, 70.6, 64.1, 63.4, 58.3, 29.1, 28.1, 58.8, 63.7)),
    ("CLIP", "Recap", (77.0, 73.7, 88.9, 80.8, 63.4, 62.0, 76.3, 34.6, 25.7, 26.7, 56.4, 57.9)),
    ("LIFT", "Recap", (88.8, 92.2, 92.3, 88.2, 76.8, 66.5, 72.8, 43.6, 34.6, 36.0, 69.1, 72.9)),
)
_RECALLS = ("i2t_r1", "t2i_r1")

# By benchmark, as eval.json names it.
_PROTOCOLS = {
    "sugarcrepe": _Protocol("composition", 7511, tuple(TASKS), 0),
    "imagenet": _Protocol("zero_shot", 50_000, ("top1",), 7),
    "coco-val2017": _Protocol("first_caption", 5000, _RECALLS, 8),
    "flickr30k": _Protocol("first_caption", 1000, _RECALLS, 10),
}
# SHA-256 of the authors' 1 000 prompts for ImageNet, in the order of the classes, joined by "\n".
_PROMPTS = "4186863f7cfe1005e11d76ffd467b870cd3c8f511536d62e942444a2f9dbe2a1"


def rows_for(
    benchmark: str | None, part: str, run: Mapping[str, Any], n: int, prompts: str | None = None
) -> list[Published]:
    """The paper's rows that may stand next to scores of ours: none where data, protocol or size are not the paper's.

    benchmark: of the set, in eval.json. part: the key of eval.json under which the scores stand: "composition",
    "first_caption", "zero_shot" ("retrieval", of all captions, is not in the paper). run: the content of run.json. n:
    the number of images or choices that the scores are of. prompts: of zero-shot scores with one template, the SHA-256
    of the prompts, joined by newlines.

    The keys of a row's scores: the tasks of composition; "i2t_r1" and "t2i_r1"; "top1".
    """
    protocol = _PROTOCOLS.get(benchmark or "")
    if protocol is None or (part, n) != (protocol.part, protocol.n) or (part == "zero_shot" and prompts != _PROMPTS):
        return []
    if run.get("preset") != PRESET or run.get("vit") or run.get("text"):
        return []
    end = protocol.first + len(protocol.names)
    return [
        Published(
            model,
            data,
            {
                name: round(value / 100, 3)
                for name, value in zip(protocol.names, values[protocol.first : end], strict=True)
            },
        )
        for model, data, values in _ROWS
    ]


WHY = (
    "Our FLOPs are an exact count, a multiply-accumulate as two FLOPs in both towers; the paper's 25.5 % and "
    "35.7 % come close to a count that takes the image tower in multiply-accumulates, half as many, and the "
    "text tower in FLOPs. "
    "Memory depends on the regime: without activation checkpointing CLIP keeps all of its text tower's "
    "activations until backward; with it the peak falls into the image tower's backward, when those of the "
    "text tower are gone. The paper's 6.8 % and 12.6 % are taken with checkpointing."
)

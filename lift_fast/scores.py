"""eval.json: the scores that evaluation writes, and reports and model cards read."""

from typing import Any, Literal, TypedDict

from . import foreign
from .foreign import Count, Share

FORMAT = 2
TASKS = ("retrieval", "first_caption", "composition", "zero_shot")  # each {set: scores} of the sets that ask for it


class _Recalls(TypedDict):
    r1: Share
    r5: Share
    r10: Share


class _Chance(TypedDict, total=False):
    i2t: dict[str, Share]
    t2i: dict[str, Share]


class _NeededOfRetrieval(TypedDict):
    i2t: _Recalls
    t2i: _Recalls
    n: Count


class _Retrieval(_NeededOfRetrieval, total=False):
    captions: Count
    repeats: Count
    chance: _Chance


class _Composition(TypedDict, total=False):
    """Without the accuracies, whose names are those of `counts`, and "mean"."""

    n: Count
    counts: dict[str, Count]
    ties: dict[str, Count]
    chance: dict[str, Share]
    blind: dict[str, Share]


class _Top(TypedDict):
    top1: Share
    top5: Share


class _NeededOfZeroShot(_Top):
    n: Count


class _ZeroShot(_NeededOfZeroShot, total=False):
    mean_per_class: Share
    classes: Count
    templates: Count
    chance: Share
    majority: Share
    one_template: _Top | None
    alone: str
    prompts: str


class _Image(TypedDict):
    image: str
    caption: str
    first: str
    right: bool


class _Text(TypedDict):
    caption: str
    images: list[str]
    right: list[bool]


class _Worst(TypedDict):
    image: str
    caption: str
    first: str
    rank: Count


class _Examples(TypedDict):
    images: list[_Image]
    texts: list[_Text]
    worst: list[_Worst]


class _Needed(TypedDict):
    format: Literal[2]


class Scores(_Needed, total=False):
    """The types of what is used of eval.json."""

    retrieval: dict[str, _Retrieval]
    first_caption: dict[str, _Retrieval]
    composition: dict[str, _Composition]
    zero_shot: dict[str, _ZeroShot]
    benchmarks: dict[str, str | None]
    skipped: dict[str, Count]
    skipped_causes: dict[str, dict[str, Count]]
    notes: dict[str, list[str]]
    examples: dict[str, _Examples]


def is_of_another_version(content: Any) -> bool:
    """Whether the content of an eval.json is none of this version's."""
    return not isinstance(content, dict) or type(content.get("format")) is not int or content["format"] != FORMAT


def check(content: Any) -> None:
    """Validates the content of an eval.json, as far as it is there. Raises ValueError."""
    foreign.check(content, Scores)
    for name, scores in content.get("composition", {}).items():
        for task in (*scores.get("counts", ()), "mean"):
            if task in scores:
                foreign.check(scores[task], Share, f"it.composition[{name!r}].{task}")

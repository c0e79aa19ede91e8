"""The classes that the metadata of samples name."""

from collections.abc import Mapping
from typing import Any

from .questions import Classes

LABELS = ("group", "label", "class", "class_name", "cls")  # entries of the metadata that name a sample's class
TEMPLATES = ("{}", "a drawing of {}", "an emoji of {}", "a picture that belongs to {}")


def readable(name: str) -> str:
    """The name of a class as it stands in a prompt: in lower case, with "and" for &."""
    return name.lower().replace("&", "and")


def label_of(meta: Mapping[str, Any]) -> str | None:
    """The class that a sample's metadata name: the first of LABELS that is there. None where there is none, and where
    it is a number, which says nothing to a text encoder."""
    for name in LABELS:
        value = meta.get(name)
        if isinstance(value, str) and value.strip() and not value.strip().isdigit():
            return value.strip()
    return None


def has_numbers(metas: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether samples' metadata hold classes as numbers, without names."""
    return any(str(meta.get(name, "")).strip().isdigit() for meta in metas.values() for name in LABELS)


def classes_of(metas: Mapping[int, Mapping[str, Any]]) -> Classes | None:
    """The classes that the metadata name, sorted; None where there are less than two. metas: sample -> metadata.

    Samples without a class have no label.
    """
    labels = {sample: label for sample, meta in metas.items() if (label := label_of(meta))}
    names = sorted(set(labels.values()))
    if len(names) < 2:
        return None
    number = {name: i for i, name in enumerate(names)}
    own = {sample: number[label] for sample, label in labels.items()}
    return Classes([readable(name) for name in names], list(TEMPLATES), own)

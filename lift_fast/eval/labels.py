"""The classes that a data set names: as text or as numbers, in its metadata or in .cls members of tars."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.captions import halved
from ..data.links import Folder
from ..data.loose import LooseFiles
from ..data.samples import BadSample, Samples
from ..data.scan import key_and_suffix
from ..data.shards import Shards
from ..data.tars import NotWhole, members
from ..errors import DataError
from ..files import open_regular
from .questions import Classes
from .templates import (
    AUTHORS,
    USUAL,
    ClassNames,
    imagenet_classes,
    imagenet_templates,
    read_classnames,
    read_templates,
)

LABELS = ("group", "label", "class", "class_name", "cls")  # entries of the metadata that name a sample's class
# The files next to tars in which clip_benchmark has the names of the classes and the templates.
NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
NO_CLASS = "no class"  # cause: a label that the names of the classes do not have
_SUFFIX = b"cls"
_LONGEST = 1000  # bytes of a .cls
_DIGITS = 18  # of a label that is a number
_IMAGENET = (1000, 50)  # classes of ImageNet's validation set, and images of each
_TRIED = 8  # samples of a folder that are looked at for a .cls
_ALIKE = 900  # names of 1000 that are those of ImageNet, since some lists differ in a few


class Labelled(NamedTuple):
    """classes: None where a set names fewer than two. left_out: sample -> NO_CLASS. notes: as in Questions. benchmark:
    "imagenet" for its validation set, else None."""

    classes: Classes | None = None
    left_out: dict[int, str] = {}
    notes: list[str] = []
    benchmark: str | None = None


def classes_of(
    data: Samples,
    metas: Mapping[int, Mapping[str, Any]],
    *,
    skip_bad: bool = False,
    templates: Sequence[str] | None = None,
    classnames: ClassNames | None = None,
    labels: Mapping[int, str] | None = None,
) -> Labelled:
    """The classes of a set, for zero-shot classification.

    metas: sample -> metadata, of the samples that count. A sample's label is the first of LABELS there that is text;
    where no sample has text, the first that is a whole number from 0; in tars without either the content of its .cls.
    labels: sample -> label, where they are known and there are no metas.

    classnames: by number, where the labels are numbers; for labels that are text each label itself, in any order, or
    the name of each label in alphabetical order; or by label. Names by WordNet ids are also for labels that number
    these. Default: classnames.txt in the folder of tars or in the one above it; the names of OpenAI's CLIP for
    ImageNet's WordNet ids; else the labels, `readable`.

    templates: default: zeroshot_classification_templates.txt next to tars; those of ImageNet for its classes; else
    USUAL. Where none are given, AUTHORS is ImageNet's one template.

    Samples without a label have no class. Raises DataError for a label that the names do not have, unless skip_bad, for
    names and labels of different numbers, and for files of names or templates that cannot be read.
    """
    if labels is None:
        labels = _labels(data, metas, skip_bad)
    if not labels:
        return Labelled()
    given = templates is not None
    if classnames is None and (file := _next_to(data, NAMES_FILE)):
        classnames = read_classnames(file)
    if templates is None and (file := _next_to(data, TEMPLATES_FILE)):
        templates = read_templates(file)
    distinct = sorted(set(labels.values()))
    if classnames is None and all(map(_is_number, distinct)):
        note = (
            "its classes are numbers, and zero-shot classification needs their names: give --classnames, or a column "
            f"or an entry of the .json called one of {', '.join(LABELS)}"
        )
        return Labelled(notes=[note])
    names, number = _numbered(data, distinct, classnames)
    numbers: dict[int, int] = {}
    left_out: dict[int, str] = {}
    for sample, label in labels.items():
        if label in number:
            numbers[sample] = number[label]
        elif skip_bad:
            left_out[sample] = NO_CLASS
        else:
            raise DataError(
                f"{data.where(sample)} is of the class {label!r}, and there is no name for it; add it to --classnames, "
                "or leave such samples out with --skip-bad"
            )
    if len(names) < 2 or not numbers:
        return Labelled(left_out=left_out)
    of_imagenet = _is_imagenet(distinct, classnames)
    usual = imagenet_templates() if of_imagenet else USUAL
    classes = Classes(names, list(templates or usual), numbers, AUTHORS if of_imagenet and not given else "")
    whole = of_imagenet and _is_validation(classes)
    return Labelled(classes, left_out, _notes(len(metas or labels), classes, left_out), "imagenet" if whole else None)


def check_classes(data: Samples, found: Labelled) -> None:
    """Raises DataError for a set without captions in which no classes were found."""
    if found.classes is None:
        reason = "; ".join(found.notes) or "its samples are of fewer than two classes"
        raise DataError(f"{data.folder} has no captions, and {reason}")


def label_of(meta: Mapping[str, Any]) -> str | None:
    """The label that a sample's metadata name: the first of LABELS that is text and no number, else the first that is a
    whole number from 0, as text. None where there is none."""
    found = [text for name in LABELS if (text := _text(meta.get(name))) is not None]
    return next((text for text in found if not _is_number(text)), found[0] if found else None)


def readable(label: str) -> str:
    """A label as it stands in a prompt: "Food_&_Drink" -> "food and drink"."""
    return label.lower().replace("&", "and").replace("_", " ")


def labels_of_tars(shards: Shards, skip_bad: bool = False) -> dict[int, str]:
    """Sample -> the content of its .cls. Raises DataError for one that is too long or not UTF-8, unless skip_bad, and
    for a tar that cannot be read."""
    found = {}
    first = 0
    for number, path in enumerate(shards.paths):
        row = {key: first + i for i, key in enumerate(shards.shard_keys(number))}
        for key, content in _contents(path):
            if label := _label(content):
                if key in row:
                    found[row[key]] = label
            elif not skip_bad:
                raise DataError(f"{path}: the .cls of the sample {key!r} is neither a number nor a name")
        first += shards.shard_sizes[number]
    return found


def labels_of_files(data: LooseFiles, skip_bad: bool = False) -> dict[int, str]:
    """Sample -> the content of the .cls next to its image, {} where the first samples have none. Raises DataError as
    labels_of_tars."""
    found: dict[int, str] = {}
    first = 0
    for number, size in enumerate(data.shard_sizes):
        for sample, key in enumerate(data.shard_keys(number), first):
            if sample == _TRIED and not found:
                return {}
            path = data.folder / f"{key}.{_SUFFIX.decode()}"
            try:
                with open_regular(data.file_next_to(sample, _SUFFIX.decode())) as file:
                    label = _label(file.read(_LONGEST))
            except FileNotFoundError:
                continue
            except (OSError, BadSample) as error:
                why = error.reason if isinstance(error, BadSample) else error.strerror
                raise DataError(f"{path} cannot be read ({why})") from error
            if label:
                found[sample] = label
            elif not skip_bad:
                raise DataError(f"{path}: the .cls of the sample {key!r} is neither a number nor a name")
        first += size
    return found


def tar_suffixes(path: Path, most: int = 64) -> set[str]:
    """The suffixes of the first files in a tar, none where it cannot be read."""
    found = set()
    try:
        with open_regular(path) as file:
            for _, member in zip(range(most), members(file.fileno(), os.fstat(file.fileno()).st_size), strict=False):
                if (named := key_and_suffix(member.name)) is not None:
                    found.add(named[1].lower().decode(errors="replace"))
    except (OSError, NotWhole):
        pass
    return found


def _contents(path: Path) -> Iterator[tuple[str, bytes]]:
    """The key and the first bytes of each .cls in a tar, up to a damage, which opening the set has reported."""
    try:
        with open_regular(path) as file:
            for name, offset, size in members(file.fileno(), os.fstat(file.fileno()).st_size):
                named = key_and_suffix(name)
                if named is not None and named[1].lower() == _SUFFIX:
                    yield named[0].decode(errors="replace"), os.pread(file.fileno(), min(size, _LONGEST), offset)
    except NotWhole:
        return
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def _label(content: bytes) -> str:
    """The label in a .cls, "" for what is none: blank, as long as _LONGEST or longer, or not UTF-8."""
    try:
        return content.decode().strip() if len(content) < _LONGEST else ""
    except UnicodeDecodeError:
        return ""


def _labels(data: Samples, metas: Mapping[int, Mapping[str, Any]], skip_bad: bool) -> dict[int, str]:
    """Sample -> its label: text where any sample has text, else a number."""
    found = {sample: label for sample, meta in metas.items() if (label := label_of(meta)) is not None}
    if not found and isinstance(data, Shards) and "cls" in tar_suffixes(data.paths[0]):
        found = {sample: label for sample, label in labels_of_tars(data, skip_bad).items() if sample in metas}
    if not found and isinstance(data, LooseFiles):
        found = {sample: label for sample, label in labels_of_files(data, skip_bad).items() if sample in metas}
    if not all(map(_is_number, found.values())):
        found = {sample: label for sample, label in found.items() if not _is_number(label)}
    return found


def _numbered(data: Samples, distinct: list[str], classnames: ClassNames | None) -> tuple[list[str], dict[str, int]]:
    """The names of the classes, and label -> number of its class. Raises DataError."""
    if classnames is None:
        known = imagenet_classes() if _is_imagenet(distinct) else {}
        names = [known.get(label) or readable(label) for label in distinct]
        return names, {label: i for i, label in enumerate(distinct)}
    numbers = all(map(_is_number, distinct))
    if isinstance(classnames, dict):
        if not numbers or all(map(_is_number, classnames)):
            return list(classnames.values()), {label: i for i, label in enumerate(classnames)}
        classnames = list(classnames.values())
    if numbers:
        return classnames, {label: int(label) for label in distinct if int(label) < len(classnames)}
    by_name = {readable(name): i for i, name in reversed(list(enumerate(classnames)))}
    if all(readable(label) in by_name for label in distinct):
        return classnames, {label: by_name[readable(label)] for label in distinct}
    if len(classnames) != len(distinct):
        raise DataError(
            f"{data.folder} has {len(distinct)} classes, such as {distinct[0]!r}, and --classnames has "
            f"{len(classnames)} names, not these; write a line for each class: the class, a tab, and its name"
        )
    return classnames, {label: i for i, label in enumerate(distinct)}


def _next_to(data: Samples, name: str) -> Path | None:
    """The file of this name in the folder of tars, or in the one above it, whose folders are then the splits. Raises
    DataError for a link that leads out of these."""
    if not isinstance(data, Shards):
        return None
    path = next((path for folder in (data.folder, data.folder.parent) if (path := folder / name).is_file()), None)
    if path is not None and Folder(data.folder.parent, data.options).leads_out(path):
        raise DataError(f"{path} is a link that leads out of {data.folder.parent}; --follow-links follows it")
    return path


def _text(value: Any) -> str | None:
    """A label as text, None for what is none: text that is blank or holds half a character, a fraction, a number below
    0 or of many digits, true."""
    if isinstance(value, str):
        return None if halved(value) else value.strip() or None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**_DIGITS:
        return str(value)
    return None


def _is_number(label: str) -> bool:
    return label.isascii() and label.isdigit() and len(label) <= _DIGITS


def _is_imagenet(distinct: Sequence[str], classnames: ClassNames | None = None) -> bool:
    """Whether the labels are WordNet ids of ImageNet's classes, or number these: names by all ids, or most of the 1000
    names of OpenAI's CLIP, in order."""
    known = imagenet_classes()
    if all(label in known for label in distinct):
        return True
    if isinstance(classnames, dict):
        return list(classnames) == list(known)
    alike = sum(a == b for a, b in zip(classnames or (), known.values(), strict=False))
    return len(classnames or ()) == len(known) and alike >= _ALIKE


def _is_validation(classes: Classes) -> bool:
    """Whether there are as many images of each class as in ImageNet's validation set."""
    number, each = _IMAGENET
    counts = Counter(classes.labels.values())
    return len(classes.names) == len(counts) == number and set(counts.values()) == {each}


def _notes(known: int, classes: Classes, left_out: Mapping[int, str]) -> list[str]:
    notes = []
    if without := known - len(classes.labels) - len(left_out):
        notes.append(f"{without} of {known} samples name no class, and count in no score of zero-shot classification")
    if twice := [name for name, count in Counter(classes.names).items() if count > 1]:
        notes.append(f"several classes are called {', '.join(twice[:3])}: no name tells them apart")
    return notes

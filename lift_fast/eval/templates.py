"""Templates and class names for zero-shot classification: those of ImageNet, and a user's own files."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..data.captions import halved
from ..errors import DataError
from ..files import read_regular
from ..foreign import parse_json

ClassNames = list[str] | dict[str, str]  # names by number; or id, such as the name of a class folder -> name
AUTHORS = "It is a photo of a {}"  # LIFT's authors' only template, for ImageNet
USUAL = ("{}", "a drawing of {}", "an emoji of {}", "a picture that belongs to {}")  # of sets that are not ImageNet's
_MOST_BYTES = 1 << 24  # of a file of templates or names
_FOLDER = Path(__file__).parent / "imagenet"
# In place of a file: what is installed.
_TEMPLATES = {"imagenet": "templates.txt", "imagenet-authors": "authors-templates.txt"}
_CLASSES = {"imagenet": "classes.txt", "imagenet-authors": "authors.txt"}
_SYNSET = re.compile(r"n\d{8}")
_NUMBER_OR_SYNSET = re.compile(r"\d+|n\d{8}")


@cache
def imagenet_templates() -> tuple[str, ...]:
    """The 80 templates of OpenAI's CLIP for ImageNet."""
    return tuple(read_templates(_FOLDER / "templates.txt"))


@cache
def imagenet_classes() -> dict[str, str]:
    """WordNet id -> name, for the 1000 classes of ImageNet-1K by number, with the names of OpenAI's CLIP. Two of the
    names stand for two classes each: missile and sunglasses."""
    found = read_classnames(_FOLDER / "classes.txt")
    assert isinstance(found, dict)
    return found


def read_templates(path: Path) -> list[str]:
    """Reads templates from a text file, one a line, or from a .json list. {} or {c} stands for the class's name; lines
    that are blank or begin with # are left out. `imagenet`, where there is no such file: the 80 of OpenAI's CLIP;
    `imagenet-authors`: AUTHORS.

    Raises DataError for a file that cannot be read, a line without {}, and a file without templates.
    """
    path = _installed(path, _TEMPLATES)
    found = []
    for where, line, _ in _lines(path):
        template = line.replace("{c}", "{}").strip()
        if template and "{}" not in template:
            raise DataError(f"{where}: {_short(template)} has no {{}} where the name of the class goes")
        if template:
            found.append(template)
    if not found:
        raise DataError(f"{path} holds no template; write one a line, such as: {AUTHORS}")
    return found


def read_classnames(path: Path) -> ClassNames:
    """Reads the names of classes from a text or a .json file. `imagenet`, where there is no such file: the 1000 of
    ImageNet-1K, by OpenAI's CLIP; `imagenet-authors`: by LIFT's authors.

        cat                                     a name a line, or a list: of class 0, 1, …
        n02123045<TAB>tabby cat                 an id and a name a line, or an object: of the class with this label or
                                                class folder. Where every id is a number or a WordNet id, a space will
        n01440764 tench, Tinca tinca            do; of a WordNet id's names with commas the first is taken
        {"0": ["n01440764", "tench"], …}        imagenet_class_index.json; underscores stand for spaces

    Lines of a text file that begin with # are left out. Raises DataError for a file that cannot be read, a blank line
    between others, an id that occurs twice, a name that is no text, and fewer than two classes.
    """
    path = _installed(path, _CLASSES)
    lines = list(_lines(path, objects=True))
    while lines and not lines[-1].text.strip():
        lines.pop()
    for line in lines:
        if not line.text.strip():
            raise DataError(f"{line.where} is blank, so that the names after it would be of other classes; fill it in")
    if len(lines) < 2:
        raise DataError(f"{path} names fewer than two classes; write the name of each class into a line of its own")
    if all(line.label is None for line in lines):
        pairs = [line.text.partition("\t") for line in lines]
        if not all(tab for _, tab, _ in pairs):
            pairs = [line.text.strip().partition(" ") for line in lines]
            if not all(name and _NUMBER_OR_SYNSET.fullmatch(label) for label, _, name in pairs):
                return [line.text.strip() for line in lines]
        lines = [_Line(line.where, name, label) for line, (label, _, name) in zip(lines, pairs, strict=True)]
    names: dict[str, str] = {}
    for line in lines:
        label, name = (line.label or "").strip(), line.text.strip()
        if not label or not name:
            raise DataError(f"{line.where} has no {'name' if label else 'id'} of a class")
        if label in names:
            raise DataError(f"{line.where}: the class {_short(label)} occurs twice")
        names[label] = name
    if path.suffix.lower() != ".json" and all(map(_SYNSET.fullmatch, names)):
        return {label: name.partition(",")[0] for label, name in names.items()}
    return names


def _installed(path: Path, known: Mapping[str, str]) -> Path:
    """The installed file that a word stands for; a file of that name goes first."""
    return _FOLDER / known[str(path)] if str(path) in known and not path.exists() else path


class _Line(NamedTuple):
    """A text of a file: where it is, for messages, and its key in an object of a .json, None elsewhere."""

    where: str
    text: str
    label: str | None = None


def _lines(path: Path, objects: bool = False) -> Iterator[_Line]:
    """The lines of a text file, the texts of a list in a .json, or, with `objects`, those of an object. Raises
    DataError."""
    try:
        data = read_regular(path, _MOST_BYTES)
        # Pairs, since an object may hold a key twice.
        content: Any = parse_json(data, tuple) if _is_json(path) else data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except ValueError as error:
        raise DataError(f"{path} is no whole JSON file ({error}); write or download it again") from error
    lines: list[tuple[str, Any, str | None]]
    if objects and isinstance(content, tuple):
        lines = [(f"{path}: {_short(key)}", *_named(key, value)) for key, value in content]
    elif isinstance(content, list):
        kind = "entry" if _is_json(path) else "line"
        lines = [(f"{path}: {kind} {number}", value, None) for number, value in enumerate(content, 1)]
    else:
        raise DataError(f"{path} is no list of texts; write one a line into a text file")
    for where, value, label in lines:
        if not isinstance(value, str) or halved(value) or halved(label or ""):
            raise DataError(f"{where} is no text")
        if _is_json(path) or not value.startswith("#"):
            yield _Line(where, value, label)


def _named(key: str, value: Any) -> tuple[Any, str]:
    """The name of a class and its id, for a pair of an object in a .json."""
    if isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value):
        return value[1].replace("_", " "), value[0]
    return value, key


def _is_json(path: Path) -> bool:
    return path.suffix.lower() == ".json"


def _short(text: str) -> str:
    """A text for a message."""
    return repr(text if len(text) <= 60 else f"{text[:60]}…")

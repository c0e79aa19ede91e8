"""SugarCrepe and SugarCrepe++: choices between captions of images of COCO val2017, in a JSON file for each task.

SugarCrepe (Hsieh et al., 2023, arXiv:2306.14610)      {"0": {"filename", "caption", "negative_caption"}, …}
SugarCrepe++ (Dumpala et al., 2024, arXiv:2406.11171)  [{"id", "filename", "caption", "caption2",
                                                         "negative_caption"}, …]
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.options import DataOptions
from ...data.samples import BadText, Problem
from ...sugarcrepe import TASKS
from ..held_out_set import HeldOutSet
from ..questions import Choice, Questions
from .entries import Entries, identity_of, name_of, object_of, shown, text_of
from .image_files import ImageFiles, images_folder

# Of the published files. SugarCrepe++ has the five tasks that replace or swap.
_CHOICES = {
    "add_obj": 2062,
    "add_att": 692,
    "replace_obj": 1652,
    "replace_att": 788,
    "replace_rel": 1406,
    "swap_obj": 245,
    "swap_att": 666,
}
_PLUS_PLUS = {task: count for task, count in _CHOICES.items() if not task.startswith("add")}
_SECOND = "caption2"


def files_in(folder: Path) -> list[Path]:
    """The files of a folder that are named like the tasks."""
    return [path for task in TASKS if (path := folder / f"{task}.json").is_file()]


def is_choices(content: Any) -> bool:
    """Whether the content of a JSON file looks like SugarCrepe's, judged from its first entry."""
    first = next(iter(content.values() if isinstance(content, dict) else content), None)
    return isinstance(first, dict) and "negative_caption" in first


def open_sugarcrepe(
    folder: Path, files: Sequence[Path], images: Path | None, options: DataOptions, content: Any = None
) -> HeldOutSet:
    """Opens these files as one set, in which a sample is an image and the task is the name of the file.

    folder: names the set. content: of the only file, where it has been read.

    Raises DataError for a file that does not parse or holds no choice, an entry that cannot be used, unless
    options.skip_bad, and when no image is there.
    """
    sample_of: dict[str, int] = {}
    choices: list[Choice] = []
    problems: list[Problem] = []
    for path in files:
        entries = Entries(path, options.skip_bad)
        found = _choices(entries, entries.json() if content is None else content)
        if not found:
            raise entries.nothing("choice")
        for image, captions, foil in found:
            choices.append(Choice(path.stem, sample_of.setdefault(image, len(sample_of)), captions, foil))
        problems += entries.problems()
    names = list(sample_of)
    base = folder if folder.is_dir() else folder.parent
    bases = [images] if images else [base, base.parent]
    folders = [place for base in bases for place in (base / "val2017", base / "images", base)]
    root = images_folder(folder, names, folders, options)
    data = ImageFiles(folder, root, names, options=options, problems=problems, files=files)
    return HeldOutSet(data, Questions(choices=choices, notes=_notes(choices)), _benchmark(choices))


def _choices(entries: Entries, content: Any) -> list[tuple[str, tuple[str, ...], str]]:
    """The image, the true captions and the foil of each choice in a file."""
    found = []
    seen: set[int | str] = set()
    if isinstance(content, dict):
        pairs = list(content.items())
    elif isinstance(content, list):
        pairs = list(enumerate(content))
    else:
        pairs = []
    for key, value in pairs:
        where = entries.where(key)
        with entries.sorted_out():
            entry = object_of(value, where)
            if isinstance(content, list) and "id" in entry:
                identity = identity_of(entry, "id", where)
                if identity in seen:
                    raise BadText("repeated key", f"{where} has the id {shown(identity)} of another entry")
                seen.add(identity)
            fields = ["caption", _SECOND] if _SECOND in entry else ["caption"]
            captions = tuple(text_of(entry, field, where) for field in fields)
            found.append((name_of(entry, "filename", where), captions, text_of(entry, "negative_caption", where)))
    return found


def _notes(choices: Sequence[Choice]) -> list[str]:
    same = sum(choice.foil in choice.captions for choice in choices)
    if not same:
        return []
    return [f"in {same} of {len(choices)} choices the foil is equal to a true caption, so that no model can be right"]


def _benchmark(choices: Sequence[Choice]) -> str | None:
    counts = Counter(choice.task for choice in choices)
    captions = {len(choice.captions) for choice in choices}
    if captions == {1} and counts == _CHOICES:
        return "sugarcrepe"
    return "sugarcrepe++" if captions == {2} and counts == _PLUS_PLUS else None

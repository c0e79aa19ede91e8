"""Images with several captions each, as COCO, Karpathy's splits and Flickr30K list them.

    COCO (Chen et al., 2015, arXiv:1504.00325)       captions_val2017.json: {"images": [{"id", "file_name"}, …],
                                                     "annotations": [{"id", "image_id", "caption"}, …]}
    splits of COCO, Flickr8K and Flickr30K           dataset_coco.json: {"dataset", "images": [{"split", "filepath",
    (Karpathy and Fei-Fei, 2015, arXiv:1412.2306)    "filename", "sentences": [{"raw"}, …]}, …]}
    the same of Flickr30K, as a table                flickr_annotations_30k.csv: raw (a JSON list), split, filename
    the same of Flickr30K or COCO, as lines          flickr30k_test_karpathy.txt: image,caption, then NAME.jpg,CAPTION
    Flickr30K (Young et al., 2014)                   results_20130124.token: NAME.jpg#0<TAB>CAPTION

The captions of an image stay in the order of the file. Of a file with splits, the split "test" is read.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ...data.captions import checked_caption
from ...data.options import DataOptions
from ...data.samples import BadText
from ...errors import DataError
from ...foreign import parse_json
from ..held_out_set import HeldOutSet
from ..questions import Questions
from .entries import Entries, first_line, identity_of, list_of, name_of, object_of, shown, text_of
from .image_files import ImageFiles, images_folder

# Images and captions of the sets whose figures others publish.
_BENCHMARKS = {(5000, 25_014): "coco-val2017", (5000, 25_010): "coco-karpathy", (1000, 5000): "flickr30k"}
_FOLDERS = ("val2017", "val2014", "images", "flickr30k-images", "flickr30k_images")
_SPLIT = "test"
_TOKEN = re.compile(r"(.+\.\w+)#\d+\t(.*)")
_LINE = re.compile(r"(.+?\.(?:jpg|jpeg|png)),(.*)", re.IGNORECASE)

Captions = dict[str, list[str]]  # name of an image -> its captions


def is_captions(content: Any) -> bool:
    """Whether the content of a JSON file looks like COCO's or Karpathy's."""
    return isinstance(content, dict) and "images" in content


def open_json(entries: Entries, content: Any, images: Path | None, options: DataOptions) -> HeldOutSet:
    """Opens a JSON file of COCO or Karpathy, whose content this is. Raises as open_lines."""
    listed = list_of(content["images"], f"{entries.path}: 'images'")
    if "annotations" in content:
        annotations = list_of(content["annotations"], f"{entries.path}: 'annotations'")
        return _opened(entries, _of_coco(entries, listed, annotations), images, options)
    return _opened(entries, _of_karpathy(entries, listed), images, options)


def is_table(path: Path) -> bool:
    """Whether a .csv is the table of Flickr30K, judged from its header. Raises DataError."""
    return {"raw", "split", "filename"} <= set(first_line(path, 1000).split(","))


def is_lines(path: Path) -> bool:
    """Whether a text file has captions as lines, judged from its first. Raises DataError."""
    first = first_line(path, 10_000)
    return first == "image,caption" or bool(_TOKEN.fullmatch(first))


def open_lines(path: Path, images: Path | None, options: DataOptions) -> HeldOutSet:
    """Opens a table or a text file of captions.

    Raises DataError for a file that cannot be read or holds no image, an entry that cannot be used, unless
    options.skip_bad, and when no image is there.
    """
    entries = Entries(path, options.skip_bad)
    return _opened(
        entries, _of_lines(entries) if path.suffix.lower() != ".csv" else _of_table(entries), images, options
    )


def _of_coco(entries: Entries, listed: list[Any], annotations: list[Any]) -> Captions:
    found: Captions = {}
    names: dict[int | str, str] = {}
    for number, value in enumerate(listed):
        where = f"{entries.path}: image {number}"
        with entries.sorted_out():
            entry = object_of(value, where)
            identity, name = identity_of(entry, "id", where), name_of(entry, "file_name", where)
            if identity in names or name in found:
                raise BadText("repeated key", f"{where}, {shown(name)}, has the id or the name of another image")
            names[identity] = name
            found[name] = []
    seen: set[int | str] = set()
    for number, value in enumerate(annotations):
        where = f"{entries.path}: annotation {number}"
        with entries.sorted_out():
            entry = object_of(value, where)
            image = identity_of(entry, "image_id", where)
            if "id" in entry:
                identity = identity_of(entry, "id", where)
                if identity in seen:
                    raise BadText("repeated key", f"{where} has the id {shown(identity)} of another annotation")
                seen.add(identity)
            caption = text_of(entry, "caption", where)
            if image not in names:
                raise BadText("no key", f"{where} is of the image {shown(image)}, which 'images' does not have")
            found[names[image]].append(caption)
    return found


def _of_karpathy(entries: Entries, listed: list[Any]) -> Captions:
    found: Captions = {}
    splits: set[str] = set()
    for number, value in enumerate(listed):
        where = f"{entries.path}: image {number}"
        with entries.sorted_out():
            entry = object_of(value, where)
            splits.add(shown(entry.get("split")))
            if entry.get("split") != _SPLIT:
                continue
            name = name_of(entry, "filename", where)
            if "filepath" in entry:
                name = f"{name_of(entry, 'filepath', where)}/{name}"
            _add(found, name, where)
            for sentence in list_of(entry.get("sentences"), f"{where}: 'sentences'"):
                with entries.sorted_out():
                    found[name].append(text_of(object_of(sentence, f"{where}: a sentence"), "raw", where))
    _check_split(entries, found, splits)
    return found


def _of_table(entries: Entries) -> Captions:
    found: Captions = {}
    splits: set[str] = set()
    try:
        for number, row in enumerate(csv.DictReader(entries.lines()), 1):
            where = f"{entries.path}: row {number}"
            splits.add(shown(row.get("split")))
            if row.get("split") != _SPLIT:
                continue
            with entries.sorted_out():
                name = name_of(row, "filename", where)
                _add(found, name, where)
                try:
                    captions = parse_json((row.get("raw") or "").encode())
                except ValueError as error:
                    raise BadText("does not parse", f"{where}: its 'raw' is no JSON list ({error})") from error
                for caption in list_of(captions, f"{where}: 'raw'"):
                    with entries.sorted_out():
                        found[name].append(text_of({"raw": caption}, "raw", where))
    except csv.Error as error:
        raise DataError(f"{entries.path} does not parse ({error}); download it again") from error
    _check_split(entries, found, splits)
    return found


def _of_lines(entries: Entries) -> Captions:
    found: Captions = {}
    lines = entries.lines()
    pattern = _TOKEN if lines and _TOKEN.fullmatch(lines[0]) else _LINE
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and pattern is _LINE):
            continue
        where = f"{entries.path}: line {number}"
        with entries.sorted_out():
            match = pattern.fullmatch(line)
            if match is None:
                raise BadText("does not parse", f"{where} is not the name of an image and its caption")
            captions = found.setdefault(match[1], [])
            captions.append(checked_caption(match[2], "caption", lambda where=where: where))  # type: ignore[misc]
    return found


def _add(found: Captions, name: str, where: str) -> None:
    """Raises BadText for a name that occurs twice."""
    if name in found:
        raise BadText("repeated key", f"{where} has the name {shown(name)} of another image")
    found[name] = []


def _check_split(entries: Entries, found: Captions, splits: Iterable[str]) -> None:
    if splits and shown(_SPLIT) not in splits:
        raise DataError(
            f"{entries.path} has no split {_SPLIT!r}, which is the one that is read; it has {_some(splits)}"
        )


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5])


def _opened(entries: Entries, found: Captions, images: Path | None, options: DataOptions) -> HeldOutSet:
    """The set of these images and captions. Raises DataError when there is none, or no image is there."""
    if not any(found.values()):
        raise entries.nothing("caption")
    names, folder = _located(entries.path, list(found), images, options)
    captions = list(found.values())
    data = ImageFiles(entries.path, folder, names, captions, options, entries.problems())
    questions = Questions(captions={i: some for i, some in enumerate(captions) if some})
    return HeldOutSet(data, questions, _BENCHMARKS.get((len(captions), sum(map(len, captions)))))


def _located(path: Path, names: Sequence[str], images: Path | None, options: DataOptions) -> tuple[Sequence[str], Path]:
    """The names of the images, and the folder in which they lie: with the folders in their names, or without them."""
    bases = [images] if images else [path.parent, path.parent.parent]
    split = path.stem.partition("_")[2]  # captions_val2017
    below = dict.fromkeys([*([split] if split else []), *_FOLDERS])
    folders = [place for base in bases for place in (base, *(base / name for name in below))]
    bare = [PurePosixPath(name).name for name in names]
    if bare == list(names) or len(set(bare)) < len(bare):
        return names, images_folder(path, names, folders, options)
    try:
        return names, images_folder(path, names, folders, options)
    except DataError:
        return bare, images_folder(path, bare, folders, options)

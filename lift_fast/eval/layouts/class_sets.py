"""Sets of classes without captions, and the tars of clip_benchmark.

DATA/n01440764/ILSVRC2012_val_00000293.JPEG    class folders
DATA/0.tar with s0000000.jpg, s0000000.cls     tars with the number or the name of the class, as img2dataset,
                                               clip_benchmark and timm write them
DATA/1.jpg, DATA/1.cls                         the same, unpacked
DATA/test/0.tar, DATA/classnames.txt           clip_benchmark's folder of splits
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ...data.loose import LooseFiles, is_folder
from ...data.open import open_data
from ...data.options import DataOptions
from ...data.samples import BadText, Samples, SeveralCaptions
from ...data.scan import IMAGE_SUFFIXES
from ...data.shards import Shards
from ...files import read_regular
from ..held_out_set import HeldOutSet
from ..labels import check_classes, classes_of, tar_suffixes
from ..questions import Questions
from ..templates import ClassNames

_TYPE_FILE, _RETRIEVAL = "dataset_type.txt", "retrieval"  # of clip_benchmark
_LONGEST = 1000  # bytes of it
_LOOKED_AT = 200  # files of a folder
_SPLITS = ("test", "val", "validation")  # with tars; the first that there is
_CAPTIONS = {"txt", "json", "text", "caption"}


def open_class_set(
    path: Path,
    options: DataOptions,
    templates: Sequence[str] | None,
    classnames: ClassNames | None,
    wanted: str = "txt",
) -> HeldOutSet | None:
    """Opens a set of which every sample has a class and none a caption `wanted`, as far as its first tell; None for any
    other. Raises as open_data, classes_of and check_classes do."""
    if options.text_suffix:
        return None
    of_cls = replace(options, text_suffix="cls")
    data: Samples
    if (tars := _tars_in(path)) is not None:
        suffixes = tar_suffixes(tars[0])
        if "cls" not in suffixes or "txt" in suffixes:
            return None
        data = Shards(tars[0].parent, options=of_cls)
        if wanted != "txt" and _has(data, wanted):
            return None
    else:
        suffixes, in_folders = _first_suffixes(path)
        if suffixes & _CAPTIONS:
            return None
        if "cls" in suffixes:
            data = LooseFiles(path, of_cls)
        elif in_folders and suffixes & {*IMAGE_SUFFIXES}:
            data = open_data(path, options=options)
            if not isinstance(data, LooseFiles) or not data.classes:
                return None
        else:
            return None
    labels, left_out = _captions(data, options.skip_bad)
    found = classes_of(data, {}, skip_bad=options.skip_bad, templates=templates, classnames=classnames, labels=labels)
    check_classes(data, found)
    questions = Questions(classes=found.classes, left_out=left_out | found.left_out, notes=found.notes)
    return HeldOutSet(data, questions, found.benchmark)


def open_retrieval_tars(path: Path, options: DataOptions) -> HeldOutSet | None:
    """Opens tars that clip_benchmark wrote for retrieval, whose .txt has a caption a line; None for any other folder.

    Raises DataError as Shards does, and for a sample without a caption, unless options.skip_bad.
    """
    tars = _tars_in(path)
    if tars is None or not _says_retrieval(tars[0].parent):
        return None
    data = Shards(tars[0].parent, options=options)
    texts, left_out = _captions(data, options.skip_bad)
    captions = {sample: [line.strip() for line in text.split("\n") if line.strip()] for sample, text in texts.items()}
    return HeldOutSet(data, Questions(captions=captions, left_out=left_out))


def _has(data: Samples, field: str) -> bool:
    """Whether the first sample has a caption."""
    try:
        return bool(data.caption(0, field))
    except SeveralCaptions:
        return True
    except BadText:
        return False


def _captions(data: Samples, skip_bad: bool) -> tuple[dict[int, str], dict[int, str]]:
    """Sample -> caption; and sample -> cause, where it cannot be used. Raises BadText for one, unless skip_bad."""
    found: dict[int, str] = {}
    left_out: dict[int, str] = {}
    first = 0
    for number, size in enumerate(data.shard_sizes):
        for row, caption in enumerate(data.captions(number), first):
            if not isinstance(caption, BadText):
                found[row] = caption
            elif skip_bad:
                left_out[row] = caption.cause
            else:
                raise caption
        first += size
    return found, left_out


def _tars_in(path: Path) -> list[Path] | None:
    """The tars in a folder, or in that of a split, where it holds none; None where there is none."""
    for folder in (path, *(path / split for split in _SPLITS)):
        if tars := sorted(folder.glob("*.tar")):
            return tars
    return None


def _says_retrieval(folder: Path) -> bool:
    """Whether the file of clip_benchmark in the folder of the tars, or in the one above it, says so."""
    for place in folder, folder.parent:
        try:
            return read_regular(place / _TYPE_FILE, _LONGEST).decode().strip().lower() == _RETRIEVAL
        except (OSError, UnicodeDecodeError):
            continue
    return False


def _first_suffixes(path: Path) -> tuple[set[str], bool]:
    """The suffixes of the first files in a folder, or, where no image is among them, in the first folders in it that
    hold files; and whether it is the latter."""
    files, folders = _first_entries(path)
    if suffixes := _suffixes(files):
        return suffixes, False
    with_files = filter(None, (_first_entries(folder)[0] for folder in folders))
    return _suffixes([name for names in islice(with_files, 3) for name in names]), True


def _suffixes(names: Sequence[str]) -> set[str]:
    """The suffixes of files, where there are images or classes among them."""
    found = {name.rpartition(".")[2].lower() for name in names if "." in name and not name.startswith(".")}
    return found if found & {"cls", *IMAGE_SUFFIXES} else set()


def _first_entries(path: Path) -> tuple[list[str], list[Path]]:
    """The names of the first files in a folder, and the first folders; none where it cannot be listed, which opening
    the set reports."""
    files, folders = [], []
    try:
        with os.scandir(path) as entries:
            for entry in islice(entries, _LOOKED_AT):
                if is_folder(entry):
                    folders.append(Path(entry.path))
                else:
                    files.append(entry.name)
    except OSError:
        pass
    return files, folders

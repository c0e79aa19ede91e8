"""Data sets of published benchmarks, and of classes, in their own layouts."""

import re
from collections.abc import Sequence
from pathlib import Path

from ...data.options import DataOptions
from ...errors import DataError
from ..held_out_set import HeldOutSet
from ..templates import ClassNames
from . import captioned, sugarcrepe
from .class_sets import open_class_set, open_retrieval_tars
from .entries import Entries, names_in

_ROOTS = ("", "annotations")  # of a folder: where a file of captions may lie
_USUAL = "captions_val2017.json"  # of COCO's own folder, which holds those of other splits too
_FILES = re.compile(
    r"captions_val201[47]\.json|dataset_(coco|flickr8k|flickr30k)\.json|.+_test_karpathy\.(json|txt)"
    r"|flickr_annotations_.+\.csv|results_.+\.token"
)


def open_benchmark(
    path: Path,
    images: Path | None = None,
    *,
    options: DataOptions | None = None,
    templates: Sequence[str] | None = None,
    classnames: ClassNames | None = None,
    fields: Sequence[str] = (),
    wanted: str = "txt",
) -> HeldOutSet | None:
    """Opens a held-out set in one of these layouts, which are told by their content; None for any other:

    a folder with add_att.json, …, swap_obj.json    SugarCrepe or SugarCrepe++, any of its files (sugarcrepe.py)
    one such file
    a file of captions, or a folder that has one    COCO, Karpathy's splits, Flickr30K (captioned.py)
    tars of images and .txt, of "retrieval"         as clip_benchmark writes them: a caption a line (class_sets.py)
    class folders; images or tars with .cls         a set of classes (class_sets.py), where no caption is asked for

    images: the folder of the image files, where they are not in the folder of the file or next to it. options: of them
    skip_bad and absolute_paths; for class folders and tars all. templates, classnames: as of labels.classes_of. fields:
    the captions that are asked for. wanted: those that are read where a set has them.

    Raises DataError and ConfigError where one of these modules does, and for a folder with several files of captions.
    """
    options = options or DataOptions()
    if path.is_file():
        return _open_file(path, images, options)
    if not path.is_dir():
        return None
    for folder in path, path / "data":
        if files := sugarcrepe.files_in(folder):
            return sugarcrepe.open_sugarcrepe(folder, files, images, options)
    if (file := _captions_in(path)) is not None:
        return _open_file(file, images, options)
    if images is not None or fields:
        return None
    return open_retrieval_tars(path, options) or open_class_set(path, options, templates, classnames, wanted)


def _open_file(path: Path, images: Path | None, options: DataOptions) -> HeldOutSet | None:
    suffix = path.suffix.lower()
    if suffix == ".json":
        entries = Entries(path, options.skip_bad)
        content = entries.json()
        if captioned.is_captions(content):
            return captioned.open_json(entries, content, images, options)
        if isinstance(content, dict | list) and sugarcrepe.is_choices(content):
            return sugarcrepe.open_sugarcrepe(path, [path], images, options, content)
        raise DataError(
            f"{path} is not a file of SugarCrepe (entries with filename, caption and negative_caption), of COCO "
            "(captions_val2017.json) or of Karpathy (dataset_coco.json)"
        )
    if (suffix == ".csv" and captioned.is_table(path)) or (suffix in (".token", ".txt") and captioned.is_lines(path)):
        return captioned.open_lines(path, images, options)
    return None


def _captions_in(folder: Path) -> Path | None:
    """The file of captions in a folder. Raises DataError when there are several, but for COCO's annotations."""
    places = [folder / root for root in _ROOTS]
    found = [place / name for place in places if place.is_dir() for name in names_in(place) if _FILES.fullmatch(name)]
    usual = [file for file in found if file.name == _USUAL]
    others = [file for file in found if not file.name.startswith("captions_")]
    if len(usual) == 1 and not others:
        return usual[0]
    if len(found) > 1:
        shown = ", ".join(str(file.relative_to(folder)) for file in found[:5])
        raise DataError(f"{folder} holds several files of captions ({shown}); name the one to read")
    return found[0] if found else None

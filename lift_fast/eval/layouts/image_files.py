"""Images in a folder, named by a file that lists them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...data.links import Folder
from ...data.options import DataOptions
from ...data.reading import read_image, stamp_of
from ...data.samples import BadSample, Problem, located
from ...data.tables import TableSamples
from ...errors import DataError

_IMAGE, _CAPTIONS = "file_name", "caption"
_LOOKED_AT = 64  # images, before all are looked for


class _List:
    """The table of TableSamples: an image a row, and its captions, if there are any; all in one shard."""

    def __init__(
        self,
        path: Path,
        images: Sequence[str],
        captions: Sequence[Sequence[str]],
        problems: list[Problem],
        files: Sequence[Path],
    ):
        self.path, self.problems = path, problems
        self.columns = [_IMAGE, _CAPTIONS] if captions else [_IMAGE]
        self.names, self.sizes, self.starts = [path.name], [len(images)], [0, len(images)]
        self._values: dict[str, list[Any]] = {_IMAGE: list(images), _CAPTIONS: [_caption(some) for some in captions]}
        self._stamp = ",".join("{}-{}".format(*stamp_of(os.stat(file))) for file in files)

    def __len__(self) -> int:
        return self.sizes[0]

    def lacking(self, name: str) -> tuple[Path, Sequence[str]] | None:
        return None if name in self.columns else (self.path, self.columns)

    def read(self, number: int, names: Sequence[str]) -> list[list[Any]]:
        return [self._values[name] for name in names]

    def row(self, i: int) -> dict[str, Any]:
        values = {name: self.value(i, name) for name in self.columns}
        return {name: value for name, value in values.items() if isinstance(value, str)}

    def value(self, i: int, name: str) -> Any:
        _, row = located(i, self.starts[1:], self.path)
        return self._values[name][row]

    image = value

    def where(self, i: int) -> str:
        return f"{self.path}: image {self.value(i, _IMAGE)!r}"

    place = where

    def stamp(self, number: int) -> str:
        return self._stamp


class ImageFiles(TableSamples):
    """The Samples of images that a file names. The key is the image's name; the caption "txt" is the one that the file
    has for it, or a list of several, which `caption` raises as SeveralCaptions.

    path: the file, or the folder of the files. root: the folder of the images. images: their names, each once and
    relative to `root`, which they must not leave, unless options.absolute_paths. captions: of each image; () for a file
    without captions. problems: as in Samples. files: where `path` is a folder.
    """

    def __init__(
        self,
        path: Path,
        root: Path,
        images: Sequence[str],
        captions: Sequence[Sequence[str]] = (),
        options: DataOptions | None = None,
        problems: Sequence[Problem] = (),
        files: Sequence[Path] = (),
    ):
        options = replace(options or DataOptions(), key=_IMAGE)
        super().__init__(path, _List(path, images, captions, list(problems), files or [path]), options)
        self._images = Folder(root, options)
        self.root = self._images.path

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""
        return read_image(self.image_file(i))

    def image_file(self, i: int) -> Path:
        """The image of sample i, which need not exist. Raises BadSample: "unreadable" for a name that leads out of the
        folder."""
        return self._images.file(self._table.value(i, _IMAGE))


def images_folder(path: Path, images: Sequence[str], folders: Sequence[Path], options: DataOptions) -> Path:
    """The first of the folders in which one of the images lies. path: the file that names them.

    Raises DataError when there is none.
    """
    for count in (_LOOKED_AT, len(images)):
        for folder in folders:
            place = Folder(folder, options)
            if any(_lies_in(place, name) for name in images[:count]):
                return folder
    shown = " or ".join(str(folder) for folder in folders)
    raise DataError(
        f"{path} names {len(images)} images, such as {images[0]!r}, and none of them lies in {shown}; name the folder "
        "of the images with --pictures"
    )


def _lies_in(folder: Folder, name: str) -> bool:
    try:
        return os.path.isfile(folder.file(name))
    except BadSample:
        return False


def _caption(captions: Sequence[str]) -> str | list[str] | None:
    if len(captions) < 2:
        return captions[0] if captions else None
    return list(captions)

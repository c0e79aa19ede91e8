"""Image files in folders whose captions are in parquet files.

The layout of LIFT's authors (github.com/Jingfeng0705/LIFT, DATASET.md) and of img2dataset's `files`:

    IMAGES/train-00012-of-03550/000000000001.jpg          a folder of images for each parquet file
    CAPTIONS/train-00012-of-03550.parquet                 columns key, re_caption, org_caption, extension; or
    EMBEDDINGS/train-00012-of-03550/0.parquet, 1.parquet  columns key ("000000000001.jpg"), embedding
"""

import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DataError
from .columns import Columns, is_text
from .links import Folder
from .options import DataOptions
from .reading import read_image
from .samples import BadSample, located
from .scan import IMAGE_SUFFIXES
from .tables import TableSamples


class ParquetImages(TableSamples):
    """The Samples of a folder of parquet files and of image files in folders of the same names.

    A parquet file of captions is a shard; so is a folder of parquet files of embeddings. Samples are in the order of
    the rows, so that a cache made from either matches. The column key names the images. A shard's names are read when
    the first of them is needed, and stay in memory (8 bytes and the text for each key and each extension). Captions
    are read a file at a time when one is needed; at most 1 GiB of them stays in memory.

    captions: a parquet file, a folder of them, or of folders of them. images: the folder with a folder of images for
    each, named like the parquet file or folder up to its first dot.

    Raises DataError for a folder without parquet files, files that cannot be read or have no keys, no matching folder
    of images, and when pyarrow is not installed.
    """

    def __init__(self, captions: str | Path, images: str | Path, options: DataOptions | None = None):
        folder, options = Path(captions), options or DataOptions()
        self.images = Path(images)
        groups = _groups(folder)
        if not groups:
            raise DataError(f"{folder} holds no parquet file, nor a folder with one")
        stems = [name.partition(".")[0] for name in groups]
        within = replace(options, absolute_paths=False)
        self._folders = [Folder(self.images / stem, within, self.images) for stem in stems]
        if not any(folder.path.is_dir() for folder in self._folders):
            raise DataError(no_images(folder, self.images, next(iter(groups))))
        self._columns = Columns(folder, groups, options.skip_bad)
        if (lacking := self._columns.lacking("key")) and not (options.skip_bad and "key" in self._columns.columns):
            raise DataError(
                f"{lacking[0]} has no column 'key' that names the images; there are: {', '.join(lacking[1])}"
            )
        super().__init__(folder, self._columns, options)
        self._ends = self._columns.starts[1:]
        if not len(self):
            raise DataError(f"{folder}: {sum(map(len, groups.values()))} parquet files hold no row")
        self._lock = threading.Lock()
        self._names: dict[int, tuple[Any, Any]] = {}  # shard -> Arrow arrays of its keys, extensions

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""
        return read_image(self.image_file(i))

    def image_file(self, i: int) -> Path:
        """The image of sample i, which need not exist. Raises BadSample: "missing", "unreadable"."""
        number, row = located(i, self._ends, self.folder)
        try:
            key, extension = self._name(number, row)
            if not key:
                self._columns.value(i, "key")  # raises where the row cannot be read
        except BadSample:
            raise
        except DataError as error:
            raise BadSample("unreadable", str(error)) from error
        if not key:
            raise BadSample("missing", f"{self.folder / self.names[number]}: row {row} has no key")
        if extension:
            names = [f"{key}.{extension}"]
        elif key.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
            names = [key]
        else:
            names = [f"{key}.{suffix}" for suffix in IMAGE_SUFFIXES]
        paths = [self._folders[number].named(name) for name in names]
        path = next((path for path in paths[:-1] if os.path.exists(path)), paths[-1])
        self._folders[number].check(path)
        return path

    def text_fields(self) -> list[str]:
        """The columns of text: meta has none."""
        return [field.name for field in self._columns.schema if is_text(field.type) and field.name not in _NAMES]

    def meta(self, i: int) -> dict:
        """{}: a parquet file has no metadata besides keys and captions."""
        return {}

    def where(self, i: int) -> str:
        """File, row and key of sample i, for messages."""
        return self._described(i)

    def _key_name(self, value: Any) -> Any:
        """The sample key; beside embeddings it is the name of a file, which is cut at its first dot."""
        if isinstance(value, str) and "embedding" in self.columns:
            return re.sub(r"\.[^/]*$", "", value)
        return value

    def _name(self, number: int, row: int) -> tuple[str | None, str | None]:
        """Key and extension of an image. Raises DataError."""
        with self._lock:
            if number not in self._names:
                keys = self._columns.texts(number, "key")
                extensions = self._columns.texts(number, "extension") if "extension" in self.columns else None
                self._names[number] = keys, extensions
            keys, extensions = self._names[number]
        try:
            return keys[row].as_py(), None if extensions is None else extensions[row].as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.folder / self.names[number]}: row {row}: its key is not UTF-8") from error


_NAMES = ("key", "extension")


def no_images(folder: Path, images: Path, name: str) -> str:
    """The message that there are no images for parquet files, of which one has this name."""
    return (
        f"no images for the parquet files at {folder}: expected a folder {images / name.partition('.')[0]} with the "
        f"images of {name}"
    )


def _groups(folder: Path) -> dict[str, list[Path]]:
    """Name of each shard -> its parquet files, in order, for a folder of parquet files or of folders of them."""
    if folder.is_file():
        return {folder.name: [folder]}
    flat = {path.name: [path] for path in sorted(folder.glob("*.parquet"))}
    if flat:
        return flat  # without listing the folders next to them, which may hold millions of images
    nested = {path.name: sorted(path.glob("*.parquet"), key=_by_number) for path in sorted(folder.iterdir())}
    return {name: files for name, files in nested.items() if files}


def _by_number(path: Path) -> list[tuple[int, str]]:
    """A sorting key that puts 2.parquet before 10.parquet."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]

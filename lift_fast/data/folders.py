"""Image files on disk whose captions are in a table.

ParquetImages: the layout of LIFT's authors (github.com/Jingfeng0705/LIFT, DATASET.md) and of img2dataset's `files`:

    IMAGES/train-00012-of-03550/000000000001.jpg          a folder of images for each parquet file
    CAPTIONS/train-00012-of-03550.parquet                 columns key, re_caption, org_caption, extension; or
    EMBEDDINGS/train-00012-of-03550/0.parquet, 1.parquet  columns key ("000000000001.jpg"), embedding

TableImages: one CSV, TSV or JSONL file whose rows name an image each, such as Hugging Face's metadata.csv.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..ops.rows.table import key_hashes
from .index import IMAGE_SUFFIXES
from .reading import read_image
from .samples import BadSample, located
from .sources import SHARD_ROWS, Rows, checked_caption, checked_keys, read_parquet

FILE_COLUMNS = ("file_name", "filepath", "image", "path")
_KEPT_BYTES = 1 << 30  # of caption columns


class ParquetImages:
    """The Samples of a folder of parquet files and of image files in folders of the same names.

    A parquet file of captions is a shard; so is a folder of parquet files of embeddings. Samples are in the order of
    the rows, so that a cache made from either matches. A shard's keys are read when the first of them is needed, and
    stay in memory (8 bytes and the text for each key and each extension). Captions are read a shard at a time when one
    is needed; at most 1 GiB of them stays in memory.

    captions: a folder of parquet files, or of folders of them. images: the folder with a folder of images for each,
    named like the parquet file or folder up to its first dot.

    Raises DataError for a folder without parquet files, files that cannot be read or have no keys, no matching folder
    of images, and when pyarrow is not installed.
    """

    def __init__(self, captions: str | Path, images: str | Path):
        self.folder, self.images = Path(captions), Path(images)
        groups = _groups(self.folder)
        if not groups:
            raise DataError(f"{self.folder} holds no parquet file, nor a folder with one")
        self.names = list(groups)
        self._files = list(groups.values())
        stems = [name.partition(".")[0] for name in self.names]
        self._roots = [Path(os.path.abspath(self.images / stem)) for stem in stems]
        if not any(root.is_dir() for root in self._roots):
            raise DataError(
                f"no images for the parquet files at {self.folder}: expected a folder {self.images / stems[0]} "
                f"with the images of {self.names[0]}"
            )
        flat = [path for group in self._files for path in group]
        with ThreadPoolExecutor(min(32, 4 * len(os.sched_getaffinity(0)))) as pool:
            found = dict(zip(flat, pool.map(_rows_and_columns, flat), strict=True))
        self.columns = found[flat[0]][1]
        self._rows = [[found[path][0] for path in group] for group in self._files]
        self.shard_sizes = [sum(rows) for rows in self._rows]
        self._ends = list(accumulate(self.shard_sizes))
        if not len(self):
            raise DataError(f"{self.folder}: {len(flat)} parquet files hold no row")
        self._lock = threading.RLock()
        self._names: dict[int, tuple[Any, Any]] = {}  # shard -> Arrow arrays of its keys, extensions
        self._captions: OrderedDict[tuple[int, str], Any] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""
        number, row = self._locate(i)
        try:
            keys, extensions = self._keys(number)
        except DataError as error:
            raise BadSample("unreadable", str(error)) from error
        key = keys[row].as_py()
        extension = None if extensions is None else extensions[row].as_py()
        if not key:
            raise BadSample("missing", f"{self.folder / self.names[number]}: row {row} has no key")
        if extension:
            names = [f"{key}.{extension}"]
        elif key.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
            names = [key]
        else:
            names = [f"{key}.{suffix}" for suffix in IMAGE_SUFFIXES]
        paths = [inside(self._roots[number], name) for name in names]
        return read_image(next((path for path in paths[:-1] if os.path.exists(path)), paths[-1]))

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i: the column `field`; for "txt" it is "re_caption" where there is no column "txt".

        Raises DataError when it is missing or blank.
        """
        number, row = self._locate(i)
        field = column_of(self.folder, field, self.columns, "re_caption")
        with self._lock:
            column = self._captions.pop((number, field), None)
            if column is not None:
                self._captions[number, field] = column
            else:
                column = self._captions[number, field] = self._read(number, [field])[0]
                while len(self._captions) > 1 and sum(kept.nbytes for kept in self._captions.values()) > _KEPT_BYTES:
                    self._captions.popitem(last=False)
        return checked_caption(column[row].as_py(), field, lambda: self.where(i))

    def meta(self, i: int) -> dict:
        """{}: a parquet file has no metadata besides keys and captions."""
        return {}

    def where(self, i: int) -> str:
        """Shard and key of sample i, for messages."""
        number, row = self._locate(i)
        place = f"{self.folder / self.names[number]}: row {row}"
        try:
            return f"{place}, key {self._keys(number)[0][row].as_py()!r}"
        except DataError:  # the message is about a file that cannot be read
            return place

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order. Raises DataError for one that is missing or occurs twice."""
        keys = self._keys(number)[0].to_pylist()
        if "embedding" in self.columns:  # file names, cut at the first dot of the base name
            keys = [key and re.sub(r"\.[^/]*$", "", key) for key in keys]
        return checked_keys(keys, lambda row: f"{self.folder / self.names[number]}: row {row}")

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of these keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]]."""
        return key_hashes(self.shard_keys(number))

    def _locate(self, i: int) -> tuple[int, int]:
        return located(i, self._ends, self.folder)

    def _keys(self, number: int) -> tuple[Any, Any]:
        with self._lock:
            if number not in self._names:
                wanted = ["key", *(["extension"] if "extension" in self.columns else [])]
                arrays = self._read(number, wanted)
                self._names[number] = arrays[0], (arrays[1] if len(arrays) > 1 else None)
            return self._names[number]

    def _read(self, number: int, columns: Sequence[str]) -> list[Any]:
        """Reads columns of a shard as Arrow arrays of text. Raises DataError."""
        import pyarrow as pa

        def read(file: Any) -> Any:
            table = file.read(columns=list(columns))
            table.validate(full=True)  # in particular that the text is UTF-8
            return table

        parts: list[list[Any]] = [[] for _ in columns]
        for path, rows in zip(self._files[number], self._rows[number], strict=True):
            table = read_parquet(path, read)
            if table.num_rows != rows:
                raise DataError(f"{path} has changed since the data set was opened; run the command again")
            for name, part in zip(columns, parts, strict=True):
                if table.column_names.count(name) != 1:
                    raise DataError(f"{path} does not have exactly one column {name!r}, as {self._files[0][0]} has")
                column = table.column(name)
                kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
                    raise DataError(f"{path}: the column {name!r} is {column.type}, not text")
                part += column.cast(pa.large_string()).chunks
        return [pa.concat_arrays(part or [pa.array([], pa.large_string())]) for part in parts]


class TableImages:
    """The Samples of one CSV, TSV or JSONL file whose rows name an image each; 10 000 rows are a shard.

    The image is named by the first of the columns file_name, filepath, image and path that exists; the key is in the
    column "key", or else it is the row's number, as in sources.Lines, so that a cache made from the file matches. Rows
    are read when they are needed; 8 bytes a row stay in memory.

    root: the folder that the names of images are relative to and must not lead out of; None for the file's folder.

    Raises DataError for a file that does not parse, has none of these columns, or no row.
    """

    def __init__(self, table: str | Path, root: str | Path | None = None):
        self.folder = Path(table)
        self.root = Path(os.path.abspath(self.folder.parent if root is None else root))
        self._rows = Rows(self.folder)
        self.columns = self._rows.columns
        column = next((name for name in FILE_COLUMNS if name in self.columns), None)
        if column is None:
            raise DataError(
                f"{self.folder} names no images: expected a column {', '.join(FILE_COLUMNS[:-1])} or "
                f"{FILE_COLUMNS[-1]}; there are: {', '.join(self.columns)}"
            )
        for name in (column, "key"):
            if self.columns.count(name) > 1:
                raise DataError(f"{self.folder} has {name!r} twice among its columns; leave one out")
        self._column, self._keyed = column, "key" in self.columns
        self._rows.cut(SHARD_ROWS)
        self.names, self.shard_sizes = self._rows.names, self._rows.sizes
        if not len(self):
            raise DataError(f"{self.folder} holds no sample")

    def __len__(self) -> int:
        return len(self._rows)

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""
        try:
            name = self._rows.row(i).get(self._column)
        except DataError as error:
            raise BadSample("unreadable", str(error)) from error
        if not name or not isinstance(name, str):
            raise BadSample("missing", f"{self.where(i)} has no {self._column!r}")
        return read_image(inside(self.root, name))

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i: the column `field`; for "txt" it is "caption" where there is no column "txt".

        Raises DataError when it is missing or blank.
        """
        field = column_of(self.folder, field, self.columns, "caption")
        return checked_caption(self._rows.row(i).get(field), field, lambda: self.where(i))

    def meta(self, i: int) -> dict:
        """The row of sample i."""
        return self._rows.row(i)

    def where(self, i: int) -> str:
        """File and row of sample i, for messages."""
        return f"{self.folder}: row {i}"

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order. Raises DataError for one that is missing or occurs twice."""
        start = self._rows.starts[number]
        if not self._keyed:
            return [str(start + row) for row in range(self.shard_sizes[number])]
        keys = [row.get("key") for row, _ in self._rows.read(number)]
        return checked_keys(keys, lambda row: f"{self.folder}: row {start + row}")

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of these keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]]."""
        return key_hashes(self.shard_keys(number))


def _groups(folder: Path) -> dict[str, list[Path]]:
    """Name of each shard -> its parquet files, in order, for a folder of parquet files or of folders of them."""
    flat = {path.name: [path] for path in sorted(folder.glob("*.parquet"))}
    if flat:
        return flat  # without listing the folders next to them, which may hold millions of images
    nested = {path.name: sorted(path.glob("*.parquet"), key=_by_number) for path in sorted(folder.iterdir())}
    return {name: files for name, files in nested.items() if files}


def inside(root: Path, name: str) -> Path:
    """root / name, where root is absolute. Raises BadSample ("unreadable") for a name that leads out of root."""
    path = os.path.normpath(os.path.join(root, name))
    if "\0" in name or not path.startswith(os.path.join(root, "")):
        raise BadSample("unreadable", f"{name!r} leads out of {root}")
    return Path(path)


def column_of(path: Path, field: str, columns: Sequence[str], plain: str) -> str:
    """The column of a caption field; `plain` for "txt" where there is no column "txt". Raises DataError."""
    name = plain if field == "txt" and "txt" not in columns else field
    if name not in columns:
        raise DataError(f"{path} has no column {name!r}; choose the caption field among: {', '.join(columns)}")
    return name


def _rows_and_columns(path: Path) -> tuple[int, list[str]]:
    rows, columns = read_parquet(path, lambda file: (file.metadata.num_rows, file.schema_arrow.names))
    if columns.count("key") != 1:
        raise DataError(f"{path} has no column 'key' that names the images; there are: {', '.join(columns)}")
    return rows, columns


def _by_number(path: Path) -> list[tuple[int, str]]:
    """A sorting key that puts 2.parquet before 10.parquet."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]

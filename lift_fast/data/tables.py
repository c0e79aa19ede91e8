"""Tables as data sets: a row is a sample, and a column names or holds its image.

TableImages: a CSV, TSV or JSONL file, such as metadata.csv of Hugging Face's imagefolder; a parquet file or a folder of
them, such as data/train-00000-of-00008.parquet of a data set on the Hub; a folder that `datasets` saved (Arrow files).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..errors import DataError
from ..ops.rows.table import key_hashes
from .captions import checked_caption, checked_captions, sorted_out
from .columns import Columns, is_bytes, is_image_struct, is_text
from .links import Folder
from .options import DataOptions
from .reading import MOST_BYTES, read_image
from .rows import LINES, Rows
from .samples import BadSample, BadText, Problem

TABLES = (*LINES, ".parquet", ".arrow")  # suffixes of files with one row for each sample
CAPTION_COLUMNS = ("txt", "caption", "text", "title", "re_caption")  # the first that there is has the captions "txt"
IMAGE_COLUMNS = ("file_name", "filepath", "filename", "image", "path", "image_path")


class Table(Protocol):
    """Rows in shards; Rows and Columns implement it.

    path: for messages. columns: names. names, sizes, starts: of the shards. problems: as in Samples.
    """

    path: Path
    columns: list[str]
    names: list[str]
    sizes: list[int]
    starts: list[int]
    problems: list[Problem]

    def __len__(self) -> int: ...

    def lacking(self, name: str) -> tuple[Path, Sequence[str]] | None:
        """The first file that does not have exactly one column of this name, and its columns."""

    def read(self, number: int, names: Sequence[str]) -> list[list[Any]]:
        """Reads columns of a shard. For a row that cannot be read, a BadText stands in each of them. Raises DataError
        when a file cannot be read or has changed."""

    def row(self, i: int) -> dict[str, Any]:
        """Text and numbers of row i. Raises BadText for a row that cannot be read; DataError, IndexError."""

    def value(self, i: int, name: str) -> Any:
        """A field of row i. Raises as row does."""

    def image(self, i: int, name: str) -> Any:
        """A field of row i that names or holds an image. Raises as row does."""

    def where(self, i: int) -> str:
        """File and row of row i."""

    def place(self, i: int) -> str:
        """File, row and, where there are lines, line of row i."""

    def stamp(self, number: int) -> str:
        """Sizes and times of change of the files of a shard, as they were opened."""


class TableSamples:
    """What the Samples of all tables share: captions and keys.

    The key is in the column options.key, else in the column "key", else it is the row's number in the whole table.

    Raises DataError when there is no such column.
    """

    def __init__(self, folder: Path, table: Table, options: DataOptions):
        self.folder, self.columns = folder, table.columns
        self.names, self.shard_sizes, self.problems = table.names, table.sizes, table.problems
        self._table, self._options = table, options
        self._fields: dict[str, str] = {}  # caption field -> its column
        self._last: tuple[int, list[str], dict[int, BadText]] = -1, [], {}  # the keys of the shard that was read last
        self.key = options.key or ("key" if "key" in self.columns else None)
        if self.key is not None:
            self._check_column(self.key, "--key")

    def __len__(self) -> int:
        return len(self._table)

    def caption_field(self, field: str = "txt") -> str:
        """The column of the captions `field`; for "txt" the first of CAPTION_COLUMNS that exists. Raises DataError."""
        if field not in self._fields:
            name = field
            if field == "txt":
                name = next((name for name in CAPTION_COLUMNS if name in self.columns), "")
            if not name:
                raise DataError(
                    f"{self.folder} has no column of captions ({', '.join(CAPTION_COLUMNS)}); choose with --field "
                    f"among: {', '.join(self.columns)}"
                )
            self._check_column(name, "--field")
            self._fields[field] = name
        return self._fields[field]

    def text_fields(self) -> list[str]:
        """None: meta has all texts."""
        return []

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i, from the column caption_field(field). Raises BadText; DataError, IndexError."""
        name = self.caption_field(field)
        return checked_caption(self._table.value(i, name), name, lambda: self._described(i))

    def captions(self, number: int, field: str = "txt") -> list[str | BadText]:
        """All captions of shard `number`, in order, with the errors that caption() raises. Raises DataError."""
        name, start = self.caption_field(field), self._table.starts[number]
        keyed = self.key is not None and self.key != name
        values, *keys = self._table.read(number, [name, str(self.key)] if keyed else [name])
        return checked_captions(
            values, name, lambda row: self._described(start + row, keys[0][row] if keyed else start + row)
        )

    def meta(self, i: int) -> dict:
        """The row of sample i, without images and lists. Raises BadText, DataError."""
        return self._table.row(i)

    def where(self, i: int) -> str:
        """File and row of sample i, for messages."""
        return self._table.where(i)

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order. Raises DataError for one that is missing or occurs twice; with
        skip_bad a missing one is "", and bad_keys has both."""
        names, bad = self._sorted_keys(number)
        if not self._options.skip_bad:
            for error in bad.values():
                raise error
        return names

    def bad_keys(self, number: int) -> dict[int, BadText]:
        """Row in shard `number` -> what is wrong with its key."""
        return self._sorted_keys(number)[1]

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of these keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]]."""
        return key_hashes(self.shard_keys(number))

    def shard_stamp(self, number: int) -> str:
        """Sizes and times of change of the files of the shard."""
        return self._table.stamp(number)

    def described(self, field: str) -> str:
        """A description for the user: how many rows, where, and which captions and keys."""
        kind = "Arrow" if self.names[0].endswith(".arrow") else "parquet"
        files = f"{len(self.names)} {kind} files at {self.folder}"
        if isinstance(self._table, Rows):
            shards = "1 shard" if len(self.names) == 1 else f"{len(self.names)} shards"
            files = f"{self.folder}, cut into {shards}"
        elif self.folder.suffix.lower() in TABLES:
            files = str(self.folder)
        others = [name for name in CAPTION_COLUMNS if name in self.columns and name != field]
        also = f" (there is also {' and '.join(map(repr, others))})" if others else ""
        keys = "keys: the rows' numbers" if self.key is None else f"keys from {self.key!r}"
        return f"{len(self)} rows in {files}, captions from the column {field!r}{also}, {keys}"

    def remarks(self) -> list[str]:
        """What a user should know of how the table was read, a sentence each."""
        return self._table.remarks() if isinstance(self._table, Rows) else []

    def _key_name(self, value: Any) -> Any:
        """The sample key that a value of the key column stands for."""
        return value

    def _sorted_keys(self, number: int) -> tuple[list[str], dict[int, BadText]]:
        last, names, bad = self._last
        if last != number:
            start = self._table.starts[number]
            if self.key is None:
                names, bad = [str(start + row) for row in range(self.shard_sizes[number])], {}
            else:
                values = map(self._key_name, self._table.read(number, [self.key])[0])
                names, bad = sorted_out(list(values), lambda row: self._table.place(start + row))
            self._last = number, names, bad
        return names, bad

    def _described(self, i: int, key: Any = None) -> str:
        """File, row and key of sample i, for messages."""
        place = self._table.place(i)
        if key is None:
            try:
                key = i if self.key is None else self._table.value(i, self.key)
            except DataError:  # the message is about a row that cannot be read
                return place
        key = self._key_name(key)
        return f"{place}, key {str(key)!r}" if isinstance(key, (str, int)) else place

    def _check_column(self, name: str, option: str) -> None:
        found = self._table.lacking(name)
        # Files that lack a column have bad rows only.
        if found and not (self._options.skip_bad and self.columns.count(name) == 1):
            file, columns = found
            several = "several columns" if name in columns else "no column"
            raise DataError(f"{file} has {several} {name!r}; choose with {option} among: {', '.join(columns)}")


class TableImages(TableSamples):
    """The Samples of a table whose rows name or hold an image each.

    A CSV, TSV or JSONL file is cut into shards of options.shard_rows rows; rows are read when they are needed, and 8
    bytes a row stay in memory. Each parquet or Arrow file is a shard. The image is in options.image_column; by default
    in the first of IMAGE_COLUMNS that there is, where the first that holds images goes before those that name them, or
    in the only column of {bytes, path}. Names are relative to `root` and must not lead out of it, unless
    options.absolute_paths.

    table: the file, or a folder. root: the folder of images; None for the table's own. captions_only: there need be no
    images. groups: the shards of a folder: names and files.

    Raises DataError for a file that does not parse, no column of images, or no row.
    """

    def __init__(
        self,
        table: str | Path,
        root: str | Path | None = None,
        options: DataOptions | None = None,
        captions_only: bool = False,
        groups: Mapping[str, Sequence[Path]] | None = None,
    ):
        path, options = Path(table), options or DataOptions()
        opened: Rows | Columns
        if path.suffix.lower() in LINES and not groups:
            opened = Rows(path, options)
        else:
            opened = Columns(path, groups or {path.name: [path]}, options.skip_bad)
        super().__init__(path, opened, options)
        folder = path if groups else path.parent
        self._images = Folder(folder if root is None else root, options)
        self.root = self._images.path
        self.image_column, self._holds = self._images_in(opened)
        if not captions_only:
            self.require_images()
        if isinstance(opened, Rows):
            opened.cut(self.image_column)
            self.names, self.shard_sizes = opened.names, opened.sizes
        if not len(self):
            raise DataError(f"{path} holds no sample")

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large", "does not parse"."""
        image = self._image(i)
        if isinstance(image, Path):
            return read_image(image)
        if len(image) > MOST_BYTES:
            raise BadSample("too large", f"{self.where(i)} has {len(image)} bytes; {MOST_BYTES} are read at most")
        return image

    def image_file(self, i: int) -> Path | None:
        """The image of sample i; None where the table holds it. Raises BadSample: "missing", "unreadable", "does not
        parse"."""
        image = self._image(i)
        return image if isinstance(image, Path) else None

    def require_images(self) -> None:
        """Raises DataError when there is no column of images."""
        if self.image_column is None:
            raise DataError(
                f"{self.folder} names no images: expected a column {', '.join(IMAGE_COLUMNS[:-1])} or "
                f"{IMAGE_COLUMNS[-1]}; choose with --image-column among: {', '.join(self.columns)}"
            )

    def _image(self, i: int) -> bytes | Path:
        """The encoded image of sample i, or its file. Raises BadSample."""
        if self.image_column is None:
            raise BadSample("missing", f"{self.folder} names no images")
        try:
            value = self._table.image(i, self.image_column)
        except BadSample:
            raise
        except DataError as error:
            raise BadSample("unreadable", str(error)) from error
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes) and self._holds:
            return value
        if not value or not isinstance(value, str):
            raise BadSample("missing", f"{self.where(i)} has no {self.image_column!r}")
        return self._images.file(value)

    def _images_in(self, table: Rows | Columns) -> tuple[str | None, bool]:
        """The column of images, and whether it holds them. Raises DataError when the one chosen cannot be that."""
        chosen = self._options.image_column
        if chosen is not None:
            self._check_column(chosen, "--image-column")
        if isinstance(table, Rows):
            name = chosen or next((name for name in IMAGE_COLUMNS if name in self.columns), None)
            if name is not None:
                self._check_column(name, "--image-column")
            return name, False
        kinds = {field.name: field.type for field in table.schema}
        holding = [name for name, kind in kinds.items() if is_bytes(kind) or is_image_struct(kind)]
        naming = [name for name, kind in kinds.items() if is_text(kind)]
        if chosen is not None:
            if chosen not in (*holding, *naming):
                raise DataError(f"{self.folder}: the column {chosen!r} is {kinds[chosen]}, not images or their names")
            return chosen, chosen in holding
        structs = [name for name in holding if is_image_struct(kinds[name])]
        for name in (*(name for name in IMAGE_COLUMNS if name in holding), *(structs if len(structs) == 1 else ())):
            self._check_column(name, "--image-column")
            return name, True
        named = next((name for name in IMAGE_COLUMNS if name in naming), None)
        if named is not None:
            self._check_column(named, "--image-column")
        return named, False

"""Sources of captions to embed: tar shards, parquet files, or one CSV, TSV or JSONL file.

A source is cut into shards, and cache shard k holds the captions of its shard k. Opening a source counts its samples;
keys and captions are read a shard at a time.
"""

import csv
import io
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import ConfigError, DataError
from .reading import FILES, stamp_of
from .shards import Shards

SHARD_ROWS = 10_000
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (*DELIMITERS, ".jsonl", ".ndjson")  # suffixes of files with one row for each sample


class Source(Protocol):
    """Captions in shards. path: for messages. field: the caption. names, sizes: name and samples of each shard."""

    path: Path
    field: str
    names: list[str]
    sizes: list[int]

    def read(self, number: int) -> tuple[list[str], list[str]]:
        """Reads the sample keys and the captions of shard `number`, in order; captions without surrounding space.

        Raises DataError, naming the shard, the row and the key, for a caption that is missing, blank or not text, a key
        that is missing or a duplicate, and a shard that does not parse or has changed.
        """

    def __str__(self) -> str:
        """A description for the user: how many samples, where, and which captions and keys."""


def open_source(
    path: str | Path, field: str | None = None, key: str | None = None, shard_rows: int | None = None
) -> Source:
    """Opens the captions at `path`: a folder of tar shards or parquet files, or a .parquet, .csv, .tsv or .jsonl file.

    field: for tars "txt" (the default) or an entry of the .json; for other files a column, by default "re_caption" of
    parquet and "caption" of the rest. key: the column of sample keys, not for tars; None for "key" where there is such
    a column, else for the number of the row in the whole source. shard_rows: rows in a shard of CSV, TSV or JSONL; None
    for 10 000.

    Raises DataError when there is nothing at `path`, it cannot be read, or has no such column; ConfigError for a
    setting that does not apply to the files.
    """
    path = Path(path)
    lines = path.suffix.lower() in TABLES
    if shard_rows is not None and path.exists() and not (lines and path.is_file()):
        raise ConfigError(f"--shard-rows cuts one CSV, TSV or JSONL file; the files at {path} are the shards")
    if path.is_file():
        if lines:
            return Lines(path, field or "caption", key, SHARD_ROWS if shard_rows is None else shard_rows)
        if path.suffix.lower() == ".parquet":
            return Parquet(path, field or "re_caption", key)
        kinds = ", ".join((".parquet", *TABLES))
        raise DataError(f"{path} is no file of captions ({kinds}); to read a tar shard, name its folder")
    if path.is_dir() and not any(path.glob("*.tar")):
        if any(path.glob("*.parquet")):
            return Parquet(path, field or "re_caption", key)
        raise DataError(f"{path} holds no .tar shard and no .parquet file; name a CSV or JSONL file itself")
    source = Tars(Shards(path), field or "txt")
    if key is not None:
        raise ConfigError(f"--key names a column; the samples of tar shards at {path} have their keys in their names")
    return source


class Tars:
    """A Source of tar shards. field: "txt", or an entry of the .json."""

    def __init__(self, data: Shards, field: str = "txt"):
        self._data = data
        self.path, self.field = data.folder, field
        self.names, self.sizes = data.names, data.shard_sizes
        self._starts = list(accumulate(self.sizes, initial=0))

    def read(self, number: int) -> tuple[list[str], list[str]]:
        start = self._starts[number]
        samples = range(start, start + self.sizes[number])
        captions = [self._data.caption(i, self.field) for i in samples]
        keys = self._data.shard_keys(number)
        return _checked(keys, captions, self.field, lambda row: f"{self.names[number]}: row {row}")

    def __str__(self) -> str:
        what = "their .txt" if self.field == "txt" else f"{self.field!r} of their .json"
        return f"{len(self._data)} samples in {len(self.names)} tar shards at {self.path}, captions from {what}"


class Parquet:
    """A Source of one parquet file or a folder of them; each file is a shard. Needs pyarrow."""

    def __init__(self, path: str | Path, field: str = "re_caption", key: str | None = None):
        self.path, self.field = Path(path), field
        self._files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.parquet"))
        self.names, self.sizes = [file.name for file in self._files], []
        self._key = key
        for file in self._files:
            rows, columns = read_parquet(file, lambda table: (table.metadata.num_rows, table.schema_arrow.names))
            if key is None and file == self._files[0] and "key" in columns:
                self._key = "key"
            _check_columns(file, columns, field, self._key)
            self.sizes.append(rows)
        self._starts = list(accumulate(self.sizes, initial=0))
        _check_not_empty(self)

    def read(self, number: int) -> tuple[list[str], list[str]]:
        wanted = [self.field] if self._key in (None, self.field) else [self.field, str(self._key)]
        columns = read_parquet(self._files[number], lambda table: table.read(columns=wanted).to_pydict())
        captions = columns[self.field]
        if len(captions) != self.sizes[number]:
            raise DataError(f"{self._files[number]} has changed while it was read; run the command again")
        start = self._starts[number]
        keys = range(start, start + len(captions)) if self._key is None else columns[self._key]
        return _checked(keys, captions, self.field, lambda row: f"{self._files[number]}: row {row}")

    def __str__(self) -> str:
        return (
            f"{sum(self.sizes)} rows in {len(self.names)} parquet files at {self.path}, captions from the column "
            f"{self.field!r}, {_key_in_words(self._key)}"
        )


class Lines:
    """A Source of one CSV, TSV or JSONL file, read by Rows; every `shard_rows` samples are a shard."""

    def __init__(self, path: str | Path, field: str = "caption", key: str | None = None, shard_rows: int = SHARD_ROWS):
        self._rows = Rows(path)
        self.path, self.field = self._rows.path, field
        self._key = "key" if key is None and "key" in self._rows.columns else key
        _check_columns(self.path, self._rows.columns, field, self._key)
        self._rows.cut(shard_rows)
        self.names, self.sizes = self._rows.names, self._rows.sizes
        _check_not_empty(self)

    def read(self, number: int) -> tuple[list[str], list[str]]:
        keys: list[Any] = []
        captions: list[Any] = []
        lines: list[int] = []  # the line that each row ends on
        for row, line in self._rows.read(number):
            captions.append(row.get(self.field))
            keys.append(row.get(self._key) if self._key else self._rows.starts[number] + len(keys))
            lines.append(line)
        return _checked(keys, captions, self.field, lambda row: f"{self.path}: line {lines[row]}")

    def __str__(self) -> str:
        return (
            f"{sum(self.sizes)} rows in {self.path}, captions from {self.field!r}, {_key_in_words(self._key)}, "
            f"cut into {len(self.sizes)} shards"
        )


class Rows:
    """The rows, as dicts, of a CSV or TSV file with a header, or of a JSONL file, in UTF-8. Blank lines are skipped.

    columns: the names in the header, or in the first object. After `cut`: names, sizes and starts of the shards.

    Raises DataError naming the line of a file that does not parse.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.starts: list[int] = [0]
        self._delimiter = DELIMITERS.get(self.path.suffix.lower())
        self._header: list[str] = []
        self._places = array("q")  # offsets of the rows, and of the end of the last one
        self._lines: list[int] = []  # number of lines before each shard
        with self._opened() as file:
            lines = _Decoded(file, self.path)
            if self._delimiter:
                self.columns = self._header = self._parsed(lines, lambda: next(self._split(lines), []))
            else:
                self.columns = sorted(self._parsed(lines, lambda: next(self._objects(lines), {})))
            self._first = lines.place if self._delimiter else (0, 0)

    def __len__(self) -> int:
        return self.starts[-1]

    def cut(self, shard_rows: int) -> None:
        """Finds the offset of every row, and makes each `shard_rows` of them a shard. Raises ConfigError, DataError."""
        if shard_rows < 1:
            raise ConfigError(f"shard_rows is {shard_rows}: a shard holds at least 1 sample")
        with self._opened() as file:
            self._stamp = stamp_of(os.fstat(file.fileno()))
            lines = _Decoded(file, self.path, self._first)
            rows: Iterator[Any] = self._split(lines) if self._delimiter else (line for line in lines if line.strip())
            at, number = lines.place
            while self._parsed(lines, lambda: next(rows, None)) is not None:
                if not self.sizes or self.sizes[-1] == shard_rows:
                    self._lines.append(number)
                    self.sizes.append(0)
                self._places.append(at)
                self.sizes[-1] += 1
                at, number = lines.place
            self._places.append(at)
        self.names = [f"{self.path.name}#{number:05d}" for number in range(len(self.sizes))]
        self.starts = list(accumulate(self.sizes, initial=0))

    def read(self, number: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Yields the rows of a shard, each with the number of its last line.

        Raises DataError, also when the file has changed.
        """
        with self._opened() as file:
            lines = _Decoded(file, self.path, (self._places[self.starts[number]], self._lines[number]))
            rows = self._dicts(lines)
            for _ in range(self.sizes[number]):
                row = self._parsed(lines, lambda: next(rows, None))
                if row is None:
                    raise DataError(f"{self.path} has changed while it was read; run the command again")
                yield row, lines.number

    def row(self, i: int) -> dict[str, Any]:
        """Reads row i alone. Raises DataError, IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} in {self.path}")
        start = self._places[i]
        try:
            data = FILES.read(self.path, self._stamp, start, self._places[i + 1] - start)
            text = data.decode("utf-8" if start else "utf-8-sig")
            if not self._delimiter:
                return _object(text)
            rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=self._delimiter, strict=True)
            return dict(zip(self._header, next(filter(None, rows)), strict=True))
        except OSError as error:
            raise DataError(f"{self.path}: row {i} cannot be read ({error.strerror})") from error
        except (csv.Error, ValueError, RecursionError, StopIteration) as error:
            raise DataError(f"{self.path}: row {i} does not parse any more ({error}); has the file changed?") from error

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror})") from error

    def _dicts(self, lines: "_Decoded") -> Iterator[dict[str, Any]]:
        if not self._delimiter:
            return self._objects(lines)
        return (dict(zip(self._header, row, strict=True)) for row in self._split(lines))

    def _split(self, lines: "_Decoded") -> Iterator[list[str]]:
        """Yields the fields of each row of a CSV or TSV file, and of the header when `lines` begin with it."""
        for row in csv.reader(lines, delimiter=str(self._delimiter), strict=True):
            if row:
                if self._header and len(row) != len(self._header):
                    raise DataError(
                        f"{self.path}: line {lines.number} has {len(row)} fields and the header has {len(self._header)}"
                    )
                yield row

    def _objects(self, lines: "_Decoded") -> Iterator[dict[str, Any]]:
        for line in lines:
            if line.strip():
                yield _object(line)

    def _parsed(self, lines: "_Decoded", read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (csv.Error, ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: line {lines.number} does not parse ({error})") from error


def _object(line: str) -> dict[str, Any]:
    row = json.loads(line.strip())  # strips more kinds of space than JSON allows, as does the test for blank lines
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    return row


class _Decoded:
    """Iterates over the decoded lines of a file, from `place` on, and counts bytes and lines. Raises DataError."""

    def __init__(self, file: BinaryIO, path: Path, place: tuple[int, int] = (0, 0)):
        self._file, self._path = file, path
        self._at, self.number = place
        file.seek(self._at)

    @property
    def place(self) -> tuple[int, int]:
        """The number of bytes and of lines before the next line."""
        return self._at, self.number

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            encoding = "utf-8" if self._at else "utf-8-sig"
            self._at += len(line)
            self.number += 1
            try:
                yield line.decode(encoding)
            except UnicodeDecodeError as error:
                raise DataError(f"{self._path}: line {self.number} is not UTF-8 ({error.reason})") from error


def read_parquet(file: Path, read: Callable[[Any], Any]) -> Any:
    """Returns `read` of the opened parquet file. Raises DataError when it fails, or pyarrow is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{file} needs pyarrow to be read; install it with: pip install 'lift-fast[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            return read(table)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is not a whole parquet file ({str(error).splitlines()[0]})") from error


def _check_columns(path: Path, columns: Sequence[str], field: str, key: str | None) -> None:
    for name, option in ((field, "--column"), (key, "--key")):
        if name is not None and columns.count(name) != 1:
            several = "several columns" if name in columns else "no column"
            raise DataError(f"{path} has {several} {name!r}; choose with {option} among: {', '.join(columns)}")


def _check_not_empty(source: Source) -> None:
    if not sum(source.sizes):
        raise DataError(f"{source.path} holds no sample")


def checked_keys(keys: Sequence[Any], where: Callable[[int], str]) -> list[str]:
    """Returns the keys as text. Raises DataError for the first that is no valid key, or a duplicate."""
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if isinstance(key, bool) or not isinstance(key, (str, int)) or key == "":
            found = "no key" if key is None or key == "" else f"the key {key!r}, neither text nor a whole number"
            raise DataError(f"{where(row)} has {found}")
        name = str(key)
        if name in first:
            raise DataError(f"{where(row)} has the key {name!r}, as {where(first[name])} has")
        first[name] = row
        if _halved(name):
            raise DataError(f"{where(row)}, key {name!r}: half a Unicode character")
    return list(first)


def checked_caption(caption: Any, field: str, where: Callable[[], str]) -> str:
    """Returns a caption without surrounding space. Raises DataError when it is missing, blank, or not text."""
    if caption is not None and not isinstance(caption, str):
        raise DataError(f"{where()}: {field!r} is {type(caption).__name__}, not text")
    text = (caption or "").strip()
    if not text:
        raise DataError(f"{where()} has no caption {field!r}; add one or drop the sample")
    if _halved(text):
        raise DataError(f"{where()}: half a Unicode character")
    return text


def _halved(text: str) -> bool:
    """Whether the text holds half a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _checked(
    keys: Sequence[Any], captions: Sequence[Any], field: str, where: Callable[[int], str]
) -> tuple[list[str], list[str]]:
    """Returns the keys as text and the captions stripped. Raises DataError for the first that is not valid."""
    names = checked_keys(keys, where)
    texts = [
        checked_caption(caption, field, lambda: f"{where(row)}, key {names[row]!r}")  # noqa: B023 - called at once
        for row, caption in enumerate(captions)
    ]
    return names, texts


def _key_in_words(key: str | None) -> str:
    return "keys: the rows' numbers" if key is None else f"keys from {key!r}"

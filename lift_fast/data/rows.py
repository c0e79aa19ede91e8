"""The rows of CSV, TSV and JSONL files: where each begins, what does not parse, and what the fields hold.

Opening a file finds the offset of every row (8 bytes a row stay in memory); fields are read when they are needed.
"""

import csv
import io
import json
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError
from ..files import open_regular
from ..foreign import parse_json
from .options import DataOptions
from .reading import FILES, stamp_of
from .samples import BadText, Cause, Problem
from .scan import IMAGE_SUFFIXES

SHARD_ROWS = 10_000
LINES = (".csv", ".tsv", ".jsonl", ".ndjson")  # suffixes of files with one row for each sample
DELIMITED = (".csv", ".tsv")
_SEARCHED = {",": "comma", "\t": "tab", ";": "semicolon"}  # delimiters that the header of a .csv may have
_MOST_TEXT = 1 << 24  # characters of a field
_SKIP = "--skip-bad leaves such rows out"
_MOST_BYTES = 1 << 25  # of a row
_UNCLOSED = ("unexpected end of data", "field larger than field limit")  # what csv says of a quote that stays open

# 131 072 by default, and a caption may be longer. The limit is the process's; it is only ever raised.
csv.field_size_limit(max(csv.field_size_limit(), _MOST_TEXT))


class Rows:
    """The rows of a CSV or TSV file with a header, or of a JSONL file, in UTF-8. Blank lines are skipped.

    columns: the names in the header, or in the first object. After `cut`: names, sizes and starts of the shards;
    several_lines: number of rows that span lines; in_quotes: number of rows that have a field in double quotes, where
    these are kept as text because nothing else was asked for.

    Raises DataError for a file that cannot be read, or whose header does not parse or does not tell the delimiter.
    """

    def __init__(self, path: str | Path, options: DataOptions | None = None):
        self.path = Path(path)
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.starts: list[int] = [0]
        self.problems: list[Problem] = []
        self.several_lines = self.in_quotes = self._first_several = self._first_in_quotes = 0
        self._options = options or DataOptions()
        self._bad: dict[int, BadText] = {}  # rows of CSV and TSV that do not parse; in JSONL they are found later
        self._places = array("q")  # offsets of the rows, and of the end of the last one
        self._lines: list[int] = []  # number of lines before each shard
        self._last: tuple[int, dict[str, list[Any]]] = -1, {}  # number and columns of the shard that was read last
        self._counted = -1, 0  # a row, and the number of lines before it
        self._delimited = self.path.suffix.lower() in DELIMITED
        with self._opened() as file:
            self._stamp = stamp_of(os.fstat(file.fileno()))
            lines = _Lines(file, self.path)
            try:
                self.columns = self._header(lines) if self._delimited else self._names_of_first(lines)
            except (csv.Error, ValueError) as error:
                raise self._error(error, max(1, lines.number)) from error
            self._first = lines.place if self._delimited else (0, 0)

    def __len__(self) -> int:
        return self.starts[-1]

    def cut(self, image: str | None = None) -> None:
        """Finds the offset of every row, and makes each options.shard_rows of them a shard.

        image: the column that names the images, if there is one. Raises DataError for a row of CSV or TSV that does not
        parse, unless the options skip bad samples.
        """
        shard_rows = self._options.shard_rows or SHARD_ROWS
        with self._opened() as file:
            lines = _Lines(file, self.path, self._first)
            for at, number in self._delimited_rows(lines, image) if self._delimited else _json_rows(lines):
                if len(self._places) % shard_rows == 0:
                    self._lines.append(number)
                self._places.append(at)
            count = len(self._places)
            self._places.append(lines.place[0])
        self._bad_rows = list(self._bad)
        self.sizes = [min(shard_rows, count - start) for start in range(0, count, shard_rows)]
        self.names = [f"{self.path.name}#{number:05d}" for number in range(len(self.sizes))]
        self.starts = list(accumulate(self.sizes, initial=0))

    def read(self, number: int, names: Sequence[str]) -> list[list[Any]]:
        """Reads columns of a shard. For a row that does not parse, a BadText stands in each of them.

        Raises DataError when the file cannot be read or has changed.
        """
        last, columns = self._last
        if last != number or not columns.keys() >= set(names):
            columns = dict(zip(names, self._columns(number, names), strict=True))
            self._last = number, columns
        return [columns[name] for name in names]

    def row(self, i: int) -> dict[str, Any]:
        """Reads row i alone. Raises BadText when it does not parse; DataError, IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} in {self.path}")
        if i in self._bad:
            raise BadText(self._bad[i].cause, self._bad[i].reason)
        try:
            data = self._bytes(i, i + 1)
        except OSError as error:
            raise DataError(f"{self.path}: row {i} cannot be read ({error.strerror})") from error
        if self._delimited:
            fields = self._fields(data, 1, range(len(self.columns)))
            return {name: values[0] for name, values in zip(self.columns, fields, strict=True)}
        row = self._object(i, data)
        if isinstance(row, BadText):
            raise row
        return row

    def value(self, i: int, name: str) -> Any:
        """A field of row i. Raises as row does."""
        return self.row(i).get(name)

    image = value

    def lacking(self, name: str) -> tuple[Path, Sequence[str]] | None:
        """File and columns, unless exactly one column has this name."""
        return None if self.columns.count(name) == 1 else (self.path, self.columns)

    def remarks(self) -> list[str]:
        """What a user should know of how the file was read, a sentence each."""
        found = []
        for count, line, what in (
            (self.several_lines, self._first_several, "rows that span several lines, in double quotes"),
            (self.in_quotes, self._first_in_quotes, "rows with quotes around a field, which --quoting minimal removes"),
        ):
            if count:
                found.append(f"{self.path}: {what}: {count}, the first at line {line}")
        return found

    def where(self, i: int) -> str:
        """File and row of row i, for messages."""
        return f"{self.path}: row {i}"

    def place(self, i: int) -> str:
        """File, row and line of row i, for messages."""
        try:
            number = bisect_right(self.starts, i) - 1
            row, lines = self._counted
            if not self.starts[number] <= row <= i:
                row, lines = self.starts[number], self._lines[number]
            lines += self._bytes(row, i).count(b"\n")
            self._counted = i, lines
            return f"{self.path}: row {i}, line {lines + 1}"
        except OSError:
            return f"{self.path}: row {i}"

    def stamp(self, number: int) -> str:
        """Size and time of change of the file, as it was opened."""
        return f"{self._stamp[0]}-{self._stamp[1]}"

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with io.BufferedReader(open_regular(self.path)) as file:
                yield file
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror})") from error

    def _bytes(self, first: int, end: int) -> bytes:
        """The bytes of the rows from `first` to before `end`. Raises OSError, also when the file has changed."""
        start = self._places[first]
        return FILES.read(self.path, self._stamp, start, self._places[end] - start)

    def _error(self, error: Exception, line: int) -> BadText:
        """What an error means that came up while line number `line` was read."""
        if isinstance(error, UnicodeDecodeError):
            return BadText("not UTF-8", f"{self.path}: line {line} is not UTF-8 ({error.reason})")
        return BadText("does not parse", f"{self.path}: line {line} does not parse ({_in_words(error)})")

    def _changed(self) -> DataError:
        return DataError(f"{self.path} has changed while it was read; run the command again")

    # CSV and TSV

    def _header(self, lines: "_Lines") -> list[str]:
        """Reads the header, and decides on delimiter and quoting."""
        first = next((line for line in lines if line.strip()), "")
        lines.back()
        delimiter, quoting = self._options.delimiter, self._options.quoting
        if delimiter is None:
            delimiter = "\t" if self.path.suffix.lower() == ".tsv" else self._delimiter_of(first)
        delimiter = "\t" if delimiter == "tab" else delimiter
        if quoting == "auto":
            quoting = "none" if delimiter == "\t" and '"' not in first else "minimal"
        self._quoted = quoting == "minimal"
        self._format: dict[str, Any] = {
            "delimiter": delimiter,
            "quoting": csv.QUOTE_MINIMAL if self._quoted else csv.QUOTE_NONE,
            "strict": True,
        }
        return next(filter(None, csv.reader(lines, **self._format)), [])

    def _delimiter_of(self, header: str) -> str:
        """The delimiter of a header: a comma where there is none. Raises DataError when it may be several."""
        found = [mark for mark in _SEARCHED if len(next(csv.reader([header], delimiter=mark))) > 1] if header else []
        if len(found) > 1:
            marks = " and ".join(_SEARCHED[mark] for mark in found)
            raise DataError(f"{self.path}: its header has {marks}; say which of them delimits, with --delimiter")
        return found[0] if found else ","

    def _delimited_rows(self, lines: "_Lines", image: str | None) -> Iterator[tuple[int, int]]:
        """Yields the place of every row; adds those that do not parse to self._bad. Raises DataError for these when
        bad samples are not skipped."""
        width = len(self.columns)
        names = [k for k, name in enumerate(self.columns) if name == image]
        reader = csv.reader(lines, **self._format)
        delimiter = self._format["delimiter"]
        trusted, told = self._options.quoting == "minimal", self._options.quoting == "auto" and not self._quoted
        while True:
            place = lines.begin()
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                first, last = place[1] + 1, lines.number
                if isinstance(error, csv.Error) and str(error).startswith(_UNCLOSED):
                    lines.back(1)  # the rest may be good
                    error = csv.Error("a double quote opens there and does not close; --quoting none keeps it as text")
                    last = first
                bad = self._error(error, last)
                reason = bad.reason
                if last > first:
                    reason += f", in a row whose quote opens at line {first}"
                yield from self._refused(lines.places(), bad.cause, reason)
                continue
            if not row:
                continue
            last = lines.number
            if last > place[1] + 1 and not trusted and _could_be_rows(lines.since, delimiter, width, names):
                reason = (
                    f"{self.path}: a quote opens at line {place[1] + 1} and closes at line {last}, and lines "
                    "between look like rows; --quoting none keeps quotes as text, --quoting minimal reads them as one"
                )
                yield from self._refused(lines.places(), "does not parse", reason)
                continue
            if len(row) != width:
                reason = f"{self.path}: line {last} has {len(row)} fields and the header has {width}"
                yield from self._refused([place], "does not parse", reason)
                continue
            if last > place[1] + 1:
                self._first_several = self._first_several or place[1] + 1
                self.several_lines += 1
            if told and b'"' in lines.since[0]:
                if any(len(field) > 1 and field[0] == field[-1] == '"' for field in row):
                    self._first_in_quotes = self._first_in_quotes or place[1] + 1
                    self.in_quotes += 1
            yield place

    def _refused(self, places: Iterable[tuple[int, int]], cause: Cause, reason: str) -> Iterator[tuple[int, int]]:
        """Yields the places of bad rows: of all lines, where a quote may have joined rows. Raises DataError unless bad
        samples are skipped."""
        if not self._options.skip_bad:
            raise DataError(f"{reason}; {_SKIP}")
        for place in places:
            self._bad[len(self._places)] = BadText(cause, reason)
            yield place

    def _fields(self, data: bytes, count: int, columns: Sequence[int]) -> list[list[str]]:
        """The values of these columns in `count` rows. Raises DataError when the file has changed."""
        found: list[list[str]] = [[] for _ in columns]
        try:
            # Rows are dropped at once: Python's garbage collection of many of them takes longer than parsing them.
            for row in csv.reader(io.StringIO(data.decode(), newline="\n"), **self._format):
                if row:
                    for values, k in zip(found, columns):  # noqa: B905 - of equal length
                        values.append(row[k])
        except (csv.Error, ValueError, IndexError) as error:
            raise self._changed() from error
        if any(len(values) != count for values in found):
            raise self._changed()
        return found

    # all

    def _columns(self, number: int, names: Sequence[str]) -> list[list[Any]]:
        """Reads columns of a shard, as read does."""
        first, end = self.starts[number], self.starts[number + 1]
        try:
            data = self._bytes(first, end)
        except OSError as error:
            raise self._changed() from error
        start = self._places[first]

        def part(row: int, stop: int) -> bytes:
            return data[self._places[row] - start : self._places[stop] - start]

        found: list[list[Any]] = [[] for _ in names]
        if not self._delimited:
            for i in range(first, end):
                row = self._object(i, part(i, i + 1))
                for values, name in zip(found, names, strict=True):
                    values.append(row if isinstance(row, BadText) else row.get(name))
            return found
        columns = [self.columns.index(name) for name in names]
        bad = self._bad_rows[bisect_left(self._bad_rows, first) : bisect_left(self._bad_rows, end)]
        for stop in (*bad, end):
            if first < stop:
                for values, more in zip(found, self._fields(part(first, stop), stop - first, columns), strict=True):
                    values += more
            if stop < end:
                for values in found:
                    values.append(self._bad[stop])
            first = stop + 1
        return found

    # JSONL

    def _names_of_first(self, lines: "_Lines") -> list[str]:
        """The names in the first object."""
        while True:
            lines.begin()
            try:
                line = next(lines, None)
                if line is None:
                    return []
                if line.strip():
                    return sorted(_object(line))
            except ValueError:
                if not self._options.skip_bad:
                    raise

    def _object(self, i: int, data: bytes) -> dict[str, Any] | BadText:
        """Row i, or what is wrong with it."""
        try:
            return _object(data.decode("utf-8" if self._places[i] else "utf-8-sig"))
        except UnicodeDecodeError as error:
            return BadText("not UTF-8", f"{self.place(i)} is not UTF-8 ({error.reason})")
        except ValueError as error:
            return BadText("does not parse", f"{self.place(i)} does not parse ({_in_words(error)})")


def _object(line: str) -> dict[str, Any]:
    # strip: of more kinds of space than JSON allows, as the test for blank lines
    row = parse_json(line.strip().encode())
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    return row


def _json_rows(lines: "_Lines") -> Iterator[tuple[int, int]]:
    """Yields the place of every line that is not blank."""
    for line, place in lines.raw():
        if line[:1] == b"{" or line.decode("utf-8" if place[0] else "utf-8-sig", "replace").strip():
            yield place


def _in_words(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)


def _could_be_rows(lines: Sequence[bytes], delimiter: str, width: int, names: Sequence[int]) -> bool:
    """Whether several lines would be rows if quotes were text.

    names: the column of the names of images, if there is one. When that of the first line ends as an image's name does,
    one more line with such a name suffices: others may be bad. Else all lines must have as many fields as the header.
    """
    rows = [line.decode(errors="replace").rstrip("\r\n").split(delimiter) for line in lines if line.strip()]
    whole = [len(row) == width for row in rows]
    named = [
        fits and all(row[k].strip(' "').rpartition(".")[2].lower() in IMAGE_SUFFIXES for k in names)
        for row, fits in zip(rows, whole, strict=True)
    ]
    if names and named[:1] == [True]:
        return any(named[1:])
    return len(rows) > 1 and all(whole)


class _Lines:
    """Iterates over the lines of a file as text, from `place` on: the numbers of bytes and of lines before the next.

    since: the bytes of the lines since the last `begin`, which was called at the place `began`.

    Iterating raises UnicodeDecodeError, and goes on with the next line afterwards; csv.Error for a quote that stays
    open too long; DataError for any other row that is too long. path: for its message.
    """

    def __init__(self, file: BinaryIO, path: Path, place: tuple[int, int] = (0, 0)):
        self._file, self._path = file, path
        self._at, self.number = self.began = place
        self.since: list[bytes] = []
        file.seek(self._at)

    @property
    def place(self) -> tuple[int, int]:
        return self._at, self.number

    def begin(self) -> tuple[int, int]:
        """Begins a row, and returns its place."""
        self.since.clear()
        self.began = self._at, self.number
        return self.began

    def back(self, lines: int = 0) -> None:
        """Goes back to the beginning of the row, or to the end of its first line."""
        del self.since[lines:]
        self._at = self.began[0] + sum(map(len, self.since))
        self.number = self.began[1] + lines
        self._file.seek(self._at)

    def places(self) -> Iterable[tuple[int, int]]:
        """The places of the lines of the row that are not blank."""
        ends = accumulate(map(len, self.since), initial=self.began[0])
        places = [(at, self.began[1] + k) for k, at in enumerate(ends)]
        return [place for place, line in zip(places, self.since, strict=False) if line.strip()]

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline(_MOST_BYTES + 1)
        if not line:
            raise StopIteration
        first = not self._at
        self._at += len(line)
        self.number += 1
        if self._at - self.began[0] > _MOST_BYTES and self.since and not any(b'"' in each for each in self.since[1:]):
            raise csv.Error(_UNCLOSED[1])  # in few characters of many bytes, which csv does not say of itself
        self._check_length(self.began[0])
        self.since.append(line)
        return line.decode("utf-8-sig" if first else "utf-8")

    def raw(self) -> Iterator[tuple[bytes, tuple[int, int]]]:
        """Yields the bytes of each line, and its place."""
        while line := self._file.readline(_MOST_BYTES + 1):
            place = self._at, self.number
            self._at += len(line)
            self.number += 1
            self._check_length(place[0])
            yield line, place

    def _check_length(self, begin: int) -> None:
        """Raises DataError for a row from `begin` to here that is too long."""
        if self._at - begin > _MOST_BYTES:
            raise DataError(
                f"{self._path}: a row that reaches line {self.number} has more than {_MOST_BYTES} bytes; close its "
                "quote, or name another file"
            )

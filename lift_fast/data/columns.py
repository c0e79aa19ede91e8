"""Parquet and Arrow files, read by column. Needs pyarrow.

Arrow files are those of Hugging Face's `datasets`, and are mapped. Of parquet files, columns are read a file at a time,
and those of images a row group at a time; at most 1 GiB of them stays in memory.
"""

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .reading import Stamp, cpu_count, stamp_at, stamp_of
from .samples import BadText, Problem, located

KEPT_BYTES = 1 << 30
_FEW_ROWS, _ROWS_A_BYTE = 1 << 20, 64  # what a file may have at most: this, and so many for each byte
_ARROW_FILE, _ARROW_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"  # begin of an IPC file, end of an IPC stream


class _File(NamedTuple):
    """A parquet or Arrow file. ends: the number of rows up to the end of each row group, or record batch.

    table: of an Arrow file, mapped. cut: why the rest of an Arrow file cannot be read.
    """

    path: Path
    stamp: Stamp
    schema: Any
    ends: list[int]
    table: Any = None
    cut: str = ""

    @property
    def rows(self) -> int:
        return self.ends[-1] if self.ends else 0


class _Column(NamedTuple):
    """A column of a file, or of one of its row groups, as an Arrow array. lost: row in it -> why it cannot be read.

    bytes: of memory.
    """

    values: Any
    lost: dict[int, str]
    bytes: int


class Columns:
    """The rows of groups of parquet or Arrow files, each group a shard.

    columns, schema: of the first file that can be read. names, sizes, starts: of the shards. problems: with skip_bad,
    what cannot be read; a file that cannot be read at all has no rows.

    path: the file or folder, for messages. groups: the name of each shard -> its files.

    Raises DataError for files that cannot be read, unless skip_bad, and when pyarrow is not installed.
    """

    def __init__(self, path: Path, groups: Mapping[str, Sequence[Path]], skip_bad: bool = False):
        self.path, self._skip_bad = path, skip_bad
        self.names = list(groups)
        flat = [file for group in groups.values() for file in group]
        _pyarrow(flat[0])
        with ThreadPoolExecutor(min(32, 4 * cpu_count())) as pool:
            opened = dict(zip(flat, pool.map(self._try_to_open, flat), strict=True))
        files = {file: found for file, found in opened.items() if isinstance(found, _File)}
        errors = {file: found for file, found in opened.items() if isinstance(found, DataError)}
        if errors and not (files and skip_bad):
            first = next(iter(errors.values()))
            raise DataError(f"{first}; --skip-bad leaves it out") if files else first
        self.problems = [Problem(str(file), "damaged shard", str(error)) for file, error in errors.items()]
        self.problems += [Problem(str(file), "damaged shard", found.cut) for file, found in files.items() if found.cut]
        self._files = [[files[file] for file in group if file in files] for group in groups.values()]
        self._first = next(iter(files.values()))
        self.schema = self._first.schema
        self.columns: list[str] = self.schema.names
        self.sizes = [sum(file.rows for file in group) for group in self._files]
        self.starts = list(accumulate(self.sizes, initial=0))
        self._ends = self.starts[1:]
        self._lock = threading.Lock()
        self._locks: dict[Path, threading.Lock] = {}  # held while a file is read
        self._kept: OrderedDict[tuple[Path, str, int | None], _Column] = OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def lacking(self, name: str) -> tuple[Path, Sequence[str]] | None:
        """The first file that does not have exactly one column of this name, and its columns."""
        files = (file for group in self._files for file in group if file.schema.names.count(name) != 1)
        return next(((file.path, file.schema.names) for file in files), None)

    def read(self, number: int, names: Sequence[str]) -> list[list[Any]]:
        """Reads columns of a shard. For a row that cannot be read, a BadText stands in each of them.

        Raises DataError when a file cannot be read or has changed.
        """
        return [self._values(number, name) for name in names]

    def texts(self, number: int, name: str) -> Any:
        """A column of a shard as an Arrow array of large_string, with null for a row that cannot be read. Raises
        DataError, also for a column that is neither text nor whole numbers."""
        import pyarrow as pa

        chunks: list[Any] = []
        for file in self._files[number]:
            column = self._column(file, name)
            kind = column.values.type
            if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
                raise DataError(f"{file.path}: the column {name!r} is {kind}, not text")
            part = column.values.cast(pa.large_string())
            chunks += part.chunks if isinstance(part, pa.ChunkedArray) else [part]
        return pa.concat_arrays(chunks or [pa.array([], pa.large_string())])

    def row(self, i: int) -> dict[str, Any]:
        """The text and the numbers of row i, as value gives them."""
        return {field.name: self.value(i, field.name) for field in self.schema if _is_plain(field.type)}

    def value(self, i: int, name: str) -> Any:
        """A field of row i; text that is not UTF-8 is bytes. Raises BadText when it cannot be read; DataError when the
        file cannot be read or has changed; IndexError."""
        file, row = self._locate(i)
        return self._value(i, self._column(file, name), row)

    def image(self, i: int, name: str) -> Any:
        """A field of row i, as value gives it; of a parquet file only its row group is read."""
        file, row = self._locate(i)
        if file.table is not None:
            return self.value(i, name)
        group = bisect_right(file.ends, row)
        return self._value(i, self._column(file, name, group), row - (file.ends[group - 1] if group else 0))

    def place(self, i: int) -> str:
        """File and row of row i, for messages."""
        number, row = located(i, self._ends, self.path)
        return f"{self.path / self.names[number] if self.path.is_dir() else self.path}: row {row}"

    where = place

    def stamp(self, number: int) -> str:
        """Sizes and times of change of the files of a shard, as they were opened."""
        return " ".join(f"{file.stamp[0]}-{file.stamp[1]}" for file in self._files[number])

    def _try_to_open(self, path: Path) -> _File | DataError:
        try:
            return _opened(path, self._skip_bad)
        except DataError as error:
            return error.with_traceback(None)

    def _locate(self, i: int) -> tuple[_File, int]:
        number, row = located(i, self._ends, self.path)
        for file in self._files[number]:
            if row < file.rows:
                return file, row
            row -= file.rows
        raise AssertionError("no such row")

    def _value(self, i: int, column: _Column, row: int) -> Any:
        if row in column.lost:
            raise BadText("damaged shard", f"{self.place(i)}: {column.lost[row]}")
        return _python(column.values[row])

    def _values(self, number: int, name: str) -> list[Any]:
        found: list[Any] = []
        for file in self._files[number]:
            column = self._column(file, name)
            try:
                values = column.values.to_pylist()
            except UnicodeDecodeError:
                values = [_python(value) for value in column.values]
            for row, reason in column.lost.items():
                place = self.place(self.starts[number] + len(found) + row)
                values[row] = BadText("damaged shard", f"{place}: {reason}")
            found += values
        return found

    def _column(self, file: _File, name: str, group: int | None = None) -> _Column:
        """A column of a file, or of one of its row groups. Raises DataError."""
        at = file.path, name, group
        if column := self._held(at):
            if file.table is not None:  # reading a mapped file behind its end would end the process
                _check_unchanged(file)
            return column
        with self._lock:
            lock = self._locks.setdefault(file.path, threading.Lock())
        with lock:  # so that no two threads read the same
            if column := self._held(at):
                return column
            column = self._mapped(file, name) if file.table is not None else self._read(file, name, group)
        with self._lock:
            self._kept[at] = column
            total = sum(kept.bytes for kept in self._kept.values())
            while len(self._kept) > 1 and total > KEPT_BYTES:
                total -= self._kept.popitem(last=False)[1].bytes
        return column

    def _held(self, at: tuple[Path, str, int | None]) -> _Column | None:
        with self._lock:
            if at not in self._kept:
                return None
            self._kept.move_to_end(at)
            return self._kept[at]

    def _mapped(self, file: _File, name: str) -> _Column:
        if problem := self._absent(file, name):
            return problem
        _check_unchanged(file)
        column = file.table.column(name)
        try:
            for chunk in column.chunks:
                _check_offsets(chunk)
        except ValueError as error:  # pyarrow's ArrowInvalid
            reason = f"{file.path} is not a whole Arrow file ({_first_line(error)})"
            if not self._skip_bad:
                raise DataError(reason) from error
            return _lost(file.rows, reason)
        return _Column(column, {}, 0)

    def _read(self, file: _File, name: str, group: int | None) -> _Column:
        if problem := self._absent(file, name):
            return problem
        rows = file.rows if group is None else file.ends[group] - (file.ends[group - 1] if group else 0)

        def read(parquet: Any) -> Any:
            columns = [name]
            table = parquet.read(columns=columns) if group is None else parquet.read_row_group(group, columns=columns)
            if parquet.metadata.num_rows == file.rows and table.num_rows != rows:
                raise ValueError(f"{table.num_rows} of {rows} rows of {name!r} can be read")
            return parquet.metadata.num_rows, table.column(name)

        try:
            now, column = read_parquet(file.path, read)
        except DataError as error:
            if not self._skip_bad:
                raise
            if group is not None or len(file.ends) < 2:
                return _lost(rows, str(error))
            return _joined([self._read(file, name, number) for number in range(len(file.ends))])
        if now != file.rows:
            raise _changed(file)
        _check_unchanged(file)
        return _Column(column, {}, column.nbytes)

    def _absent(self, file: _File, name: str) -> _Column | None:
        """With skip_bad: a column of lost rows, for a file without one column of this name. Raises DataError."""
        if file.schema.names.count(name) == 1:
            return None
        if self._first.schema.names.count(name) == 1:
            reason = f"{file.path} does not have exactly one column {name!r}, as {self._first.path} has"
        else:
            reason = f"{file.path} has several columns {name!r}; give each a name of its own"
        if not self._skip_bad:
            raise DataError(reason)
        return _lost(file.rows, reason)


def read_parquet(file: Path, read: Callable[[Any], Any]) -> Any:
    """Returns `read` of the opened parquet file. Raises DataError when it fails, or pyarrow is not installed."""
    pyarrow = _pyarrow(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            return read(table)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is not a whole parquet file ({_first_line(error)})") from error


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is text."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_bytes(kind: Any) -> bool:
    """Whether an Arrow type is that of bytes."""
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def is_image_struct(kind: Any) -> bool:
    """Whether an Arrow type is {bytes, path}, as Hugging Face's `datasets` stores images."""
    from pyarrow import types

    if not types.is_struct(kind):
        return False
    fields = {kind.field(k).name: kind.field(k).type for k in range(kind.num_fields)}
    return "bytes" in fields and is_bytes(fields["bytes"]) and set(fields) <= {"bytes", "path"}


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    return is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _opened(path: Path, skip_bad: bool) -> _File:
    """Reads the footer of a parquet file, or maps an Arrow file. Raises DataError."""
    try:
        stamp = stamp_at(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    if path.suffix.lower() == ".arrow":
        return _opened_arrow(path, stamp, skip_bad)

    def footer(parquet: Any) -> tuple[Any, list[int]]:
        metadata = parquet.metadata
        groups = [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]
        _check_rows(groups, stamp)
        return _readable(parquet.schema_arrow), list(accumulate(groups))

    return _File(path, stamp, *read_parquet(path, footer))


def _check_rows(counts: Sequence[int], stamp: Stamp) -> None:
    """Raises ValueError for numbers of rows that a file of this size does not have, even if all are alike."""
    if min(counts, default=0) < 0 or sum(counts) > _FEW_ROWS + _ROWS_A_BYTE * stamp[0]:
        raise ValueError(f"it says that it has {sum(counts)} rows in {stamp[0]} bytes")


def _readable(schema: Any) -> Any:
    """The schema. Raises ValueError when the name of a column, or of a part of one, is not UTF-8."""
    names = list(schema.names)
    kinds = list(schema.types)
    while kinds:
        kind = kinds.pop()
        parts = [kind.field(k) for k in range(kind.num_fields)]
        names += [part.name for part in parts]
        kinds += [part.type for part in parts]
    return schema


def _opened_arrow(path: Path, stamp: Stamp, skip_bad: bool) -> _File:
    pa = _pyarrow(path)
    batches: list[Any] = []
    schema, cut = None, ""
    try:
        file = pa.memory_map(str(path))
        if file.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE:
            reader = pa.ipc.open_file(file)
            schema = _readable(reader.schema)
            for number in range(reader.num_record_batches):
                batches.append(reader.get_batch(number))
        else:
            reader = pa.ipc.open_stream(file)
            schema = _readable(reader.schema)
            batches.extend(reader)
            if file.read_at(len(_ARROW_END), stamp[0] - len(_ARROW_END)) != _ARROW_END:
                raise ValueError("it lacks its end mark")
    except (pa.ArrowException, OSError, ValueError) as error:
        cut = f"{path} is not a whole Arrow file ({_first_line(error)})"
        if schema is None or not skip_bad:
            raise DataError(cut) from error
        cut += f"; its first {sum(batch.num_rows for batch in batches)} rows are read"
    counts = [batch.num_rows for batch in batches]
    try:
        _check_rows(counts, stamp)
    except ValueError as error:
        raise DataError(f"{path} is not a whole Arrow file ({error})") from error
    ends = list(accumulate(counts))
    return _File(path, stamp, schema, ends, pa.Table.from_batches(batches, schema), cut)


def _changed(file: _File) -> DataError:
    return DataError(f"{file.path} has changed since the data set was opened; run the command again")


def _check_unchanged(file: _File) -> None:
    try:
        if stamp_of(os.stat(file.path)) == file.stamp:
            return
    except OSError as error:
        raise DataError(f"{file.path} cannot be read ({error.strerror})") from error
    raise _changed(file)


def _check_offsets(array: Any) -> None:
    """Raises ValueError when an array of a mapped file refers to memory outside it. Text need not be UTF-8."""
    import pyarrow as pa

    kind = array.type
    if pa.types.is_struct(kind):
        array.validate()
        for k in range(kind.num_fields):
            _check_offsets(array.field(k))
    elif pa.types.is_dictionary(kind):
        texts = _as_bytes(array.dictionary)
        texts.validate(full=True)
        pa.DictionaryArray.from_arrays(array.indices, texts, safe=False).validate(full=True)
    else:
        _as_bytes(array).validate(full=True)


def _as_bytes(array: Any) -> Any:
    """Text as the bytes that it is stored in; other arrays as they are."""
    import pyarrow as pa

    if pa.types.is_string(array.type):
        return array.view(pa.binary())
    return array.view(pa.large_binary()) if pa.types.is_large_string(array.type) else array


def _lost(rows: int, reason: str) -> _Column:
    import pyarrow as pa

    return _Column(pa.nulls(rows), dict.fromkeys(range(rows), reason), 0)


def _joined(parts: Sequence[_Column]) -> _Column:
    """Parts of a column as one; where they were read they have one type."""
    import pyarrow as pa

    kind = next((part.values.type for part in parts if not part.lost), pa.null())
    chunks: list[Any] = []
    lost: dict[int, str] = {}
    rows = 0
    for part in parts:
        values = part.values.cast(kind)
        chunks += values.chunks if isinstance(values, pa.ChunkedArray) else [values]
        lost.update((rows + row, reason) for row, reason in part.lost.items())
        rows += len(values)
    return _Column(pa.chunked_array(chunks, kind), lost, sum(part.bytes for part in parts))


def _python(value: Any) -> Any:
    """An Arrow scalar as Python's; text that is not UTF-8 as bytes."""
    import pyarrow as pa

    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, pa.StructScalar):
            return {name: _python(value[name]) for name in value}
        return (value.value if isinstance(value, pa.DictionaryScalar) else value).as_buffer().to_pybytes()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _pyarrow(file: Path) -> Any:
    """The module, with the parts used here. Raises DataError when it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{file} needs pyarrow to be read; install it with: pip install 'lift-fast[parquet]'"
        ) from error
    return pyarrow

"""Imports parquet embeddings in the layout of LIFT's authors (github.com/Jingfeng0705/LIFT, embed_label/embed.py).

    DIR/train-00012-of-03550/0.parquet, 1.parquet, …      100 rows per file: key "000000000001.jpg", embedding [float]

Each folder becomes a shard, with its files in the order of their numbers; parquet files in DIR itself become one shard
each. A key is cut at its first dot, as by the authors' loader and by WebDataset. Different folders use the same keys
again, so only duplicate keys within one shard are an error.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendError, DataError
from ..files import open_regular
from ..ops.rows.codecs import codec_named
from ..ops.rows.quantized import QuantizedRows
from ..ops.rows.table import key_hashes
from ..progress import bar
from .codec import encode
from .rotation import Rotation
from .writer import CacheWriter

_COLUMNS = ["key", "embedding"]
_BLOCK = 1 << 20  # float32 numbers read from a file at a time


@dataclass(frozen=True)
class _Group:
    """The files of one shard, and the number of rows of each."""

    name: str
    files: list[Path]
    rows: list[int]


def import_parquet(
    folder: Path, out: Path, codec: str, encoder: dict[str, Any], field: str, progress: bool = True
) -> None:
    """Writes the embeddings in `folder` as a cache at `out`; continues an interrupted run at its first missing shard.

    encoder: the settings that the vectors were made with, recorded in the manifest, since the files do not contain
    them. field: the caption field that was embedded.

    Raises BackendError without pyarrow; DataError, naming the file and the row, for a folder that is missing or has no
    parquet file, other columns, a null, a number that is not finite, vectors of different lengths, or a duplicate key
    in one shard; CacheError and CacheMismatch as CacheWriter.
    """
    kind = codec_named(codec)
    groups = _groups(folder, progress)
    dim = _dim(groups)
    rotation = Rotation(dim) if kind.rotated else None
    sources = [{"name": group.name, "samples": sum(group.rows)} for group in groups]
    writer = CacheWriter(out, dim, codec, encoder, sources, field, rotation)
    writer.check_space()
    missing = writer.missing()
    total = sum(sum(group.rows) for group in groups)
    left = sum(sum(groups[number].rows) for number in missing)
    with (
        _one_thread_per_file() as pool,
        bar(total=total, initial=total - left, unit="row", desc="import", disable=not progress) as shown,
    ):
        for number in missing:
            group = groups[number]
            parts = [_no_rows(dim, codec, rotation)]
            hashes = [torch.empty(0, dtype=torch.int64)]
            read = pool.map(lambda path: _encoded(path, dim, codec, rotation), group.files)
            for path, count, (rows, keys) in zip(group.files, group.rows, read, strict=True):
                if len(rows) != count:
                    raise DataError(f"{path} says that it has {count} rows, and has {len(rows)}; copy it again")
                parts.append(rows)
                hashes.append(keys)
                shown.update(len(rows))
            joined = torch.cat(hashes)
            _check_duplicates(group, [len(part) for part in hashes[1:]], joined)
            writer.write_shard(number, QuantizedRows.cat(parts), joined.tolist())
    writer.finish()


@contextmanager
def _one_thread_per_file() -> Iterator[ThreadPoolExecutor]:
    """A pool with as many threads as torch has; meanwhile torch itself uses one thread in each of them."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _groups(folder: Path, progress: bool) -> list[_Group]:
    """The shards of a folder. Reads the footer of every file, to find wrong columns before anything is written."""
    _pyarrow()
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; name the folder with the parquet files")
    flat: dict[str, list[Path]] = {path.name: [path] for path in sorted(folder.glob("*.parquet"))}
    nested = {path.name: _numbered(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    nested = {name: files for name, files in nested.items() if files}
    if flat and nested:
        raise DataError(
            f"{folder} holds both parquet files and folders of parquet files ({next(iter(nested))}); separate the two"
        )
    groups = flat | nested
    if not groups:
        raise DataError(f"{folder} holds no parquet file and no folder with one; name the folder with the files")
    files = [path for group in groups.values() for path in group]
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        counted = pool.map(_count, files, chunksize=16)
        rows = dict(zip(files, bar(counted, "footers", len(files), unit="file", disable=not progress), strict=True))
    return [_Group(name, group, [rows[path] for path in group]) for name, group in groups.items()]


def _numbered(folder: Path) -> list[Path]:
    """The parquet files of a folder in numerical order: 2.parquet before 10.parquet."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted(folder.glob("*.parquet"), key=order)


def _count(path: Path) -> int:
    """The number of rows of a file. Raises DataError unless it has the columns key and embedding."""
    pa = _pyarrow()
    with _reading(path), _opened(path) as file:
        schema = file.schema_arrow
        if twice := [name for name in _COLUMNS if schema.names.count(name) > 1]:
            raise DataError(f"{path} has the column {twice[0]} more than once; write the file again with one of them")
        types = {name: schema.field(name).type for name in _COLUMNS if name in schema.names}
        key, embedding = types.get("key"), types.get("embedding")
        texts = key is not None and (pa.types.is_string(key) or pa.types.is_large_string(key))
        if not texts or embedding is None or not _is_floats(embedding):
            columns = ", ".join(f"{name} {kind}" for name, kind in zip(schema.names, schema.types, strict=True))
            raise DataError(f"{path} has the columns {columns}; it needs key (text) and embedding (a list of floats)")
        return file.metadata.num_rows


def _is_floats(kind: Any) -> bool:
    types = _pyarrow().types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return lists and types.is_floating(kind.value_type)


def _dim(groups: list[_Group]) -> int:
    """The length of the first vector. Raises DataError when there is none."""
    for group in groups:
        for path, rows in zip(group.files, group.rows, strict=True):
            if rows:
                for batch in _batches(path, 1):
                    length = batch.column("embedding").value_lengths()[0].as_py()
                    if not length:
                        raise DataError(f"{path}: row 0 has no embedding")
                    return length
    raise DataError(f"the parquet files have no rows, from {groups[0].files[0]} to {groups[-1].files[-1]}")


def _encoded(path: Path, dim: int, codec: str, rotation: Rotation | None) -> tuple[QuantizedRows, Tensor]:
    """All rows of a file as codes, and their key hashes."""
    pc = _pyarrow().compute
    parts, hashes, start = [_no_rows(dim, codec, rotation)], [torch.empty(0, dtype=torch.int64)], 0
    for batch in _batches(path, max(1, _BLOCK // dim)):
        keys, lists = batch.column("key"), batch.column("embedding")
        for column, name in ((keys, "key"), (lists, "embedding")):
            _refuse(path, start, column.is_null(), f"the {name} is null")
        lengths = lists.value_lengths()
        wrong = pc.not_equal(lengths, dim)
        if pc.any(wrong).as_py():
            bad = pc.index(wrong, True).as_py()
            raise DataError(
                f"{path}: row {start + bad} has {lengths[bad]} numbers, and the first row of the first file has {dim}; "
                "embed that caption again, or drop the row"
            )
        x = _tensor(lists.flatten(), path, start, dim)
        _refuse(path, start, ~x.isfinite().all(dim=1).numpy(), "a number is not finite")
        parts.append(encode(x, codec, rotation))
        # Cut at the first dot after the last slash: a key may be a path, whose folders have dots of their own.
        with _reading(path):  # Arrow does not check that a text is UTF-8
            hashes.append(key_hashes(pc.replace_substring_regex(keys, r"\.[^/]*$", "").to_pylist()))
        start += len(keys)
    return QuantizedRows.cat(parts), torch.cat(hashes)


def _tensor(values: Any, path: Path, start: int, dim: int) -> Tensor:
    """The numbers of a batch as [rows, dim], a view of Arrow's memory. Raises DataError for a null."""
    if values.null_count:
        bad = np.asarray(values.is_null()).reshape(-1, dim).any(axis=1)
        _refuse(path, start, bad, "a number is null")
    return torch.from_dlpack(values).view(-1, dim)


def _refuse(path: Path, start: int, bad: Any, why: str) -> None:
    """Raises DataError naming the first row where `bad`, bool [rows], is true."""
    marks = np.asarray(bad)
    if marks.any():
        raise DataError(f"{path}: row {start + int(marks.argmax())}: {why}; embed that caption again, or drop the row")


def _check_duplicates(group: _Group, sizes: list[int], hashes: Tensor) -> None:
    """Raises DataError when two rows of a shard have the same key. sizes: the rows of each of the group's files."""
    order = np.argsort(hashes.numpy(), kind="stable")
    same = np.flatnonzero(np.diff(hashes.numpy()[order]) == 0)
    if len(same):
        # The pair whose second row comes first in the shard.
        pair = min((order[k : k + 2].tolist() for k in same), key=lambda rows: rows[1])
        starts = np.cumsum([0, *sizes])
        places = []
        for row in pair:
            number = int(np.searchsorted(starts, row, side="right")) - 1
            places.append(f"row {row - int(starts[number])} of {group.files[number]}")
        raise DataError(f"{places[1]} has the key of {places[0]}; drop one of the two")


def _no_rows(dim: int, codec: str, rotation: Rotation | None) -> QuantizedRows:
    return encode(torch.empty(0, dim), codec, rotation)


def _batches(path: Path, rows: int) -> Iterator[Any]:
    """Yields the two columns of a file in batches of at most `rows` rows."""
    with _reading(path), _opened(path) as file:
        yield from file.iter_batches(batch_size=rows, columns=_COLUMNS, use_threads=False)


def _opened(path: Path) -> Any:
    """The file, opened by pyarrow, which would wait for ever for what is no regular file. Raises OSError."""
    open_regular(path).close()
    return _pyarrow().parquet.ParquetFile(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns an error of pyarrow or of the file system while a file is read into a DataError."""
    try:
        yield
    except (_pyarrow().ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path} is not a complete parquet file ({reason}); copy it again") from error


def _pyarrow() -> Any:
    """The module, with the parts used here. Raises BackendError when it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError("parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow

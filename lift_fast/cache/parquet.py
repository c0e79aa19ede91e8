"""Reads the embeddings that LIFT's authors keep (github.com/Jingfeng0705/LIFT, embed_label/embed.py) into a cache.

    DIR/train-00012-of-03550/0.parquet, 1.parquet, …      100 rows a file: key "000000000001.jpg", embedding [float]

A folder is a shard, its files in the order of their numbers; parquet files that lie in DIR itself are a shard each.
A key loses what follows its first dot, as the authors' loader and WebDataset have it. Keys start anew in each folder,
so that only two equal ones of one shard are an error.
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
from tqdm import tqdm

from ..errors import BackendError, DataError
from ..ops.rows.codecs import codec_named
from ..ops.rows.quantized import QuantizedRows
from ..ops.rows.table import key_hashes
from .codec import encode
from .rotation import Rotation
from .writer import CacheWriter

_COLUMNS = ["key", "embedding"]
_BLOCK = 1 << 20  # float32 numbers of a file that are read at a time


@dataclass(frozen=True)
class _Group:
    """The files of one shard and the rows that their footers tell."""

    name: str
    files: list[Path]
    rows: list[int]


def import_parquet(
    folder: Path, out: Path, codec: str, encoder: dict[str, Any], field: str, progress: bool = True
) -> None:
    """Writes the embeddings below `folder` as a cache; goes on where a run before it stopped.

    encoder: how the texts became vectors, which the files do not tell; field: the caption field that was embedded.

    Raises BackendError without pyarrow. DataError: nothing there, no parquet file, other columns, a null, a number
    that is not finite, vectors of different lengths, a key twice in one shard; with the file and the row. CacheError
    and CacheMismatch as CacheWriter.
    """
    kind = codec_named(codec)
    groups = _groups(folder, progress)
    dim = _dim(groups)
    rotation = Rotation(dim) if kind.rotated else None
    sources = [{"name": group.name, "samples": sum(group.rows)} for group in groups]
    writer = CacheWriter(out, dim, codec, encoder, sources, field, rotation)
    missing = writer.missing()
    total = sum(sum(group.rows) for group in groups)
    left = sum(sum(groups[number].rows) for number in missing)
    with (
        _files_at_once() as pool,
        tqdm(total=total, initial=total - left, unit="row", desc="import", disable=not progress) as bar,
    ):
        for number in missing:
            group = groups[number]
            parts = [_none(dim, codec, rotation)]
            hashes = [torch.empty(0, dtype=torch.int64)]
            for rows, keys in pool.map(lambda path: _encoded(path, dim, codec, rotation), group.files):
                parts.append(rows)
                hashes.append(keys)
                bar.update(len(rows))
            joined = torch.cat(hashes)
            _check_twice(group, [len(part) for part in hashes[1:]], joined)
            writer.write_shard(number, QuantizedRows.cat(parts), joined.tolist())
    writer.finish()


@contextmanager
def _files_at_once() -> Iterator[ThreadPoolExecutor]:
    """A thread for each processor, in which torch uses no more of them."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _groups(folder: Path, progress: bool) -> list[_Group]:
    """The shards of a folder, their footers read: rows and columns are known before anything is written."""
    _pyarrow()
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    named: dict[str, list[Path]] = {path.name: [path] for path in sorted(folder.glob("*.parquet"))}
    nested = {path.name: _numbered(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    nested = {name: files for name, files in nested.items() if files}
    if named and nested:
        raise DataError(f"{folder} holds parquet files and folders of them ({next(iter(nested))}); name one kind")
    named |= nested
    if not named:
        raise DataError(f"{folder} holds no parquet file, nor a folder with one")
    files = [path for group in named.values() for path in group]
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        counted = pool.map(_count, files, chunksize=16)
        rows = dict(zip(files, tqdm(counted, "footers", len(files), unit="file", disable=not progress), strict=True))
    return [_Group(name, group, [rows[path] for path in group]) for name, group in named.items()]


def _numbered(folder: Path) -> list[Path]:
    """The parquet files of a folder, 2.parquet before 10.parquet."""

    def order(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]

    return sorted(folder.glob("*.parquet"), key=order)


def _count(path: Path) -> int:
    """The rows of a file. Raises DataError unless it has the two columns."""
    pa = _pyarrow()
    with _explained(path), pa.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        types = {name: schema.field(name).type for name in _COLUMNS if name in schema.names}
        key, embedding = types.get("key"), types.get("embedding")
        texts = key is not None and (pa.types.is_string(key) or pa.types.is_large_string(key))
        if not texts or embedding is None or not _is_floats(embedding):
            told = ", ".join(f"{name} {kind}" for name, kind in zip(schema.names, schema.types, strict=True))
            raise DataError(f"{path} has the columns {told}; wanted are key (text) and embedding (a list of floats)")
        return file.metadata.num_rows


def _is_floats(kind: Any) -> bool:
    types = _pyarrow().types
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return lists and types.is_floating(kind.value_type)


def _dim(groups: list[_Group]) -> int:
    """The length of the first vector there is."""
    for group in groups:
        for path, rows in zip(group.files, group.rows, strict=True):
            if rows:
                for batch in _batches(path, 1):
                    length = batch.column("embedding").value_lengths()[0].as_py()
                    if not length:
                        raise DataError(f"{path}: row 0 has no embedding")
                    return length
    raise DataError(f"{groups[0].files[0].parent} and what is beside it: parquet files without one row")


def _encoded(path: Path, dim: int, codec: str, rotation: Rotation | None) -> tuple[QuantizedRows, Tensor]:
    """All rows of a file as codes, and their key hashes."""
    pc = _pyarrow().compute
    parts, hashes, start = [_none(dim, codec, rotation)], [torch.empty(0, dtype=torch.int64)], 0
    for batch in _batches(path, max(1, _BLOCK // dim)):
        keys, lists = batch.column("key"), batch.column("embedding")
        for column, what in ((keys, "key"), (lists, "embedding")):
            _refuse(path, start, column.is_null(), f"the {what} is null")
        lengths = lists.value_lengths()
        wrong = pc.not_equal(lengths, dim)
        if pc.any(wrong).as_py():
            bad = pc.index(wrong, True).as_py()
            raise DataError(f"{path}: row {start + bad} has {lengths[bad]} numbers and the first row of all has {dim}")
        x = _tensor(lists.flatten(), path, start, dim)
        _refuse(path, start, ~x.isfinite().all(dim=1).numpy(), "a number is not finite")
        parts.append(encode(x, codec, rotation))
        # The first dot of the name, whatever dots the folders before it have.
        hashes.append(key_hashes(pc.replace_substring_regex(keys, r"\.[^/]*$", "").to_pylist()))
        start += len(keys)
    return QuantizedRows.cat(parts), torch.cat(hashes)


def _tensor(values: Any, path: Path, start: int, dim: int) -> Tensor:
    """The numbers of a batch as [rows, dim], in Arrow's own memory."""
    if values.null_count:
        bad = np.asarray(values.is_null()).reshape(-1, dim).any(axis=1)
        _refuse(path, start, bad, "a number is null")
    return torch.from_dlpack(values).view(-1, dim)


def _refuse(path: Path, start: int, bad: Any, why: str) -> None:
    """Raises DataError naming the first row that is bad."""
    marks = np.asarray(bad)
    if marks.any():
        raise DataError(f"{path}: row {start + int(marks.argmax())}: {why}; embed that caption again, or drop the row")


def _check_twice(group: _Group, sizes: list[int], hashes: Tensor) -> None:
    """Raises DataError when two rows of a shard have one key."""
    order = np.argsort(hashes.numpy(), kind="stable")
    same = np.flatnonzero(np.diff(hashes.numpy()[order]) == 0)
    if len(same):
        # Of all pairs the one whose second row comes first.
        pair = min((order[k : k + 2].tolist() for k in same), key=lambda rows: rows[1])
        starts = np.cumsum([0, *sizes])
        places = []
        for row in pair:
            number = int(np.searchsorted(starts, row, side="right")) - 1
            places.append(f"row {row - int(starts[number])} of {group.files[number]}")
        raise DataError(f"{places[1]} has the key of {places[0]}; drop one of the two")


def _none(dim: int, codec: str, rotation: Rotation | None) -> QuantizedRows:
    return encode(torch.empty(0, dim), codec, rotation)


def _batches(path: Path, rows: int) -> Iterator[Any]:
    """The two columns of a file, so many rows at a time."""
    pa = _pyarrow()
    with _explained(path), pa.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=rows, columns=_COLUMNS, use_threads=False)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what pyarrow says about a file into one DataError."""
    try:
        yield
    except (_pyarrow().ArrowException, OSError) as error:
        told = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path} is not a whole parquet file ({told}); copy it again") from error


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise BackendError("parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow

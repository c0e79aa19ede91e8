"""The index of a folder of tars: where each sample lies, in about 60 bytes a sample, in memory or mapped from a file.

    index.lift-fast = magic, segments, directory, tail
    segment (one for each tar) = key hashes int64 [n], records [n], the keys in UTF-8; padded to 8 bytes
    record = int64 offsets of the image, the .txt and the .json (-1: none), uint32 their lengths and the key's end
    directory = JSON: for each tar its name, samples, bytes, time of last change, and the place of its segment

Opening the file reads the directory, and the size and time of each tar. The content of a segment is validated when it
is used.

The format is our own because WebDataset's indexed form (wids) stores no hashes of sample keys, by which a text cache is
matched to the data without reading a key.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import DataError
from ..ops.rows.table import key_hashes
from .options import DataOptions
from .reading import Stamp, stamp_of
from .tars import NotWhole, members

INDEX = "index.lift-fast"
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")  # the first that a sample has is its image
IMAGE, TXT, JSON = range(3)
_REMEDY = "run lift-fast data index again"
_MAGIC = b"LIFTIDX1"
_TAIL = struct.Struct("<QQQ8s")  # offset, length and crc32 of the directory, the magic
_RECORD = struct.Struct("<3q4I")
_RECORDS = np.dtype([("offsets", "<i8", 3), ("sizes", "<u4", 3), ("key_end", "<u4")])
_UINT32_MAX = (1 << 32) - 1
_PROCESSES_FROM = 32  # tars: fewer are scanned faster than processes start


@dataclass(frozen=True)
class Entry:
    """A tar in the index. bytes, mtime_ns: of the tar. at, length, crc32: of its segment."""

    name: str
    samples: int
    bytes: int
    mtime_ns: int
    at: int
    length: int
    crc32: int

    @property
    def stamp(self) -> Stamp:
        return self.bytes, self.mtime_ns

    @property
    def records(self) -> int:
        """Offset of the segment's records."""
        return self.at + 8 * self.samples


class Index:
    """The tars of a folder, in the order of their names, and the places of their samples.

    entries: one for each tar. segments: the segments of all tars, at the offsets in the entries.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], segments: bytearray | mmap.mmap):
        self.folder, self.entries = folder, list(entries)
        self._segments = segments

    def place(self, number: int, row: int, what: int) -> tuple[int, int] | None:
        """Offset and length, in tar `number`, of its sample `row`'s IMAGE, TXT or JSON; None when it has none.

        Raises DataError for a damaged index.
        """
        entry = self.entries[number]
        record = _RECORD.unpack_from(self._segments, entry.records + _RECORD.size * row)
        offset, size = record[what], record[3 + what]
        if offset == -1:
            return None
        if offset < 0 or offset + size > entry.bytes:
            raise self._damaged(f"{entry.name}: sample {row} lies outside the file")
        return offset, size

    def places(self, number: int, what: int) -> tuple[list[int], list[int]]:
        """The offsets (-1: none) and lengths, in tar `number`, of its samples' IMAGE, TXT or JSON, in order.

        Raises DataError for a damaged index.
        """
        entry = self.entries[number]
        records = np.frombuffer(self._segments, _RECORDS, entry.samples, entry.records)
        offsets, sizes = records["offsets"][:, what], records["sizes"][:, what].astype(np.int64)
        wrong = (offsets < -1) | (offsets > entry.bytes - sizes) & (offsets != -1)
        if wrong.any():
            raise self._damaged(f"{entry.name}: sample {wrong.argmax()} lies outside the file")
        return offsets.tolist(), sizes.tolist()

    def key(self, number: int, row: int) -> str:
        """The key of sample `row` of tar `number`. Raises DataError for a damaged index."""
        entry = self.entries[number]
        at = entry.records + _RECORD.size * row
        start = _RECORD.unpack_from(self._segments, at - _RECORD.size)[-1] if row else 0
        end = _RECORD.unpack_from(self._segments, at)[-1]
        first = entry.records + _RECORD.size * entry.samples
        if not 0 <= start <= end <= entry.at + entry.length - first:
            raise self._damaged(f"{entry.name}: sample {row} has no key")
        try:
            return self._segments[first + start : first + end].decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{entry.name}: the key of sample {row} is not UTF-8") from error

    def keys(self, number: int) -> list[str]:
        """The keys of tar `number`, in order. Raises DataError for a damaged index."""
        return [self.key(number, row) for row in range(self.entries[number].samples)]

    def hashes(self, number: int) -> Tensor:
        """The hashes of the keys of tar `number`, int64 [samples]."""
        entry = self.entries[number]
        return torch.from_numpy(np.frombuffer(self._segments, "<i8", entry.samples, entry.at).astype(np.int64))

    def segment(self, entry: Entry) -> bytes | bytearray:
        """The bytes of a tar's segment."""
        return self._segments[entry.at : entry.at + entry.length]

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.folder / INDEX} is damaged ({why}); {_REMEDY}")


@dataclass(frozen=True)
class Built:
    """The result of build_index. read: shards that were scanned; bytes: size of the index."""

    shards: int
    samples: int
    read: int
    bytes: int


def open_index(folder: Path, options: DataOptions | None = None) -> Index:
    """Opens the index of a folder of tars: maps its file, or scans the tars when there is none.

    Raises DataError for a folder without tars, a tar that is cut short, and an index that is damaged or does not match
    the tars.
    """
    paths = _tars(folder)
    if (folder / INDEX).exists():
        index = _mapped(folder)
        _check_fresh(index, paths)
        return index
    # Scanning a large set takes minutes: a bar shows that there is no index.
    entries: list[Entry] = []
    segments = bytearray()
    for path in tqdm(paths, "no index: scanning tars", unit="tar", delay=10, disable=None):
        entry, data = scan(path)
        entries.append(replace(entry, at=len(segments)))
        segments += data
    return Index(folder, entries, segments)


def build_index(folder: str | Path, processes: int | None = None, progress: bool = True) -> Built:
    """Writes the index of a folder of tars into the folder, whole or not at all.

    It scans only tars that are not in the folder's index or have changed since. processes: number of processes that
    scan; None for the number of processors.

    Raises DataError for a folder without tars, a tar that is cut short, and a folder that cannot be written to.
    """
    folder = Path(folder)
    paths = _tars(folder)
    index, known = _known(folder)
    reused = [known.get((path.name, _stamp(path))) for path in paths]
    changed = [path for path, entry in zip(paths, reused, strict=True) if entry is None]
    entries: list[Entry] = []
    with (
        _scans(changed, processes or len(os.sched_getaffinity(0))) as scans,
        _written(folder / INDEX) as file,
        tqdm(total=len(paths), unit="tar", desc="index", disable=not progress) as bar,
    ):
        at = file.write(_MAGIC)
        for old in reused:
            entry, data = next(scans) if old is None or index is None else (old, index.segment(old))
            entries.append(replace(entry, at=at))
            at += file.write(data)
            bar.update()
        directory = json.dumps([astuple(entry) for entry in entries]).encode()
        file.write(directory + _TAIL.pack(at, len(directory), zlib.crc32(directory), _MAGIC))
    samples = sum(entry.samples for entry in entries)
    return Built(len(paths), samples, len(changed), (folder / INDEX).stat().st_size)


def scan(path: Path) -> tuple[Entry, bytes]:
    """Returns the entry and the segment of one tar. Raises DataError when it is cut short, damaged, or unreadable."""
    # key -> three offsets and three lengths, in the order IMAGE, TXT, JSON, and the rank of the image's suffix
    samples: dict[str, list[int]] = {}
    ranks = {suffix.encode(): rank for rank, suffix in enumerate(IMAGE_SUFFIXES)}
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(file)
            for name, offset, size in members(file, status.st_size):
                named = key_and_suffix(name)
                if named is None:
                    continue
                key, suffix = named[0].decode(), named[1].lower()
                sample = samples.get(key)
                if sample is None:
                    sample = samples[key] = [-1, -1, -1, 0, 0, 0, len(ranks)]
                rank = ranks.get(suffix)
                if rank is not None:
                    if rank <= sample[6]:
                        sample[IMAGE], sample[3 + IMAGE], sample[6] = offset, min(size, _UINT32_MAX), rank
                elif suffix == b"txt":
                    sample[TXT], sample[3 + TXT] = offset, min(size, _UINT32_MAX)
                elif suffix == b"json":
                    sample[JSON], sample[3 + JSON] = offset, min(size, _UINT32_MAX)
        finally:
            os.close(file)
    except NotWhole as error:
        raise DataError(f"{path} is not a whole tar ({error}); write or copy it again") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: the name {error.object!r} is not UTF-8; write the tar again with other names"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    keys = [key.encode() for key in samples]
    numbers = np.array(list(samples.values()), dtype=np.int64).reshape(-1, 7)
    records = np.empty(len(keys), _RECORDS)
    records["offsets"], records["sizes"] = numbers[:, :3], numbers[:, 3:6]
    records["key_end"] = np.cumsum([len(key) for key in keys])
    data = key_hashes(list(samples)).numpy().astype("<i8").tobytes() + records.tobytes() + b"".join(keys)
    data += bytes(-len(data) % 8)
    return Entry(path.name, len(keys), *stamp_of(status), 0, len(data), zlib.crc32(data)), data


def key_and_suffix(name: bytes) -> tuple[bytes, bytes] | None:
    """Splits the name of a file in a tar into the sample's key and the suffix, by WebDataset's rule.

    Returns None for names without a key or a suffix, such as README and ._x.jpg: they belong to no sample.
    """
    folder, _, base = name.rpartition(b"/")
    stem, dot, suffix = base.partition(b".")
    if not stem or not dot:
        return None
    return (folder + b"/" + stem if folder not in (b"", b".") else stem), suffix


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"no data set at {folder}: it is not a folder of tar shards")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar shard")
    return paths


def _stamp(path: Path) -> Stamp:
    try:
        return stamp_of(path.stat())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def _mapped(folder: Path) -> Index:
    """The index file of a folder, not compared with the tars. Raises DataError when it is damaged."""
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            file.seek(max(0, length - _TAIL.size))
            tail = file.read()
            at, size, crc32, magic = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, 0, 0, b"")
            if magic != _MAGIC or at + size + _TAIL.size != length:
                raise DataError(f"{path} is damaged, or of another version of lift-fast; {_REMEDY}")
            file.seek(at)
            directory = file.read(size)
            if zlib.crc32(directory) != crc32:
                raise DataError(f"{path} is damaged; {_REMEDY}")
            entries = [Entry(*fields) for fields in json.loads(directory)]
            segments = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    end = len(_MAGIC)
    for entry in entries:
        name, *numbers = astuple(entry)
        whole = isinstance(name, str) and all(type(number) is int and number >= 0 for number in numbers)
        if not whole or entry.at != end or entry.length < (8 + _RECORD.size) * entry.samples:
            raise DataError(f"{path} is damaged (the segment of {entry.name!r}); {_REMEDY}")
        end += entry.length
    if end != at:
        raise DataError(f"{path} is damaged (its segments do not fill it); {_REMEDY}")
    return Index(folder, entries, segments)


def _check_fresh(index: Index, paths: Sequence[Path]) -> None:
    """Raises DataError naming the first tar that does not match the index."""
    known = {entry.name: entry.stamp for entry in index.entries}
    for path in paths:
        if known.pop(path.name, None) != _stamp(path):
            raise DataError(f"{index.folder / INDEX} is out of date: {path.name} was added or changed since; {_REMEDY}")
    for name in known:
        raise DataError(f"{index.folder / INDEX} is out of date: {name} is gone; {_REMEDY}")
    if len(index.entries) != len(paths):
        raise DataError(f"{index.folder / INDEX} is damaged (it lists a tar twice); {_REMEDY}")


def _known(folder: Path) -> tuple[Index | None, dict[tuple[str, Stamp], Entry]]:
    """The folder's index, None when it has none or a damaged one, and its intact entries by a tar's name and stamp."""
    try:
        index = _mapped(folder) if (folder / INDEX).exists() else None
    except DataError:
        index = None
    if index is None:
        return None, {}
    whole = [entry for entry in index.entries if zlib.crc32(index.segment(entry)) == entry.crc32]
    return index, {(entry.name, entry.stamp): entry for entry in whole}


@contextmanager
def _scans(paths: Sequence[Path], processes: int) -> Iterator[Iterator[tuple[Entry, bytes]]]:
    """Yields an iterator over scan(path) for each tar, in order, computed by `processes` where there are many tars."""
    if processes < 2 or len(paths) < _PROCESSES_FROM:
        yield map(scan, paths)
        return
    # spawn, because forking a process that has threads is unsafe.
    with ProcessPoolExecutor(min(processes, len(paths)), get_context("spawn")) as pool:
        try:
            yield pool.map(scan, paths, chunksize=max(1, min(8, len(paths) // (4 * processes))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces `path` at the end, or is removed after an error. Raises DataError for OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"cannot write the index {path} ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)

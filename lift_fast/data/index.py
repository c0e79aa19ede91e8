"""The index of a folder of tars: where each sample lies, in about 60 bytes a sample, in memory or in a file.

    index.lift-fast = magic, segments, directory, tail
    segment (one for each tar) = key hashes int64 [n], records [n], the keys in UTF-8; padded to 8 bytes
    record = int64 offsets of the image, the .txt and the .json (-1: none), uint32 their lengths and the key's end
    directory = JSON: which suffixes are the image and the caption; for each tar its name, samples, bytes, time of last
                change, the place of its segment, and what of it is not read

Opening the file reads the directory, and the size and time of each tar. A segment is read whole and its checksum
compared when it is first used; after that only the bytes that are needed are read, from the file as it was opened. An
index that is written to meanwhile is an error.

The format is our own because WebDataset's indexed form (wids) stores no hashes of sample keys, by which a text cache is
matched to the data without reading a key.
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..files import remove_abandoned, written_whole
from ..foreign import BYTES_EACH, parse_json
from ..progress import bar
from .options import DataOptions
from .reading import OpenFile, Stamp, cpu_count, stamp_at
from .samples import Cause, Problem
from .scan import IMAGE_SUFFIXES, RECORD, RECORDS, Entry, first_names, in_words, refuse, scan, suffixes_of

INDEX = "index.lift-fast"
# Names of tars that are compressed, still being copied, or in upper case.
_TARS = re.compile(
    r".+\.(tar(\.(gz|bz2|xz|zstd?|lz4|part|partial|tmp|crdownload|aria2))?|tgz|tbz2?|txz|tzst)", re.IGNORECASE
)
_REMEDY = "run lift-fast data index again"
_CAUSES = get_args(Cause)
_MAGIC = b"LIFTIDX2"
_TAIL = struct.Struct("<QQQ8s")  # offset, length and crc32 of the directory, the magic
# Bytes of a directory: this, and so many for each tar in the folder. Its names are short, and its problems name files.
_LEAST_LIMIT, _MOST_ENTRY = 1 << 26, 1 << 14
_PROCESSES_FROM = 32  # tars: fewer are scanned faster than processes start


class Index:
    """The tars of a folder, in the order of their names, and the places of their samples.

    entries: one for each tar. segments: the segments of all tars, at the offsets in the entries. suffixes: of the
    image, None for the usual ones, and of the caption.

    Methods that look into a segment raise DataError when the index is damaged or was changed.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Entry],
        segments: bytearray | OpenFile,
        suffixes: tuple[str | None, str] = (None, "txt"),
    ):
        self.folder, self.entries, self.suffixes = folder, list(entries), suffixes
        self._segments = segments
        self._checked: set[int] = set()  # numbers of the tars whose segment has its checksum

    def problems(self) -> list[Problem]:
        """What the tars hold that is not read."""
        return [
            Problem(str(self.folder / entry.name), cause, in_words(entry, cause, what), count)
            for entry in self.entries
            for cause, what, count in entry.problems
        ]

    def place(self, number: int, row: int, what: int) -> tuple[int, int] | None:
        """Offset and length, in tar `number`, of its sample `row`'s IMAGE, TXT or JSON; None when it has none."""
        entry = self.entries[number]
        record = RECORD.unpack(self._part(number, entry.records + RECORD.size * row, RECORD.size))
        offset, size = record[what], record[3 + what]
        if offset == -1:
            return None
        if offset < 0 or offset + size > entry.bytes:
            raise self._damaged(f"{entry.name}: sample {row} lies outside the file")
        return offset, size

    def places(self, number: int, what: int) -> tuple[list[int], list[int]]:
        """The offsets (-1: none) and lengths, in tar `number`, of its samples' IMAGE, TXT or JSON, in order."""
        entry = self.entries[number]
        records = np.frombuffer(self.segment(number), RECORDS, entry.samples, entry.records - entry.at)
        offsets, sizes = records["offsets"][:, what], records["sizes"][:, what].astype(np.int64)
        wrong = (offsets < -1) | (offsets > entry.bytes - sizes) & (offsets != -1)
        if wrong.any():
            raise self._damaged(f"{entry.name}: sample {wrong.argmax()} lies outside the file")
        return offsets.tolist(), sizes.tolist()

    def key(self, number: int, row: int) -> str:
        """The key of sample `row` of tar `number`."""
        entry = self.entries[number]
        at = entry.records + RECORD.size * row
        ends = self._part(number, at - RECORD.size, 2 * RECORD.size) if row else self._part(number, at, RECORD.size)
        *_, end = RECORD.unpack(ends[-RECORD.size :])
        start = RECORD.unpack(ends[: RECORD.size])[-1] if row else 0
        first = entry.records + RECORD.size * entry.samples
        self._check_keys(entry, [start, end], row)
        return self._decoded(entry, self._part(number, first + start, end - start), row)

    def keys(self, number: int) -> list[str]:
        """The keys of tar `number`, in order."""
        entry = self.entries[number]
        segment, first = self.segment(number), (8 + RECORD.size) * entry.samples
        ends = np.frombuffer(segment, RECORDS, entry.samples, entry.records - entry.at)["key_end"].tolist()
        starts = [0, *ends][: entry.samples]
        found = []
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            self._check_keys(entry, [start, end], row)
            found.append(self._decoded(entry, segment[first + start : first + end], row))
        return found

    def hashes(self, number: int) -> Tensor:
        """The hashes of the keys of tar `number`, int64 [samples]."""
        found = np.frombuffer(self.segment(number), "<i8", self.entries[number].samples)
        return torch.from_numpy(found.astype(np.int64))

    def segment(self, number: int) -> bytes:
        """The segment of tar `number`, whose checksum is compared."""
        entry = self.entries[number]
        data = self._read(entry.at, entry.length)
        if zlib.crc32(data) != entry.crc32:
            raise self._damaged(f"the checksum of its part for {entry.name} is wrong")
        self._checked.add(number)
        return data

    def _part(self, number: int, at: int, size: int) -> bytes:
        """A part of the segment of tar `number`."""
        if number not in self._checked:
            self.segment(number)
        return self._read(at, size)

    def _read(self, at: int, size: int) -> bytes:
        if isinstance(self._segments, bytearray):
            return bytes(self._segments[at : at + size])
        try:
            return self._segments.read(at, size)
        except OSError as error:
            raise DataError(f"{self.folder / INDEX} cannot be read ({error.strerror}); {_REMEDY}") from error

    def _check_keys(self, entry: Entry, ends: Sequence[int], row: int) -> None:
        if not 0 <= ends[0] <= ends[1] <= entry.length - (8 + RECORD.size) * entry.samples:
            raise self._damaged(f"{entry.name}: sample {row} has no key")

    def _decoded(self, entry: Entry, key: bytes, row: int) -> str:
        try:
            return key.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{entry.name}: the key of sample {row} is not UTF-8") from error

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.folder / INDEX} is damaged ({why}); {_REMEDY}")


@dataclass(frozen=True)
class Built:
    """The result of build_index. read: shards that were scanned. bytes: of the index. problems: files not read."""

    shards: int
    samples: int
    read: int
    bytes: int
    problems: list[Problem]


def open_index(folder: Path, options: DataOptions | None = None) -> Index:
    """Opens the index of a folder of tars: its file, or scans the tars when there is none.

    Raises DataError for a folder without tars, and an index that is damaged, does not match the tars, or was written
    for other suffixes; without options.skip_bad also for a tar that is damaged or holds a name that is not UTF-8.
    """
    options = options or DataOptions()
    suffixes = suffixes_of(options)
    paths = _tars(folder)
    if os.path.lexists(folder / INDEX):
        index = _opened(folder, len(paths))
        if index.suffixes != suffixes:
            raise DataError(
                f"{folder / INDEX} was written with {_as_options(*index.suffixes)}, and this command has "
                f"{_as_options(*suffixes)}; run lift-fast data index again with the same"
            )
        _check_fresh(index, paths)
        if not options.skip_bad:
            for entry in index.entries:
                refuse(folder, entry)
        return index
    return scanned(folder, options)


def scanned(folder: Path, options: DataOptions | None = None) -> Index:
    """The index of a folder of tars by their content, whatever its file says. Raises DataError as open_index does."""
    options = options or DataOptions()
    entries: list[Entry] = []
    segments = bytearray()
    # Scanning a large set takes minutes: a bar shows that there is no index.
    for path in bar(_tars(folder), "no index: scanning tars", unit="tar", delay=10):
        entry, data = scan(path, options)
        entries.append(replace(entry, at=len(segments)))
        segments += data
    return Index(folder, entries, segments, suffixes_of(options))


def build_index(
    folder: str | Path, processes: int | None = None, progress: bool = True, options: DataOptions | None = None
) -> Built:
    """Writes the index of a folder of tars into the folder, whole or not at all.

    It scans only tars that are not in the folder's index or have changed since. processes: number of processes that
    scan; None for the number of processors.

    Raises DataError for a folder without tars and one that cannot be written to; without options.skip_bad also for a
    tar that is damaged or holds a name that is not UTF-8.
    """
    folder, options = Path(folder), options or DataOptions()
    suffixes = suffixes_of(options)
    paths = _tars(folder)
    index, known = _known(folder, suffixes, len(paths))
    reused = [known.get((path.name, _stamp(path))) for path in paths]
    changed = [path for path, number in zip(paths, reused, strict=True) if number is None]
    entries: list[Entry] = []
    remove_abandoned(folder, INDEX)
    with (
        _scans(changed, processes or cpu_count(), options) as scans,
        _written(folder / INDEX) as file,
        bar(total=len(paths), unit="tar", desc="index", disable=not progress) as done,
    ):
        at = file.write(_MAGIC)
        for old in reused:
            if old is None or index is None:
                entry, data = next(scans)
            else:
                entry, data = index.entries[old], index.segment(old)
            if not options.skip_bad:
                refuse(folder, entry)
            entries.append(replace(entry, at=at))
            at += file.write(data)
            done.update()
        tars = [[getattr(entry, field.name) for field in fields(entry)] for entry in entries]
        directory = json.dumps({"suffixes": suffixes, "tars": tars}).encode()
        directory += b" " * max(0, BYTES_EACH * (directory.count(b"[") + 1) - len(directory))  # as parse_json asks for
        file.write(directory + _TAIL.pack(at, len(directory), zlib.crc32(directory), _MAGIC))
    samples = sum(entry.samples for entry in entries)
    problems = Index(folder, entries, bytearray(), suffixes).problems() + unread_files(folder)
    return Built(len(paths), samples, len(changed), (folder / INDEX).stat().st_size, problems)


def unread_files(folder: Path) -> list[Problem]:
    """The images in a folder of tars, and the tars that are compressed or have another suffix: they are not read."""
    images = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)
    with os.scandir(folder) as files:
        names = [file.name for file in files if not file.name.endswith(".tar")]
    names = sorted(name for name in names if _TARS.fullmatch(name) or name.lower().endswith(images))
    if not names:
        return []
    named = first_names([os.fsencode(name) for name in names])
    return [Problem(str(folder), "unused file", f"of a folder with tars only *.tar is read: {named}", len(names))]


def _as_options(image: str | None, text: str) -> str:
    return f"{f'--image-suffix {image}' if image else 'no --image-suffix'} and --text-suffix {text}"


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"no data set at {folder}: it is not a folder of tar shards")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar shard")
    return paths


def _stamp(path: Path) -> Stamp:
    try:
        return stamp_at(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def _opened(folder: Path, tars: int) -> Index:
    """The index file of a folder of so many tars, not compared with them. Raises DataError when it is damaged."""
    path = folder / INDEX
    try:
        file = OpenFile(path)
        length, _ = file.stamp
        tail = file.read(max(0, length - _TAIL.size), min(length, _TAIL.size))
        at, size, crc32, magic = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, 0, 0, b"")
        if magic != _MAGIC and magic[:7] == _MAGIC[:7]:
            raise DataError(f"{path} is of another version of lift-fast; {_REMEDY}")
        if magic != _MAGIC or at + size + _TAIL.size != length or size > _LEAST_LIMIT + _MOST_ENTRY * tars:
            raise DataError(f"{path} is damaged; {_REMEDY}")
        directory = file.read(at, size)
        if zlib.crc32(directory) != crc32:
            raise DataError(f"{path} is damaged; {_REMEDY}")
        found = parse_json(directory)
        image, text = found["suffixes"]
        entries = [Entry(*[*values, [(c, w, n) for c, w, n in told]]) for *values, told in found["tars"]]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise DataError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    end = len(_MAGIC)
    for entry in entries:
        numbers = (entry.samples, entry.bytes, entry.mtime_ns, entry.at, entry.length, entry.crc32)
        whole = isinstance(entry.name, str) and all(type(number) is int and number >= 0 for number in numbers)
        told = all(c in _CAUSES and isinstance(w, str) and type(n) is int and n > 0 for c, w, n in entry.problems)
        if not whole or not told or entry.at != end or entry.length < (8 + RECORD.size) * entry.samples:
            raise DataError(f"{path} is damaged (the segment of {entry.name!r}); {_REMEDY}")
        end += entry.length
    if end != at:
        raise DataError(f"{path} is damaged (its segments do not fill it); {_REMEDY}")
    return Index(folder, entries, file, (image, text))


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


def _known(
    folder: Path, suffixes: tuple[str | None, str], tars: int
) -> tuple[Index | None, dict[tuple[str, Stamp], int]]:
    """The folder's index, None when it has none with these suffixes or a damaged one, and the numbers of its intact
    entries by a tar's name and stamp."""
    try:
        index = _opened(folder, tars) if os.path.lexists(folder / INDEX) else None
    except DataError:
        index = None
    if index is None or index.suffixes != suffixes:
        return None, {}
    known = {}
    for number, entry in enumerate(index.entries):
        try:
            index.segment(number)
        except DataError:
            continue
        known[entry.name, entry.stamp] = number
    return index, known


@contextmanager
def _scans(paths: Sequence[Path], processes: int, options: DataOptions) -> Iterator[Iterator[tuple[Entry, bytes]]]:
    """Yields an iterator over scan(path, options) for each tar, in order, computed by `processes` if they are many."""
    read = partial(scan, options=options)
    if processes < 2 or len(paths) < _PROCESSES_FROM:
        yield map(read, paths)
        return
    # spawn, because forking a process that has threads is unsafe.
    with ProcessPoolExecutor(min(processes, len(paths)), get_context("spawn")) as pool:
        try:
            yield pool.map(read, paths, chunksize=max(1, min(8, len(paths) // (4 * processes))))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces `path` at the end, or is removed after an error. Raises DataError for OSError."""
    try:
        with written_whole(path) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot write the index {path} ({error.strerror})") from error

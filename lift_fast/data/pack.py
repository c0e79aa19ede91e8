"""What is done with whole data sets: counted, checked, packed into shards.

All of it streams: memory holds the pictures under way and one shard's keys, and what the opened set itself keeps.
"""

import functools
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import ConfigError, DataError
from .folders import ParquetPictures, TablePictures, column_of
from .images import Header, decode, read_header
from .index import Index, build_index, key_and_suffix, scan
from .open import open_data
from .order import permuted
from .samples import BadSample, Samples
from .shards import Shards, ShardWriter
from .sources import read_parquet
from .tars import NotWhole, members

Found = TypeVar("Found")
SMALL = 224  # pixels: a picture with a shorter side is enlarged for the usual model
NO_CAPTION, REPEATED, DAMAGED = "no caption", "repeated key", "damaged shard"  # causes beside those of pictures
_SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # pictures of other formats are written as PNG
_NAMED = 5  # bad samples that are listed in the figures
_FIELDS = 100  # texts that are counted: metadata may have other entries in every sample
_DISTINCT = 1 << 20  # captions that are told apart exactly
_KEY = re.compile(r"[^./\x00-\x1f\x7f\ud800-\udfff]+")
_KEY_BYTES = 80  # a name in a tar has 100, its suffix among them


def stats(
    samples: Samples, sample: int | None = 10_000, threads: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """What a data set holds, JSON-able, by the headers and captions of `sample` samples drawn without repeats (None:
    of all). Nothing is decoded.

    "bytes": of all tars, null elsewhere. The rest is of the samples looked at. "formats": pictures by format; "width",
    "height": min, median and max, upright; "below_224": the share with a shorter side below. "captions": of "txt" and
    each text of the metadata (the first 100) the samples that have it, characters (median, 95 %, max), and the share
    that repeats another's, an estimate above a million distinct ones. "no_text": samples without any, or with metadata
    that cannot be read. "bad": pictures by cause.

    Raises ConfigError for a sample below 1.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"sample must be at least 1, not {sample}")
    total = len(samples)
    looked = total if sample is None else min(sample, total)
    # In the order of the files. The draw needs no table of them.
    rows = range(total) if looked == total else map(int, np.sort(permuted(np.arange(looked), total, 0)))
    formats: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    sides: dict[str, Counter[int]] = {"width": Counter(), "height": Counter(), "shorter": Counter()}
    captions: dict[str, _Captions] = {}
    read = no_text = 0
    columns = _text_columns(samples)

    def look(row: int) -> tuple[int, Header | BadSample, dict[str, str]]:
        data = b""
        try:
            data = samples.image_bytes(row)
            return len(data), read_header(data), _texts(samples, row, columns)
        except BadSample as error:
            return len(data), error, _texts(samples, row, columns)

    told = tqdm(_in_order(look, rows, threads), "stats", looked, unit="sample", disable=not progress, leave=False)
    for _, (length, header, texts) in told:
        read += length
        no_text += not texts
        for field, text in texts.items():
            if field in captions or len(captions) < _FIELDS:
                captions.setdefault(field, _Captions()).add(text)
        if isinstance(header, BadSample):
            bad[header.cause] += 1
            continue
        formats[header.format] += 1
        for name, side in ("width", header.width), ("height", header.height):
            sides[name][side] += 1
        sides["shorter"][min(header.width, header.height)] += 1
    good = formats.total()
    small = sum(n for side, n in sides["shorter"].items() if side < SMALL)
    return {
        "samples": total,
        "shards": len(samples.shard_sizes),
        "smallest_shard": min(samples.shard_sizes),
        "largest_shard": max(samples.shard_sizes),
        "bytes": sum(path.stat().st_size for path in samples.paths) if isinstance(samples, Shards) else None,
        "sampled": looked,
        "picture_bytes": read,
        "formats": dict(formats.most_common()),
        "width": _spread(sides["width"]),
        "height": _spread(sides["height"]),
        f"below_{SMALL}": small / good if good else None,
        "captions": {field: found.told() for field, found in captions.items()},
        "no_text": no_text,
        "bad": dict(bad.most_common()),
    }


def check(
    path: str | Path,
    field: str = "txt",
    pictures: str | Path | None = None,
    bad: TextIO | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Decodes every picture and reads every caption of the data set at `path`, and looks for what a shard holds twice:
    a key, in a tar a name. Tars that are cut or damaged are told, and the others gone through. JSON-able.

    "bad": samples with anything wrong; "damaged_shards"; "causes": all that is wrong, counted; "first": the first five
    of it as {"sample", "row", "cause", "reason"}, of a shard the row is null. The file `bad` gets such a line of JSON
    for each. Rows are numbered as if damaged shards were not there.

    path, pictures: as of open_data. Raises as it does, but for damaged tars; DataError for a field that is no column.
    """

    def look(samples: Samples, row: int) -> list[tuple[str, str]]:
        wrong: list[tuple[str, str]] = []
        try:
            data = samples.image_bytes(row)
            decode(data, read_header(data))
        except BadSample as error:
            wrong.append((error.cause, error.reason))
        try:
            samples.caption(row, field)
        except DataError as error:
            wrong.append((NO_CAPTION, str(error)))
        return wrong

    found, began = _Wrong(bad), time.perf_counter()
    parts, total, damaged = _parts(Path(path), pictures)
    for name, reason in damaged.items():
        found.add(name, None, [(DAMAGED, reason)])
    done = shards = 0
    with tqdm(total=total, unit="sample", desc="check", disable=not progress, leave=False) as bar:
        for part in parts:
            _column(part, field)
            twice = _twice(part, found)
            for row, wrong in _in_order(functools.partial(look, part), range(len(part)), threads):
                if reason := next(twice):
                    wrong.append((REPEATED, reason))
                if wrong:
                    found.add(part.where(row), done + row, wrong)
                bar.update()
            done += len(part)
            shards += len(part.shard_sizes)
    seconds = time.perf_counter() - began
    return {
        "samples": done,
        "shards": shards,
        "damaged_shards": found.causes[DAMAGED],
        **found.told(),
        "seconds": seconds,
        "images_per_s": done / seconds,
    }


class _Packed(NamedTuple):
    """A sample as it is written."""

    picture: bytes
    suffix: str
    resized: bool
    caption: str
    meta: dict[str, Any]


def pack(
    samples: Samples,
    out: str | Path,
    fields: Sequence[str] = ("txt",),
    samples_per_shard: int = 10_000,
    size: int | None = None,
    quality: int = 95,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a data set as WebDataset tars in img2dataset's layout, and their index: all of it or nothing.

    A picture's bytes are copied, named by what they are; with `size` (pixels) one whose shorter side is larger is
    resized to it (Lanczos) and written as JPEG of `quality`. KEY.txt is the first of `fields` that the sample has;
    the rest of the metadata is KEY.json. Bad samples, whose picture does not decode or which have no caption, are
    left out and listed in OUT/bad.jsonl as check() does. A key is safe_key() of the sample's, with a number behind it
    where its shard holds it already; KEY.json tells a key that changed as "source_key".

    Returns {"samples", "shards", "resized", "bad", "causes", "first"}. Raises ConfigError for a setting out of range,
    DataError when `out` exists or no sample is good.
    """
    for name, value in ("samples per shard", samples_per_shard), ("size", size), ("quality", quality):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if quality > 100:
        raise ConfigError(f"quality must be 100 at most, not {quality}")
    if not fields:
        raise ConfigError("pack needs the name of the captions: txt, an entry of the .json, or a column")
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already; remove it or name another folder")

    def make(row: int) -> _Packed | tuple[str, str]:
        try:
            picture = _picture(samples.image_bytes(row), size, quality)
        except BadSample as error:
            return error.cause, error.reason
        try:
            return _Packed(*picture, *_caption(samples, row, fields, columns))
        except DataError as error:
            return NO_CAPTION, str(error)

    for field in fields:
        _column(samples, field)
    columns = _text_columns(samples)
    good = resized = 0
    taken: dict[str, int] = {}
    keys = _keys(samples)
    # Made under another name, its index and list too, so that `out` is there whole or not at all.
    partial = out.with_name(f"{out.name}.packing-{os.getpid()}")
    listed = partial.with_name(f"{partial.name}.jsonl")
    try:
        with (
            ShardWriter(partial, samples_per_shard) as writer,
            open(listed, "w") as file,
            tqdm(total=len(samples), unit="sample", desc="pack", disable=not progress, leave=False) as bar,
        ):
            found = _Wrong(file)
            for row, made in _in_order(make, range(len(samples)), threads):
                key = next(keys)
                bar.update()
                if not isinstance(made, _Packed):
                    found.add(samples.where(row), row, [made])
                    continue
                if good % samples_per_shard == 0:
                    taken = {}
                name = _unique(safe_key(key), taken)
                meta = made.meta if name == key else {**made.meta, "source_key": key}
                writer.write(name, made.picture, made.caption, meta, made.suffix)
                good += 1
                resized += made.resized
            if not good:
                worst = found.first[0]
                raise DataError(
                    f"{samples.folder}: not one of {len(samples)} samples is good; the first: {worst['sample']}: "
                    f"{worst['cause']} ({worst['reason']})"
                )
        if found.bad:
            os.replace(listed, partial / "bad.jsonl")
        build_index(partial, processes=1, progress=False)
        os.replace(partial, out)
    finally:
        listed.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    return {"samples": good, "shards": -(-good // samples_per_shard), "resized": resized, **found.told()}


def safe_key(key: str) -> str:
    """The key itself where a tar can hold it: not empty, 80 bytes at most, no dot, slash or control character. Else
    every character of it but A-Z, a-z, 0-9, _ and - becomes _, its end is cut, and 8 hexadecimal digits of its BLAKE2b
    follow: other keys stay other keys."""
    if _KEY.fullmatch(key) and len(key.encode()) <= _KEY_BYTES:
        return key
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', key)[: _KEY_BYTES - 9]}-{digest}"


def _unique(key: str, taken: dict[str, int]) -> str:
    """The key, or the first of key-2, key-3, … that is not taken, which it then is. taken: keys -> last number."""
    name, number = key, taken.get(key, 1)
    while name in taken:
        number += 1
        name = f"{key}-{number}"
    taken[key] = number
    taken[name] = taken.get(name, 1)
    return name


def _picture(data: bytes, size: int | None, quality: int) -> tuple[bytes, str, bool]:
    """A picture as it is written, its suffix, and whether it was resized. Raises BadSample when it does not decode."""
    header = read_header(data)
    pixels = decode(data, header)
    height, width, _ = pixels.shape
    encoded = io.BytesIO()
    if size is not None and min(width, height) > size:
        scale = size / min(width, height)
        to = round(width * scale), round(height * scale)
        Image.fromarray(pixels).resize(to, Image.Resampling.LANCZOS).save(encoded, "JPEG", quality=quality)
        return encoded.getvalue(), "jpg", True
    if header.format in _SUFFIXES:
        return data, _SUFFIXES[header.format], False
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue(), "png", False


def _caption(samples: Samples, row: int, fields: Sequence[str], columns: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The caption by the first field that has one, and the other metadata, JSON-able. Raises DataError."""
    meta = _whole_meta(samples, row, columns)
    for field in fields:
        try:
            caption = samples.caption(row, field)
        except DataError:
            if field == fields[-1]:
                raise
            continue
        meta.pop(_column(samples, field), None)
        return caption.encode(errors="replace").decode(), json.loads(json.dumps(meta, default=str))
    raise AssertionError("no field")


def _texts(samples: Samples, row: int, columns: Sequence[str]) -> dict[str, str]:
    """The texts of a sample that could be its caption, by field; not those that are missing, blank or unreadable."""
    try:
        meta = _whole_meta(samples, row, columns)
    except DataError:
        return {}
    return {name: text.strip() for name, text in meta.items() if isinstance(text, str) and text.strip()}


def _parts(path: Path, pictures: str | Path | None) -> tuple[Iterable[Samples], int, dict[str, str]]:
    """A data set as parts to go through, their samples, and the tars left out because they are damaged, with reasons.

    It is one part, unless a tar is damaged: then every other tar is one. Raises DataError when that is not why it
    cannot be opened.
    """
    try:
        samples = open_data(path, pictures)
        return [samples], len(samples), {}
    except DataError:
        damaged: dict[str, str] = {}
        whole: list[Path] = []
        total = 0
        for tar in sorted(path.glob("*.tar")):
            try:
                total += scan(tar)[0].samples
                whole.append(tar)
            except DataError as error:
                damaged[str(tar)] = str(error)
        if not damaged:
            raise
    indices = (Index(path, [entry], bytearray(segment)) for entry, segment in map(scan, whole) if entry.samples)
    return (Shards(path, index) for index in indices), total, damaged


def _twice(samples: Samples, found: "_Wrong") -> Iterator[str]:
    """Of each sample in order what of it its shard holds twice, in words, or "". `found` is told of shards whose keys
    are not of use."""
    for number, size in enumerate(samples.shard_sizes):
        names: dict[str, str] = {}
        try:
            if isinstance(samples, Shards):
                names = _repeated_names(samples.paths[number])
            else:
                samples.shard_keys(number)
        except (NotWhole, OSError) as error:  # what its index says of it has come from a better day
            found.add(str(samples.folder / samples.names[number]), None, [(DAMAGED, str(error))])
        except DataError as error:
            found.add(f"{samples.folder}: {samples.names[number]}", None, [(REPEATED, str(error))])
        yield from (names.get(key, "") for key in samples.shard_keys(number)) if names else [""] * size


def _repeated_names(tar: Path) -> dict[str, str]:
    """Keys of a tar of which a file occurs twice, with words for it: WebDataset makes two samples of them."""
    seen: set[bytes] = set()
    found: dict[str, str] = {}
    with open(tar, "rb") as file:
        for name, _, _ in members(file.fileno(), os.fstat(file.fileno()).st_size):
            if name in seen and (named := key_and_suffix(name)):
                base = name.rpartition(b"/")[2].decode(errors="replace")
                found[named[0].decode(errors="replace")] = f"{base} occurs twice in the tar; the last one is read"
            seen.add(name)
    return found


def _keys(samples: Samples) -> Iterator[str]:
    """The keys of all samples, in order. Raises DataError for one that is missing or occurs twice in parquet files."""
    start = 0
    for number, size in enumerate(samples.shard_sizes):
        try:
            yield from samples.shard_keys(number)
        except DataError:
            if not isinstance(samples, TablePictures):
                raise
            # The rows tell them as they are, without a word about one that occurs twice.
            told = ((row, samples.meta(row).get("key")) for row in range(start, start + size))
            yield from (str(row if key in (None, "") else key) for row, key in told)
        start += size


def _column(samples: Samples, field: str) -> str:
    """Where the captions `field` of a sample are: the entry or column. Raises DataError for a column that is none."""
    if isinstance(samples, TablePictures):
        return column_of(samples.folder, field, samples.columns, "caption")
    if isinstance(samples, ParquetPictures):
        return column_of(samples.folder, field, samples.columns, "re_caption")
    return field


def _text_columns(samples: Samples) -> list[str]:
    """Captions that are not in the metadata: the .txt of tars, the columns of text of parquet files."""
    if isinstance(samples, Shards):
        return ["txt"]
    if not isinstance(samples, ParquetPictures):
        return []
    path = samples.folder / samples.names[0]
    schema = read_parquet(path if path.is_file() else next(path.glob("*.parquet")), lambda file: file.schema_arrow)
    kinds = {column.name: str(getattr(column.type, "value_type", column.type)) for column in schema}
    return [name for name, kind in kinds.items() if kind.endswith("string") and name not in ("key", "extension")]


def _whole_meta(samples: Samples, row: int, columns: Sequence[str]) -> dict[str, Any]:
    """The metadata of a sample, and what these columns hold of it. Raises DataError."""
    meta = dict(samples.meta(row))
    for column in columns:
        try:
            meta[column] = samples.caption(row, column)
        except DataError:  # missing or blank
            continue
    return meta


def _in_order(work: Callable[[int], Found], rows: Iterable[int], threads: int | None) -> Iterator[tuple[int, Found]]:
    """(row, work(row)) in the order of the rows; threads run ahead of the caller by a few rows each."""
    threads = threads or min(32, len(os.sched_getaffinity(0)))
    queue: deque[tuple[int, Future[Found]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for row in rows:
                queue.append((row, pool.submit(work, row)))
                if len(queue) > 4 * threads:
                    row, done = queue.popleft()
                    yield row, done.result()
            while queue:
                row, done = queue.popleft()
                yield row, done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Wrong:
    """What is wrong with samples: counted by cause, listed in a file of JSON lines."""

    def __init__(self, file: TextIO | None):
        self._file = file
        self.bad = 0  # samples
        self.causes: Counter[str] = Counter()
        self.first: list[dict[str, Any]] = []

    def add(self, where: str, row: int | None, wrong: Sequence[tuple[str, str]]) -> None:
        """All that is wrong with a sample, (cause, reason) each; without a row with a shard."""
        self.bad += row is not None
        for cause, reason in wrong:
            # Reasons for people name the sample, which has an entry of its own here; names may be no Unicode.
            told = reason.removeprefix(where).lstrip(": ").encode(errors="backslashreplace").decode()
            line = {"sample": where, "row": row, "cause": cause, "reason": told}
            self.causes[cause] += 1
            if len(self.first) < _NAMED:
                self.first.append(line)
            if self._file is not None:
                self._file.write(json.dumps(line) + "\n")

    def told(self) -> dict[str, Any]:
        """{"bad": samples, "causes": {cause: n}, "first": lines}."""
        return {"bad": self.bad, "causes": dict(self.causes.most_common()), "first": self.first}


class _Captions:
    """Lengths and repeats of the captions of one field, in bounded memory.

    Distinct ones are counted by adaptive sampling (Wegman; Flajolet, 1990): hashes that divide by 2^k are kept, k
    growing as they become too many.
    """

    def __init__(self) -> None:
        self._lengths: Counter[int] = Counter()
        self._kept: set[int] = set()
        self._modulus = 1

    def add(self, text: str) -> None:
        self._lengths[len(text)] += 1
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        if (number := int.from_bytes(digest, "little")) % self._modulus == 0:
            self._kept.add(number)
            if len(self._kept) > _DISTINCT:
                self._modulus *= 2
                self._kept = {number for number in self._kept if number % self._modulus == 0}

    def told(self) -> dict[str, Any]:
        """{"samples", "median", "p95", "max": characters, "repeats": share}."""
        samples = self._lengths.total()
        return {
            "samples": samples,
            "median": _quantile(self._lengths, 0.5),
            "p95": _quantile(self._lengths, 0.95),
            "max": max(self._lengths),
            "repeats": max(0.0, 1 - len(self._kept) * self._modulus / samples),
        }


def _spread(counts: Counter[int]) -> dict[str, int] | None:
    if not counts:
        return None
    return {"min": min(counts), "median": _quantile(counts, 0.5), "max": max(counts)}


def _quantile(counts: Counter[int], share: float) -> int:
    """The smallest of the numbers that at least this share of all do not exceed."""
    wanted, below = share * counts.total(), 0
    for number in sorted(counts):
        below += counts[number]
        if below >= wanted:
            return number
    raise AssertionError("a share above 1")

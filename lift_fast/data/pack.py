"""Packs a data set into WebDataset tars."""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from ..errors import ConfigError, DataError
from .folders import TableImages
from .images import decode, read_header
from .index import build_index
from .passes import NO_CAPTION, Findings, caption_column, in_order, text_columns, whole_meta
from .samples import BadSample, Samples
from .shards import ShardWriter

_SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # pictures of other formats are written as PNG
_KEY = re.compile(r"[^./\x00-\x1f\x7f\ud800-\udfff]+")
_KEY_BYTES = 80  # a name in a tar has 100, its suffix among them


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
        caption_column(samples, field)
    columns = text_columns(samples)
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
            found = Findings(file)
            for row, made in in_order(make, range(len(samples)), threads):
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
    return {"samples": good, "shards": -(-good // samples_per_shard), "resized": resized, **found.report()}


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
    meta = whole_meta(samples, row, columns)
    for field in fields:
        try:
            caption = samples.caption(row, field)
        except DataError:
            if field == fields[-1]:
                raise
            continue
        meta.pop(caption_column(samples, field), None)
        return caption.encode(errors="replace").decode(), json.loads(json.dumps(meta, default=str))
    raise AssertionError("no field")


def _keys(samples: Samples) -> Iterator[str]:
    """The keys of all samples, in order. Raises DataError for one that is missing or occurs twice in parquet files."""
    start = 0
    for number, size in enumerate(samples.shard_sizes):
        try:
            yield from samples.shard_keys(number)
        except DataError:
            if not isinstance(samples, TableImages):
                raise
            # The rows tell them as they are, without a word about one that occurs twice.
            told = ((row, samples.meta(row).get("key")) for row in range(start, start + size))
            yield from (str(row if key in (None, "") else key) for row, key in told)
        start += size

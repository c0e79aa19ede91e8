"""Packs a data set into WebDataset tars."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..errors import ConfigError, DataError
from ..files import part_folder
from ..progress import bar
from .images import decode, memory_for, read_header
from .index import build_index
from .passes import Findings, in_order, whole_meta
from .samples import BadSample, BadText, Samples
from .shards import ShardWriter, check_new, give_name

_SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp"}  # images in other formats are written as PNG
_KEY = re.compile(r"[^./\x00-\x1f\x7f\ud800-\udfff]+")
_KEY_BYTES = 80  # a ustar name has at most 100, with the suffix


class _Packed(NamedTuple):
    """A sample ready to be written."""

    image: bytes
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

    An image's bytes are copied, with the suffix of their format. With `size`, in pixels, an image whose shorter side is
    longer is resized to it (Lanczos) and written as JPEG of `quality`. KEY.txt is the first of `fields` that the sample
    has; KEY.json has the other metadata. A sample whose image does not decode, or that has no caption, is left out and
    listed in OUT/bad.jsonl, in the form of check(), with damaged shards and unused files. KEY is safe_key() of the
    sample's key, or of its number where it has none, with a number appended where its shard has that key already; a key
    that changed is kept in KEY.json as "source_key".

    samples: opened with DataOptions.skip_bad, so that all that can be read is packed.

    Returns {"samples", "shards", "resized", "bad", "causes", "first"}, the last three as in the report of check().
    Raises ConfigError for a setting out of range; DataError when `out` exists, at the beginning or at the end, and when
    no sample is good.
    """
    for name, value in ("samples per shard", samples_per_shard), ("size", size), ("quality", quality):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    if quality > 100:
        raise ConfigError(f"quality must be 100 at most, not {quality}")
    if not fields:
        raise ConfigError("pack needs the name of the captions: txt, an entry of the .json, or a column")
    out = Path(out)
    check_new(out)

    def make(row: int) -> _Packed | BadSample:
        try:
            image = _image(samples.image_bytes(row), size, quality)
            return _Packed(*image, *_caption(samples, row, fields, texts))
        except BadSample as error:
            return error

    for field in fields:
        samples.caption_field(field)
    texts = samples.text_fields()
    good = resized = 0
    taken: dict[str, int] = {}
    keys = _keys(samples)
    # Everything is written under another name first, so that `out` appears whole or not at all.
    with part_folder(out) as part:
        packed, listed = part / "out", part / "bad.jsonl"
        with (
            ShardWriter(packed, samples_per_shard) as writer,
            open(listed, "x") as file,
            bar(total=len(samples), unit="sample", desc="pack", disable=not progress, leave=False) as shown,
        ):
            found = Findings(file)
            for problem in samples.problems:
                found.add_problem(problem)
            for row, made in in_order(make, range(len(samples)), threads):
                key = next(keys)
                shown.update()
                if isinstance(made, BadSample):
                    found.add(samples.where(row), row, [made])
                    continue
                if good % samples_per_shard == 0:
                    taken = {}
                name = _unique(safe_key(key), taken)
                meta = made.meta if name == key else {**made.meta, "source_key": key}
                writer.write(name, made.image, made.caption, meta, made.suffix)
                good += 1
                resized += made.resized
            if not good:
                worst = next((line for line in found.first if line["row"] is not None), found.first[0])
                raise DataError(
                    f"{samples.folder}: none of its {len(samples)} samples is good; the first: {worst['sample']}: "
                    f"{worst['cause']} ({worst['reason']})"
                )
        if found.causes:
            os.replace(listed, packed / listed.name)
        build_index(packed, processes=1, progress=False)
        give_name(packed, out)
    return {"samples": good, "shards": -(-good // samples_per_shard), "resized": resized, **found.report()}


def safe_key(key: str) -> str:
    """Makes a key that a tar can hold.

    A key that is not empty, has at most 80 bytes and no dot, slash or control character stays as it is. In any other
    key each character except A-Z, a-z, 0-9, _ and - becomes _, the end is cut, and 8 hexadecimal digits of the key's
    BLAKE2b are appended, so that different keys stay different.
    """
    if _KEY.fullmatch(key) and len(key.encode()) <= _KEY_BYTES:
        return key
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', key)[: _KEY_BYTES - 9]}-{digest}"


def _unique(key: str, taken: dict[str, int]) -> str:
    """Takes and returns the key, or the first of key-2, key-3, … that is free. taken: key -> last number in use."""
    name, number = key, taken.get(key, 1)
    while name in taken:
        number += 1
        name = f"{key}-{number}"
    taken[key] = number
    taken[name] = taken.get(name, 1)
    return name


def _image(data: bytes, size: int | None, quality: int) -> tuple[bytes, str, bool]:
    """The image as it is written, its suffix, and whether it was resized. Raises BadSample when it does not decode."""
    header = read_header(data)
    with memory_for(header):
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


def _caption(samples: Samples, row: int, fields: Sequence[str], texts: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The caption of the first field that has one, and the other metadata, JSON-serialisable.

    Raises BadText when no field has one, a field before it is no text, or the metadata cannot be read.
    """
    meta = whole_meta(samples, row, texts)
    for field in fields:
        try:
            caption = samples.caption(row, field)
        except BadText as error:
            if field == fields[-1] or error.cause != "no caption":
                raise
            continue
        meta.pop(samples.caption_field(field), None)
        return caption, json.loads(json.dumps(meta, default=str))
    raise AssertionError("no field")


def _keys(samples: Samples) -> Iterator[str]:
    """Yields the keys of all samples, in order; for a missing one the number of the sample.

    Raises DataError for a missing or duplicate key in a set that was not opened with skip_bad.
    """
    start = 0
    for number, size in enumerate(samples.shard_sizes):
        yield from (key or str(start + row) for row, key in enumerate(samples.shard_keys(number)))
        start += size

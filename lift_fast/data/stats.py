"""Counts what a data set holds: formats and sizes of its images, lengths of its captions."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError
from ..progress import bar
from .images import Header, read_header
from .order import permuted
from .passes import in_order, remarks_of, whole_meta
from .samples import BadSample, BadText, Samples
from .shards import Shards

SMALL = 224  # pixels: images with a shorter side below it are enlarged for the usual model
_FIELDS = 100  # fields of text that are counted: metadata may name its entries anew in every sample
_DISTINCT = 1 << 20  # distinct captions that are counted exactly


def stats(
    samples: Samples, sample: int | None = 10_000, threads: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Statistics of a data set, JSON-serialisable, from the headers and captions of `sample` samples drawn without
    repeats, or of all samples where it is None. Decodes no image.

    "samples", "shards", "smallest_shard", "largest_shard": counts of the whole set. "bytes": of all tars; None for
    other layouts. The rest describes the samples drawn, "sampled" in number:

    "picture_bytes": bytes of their encoded images. "formats": number of images by format. "width", "height": min,
    median and max of the upright images, in pixels. "below_224": share of images with a shorter side below that.
    "captions": for "txt" and each text in the metadata, 100 fields at most, the samples that have it, its length in
    characters (median, 95th percentile, max), and the share that repeats an earlier one, estimated above a million
    distinct ones. "no_text": samples without any text, or with metadata that cannot be read. "bad": images by cause.
    "bad_captions": the usual captions, those that training reads, by cause; {} for a set that has none.
    "unused_files", "damaged_shards": what opening the set found. "remarks": sentences on how a table was read.

    Raises ConfigError for a sample below 1.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"sample must be at least 1, not {sample}")
    total = len(samples)
    looked = total if sample is None else min(sample, total)
    # Sorted, so that files are read in order.
    rows = range(total) if looked == total else map(int, np.sort(permuted(np.arange(looked), total, 0)))
    formats: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    bad_captions: Counter[str] = Counter()
    sides: dict[str, Counter[int]] = {"width": Counter(), "height": Counter(), "shorter": Counter()}
    captions: dict[str, CaptionCounts] = {}
    read = no_text = 0
    columns = samples.text_fields()
    with_captions = _has_captions(samples)

    def look(row: int) -> tuple[int, Header | BadSample, dict[str, str], str]:
        data = b""
        header: Header | BadSample
        try:
            data = samples.image_bytes(row)
            header = read_header(data)
        except BadSample as error:
            header = error
        return len(data), header, _texts(samples, row, columns), _caption_cause(samples, row) if with_captions else ""

    found = bar(in_order(look, rows, threads), "stats", looked, unit="sample", disable=not progress, leave=False)
    for _, (length, header, texts, cause) in found:
        read += length
        bad_captions.update([cause] if cause else [])
        no_text += not texts
        for field, text in texts.items():
            if field in captions or len(captions) < _FIELDS:
                captions.setdefault(field, CaptionCounts()).add(text)
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
        "captions": {field: counts.report() for field, counts in captions.items()},
        "no_text": no_text,
        "bad": dict(bad.most_common()),
        "bad_captions": dict(bad_captions.most_common()),
        "unused_files": sum(problem.count for problem in samples.problems if problem.cause == "unused file"),
        "damaged_shards": sum(problem.cause == "damaged shard" for problem in samples.problems),
        "remarks": remarks_of(samples),
    }


def _has_captions(samples: Samples) -> bool:
    """Whether the set has captions of the usual name."""
    try:
        samples.caption_field()
    except DataError:
        return False
    return True


def _caption_cause(samples: Samples, row: int) -> str:
    """The cause that makes a sample's caption unusable, "" for a good one."""
    try:
        samples.caption(row)
    except BadText as error:
        return error.cause
    return ""


def _texts(samples: Samples, row: int, columns: Sequence[str]) -> dict[str, str]:
    """The texts of a sample by field, without blank ones; none where its metadata cannot be read."""
    try:
        meta = whole_meta(samples, row, columns)
    except BadText:
        return {}
    return {name: text.strip() for name, text in meta.items() if isinstance(text, str) and text.strip()}


class CaptionCounts:
    """Lengths and repeats of the captions of one field, in bounded memory.

    Distinct captions are counted by adaptive sampling (Wegman; Flajolet, 1990): it keeps the hashes that are multiples
    of 2^k, and increments k when they become too many.
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

    def report(self) -> dict[str, Any]:
        """{"samples": count, "median", "p95", "max": characters, "repeats": share}."""
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
    """The smallest number that at least this share of all numbers does not exceed. counts: number -> how often."""
    wanted, below = share * counts.total(), 0
    for number in sorted(counts):
        below += counts[number]
        if below >= wanted:
            return number
    raise AssertionError("a share above 1")

"""Embeds the captions of a data set into a text cache, shard by shard, in one process or in several.

Existing shards are not computed again, and within a group of shards a repeated caption is encoded once.

    read every shard of this rank's share       finds bad captions, and data other than the cache's, before the first
                                                write
    fit the conditioning, if one is wanted      to a sample of all captions (conditioning.py)
    compare the cache's size with the disk's free space
    for each group (up to 16 shards in a row):  group g belongs to rank g % world
        for each shard of the group:
            new = captions that no earlier shard of the group has, each once, in order
            encode, condition and quantize new  on the encoder's device, `_CHUNK` captions at a time
            copy the codes of repeated captions from this shard, or from an earlier shard of the group on disk
            write

The vectors of a shard depend only on the captions of its group. A shard is the same, byte for byte, however often the
run was killed and however many ranks there are, because the same batches are computed.

With DataOptions.skip_bad a sample whose caption or key cannot be used, or whose caption has no tokens, keeps its row:
the row's codes are those of a row of zeros, and its number is in the shard (cache/shard.py). skipped.py lists them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as default
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..cache import Cache, CacheWriter, Conditioning, Rotation, encode, key_hashes
from ..cache.manifest import digest_of
from ..data.samples import BadText, Samples
from ..data.sources import Source
from ..errors import DataError
from ..ops.rows.codecs import codec_named
from ..ops.rows.quantized import QuantizedRows
from ..progress import bar
from ..ranks import Rank
from .conditioning import Request, check_folder, fit_to_source, found_in, publish
from .encoder import NoTokens
from .first_vectors import FirstVectors
from .skipped import SkippedList
from .spec import EncoderSpec, check_batch_size

# A group ends after _GROUP_SHARDS shards, or when it has 1/64 of all captions, so that many ranks get a share; that
# number is at least _GROUP_ROWS[0] and at most _GROUP_ROWS[1].
_GROUP_ROWS, _GROUP_SHARDS = (1 << 12, 1 << 17), 16
_CHUNK = 1 << 14  # captions encoded in one call: at dim 4096, 256 MB of vectors
_SAMPLED_BATCHES = 4  # batches that `estimate` times


class TextEncoder(Protocol):
    """What embedding needs of an encoder; text.encoder.Encoder implements it."""

    spec: EncoderSpec

    @property
    def dim(self) -> int:
        """The length of a vector."""

    def encode(self, captions: Sequence[str], batch_size: int, done: Callable[[int], object]) -> Tensor:
        """Returns the captions' vectors, float32 [len(captions), dim]; calls done with a count after each batch."""


@dataclass(frozen=True)
class Outcome:
    """What one rank did.

    computed: captions that were encoded. copied: rows that repeat a caption, whose codes were copied. missing: shards
    that other ranks have not written yet, 0 when the cache is finished. cosine: mean cosine between the first vectors
    that were stored (at most 1 024) and their codes, None if none was computed. spread: mean cosine between two of the
    encoder's first vectors, None for fewer than 8. skipped: samples left out by cause: of the whole cache when it is
    finished, else of this rank's share. written: shards that this rank wrote. by_others: shards of its share that
    another process wrote meanwhile.
    """

    computed: int
    copied: int
    missing: int
    cosine: float | None
    spread: float | None = None
    skipped: dict[str, int] = default(default_factory=dict)
    written: int = 0
    by_others: int = 0


@dataclass(frozen=True)
class Estimate:
    """The size of a cache, and how long embedding takes.

    rows, dim, bytes: of the finished cache. They are exact unless a conditioning is still to be fitted (`exact`): dim
    and bytes are then at most those; without `auto` dims, dim is exact and bytes are less than a hundred too many.
    captions_per_s: captions per second of one process, measured on `sampled` captions. seconds: number of ranks ->
    seconds. It counts repeated captions as if they were encoded, because finding them would need reading all captions.
    """

    rows: int
    dim: int
    bytes: int
    exact: bool
    captions_per_s: float
    sampled: int
    seconds: dict[int, float]


def embed(
    data: Samples,
    out: str | Path,
    encoder: TextEncoder,
    *,
    field: str = "txt",
    codec: str = "int8",
    batch_size: int = 64,
    conditioning: Conditioning | Request | None = None,
    progress: bool = True,
) -> Cache:
    """Embeds all captions of a data set into a cache at `out`, in this process, and returns the cache, opened.

    field: txt, an entry of the .json, or a column. codec, batch_size, conditioning, errors: as for `embed_share`.
    """
    source = Source(data, field)
    embed_share(source, out, encoder, codec=codec, batch_size=batch_size, conditioning=conditioning, progress=progress)
    return Cache(out)


def embed_share(
    source: Source,
    out: str | Path,
    encoder: TextEncoder,
    *,
    codec: str = "int8",
    batch_size: int = 64,
    conditioning: Conditioning | Request | None = None,
    rank: Rank | None = None,
    progress: bool = True,
    warn: Callable[[str], object] = lambda warning: None,
    fitted: Callable[[Conditioning], object] = lambda conditioning: None,
) -> Outcome:
    """Embeds the missing shards of a rank's share of `source` into the cache at `out`; finishes the cache when no
    rank's shard is missing.

    Cache shard k holds the captions of the source's shard k in the same order. A killed run continues at its first
    missing shard. A shard that another process with the same share writes meanwhile is not written again.

    codec: a key of ops.rows.codecs.CODECS. batch_size: captions per call of the model. conditioning: of the vectors; a
    Request is fitted to a sample of all captions before the first shard is written, unless the folder has the fit of an
    earlier run or another rank. rank: None for a single process. progress: whether to show progress bars. warn: called
    with a warning for the user. fitted: called with the conditioning before the first shard is written.

    Samples that were left out are listed in OUT/skipped.jsonl when the cache is finished (skipped.py).

    Raises ConfigError for a batch_size below 1 and for a conditioning that the captions do not determine, and DataError
    for bad data, all before anything is written; CacheError when the disk has not the space for the cache, also before,
    and when it cannot be written; CacheMismatch when `out` was made from other keys or captions, with another encoder,
    field, codec or conditioning; EncoderError for an encoder that gives different captions one vector; BadText for a
    caption without tokens, unless bad samples are skipped.
    """
    check_batch_size(batch_size)
    rank = rank or Rank()
    codec_named(codec)  # raises for an unknown one
    mine = groups(source.sizes)[rank.number :: rank.world]
    first = FirstVectors(encoder.spec.name, warn)
    known = _known(conditioning, source, out, encoder)
    if isinstance(known, Request):
        plan = _read_all(source, lambda number, keys, captions: None, mine, rank, progress)
        fit = _fit(known, source, encoder, batch_size, first, rank, progress)
        _writer(source, out, encoder, codec, fit).check_space()
        known = publish(Path(out), fit)
        writer = _writer(source, out, encoder, codec, known, plan)
    else:
        writer = _writer(source, out, encoder, codec, known)
        plan = _read_all(source, writer.expect, mine, rank, progress)
    writer.check_space()
    if known is not None:
        fitted(known)
    dim, rotation = _codes_of(codec, encoder.dim, known)
    missing = set(writer.missing())
    todo = [number for group in mine for number in group if number in missing]
    left = writer.size_on_disk(todo)
    computed = copied = written = by_others = 0
    left_out = SkippedList(source, encoder.spec.name)
    zero = encode(torch.zeros(1, dim), codec, rotation)
    with bar(
        total=sum(plan[number].new for number in todo),
        unit=" captions",
        unit_scale=True,
        desc=_title(f"embed {source.field}", rank),
        disable=not progress,
    ) as shown:

        def encode_captions(captions: list[str]) -> tuple[QuantizedRows, list[int]]:
            """The rows of captions, and the numbers of those that have no tokens and so no vector."""
            parts, empty = [], []
            for start in range(0, max(1, len(captions)), _CHUNK):  # once even without captions, for codes of no row
                chunk = captions[start : start + _CHUNK]
                vectors, without = _vectors(encoder, chunk, batch_size, shown.update)
                first.look(chunk, vectors, without)
                vectors = vectors if known is None else known.apply(vectors)
                rows = encode(vectors, codec, rotation)
                first.compare(vectors, rows, rotation, without)
                parts.append(rows.to("cpu"))
                empty += [start + i for i in without]
            return QuantizedRows.cat(parts), empty

        for group in mine:
            seen: dict[str, tuple[int, int]] = {}  # caption -> the shard and row where the group has it first
            for number in range(group.start, max((k + 1 for k in group if k in missing), default=group.start)):
                keys, captions, bad = source.read(number)
                if digest_of(captions) != plan[number].captions:
                    raise DataError(
                        f"{source.names[number]} of {source.path} changed while it was embedded; run the command again"
                    )
                firsts = [
                    None if caption is None else seen.setdefault(caption, (number, row))
                    for row, caption in enumerate(_usable(captions, bad))
                ]
                if number not in missing:
                    continue
                shown.set_postfix_str(f"{in_bytes(left)} to write")
                left -= writer.size_on_disk([number])
                if writer.is_written(number):  # by another process, since this one began
                    writer.expect(number, keys, plan[number].captions)
                    shown.update(plan[number].new)
                    by_others += 1
                    continue
                found = _rows(number, captions, firsts, encode_captions, zero, writer)
                if found.empty and not source.options.skip_bad:
                    raise left_out.reasons(number, found.empty[:1])[found.empty[0]]
                is_mine = writer.write_shard(number, found.rows, key_hashes(keys).tolist(), found.skipped)
                written, by_others = written + is_mine, by_others + (not is_mine)
                computed += found.computed
                copied += len(captions) - found.computed - len(found.skipped)
        shown.set_postfix_str(f"{in_bytes(left)} to write")
    unwritten = set(writer.missing()).difference(*mine)
    if not unwritten:
        writer.finish()
    for number in range(len(source.sizes)) if not unwritten else plan:
        left_out.add(number, writer.skipped(number))
    if not unwritten:
        left_out.write_to(Path(out))
    skipped = dict(left_out.causes)
    return Outcome(computed, copied, len(unwritten), first.cosine, first.spread, skipped, written, by_others)


def estimate(
    source: Source,
    out: str | Path,
    encoder: TextEncoder,
    *,
    codec: str = "int8",
    batch_size: int = 64,
    conditioning: Conditioning | Request | None = None,
    worlds: Sequence[int] = (1,),
) -> Estimate:
    """Computes the size of the cache that embed_share would write at `out`, and estimates its time.

    The time comes from encoding a few batches spread over the source; a Request is not fitted, as that may take long.
    worlds: the numbers of ranks to estimate the time for. Writes nothing. Raises as embed_share.
    """
    check_batch_size(batch_size)
    known, to_fit = _known(conditioning, source, out, encoder), 0
    exact = not isinstance(known, Request)
    if isinstance(known, Request):
        to_fit = min(known.sample_rows(encoder.dim), sum(source.sizes))
        known = known.at_most(encoder.dim, known.of_source(source, encoder.spec.as_dict(), encoder.dim))
    writer = _writer(source, out, encoder, codec, known)
    dim, rotation = _codes_of(codec, encoder.dim, known)
    filled = [number for number, size in enumerate(source.sizes) if size]
    spread = [filled[len(filled) * k // _SAMPLED_BATCHES] for k in range(_SAMPLED_BATCHES)]
    sample: list[str] = []
    for number in sorted(set(spread)):
        read = source.read(number)
        captions = list(filter(None, _usable(read.captions, read.bad)))
        wanted = batch_size * spread.count(number)
        sample += captions[:: max(1, len(captions) // wanted)][:wanted]

    def run() -> None:
        vectors = _vectors(encoder, sample, batch_size, lambda captions: None)[0]
        encode(vectors if known is None else known.apply(vectors), codec, rotation).to("cpu")

    run()  # the first call of a model is slower
    start = time.perf_counter()
    run()
    rate = len(sample) / (time.perf_counter() - start)
    rows = [sum(source.sizes[number] for number in group) for group in groups(source.sizes)]
    shares = {world: max(sum(rows[rank::world]) for rank in range(world)) for world in worlds}
    seconds = {world: (to_fit + share) / rate for world, share in shares.items()}
    return Estimate(sum(source.sizes), dim, writer.size_on_disk(), exact, rate, len(sample), seconds)


def groups(sizes: Sequence[int]) -> list[range]:
    """Splits shards with these numbers of captions into groups of consecutive shards, within which a repeated caption
    is encoded once. Groups do not depend on the number of ranks."""
    enough = min(max(sum(sizes) // 64, _GROUP_ROWS[0]), _GROUP_ROWS[1])
    found, start, rows = [], 0, 0
    for number, size in enumerate(sizes):
        rows += size
        if rows >= enough or number + 1 - start == _GROUP_SHARDS or number + 1 == len(sizes):
            found.append(range(start, number + 1))
            start, rows = number + 1, 0
    return found


def in_bytes(count: float) -> str:
    """Formats a number of bytes with three significant digits: 3912345678 -> "3.91 GB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"


@dataclass(frozen=True)
class _Read:
    """What the first reading of a shard found. captions: their digest. new: captions, each counted once, that no
    earlier shard of the group has."""

    captions: str
    new: int


def _read_all(
    source: Source,
    expect: Callable[[int, Sequence[str], str], object],
    mine: Sequence[range],
    rank: Rank,
    progress: bool,
) -> dict[int, _Read]:
    """Reads a rank's share once, and calls expect(number, keys, digest of the captions) for each shard: the writer's,
    once there is one. Raises DataError for bad data, and what expect raises."""
    found = {}
    total = sum(source.sizes[number] for group in mine for number in group)
    title = _title(f"read {source.field}", rank)
    with bar(total=total, unit=" captions", unit_scale=True, desc=title, disable=not progress) as shown:
        for group in mine:
            seen: set[str | None] = set()
            for number in group:
                keys, captions, bad = source.read(number)
                digest, before = digest_of(captions), len(seen)
                expect(number, keys, digest)
                seen.update(_usable(captions, bad))
                seen.discard(None)
                found[number] = _Read(digest, len(seen) - before)
                shown.update(len(captions))
    return found


def _usable(captions: Sequence[str | None], bad: Mapping[int, BadText]) -> Sequence[str | None]:
    """The captions of a shard, None for those of samples that are left out."""
    return [None if row in bad else caption for row, caption in enumerate(captions)] if bad else captions


def _vectors(
    encoder: TextEncoder, captions: list[str], batch_size: int, done: Callable[[int], object]
) -> tuple[Tensor, list[int]]:
    """The vectors of captions, float32 [len(captions), dim], and the numbers of those without tokens, whose rows are
    zeros."""
    try:
        return encoder.encode(captions, batch_size, done), []
    except NoTokens as error:
        empty = sorted(error.captions)
    without = set(empty)
    kept = [i for i in range(len(captions)) if i not in without]
    encoded = encoder.encode([captions[i] for i in kept], batch_size, done)
    done(len(empty))
    vectors = encoded.new_zeros((len(captions), encoded.shape[1]))
    vectors[torch.tensor(kept, dtype=torch.int64, device=vectors.device)] = encoded
    return vectors, empty


@dataclass(frozen=True)
class _Shard:
    """A shard to write. skipped: rows without a vector, ascending. empty: those of them whose caption has no tokens.
    computed: captions that were encoded."""

    rows: QuantizedRows
    skipped: list[int]
    empty: list[int]
    computed: int


def _rows(
    number: int,
    captions: Sequence[str | None],
    firsts: Sequence[tuple[int, int] | None],
    encode_captions: Callable[[list[str]], tuple[QuantizedRows, list[int]]],
    zero: QuantizedRows,
    writer: CacheWriter,
) -> _Shard:
    """The rows of shard `number`: new captions encoded, repeated ones copied, zeros where there is no vector.

    firsts: the (shard, row) of each caption's first occurrence in the group, None for a sample that is left out.
    encode_captions(captions) computes rows, and tells those without tokens. zero: the codes of one row of zeros.
    """
    new = [row for row, first in enumerate(firsts) if first == (number, row)]
    encoded, without = encode_captions([str(captions[row]) for row in new])
    if len(new) == len(captions):
        return _Shard(encoded, without, without, len(new) - len(without))
    # Rows of `parts`, concatenated: those of the new captions, then those copied from each earlier shard, then zeros.
    parts, position = [encoded], {row: i for i, row in enumerate(new)}
    count = len(new)
    no_vector = {(number, new[i]) for i in without}
    for shard in sorted({first[0] for first in firsts if first} - {number}):
        copied = {row: first[1] for row, first in enumerate(firsts) if first and first[0] == shard}
        parts.append(writer.written(shard, torch.tensor(list(copied.values()))))
        position.update(zip(copied, range(count, count + len(copied)), strict=True))
        count += len(copied)
        no_vector |= {(shard, row) for row in writer.skipped(shard)}
    parts.append(zero)
    order = [
        count if first is None else position[row if first[0] != number else first[1]]
        for row, first in enumerate(firsts)
    ]
    empty = [row for row, first in enumerate(firsts) if first in no_vector]
    skipped = [row for row, first in enumerate(firsts) if first is None or first in no_vector]
    return _Shard(QuantizedRows.cat(parts)[torch.tensor(order)], skipped, empty, len(new) - len(without))


def _known(
    conditioning: Conditioning | Request | None, source: Source, out: str | Path, encoder: TextEncoder
) -> Conditioning | Request | None:
    """The conditioning of a cache, a Request while it is to be fitted. Raises ConfigError and CacheError."""
    if not isinstance(conditioning, Request):
        check_folder(Path(out), conditioning)
        return conditioning
    conditioning.check(encoder.dim, [sum(source.sizes)])
    return found_in(Path(out), conditioning.of_source(source, encoder.spec.as_dict(), encoder.dim)) or conditioning


def _fit(
    request: Request,
    source: Source,
    encoder: TextEncoder,
    batch_size: int,
    first: FirstVectors,
    rank: Rank,
    progress: bool,
) -> Conditioning:
    """Fits a conditioning to a sample of the captions; `first` looks at its vectors. Raises as fit_to_source."""

    def encode_sample(captions: list[str], done: Callable[[int], object]) -> Tensor:
        vectors, without = _vectors(encoder, captions, batch_size, done)
        first.look(captions, vectors, without)
        return vectors

    asked = request.of_source(source, encoder.spec.as_dict(), encoder.dim)
    title = _title("fit conditioning", rank)
    return fit_to_source(request, source, encode_sample, encoder.dim, asked, title, progress)


def _codes_of(codec: str, dim: int, conditioning: Conditioning | None) -> tuple[int, Rotation | None]:
    """The length of the vectors that are stored, and the rotation of their codes. dim: of the encoder's vectors."""
    dim = dim if conditioning is None else conditioning.dim
    return dim, Rotation(dim) if codec_named(codec).rotated else None


def _writer(
    source: Source,
    out: str | Path,
    encoder: TextEncoder,
    codec: str,
    conditioning: Conditioning | None,
    plan: Mapping[int, _Read] | None = None,
) -> CacheWriter:
    """The writer of a cache. plan: the shards that are read already."""
    shards = [
        {
            "name": name,
            "samples": size,
            "captions": plan[number].captions if plan and number in plan else "",
            "stamp": source.stamp(number),
        }
        for number, (name, size) in enumerate(zip(source.names, source.sizes, strict=True))
    ]
    read, settings = source.options.recorded(), encoder.spec.as_dict()
    dim, rotation = _codes_of(codec, encoder.dim, conditioning)
    return CacheWriter(out, dim, codec, settings, shards, source.field, rotation, read, conditioning)


def _title(what: str, rank: Rank) -> str:
    return what if rank.world == 1 else f"{what} ({rank})"

"""Embeds the captions of a data set into a text cache, shard by shard, in one process or in several.

Existing shards are not computed again, and within a group of shards a repeated caption is encoded once.

    read every shard of this rank's share       finds bad captions, and data other than the cache's, before the first
                                                write
    for each group (up to 16 shards in a row):  group g belongs to rank g % world
        for each shard of the group:
            new = captions that no earlier shard of the group has, each once, in order
            encode and quantize new             on the encoder's device, `_CHUNK` captions at a time
            copy the codes of repeated captions from this shard, or from an earlier shard of the group on disk
            write

A shard's bytes depend only on the captions of its group. They are the same however often the run was killed and
however many ranks there are, because the same batches are computed.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..cache import Cache, CacheWriter, Rotation, encode, key_hashes
from ..data.shards import Shards
from ..data.sources import Source, Tars
from ..errors import ConfigError, DataError
from ..ops.rows.codecs import codec_named
from ..ops.rows.quantized import QuantizedRows
from .spec import EncoderSpec, check_batch_size

# A group ends after _GROUP_SHARDS shards, or when it has 1/64 of all captions, so that many ranks get a share; that
# number is at least _GROUP_ROWS[0] and at most _GROUP_ROWS[1].
_GROUP_ROWS, _GROUP_SHARDS = (1 << 12, 1 << 17), 16
_CHUNK = 1 << 14  # captions encoded in one call: at dim 4096, 256 MB of vectors
_SAMPLED_BATCHES = 4  # batches that `estimate` times
_COMPARED = 1 << 10  # vectors that are compared with their codes, for Outcome.cosine


class TextEncoder(Protocol):
    """What embedding needs of an encoder; text.encoder.Encoder implements it."""

    spec: EncoderSpec

    @property
    def dim(self) -> int:
        """The length of a vector."""

    def encode(self, captions: Sequence[str], batch_size: int, done: Callable[[int], object]) -> Tensor:
        """Returns the captions' vectors, float32 [len(captions), dim]; calls done with a count after each batch."""


@dataclass(frozen=True)
class Rank:
    """One of `world` processes that share the work. number: its rank. local: its rank on its machine.

    Raises ConfigError for numbers that are not those of a rank.
    """

    number: int = 0
    world: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.number < self.world and self.local >= 0):
            raise ConfigError(
                f"RANK {self.number} of WORLD_SIZE {self.world}, LOCAL_RANK {self.local} is not a rank: RANK must be "
                "less than WORLD_SIZE, and none may be negative; start the processes with torchrun"
            )

    @staticmethod
    def from_environment() -> "Rank":
        """The rank of this process from torchrun's environment variables, else rank 0 of 1. Raises ConfigError."""
        try:
            number, world, local = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
        except ValueError as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, as torchrun sets them: {error}"
            ) from error
        return Rank(number, world, local)

    def __str__(self) -> str:
        return f"rank {self.number} of {self.world}"


@dataclass(frozen=True)
class Outcome:
    """What one rank did.

    computed: captions that were encoded. copied: repeated captions, whose codes were copied. missing: shards that
    other ranks have not written yet, 0 when the cache is finished. cosine: mean cosine between the first computed
    vectors (at most 1 024) and their codes, None if none was computed.
    """

    computed: int
    copied: int
    missing: int
    cosine: float | None


@dataclass(frozen=True)
class Estimate:
    """The size of a cache, and how long embedding takes.

    rows, bytes: of the finished cache, exact. captions_per_s: captions per second of one process, measured on `sampled`
    captions. seconds: number of ranks -> seconds. It counts repeated captions as if they were encoded, because finding
    them would need reading all captions.
    """

    rows: int
    bytes: int
    captions_per_s: float
    sampled: int
    seconds: dict[int, float]


def embed(
    data: Shards,
    out: str | Path,
    encoder: TextEncoder,
    *,
    field: str = "txt",
    codec: str = "int8",
    batch_size: int = 64,
    progress: bool = True,
) -> Cache:
    """Embeds all captions of tar shards into a cache at `out`, in this process, and returns the cache, opened.

    field: "txt" or an entry of the .json. codec, batch_size, errors: as for `embed_share`.
    """
    embed_share(Tars(data, field), out, encoder, codec=codec, batch_size=batch_size, progress=progress)
    return Cache(out)


def embed_share(
    source: Source,
    out: str | Path,
    encoder: TextEncoder,
    *,
    codec: str = "int8",
    batch_size: int = 64,
    rank: Rank | None = None,
    progress: bool = True,
) -> Outcome:
    """Embeds the missing shards of a rank's share of `source` into the cache at `out`; finishes the cache when no
    rank's shard is missing.

    Cache shard k holds the captions of the source's shard k in the same order. A killed run continues at its first
    missing shard. codec: a key of ops.rows.codecs.CODECS. batch_size: captions per call of the model. rank: None for a
    single process. progress: whether to show progress bars.

    Raises ConfigError for a batch_size below 1 and DataError for bad data, both before anything is written;
    CacheMismatch when `out` was made from other keys or captions, with another encoder, field or codec; CacheError when
    the cache cannot be written.
    """
    check_batch_size(batch_size)
    rank = rank or Rank()
    rotation = _rotation(codec, encoder.dim)
    writer = _writer(source, out, encoder, codec, rotation)
    mine = groups(source.sizes)[rank.number :: rank.world]
    plan = _read_all(source, writer, mine, rank, progress)
    missing = set(writer.missing())
    todo = [number for group in mine for number in group if number in missing]
    left, copied = writer.size_on_disk(todo), 0
    cosine: float | None = None
    with tqdm(
        total=sum(plan[number].new for number in todo),
        unit=" captions",
        unit_scale=True,
        desc=_title(f"embed {source.field}", rank),
        position=rank.local,
        disable=not progress,
    ) as bar:

        def encode_captions(captions: list[str]) -> QuantizedRows:
            nonlocal cosine
            parts = []
            for start in range(0, max(1, len(captions)), _CHUNK):  # once even without captions, for codes of no row
                vectors = encoder.encode(captions[start : start + _CHUNK], batch_size, bar.update)
                rows = encode(vectors, codec, rotation)
                if cosine is None and len(rows):
                    cosine = _cosine(vectors[:_COMPARED], rows[:_COMPARED], rotation)
                parts.append(rows.to("cpu"))
            return QuantizedRows.cat(parts)

        for group in mine:
            seen: dict[str, tuple[int, int]] = {}  # caption -> the shard and row where the group has it first
            for number in range(group.start, max((k + 1 for k in group if k in missing), default=group.start)):
                keys, captions = source.read(number)
                if _digest(captions) != plan[number].captions:
                    raise DataError(
                        f"{source.names[number]} of {source.path} changed while it was embedded; run the command again"
                    )
                firsts = [seen.setdefault(caption, (number, row)) for row, caption in enumerate(captions)]
                if number not in missing:
                    continue
                bar.set_postfix_str(f"{in_bytes(left)} to write")
                rows = _with_copies(number, captions, firsts, encode_captions, writer.written)
                writer.write_shard(number, rows, key_hashes(keys).tolist())
                left -= writer.size_on_disk([number])
                copied += len(captions) - plan[number].new
        bar.set_postfix_str(f"{in_bytes(left)} to write")
    unwritten = set(writer.missing()).difference(*mine)
    if not unwritten:
        writer.finish()
    return Outcome(sum(plan[number].new for number in todo), copied, len(unwritten), cosine)


def estimate(
    source: Source,
    out: str | Path,
    encoder: TextEncoder,
    *,
    codec: str = "int8",
    batch_size: int = 64,
    worlds: Sequence[int] = (1,),
) -> Estimate:
    """Computes the size of the cache that embed_share would write at `out`, and estimates its time.

    The time comes from encoding a few batches spread over the source. worlds: the numbers of ranks to estimate the
    time for. Writes nothing. Raises as embed_share.
    """
    check_batch_size(batch_size)
    rotation = _rotation(codec, encoder.dim)
    writer = _writer(source, out, encoder, codec, rotation)
    filled = [number for number, size in enumerate(source.sizes) if size]
    spread = [filled[len(filled) * k // _SAMPLED_BATCHES] for k in range(_SAMPLED_BATCHES)]
    sample: list[str] = []
    for number in sorted(set(spread)):
        captions = source.read(number)[1]
        wanted = batch_size * spread.count(number)
        sample += captions[:: max(1, len(captions) // wanted)][:wanted]

    def run() -> None:
        encode(encoder.encode(sample, batch_size, lambda captions: None), codec, rotation).to("cpu")

    run()  # the first call of a model is slower
    start = time.perf_counter()
    run()
    rate = len(sample) / (time.perf_counter() - start)
    rows = [sum(source.sizes[number] for number in group) for group in groups(source.sizes)]
    shares = {world: max(sum(rows[rank::world]) for rank in range(world)) for world in worlds}
    seconds = {world: share / rate for world, share in shares.items()}
    return Estimate(sum(source.sizes), writer.size_on_disk(), rate, len(sample), seconds)


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
    source: Source, writer: CacheWriter, mine: Sequence[range], rank: Rank, progress: bool
) -> dict[int, _Read]:
    """Reads a rank's share once. Raises DataError for bad data, CacheMismatch for a cache of other data."""
    found = {}
    total = sum(source.sizes[number] for group in mine for number in group)
    title = _title(f"read {source.field}", rank)
    with tqdm(
        total=total, unit=" captions", unit_scale=True, desc=title, position=rank.local, disable=not progress
    ) as bar:
        for group in mine:
            seen: set[str] = set()
            for number in group:
                keys, captions = source.read(number)
                digest, before = _digest(captions), len(seen)
                writer.expect(number, keys, digest)
                seen.update(captions)
                found[number] = _Read(digest, len(seen) - before)
                bar.update(len(captions))
    return found


def _with_copies(
    number: int,
    captions: Sequence[str],
    firsts: Sequence[tuple[int, int]],
    encode_captions: Callable[[list[str]], QuantizedRows],
    written: Callable[[int], QuantizedRows],
) -> QuantizedRows:
    """The rows of shard `number`: new captions encoded, repeated ones copied.

    firsts: the (shard, row) of each caption's first occurrence in the group. encode_captions(captions) computes rows;
    written(shard) returns the rows of an earlier shard.
    """
    new = [row for row, first in enumerate(firsts) if first == (number, row)]
    # Rows of `parts`, concatenated: those of the new captions, then those copied from each earlier shard.
    parts, position = [encode_captions([captions[row] for row in new])], {row: i for i, row in enumerate(new)}
    if len(new) == len(captions):
        return parts[0]
    count = len(new)
    for shard in sorted({shard for shard, _ in firsts} - {number}):
        rows = [row for row, first in enumerate(firsts) if first[0] == shard]
        parts.append(written(shard)[torch.tensor([firsts[row][1] for row in rows])])
        position.update(zip(rows, range(count, count + len(rows)), strict=True))
        count += len(rows)
    order = [position[row if shard != number else first] for row, (shard, first) in enumerate(firsts)]
    return QuantizedRows.cat(parts)[torch.tensor(order)]


def _writer(
    source: Source, out: str | Path, encoder: TextEncoder, codec: str, rotation: Rotation | None
) -> CacheWriter:
    shards = [{"name": name, "samples": size} for name, size in zip(source.names, source.sizes, strict=True)]
    return CacheWriter(out, encoder.dim, codec, encoder.spec.as_dict(), shards, source.field, rotation)


def _rotation(codec: str, dim: int) -> Rotation | None:
    return Rotation(dim) if codec_named(codec).rotated else None


def _cosine(vectors: Tensor, rows: QuantizedRows, rotation: Rotation | None) -> float:
    """The mean cosine between vectors and the vectors that their codes stand for, in the space of the codes."""
    exact = vectors.float() if rotation is None else rotation.apply(vectors)
    return F.cosine_similarity(exact.double(), rows.widen().double()).mean().item()


def _digest(captions: Sequence[str]) -> str:
    """128-bit hash of a shard's captions, in hex."""
    return blake2b(json.dumps(captions).encode(), digest_size=16).hexdigest()


def _title(what: str, rank: Rank) -> str:
    return what if rank.world == 1 else f"{what} ({rank})"

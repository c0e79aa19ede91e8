"""Captions of a data set -> a text cache, shard by shard, by one process or several. What is written already is not
computed again, and neither is a caption that occurred before.

    read every shard of one's share     bad captions and other data than the folder's are found before anything is
                                        written
    for each group of shards:           up to 16 in a row; group g is rank g % world's
        for each shard:
            new = captions that no earlier shard of the group has, each once, in order
            encode, quantize            `_CHUNK` captions at a time, on the encoder's device
            copy the others' codes      from this shard, or from an earlier one of the group on the disk
            write

A shard's bytes follow from the captions of its group: the same batches are computed however often the run was killed
and however many ranks there are.
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

# A group is complete when it has this many captions: a 64th of all, so that many ranks have their share, but no fewer
# than the first number and no more than the second; or that many shards.
_GROUP_ROWS, _GROUP_SHARDS = (1 << 12, 1 << 17), 16
_CHUNK = 1 << 14  # captions that are encoded in one call: at dim 4096, 256 MB of vectors
_SAMPLED_BATCHES = 4
_COMPARED = 1 << 10  # vectors whose codes are compared with them


class TextEncoder(Protocol):
    """What embedding asks of an encoder; text.encoder.Encoder has it."""

    spec: EncoderSpec

    @property
    def dim(self) -> int: ...

    def encode(self, captions: Sequence[str], batch_size: int, done: Callable[[int], object]) -> Tensor: ...


@dataclass(frozen=True)
class Rank:
    """One of `world` processes that share the work; local: its number on its machine."""

    number: int = 0
    world: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.number < self.world and self.local >= 0):
            raise ConfigError(f"RANK {self.number} of WORLD_SIZE {self.world}, LOCAL_RANK {self.local}: no such rank")

    @staticmethod
    def from_environment() -> "Rank":
        """What torchrun tells. Raises ConfigError."""
        try:
            number, world, local = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
        except ValueError as error:
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK are set by torchrun, to whole numbers: {error}"
            ) from error
        return Rank(number, world, local)

    def __str__(self) -> str:
        return f"rank {self.number} of {self.world}"


@dataclass(frozen=True)
class Outcome:
    """What one rank did. computed: captions that went through the encoder; copied: captions that had occurred before;
    missing: shards that other ranks have still to write, 0 when the cache is finished; cosine: the mean between the
    first vectors computed and what their codes stand for, None without any."""

    computed: int
    copied: int
    missing: int
    cosine: float | None


@dataclass(frozen=True)
class Estimate:
    """rows, bytes: of the finished cache, exact. captions_per_s: of one process. seconds: by ranks, for those asked
    for. Of the time, captions that repeat others are not taken off: they are known only when all is read."""

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
    """Embeds every caption of `data` once and writes the cache at `out`; returns it opened. Raises as embed_share."""
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
    """Embeds what is missing of a rank's share of `source` into the cache at `out`, and finishes the cache if nothing
    is missing then.

    Cache shard k holds the captions of the source's shard k in its order. A run that was killed goes on at the first
    missing shard. Raises ConfigError for a batch_size below 1 and DataError for bad data (both before anything is
    written), CacheMismatch when `out` was made from other keys or captions, in another way, or with another codec,
    and CacheError when the cache cannot be written.
    """
    check_batch_size(batch_size)
    rank = rank or Rank()
    writer = _writer(source, out, encoder, codec)
    rotation = _rotation(codec, encoder.dim)
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

        def coded(captions: list[str]) -> QuantizedRows:
            nonlocal cosine
            parts = []
            for start in range(0, max(1, len(captions)), _CHUNK):  # no caption gives codes too: of no row
                vectors = encoder.encode(captions[start : start + _CHUNK], batch_size, bar.update)
                rows = encode(vectors, codec, rotation)
                if cosine is None and len(rows):
                    cosine = _cosine(vectors[:_COMPARED], rows[:_COMPARED], rotation)
                parts.append(rows.to("cpu"))
            return QuantizedRows.cat(parts)

        for group in mine:
            places: dict[str, tuple[int, int]] = {}  # of each caption, the shard and row where the group has it first
            for number in range(group.start, max((k + 1 for k in group if k in missing), default=group.start)):
                keys, captions = source.read(number)
                if _digest(captions) != plan[number].captions:
                    raise DataError(f"{source.names[number]} of {source.path} changed while it was embedded")
                first = [places.setdefault(caption, (number, row)) for row, caption in enumerate(captions)]
                if number not in missing:
                    continue
                bar.set_postfix_str(f"{in_bytes(left)} to write")
                rows = _with_copies(number, captions, first, coded, writer.written)
                writer.write_shard(number, rows, key_hashes(keys).tolist())
                left -= writer.size_on_disk([number])
                copied += len(captions) - plan[number].new
        bar.set_postfix_str(f"{in_bytes(left)} to write")
    others = set(writer.missing()).difference(*mine)
    if not others:
        writer.finish()
    return Outcome(sum(plan[number].new for number in todo), copied, len(others), cosine)


def estimate(
    source: Source,
    out: str | Path,
    encoder: TextEncoder,
    *,
    codec: str = "int8",
    batch_size: int = 64,
    worlds: Sequence[int] = (1,),
) -> Estimate:
    """The size of the cache that embed_share would write at `out`, and its time by the number of ranks, from a few
    batches spread over the source. Writes nothing. Raises as embed_share."""
    check_batch_size(batch_size)
    writer, rotation = _writer(source, out, encoder, codec), _rotation(codec, encoder.dim)
    full = [number for number, size in enumerate(source.sizes) if size]
    spread = [full[len(full) * k // _SAMPLED_BATCHES] for k in range(_SAMPLED_BATCHES)]
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
    """Shards in a row within which a caption is embedded once: the same whoever embeds them."""
    enough = min(max(sum(sizes) // 64, _GROUP_ROWS[0]), _GROUP_ROWS[1])
    found, start, rows = [], 0, 0
    for number, size in enumerate(sizes):
        rows += size
        if rows >= enough or number + 1 - start == _GROUP_SHARDS or number + 1 == len(sizes):
            found.append(range(start, number + 1))
            start, rows = number + 1, 0
    return found


def in_bytes(count: float) -> str:
    """3912345678 -> "3.91 GB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"


@dataclass(frozen=True)
class _Read:
    """What reading a shard once told. captions: their digest; new: how many no earlier shard of the group has."""

    captions: str
    new: int


def _read_all(
    source: Source, writer: CacheWriter, mine: Sequence[range], rank: Rank, progress: bool
) -> dict[int, _Read]:
    """Reads a rank's share once. Raises DataError for bad data, CacheMismatch for other data than the folder's."""
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
    first: Sequence[tuple[int, int]],
    coded: Callable[[list[str]], QuantizedRows],
    written: Callable[[int], QuantizedRows],
) -> QuantizedRows:
    """The rows of a shard. first: where each caption is first, as (shard, row); coded(captions) computes rows,
    written(shard) has those of an earlier shard."""
    new = [row for row, place in enumerate(first) if place == (number, row)]
    parts, at = [coded([captions[row] for row in new])], {row: i for i, row in enumerate(new)}
    if len(new) == len(captions):
        return parts[0]
    there = len(new)
    for shard in sorted({shard for shard, _ in first} - {number}):
        rows = [row for row, place in enumerate(first) if place[0] == shard]
        parts.append(written(shard)[torch.tensor([first[row][1] for row in rows])])
        at.update(zip(rows, range(there, there + len(rows)), strict=True))
        there += len(rows)
    order = [at[row if shard != number else source] for row, (shard, source) in enumerate(first)]
    return QuantizedRows.cat(parts)[torch.tensor(order)]


def _writer(source: Source, out: str | Path, encoder: TextEncoder, codec: str) -> CacheWriter:
    shards = [{"name": name, "samples": size} for name, size in zip(source.names, source.sizes, strict=True)]
    rotation = _rotation(codec, encoder.dim)
    return CacheWriter(out, encoder.dim, codec, encoder.spec.as_dict(), shards, source.field, rotation)


def _rotation(codec: str, dim: int) -> Rotation | None:
    return Rotation(dim) if codec_named(codec).rotated else None


def _cosine(vectors: Tensor, rows: QuantizedRows, rotation: Rotation | None) -> float:
    """The mean cosine between vectors and their codes."""
    whole = vectors.float() if rotation is None else rotation.apply(vectors)
    return F.cosine_similarity(whole.double(), rows.widen().double()).mean().item()


def _digest(captions: Sequence[str]) -> str:
    """128 bits that tell a shard's captions from others, in hex."""
    return blake2b(json.dumps(captions).encode(), digest_size=16).hexdigest()


def _title(what: str, rank: Rank) -> str:
    return what if rank.world == 1 else f"{what} ({rank})"

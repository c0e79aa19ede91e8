"""manifest.json: what a cache is, which shards it has, and which data shard each belongs to."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import CacheError

FORMAT = 1
MANIFEST = "manifest.json"
PARTIAL = "partial.json"  # the same, while shards are still missing


@dataclass(frozen=True)
class Shard:
    """One file of codes. source: the data shard it belongs to; sha256: of the file, "" until written; captions:
    a digest of the texts it was made from, "" where the writer was told none."""

    name: str
    rows: int
    source: str
    sha256: str = ""
    captions: str = ""


@dataclass(frozen=True)
class Manifest:
    """encoder: id, revision, pooling, prompt, max_length and whatever else tells how the text became vectors.

    field: the caption field. rotation: None for codecs without one, else {"kind", "seed"}.
    """

    dim: int
    codec: str
    field: str
    encoder: dict[str, Any]
    shards: tuple[Shard, ...]
    rotation: dict[str, Any] | None = None
    format: int = FORMAT

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Raises CacheError: not to be read, another format version, or not a manifest."""
        again = f"remove the folder {path.parent} and embed the captions again"
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CacheError(f"{path} cannot be read ({error}); {again}") from error
        if not isinstance(data, dict) or "format" not in data:
            raise CacheError(f"{path} is not the manifest of a text cache")
        if data["format"] != FORMAT:
            raise CacheError(
                f"{path} has format version {data['format']!r} and this lift-fast reads {FORMAT}; "
                f"{again}, or read it with the version that wrote it"
            )
        try:
            shards = tuple(Shard(**shard) for shard in data.pop("shards"))
            manifest = Manifest(shards=shards, **data)
            counts = [manifest.dim, *(shard.rows for shard in shards)]
            texts = [manifest.codec, manifest.field]
            texts += [text for s in shards for text in (s.name, s.source, s.sha256, s.captions)]
            whole = all(type(n) is int and 0 <= n < 1 << 48 for n in counts) and isinstance(manifest.encoder, dict)
            whole = whole and all(isinstance(text, str) for text in texts)
        except (TypeError, KeyError) as error:
            raise CacheError(f"{path} is not a whole manifest ({error}); {again}") from error
        # A name is joined to the folder: it must not lead out of it.
        if not whole or any(shard.name != shard_name(k) for k, shard in enumerate(shards)):
            raise CacheError(f"{path} is damaged: a count or a name in it is wrong; {again}")
        return manifest

    def differences(self, other: "Manifest") -> list[str]:
        """What two caches do not share, in words: "field: 'txt' there, 'long' here".

        Checksums do not count, nor do captions where one of the two was not told any.
        """
        found = []
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name == "encoder":
                names = sorted({*mine, *theirs})
                found += [
                    f"encoder {name}: {theirs.get(name)!r} there, {mine.get(name)!r} here"
                    for name in names
                    if mine.get(name) != theirs.get(name)
                ]
            elif field.name == "shards":
                ours = [(shard.source, shard.rows) for shard in mine]
                its = [(shard.source, shard.rows) for shard in theirs]
                if ours != its:
                    pairs = [f"{a} there, {b} here" for a, b in zip(its, ours, strict=False) if a != b]
                    counts = f"{len(its)} there, {len(ours)} here"
                    found.append(f"data shards: {pairs[0] if pairs else counts}")
                found += [
                    f"captions of {a.source}: other texts there than here"
                    for a, b in zip(mine, theirs, strict=False)
                    if a.captions and b.captions and a.captions != b.captions
                ][:1]
            elif mine != theirs:
                found.append(f"{field.name}: {theirs!r} there, {mine!r} here")
        return found


def shard_name(number: int) -> str:
    return f"text-{number:05d}.safetensors"


def file_sha256(path: Path) -> str:
    """As sha256sum prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""manifest.json: what a cache is, which shards it has, and which data shard each belongs to."""

import json
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..errors import CacheError
from ..ops.rows.codecs import codec_named
from .rotation import Rotation

FORMAT = 2
ENDIAN = "little"
MANIFEST = "manifest.json"
PARTIAL = "partial.json"  # the same, while shards are still missing


@dataclass(frozen=True)
class Shard:
    """One file of codes. source: the data shard it belongs to; sha256: of its tensors, as they lie in the file, ""
    until written; captions: a digest of the texts it was made from, "" where the writer was told none."""

    name: str
    rows: int
    source: str
    sha256: str = ""
    captions: str = ""


@dataclass(frozen=True)
class Manifest:
    """encoder: id, revision, pooling, prompt, max_length and whatever else tells how the text became vectors.

    field: the caption field. rotation: {"kind", "seed"} for the codecs that rotate, else None.
    """

    dim: int
    codec: str
    field: str
    encoder: dict[str, Any]
    shards: tuple[Shard, ...]
    rotation: dict[str, Any] | None = None
    format: int = FORMAT
    endian: str = ENDIAN

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def identity(self) -> str:
        """128 bits, in hex, of everything that decides a vector and its codes; each shard holds them too."""
        what = [self.format, self.dim, self.codec, self.rotation, self.field, self.encoder]
        return blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()

    def rotated_by(self) -> Rotation | None:
        """The rotation of the vectors, None for codecs without one."""
        return None if self.rotation is None else Rotation.from_dict(self.rotation, self.dim)

    def to_json(self) -> bytes:
        entries = asdict(self)
        return (json.dumps(entries | {"checksum": _checksum(entries)}, indent=1, sort_keys=True) + "\n").encode()

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
        told = data.pop("checksum", None)
        if told != _checksum(data):
            raise CacheError(f"{path} is damaged: it is not what was written; {again}")
        try:
            shards = tuple(Shard(**shard) for shard in data.pop("shards"))
            manifest = Manifest(shards=shards, **data)
            counts = [manifest.dim - 1, manifest.rows, *(shard.rows for shard in shards)]
            texts = [manifest.codec, manifest.field]
            texts += [text for s in shards for text in (s.name, s.source, s.sha256, s.captions)]
            whole = all(type(n) is int and 0 <= n < 1 << 48 for n in counts) and isinstance(manifest.encoder, dict)
            whole = whole and manifest.dim <= 1 << 24 and all(isinstance(text, str) for text in texts)
        except (TypeError, KeyError) as error:
            raise CacheError(f"{path} is not a whole manifest ({error}); {again}") from error
        # A name is joined to the folder: it must not lead out of it.
        if not whole or any(shard.name != shard_name(k) for k, shard in enumerate(shards)):
            raise CacheError(f"{path} is damaged: a count or a name in it is wrong; {again}")
        if manifest.endian != ENDIAN:
            raise CacheError(f"{path} says {manifest.endian!r}-endian; this format is {ENDIAN}-endian; {again}")
        try:
            codec = codec_named(manifest.codec)
            if codec.rotated != (manifest.rotation is not None):
                raise CacheError(f"codec {manifest.codec} {'needs a' if codec.rotated else 'has no'} rotation")
            if manifest.rotation is not None:
                Rotation.check(manifest.rotation)
        except CacheError as error:
            raise CacheError(f"{path}: {error}; {again}") from error
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


def _checksum(entries: dict[str, Any]) -> str:
    """128 bits, in hex, of a manifest's entries without this one: rows that moved between shards would move others."""
    return blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=16).hexdigest()


def shard_name(number: int) -> str:
    return f"text-{number:05d}.safetensors"

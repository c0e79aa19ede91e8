"""manifest.json: how a cache was made, its shards, and the data shard that each was made from."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from .. import foreign
from ..errors import CacheError
from ..ops.rows.codecs import codec_named
from .conditioning import Conditioning
from .rotation import Rotation

FORMAT = 3  # of new caches
CONDITIONED_FORMAT = 4  # of those with a conditioning, which an older lift-fast must refuse
FORMATS = (2, 3, 4)  # that are read: 2 has no `read`, no stamps and no rows that are left out
ENDIAN = "little"
_MOST_BYTES = 1 << 28  # of a manifest: nearly a million shards
MANIFEST = "manifest.json"
_LARGEST_DIM, MOST_ROWS = 1 << 24, 1 << 36  # together at most 2^62 bytes of codes
PARTIAL = "partial.json"  # stands in for manifest.json while shards are missing


@dataclass(frozen=True)
class Shard:
    """The manifest's entry of one shard file.

    source: name of the data shard that it was made from. sha256: hex digest of everything after the file's header, ""
    until it is written. captions: digest_of the captions that it was made from, "" if the writer had none. stamp: of
    the data shard's files when the captions were read, "" if the writer had none: while it stays the same, so do the
    captions. skipped: rows without a vector.
    """

    name: str
    rows: int
    source: str
    sha256: str = ""
    captions: str = ""
    stamp: str = ""
    skipped: int = 0


@dataclass(frozen=True)
class Manifest:
    """How a cache was made, and its shards.

    dim: length of a vector. codec: a key of ops.rows.codecs.CODECS. field: the caption field that was embedded.
    encoder: the settings that turn a text into a vector, as JSON: name, revision, pooling, prompt, max_length, …
    rotation: {"kind", "seed"} for the rotated codecs, else None. read: how the data set was read, where not by default
    (data.options.DataOptions.recorded): with the same settings its keys and captions are found again. conditioning: of
    the vectors, as Conditioning.as_dict has it, else None; `dim` is then that of conditioned vectors.
    """

    dim: int
    codec: str
    field: str
    encoder: dict[str, Any]
    shards: tuple[Shard, ...]
    rotation: dict[str, Any] | None = None
    read: dict[str, Any] = dataclasses.field(default_factory=dict)
    conditioning: dict[str, Any] | None = None
    format: int = FORMAT
    endian: str = ENDIAN

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def skipped(self) -> int:
        """Rows of all shards that have no vector."""
        return sum(shard.skipped for shard in self.shards)

    @property
    def identity(self) -> str:
        """128-bit hash, in hex, of every setting that determines the codes of a caption; each shard stores it too."""
        settings = [self.format, self.dim, self.codec, self.rotation, self.field, self.encoder]
        if self.conditioning is not None:
            settings.append(self.conditioning)
        return blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()

    def rotated_by(self) -> Rotation | None:
        """The rotation of the vectors, None for codecs without one."""
        return None if self.rotation is None else Rotation.from_dict(self.rotation, self.dim)

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        entries = asdict(self)
        if self.format < CONDITIONED_FORMAT:
            del entries["conditioning"]
        if self.format < 3:
            del entries["read"]
            for shard in entries["shards"]:
                del shard["stamp"], shard["skipped"]
        return (json.dumps(entries | {"checksum": _checksum(entries)}, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def load(path: Path) -> "Manifest":
        """Reads and validates a manifest.

        Raises CacheError when it cannot be read, has another format version, is damaged or is not a manifest.
        """
        again = f"remove the folder {path.parent} and embed the captions again"
        try:
            data = foreign.read_json(path, _MOST_BYTES)
        except (OSError, ValueError) as error:
            raise CacheError(f"{path} cannot be read ({error}); {again}") from error
        if not isinstance(data, dict) or "format" not in data:
            raise CacheError(f"{path} is not the manifest of a text cache; name the folder of a text cache")
        if type(data["format"]) is not int or data["format"] not in FORMATS:
            raise CacheError(
                f"{path} has format version {foreign.shown(data['format'])} and this lift-fast reads {FORMATS[0]} to "
                f"{FORMATS[-1]}; {again}, or read it with the version that wrote it"
            )
        if data.pop("checksum", None) != _checksum(data):
            raise CacheError(f"{path} is damaged: its checksum is wrong; {again}")
        try:
            foreign.check(data, Manifest)
        except ValueError as error:
            raise CacheError(f"{path} is not a complete manifest ({error}); {again}") from error
        shards = tuple(Shard(**shard) for shard in data.pop("shards"))
        manifest = Manifest(shards=shards, **data)
        valid = 1 <= manifest.dim <= _LARGEST_DIM and all(0 <= s.skipped <= s.rows <= MOST_ROWS for s in shards)
        valid = valid and manifest.rows <= MOST_ROWS
        # Shard names are joined to the folder, so one such as "../x" must be refused.
        if not valid or any(shard.name != shard_name(k) for k, shard in enumerate(shards)):
            raise CacheError(f"{path} is damaged: it has an invalid count or name; {again}")
        if manifest.endian != ENDIAN:
            raise CacheError(f"{path} is {manifest.endian!r}-endian; this format is {ENDIAN}-endian; {again}")
        try:
            codec = codec_named(manifest.codec)
            if codec.rotated != (manifest.rotation is not None):
                raise CacheError(f"codec {manifest.codec} {'needs a' if codec.rotated else 'takes no'} rotation")
            if manifest.rotation is not None:
                Rotation.check(manifest.rotation)
            if manifest.format == CONDITIONED_FORMAT:
                Conditioning.check(manifest.conditioning)
            elif manifest.conditioning is not None:
                raise CacheError(f"format version {manifest.format} has no conditioning")
        except CacheError as error:
            raise CacheError(f"{path}: {error}; {again}") from error
        return manifest

    def differences(self, other: "Manifest") -> list[str]:
        """How `other` differs from this manifest, each difference as a text such as "field is 'txt', not 'long'".

        Checksums, stamps and skipped rows are not compared, and captions only where both manifests have their digest.
        """
        found = []
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if entry.name in ("encoder", "read"):
                prefix = "encoder " if entry.name == "encoder" else ""
                found += [
                    f"{prefix}{name} is {theirs.get(name)!r}, not {mine.get(name)!r}"
                    for name in sorted({*mine, *theirs})
                    if mine.get(name) != theirs.get(name)
                ]
            elif entry.name == "shards":
                sizes = [[(shard.source, shard.rows) for shard in shards] for shards in (theirs, mine)]
                if sizes[0] != sizes[1]:
                    unequal = [
                        f"data shard {k} is {a} with {m} samples, not {b} with {n}"
                        for k, ((a, m), (b, n)) in enumerate(zip(*sizes, strict=False))
                        if (a, m) != (b, n)
                    ]
                    counts = f"the number of data shards is {len(theirs)}, not {len(mine)}"
                    found.append(unequal[0] if unequal else counts)
                found += [
                    f"the captions of {a.source} are different"
                    for a, b in zip(mine, theirs, strict=False)
                    if a.captions and b.captions and a.captions != b.captions
                ][:1]
            elif mine != theirs:
                found.append(f"{entry.name} is {theirs!r}, not {mine!r}")
        return found


def _checksum(entries: dict[str, Any]) -> str:
    """128-bit hash, in hex, of a manifest's other entries: an altered count of rows in one shard would otherwise give
    wrong numbers to the rows of the intact shards after it."""
    return blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=16).hexdigest()


def digest_of(captions: Sequence[object]) -> str:
    """128-bit hash of a shard's captions in order, in hex. What is not text counts as no caption."""
    texts = [caption if isinstance(caption, str) else None for caption in captions]
    return blake2b(json.dumps(texts).encode(), digest_size=16).hexdigest()


def shard_name(number: int) -> str:
    """The file name of shard `number`."""
    return f"text-{number:05d}.safetensors"

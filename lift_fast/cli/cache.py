"""lift-fast cache: describes, verifies, recodes, imports, merges and samples text caches."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..text.spec import Pooling
from .common import CodecName, check_threads, print_size, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.sources import Source


@dataclass(frozen=True)
class CacheInfo:
    """What a cache is: rows, dim, codec, size, encoder, rotation."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    json: Path | None = None
    """File to write the figures to."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import info

        found = info(Cache(self.cache))
        rotation = "".join(f", rotated ({r['kind']}, seed {r['seed']})" for r in [found["rotation"]] if r)
        missing = f" ({len(found['missing'])} missing)" if found["missing"] else ""
        lines = {
            "rows": f"{found['rows']} in {found['shards']} shards{missing}",
            "vectors": f"{found['dim']} numbers, {found['codec']}{rotation}",
            "size": f"{found['bytes'] / 1e6:.1f} MB; {found['bytes_per_row']} bytes a row, scale and key hash included",
            "captions": found["field"],
            "encoder": ", ".join(f"{key} {value!r}" for key, value in found["encoder"].items()),
            "format": f"version {found['format']}, identity {found['identity']}",
        }
        for name, line in lines.items():
            print(f"{name:9} {line}")
        if self.json:
            write_json(self.json, found)


@dataclass(frozen=True)
class CacheVerify:
    """Read every shard of a cache and compare its checksum; name each that is damaged."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    data: Path | None = None
    """What the cache was made from, as in embed: also compare its sample keys with the cache's."""
    threads: int | None = None
    """Shards read at a time. Default: the number of processors, 8 at most."""

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def __call__(self) -> None:
        from ..cache import Cache
        from ..data.sources import open_source

        cache = Cache(self.cache)
        cache.verify(self.threads, progress=True)
        if self.data:
            cache.check_keys(SourceKeys(open_source(self.data, cache.manifest.field)))
        matched = f"; every row belongs to its sample of {self.data}" if self.data else ""
        print(f"{self.cache}: {len(cache)} rows in {len(cache.manifest.shards)} shards are as written{matched}")


@dataclass(frozen=True)
class CacheConvert:
    """Write a cache's vectors with another codec. Resumes where it stopped."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    out: tyro.conf.Positional[Path]
    """Folder of the new cache."""
    codec: CodecName
    """How vectors are stored (docs/cache.md)."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import convert, info

        source = Cache(self.cache)
        convert(source, self.out, self.codec)
        former = source.manifest.codec
        if former != "f32":
            print(
                f"{self.cache} holds {former}, so the errors of {former} and of {self.codec} add up; for those of "
                f"{self.codec} alone embed the captions with it"
            )
        print_size(self.out, info(Cache(self.out)))


@dataclass(frozen=True)
class CacheImportParquet:
    """Read parquet embeddings, laid out as LIFT's authors do, into a cache. Resumes where it stopped."""

    data: tyro.conf.Positional[Path]
    """Folder with a folder of parquet files (key, embedding) for each data shard, or with the files themselves."""
    out: tyro.conf.Positional[Path]
    """Folder of the cache."""
    encoder: str
    """Text encoder that made them, as in embed: a name, a folder or a hub name. It is recorded and not loaded."""
    codec: CodecName = "int8"
    """How vectors are stored (docs/cache.md)."""
    field: str = "txt"
    """Caption that was embedded: the .txt, or an entry of the .json, of the data set that the cache is for."""
    pooling: Pooling | None = None
    """How the encoder was used; evaluation uses it in the same way. Default of this and the next three: as its model
    card says."""
    prompt: str | None = None
    max_length: int | None = None
    revision: str | None = None

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.parquet import import_parquet
        from ..cache.tools import info
        from ..text.presets import spec_for

        used: dict[str, Any] = {"pooling": self.pooling, "prompt": self.prompt, "max_length": self.max_length}
        spec = spec_for(self.encoder, revision=self.revision, **used)
        import_parquet(self.data, self.out, self.codec, spec.as_dict(), self.field)
        print_size(self.out, info(Cache(self.out)))


@dataclass(frozen=True)
class CacheMerge:
    """Concatenate caches of one encoder and codec: merge A B … OUT. Resumes where it stopped."""

    caches: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the caches, in order, and last the folder of the new one."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import info, merge

        *sources, out = self.caches or (Path(),)
        merge([Cache(folder) for folder in sources], out)
        print_size(out, info(Cache(out)))


@dataclass(frozen=True)
class CacheSample:
    """Show a few rows of a cache, and their mean cosine: near 1, the encoder gives all captions nearly one vector."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    rows: int = 8
    seed: int = 0
    data: Path | None = None
    """What the cache was made from, as in embed: show keys and captions."""
    json: Path | None = None
    """File to write the figures to."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import sample
        from ..data.sources import open_source

        cache = Cache(self.cache)
        found = sample(cache, self.rows, self.seed)
        if self.data:
            source = open_source(self.data, cache.manifest.field)
            cache.check_keys(SourceKeys(source))
            for entry in found["rows"]:
                keys, captions = source.read(entry["shard"])
                entry["key"], entry["caption"] = keys[entry["row_of_shard"]], captions[entry["row_of_shard"]]
        for entry in found["rows"]:
            first = " ".join(f"{number:+.4f}" for number in entry["first"])
            name = f"{entry['key']} {entry['caption']!r}" if self.data else f"key hash {entry['key_hash']}"
            print(f"row {entry['row']} ({entry['source']}): {name}; length {entry['length']:.4f}; {first} …")
        if found["mean_cosine"] is not None:
            print(f"mean cosine among them: {found['mean_cosine']:.4f} (1: all captions have one vector)")
        if self.json:
            write_json(self.json, found)


class SourceKeys:
    """The sample keys of a Source of captions, as Cache.check_keys expects them."""

    def __init__(self, source: "Source"):
        self.folder, self.shard_sizes = source.path, source.sizes
        self._source = source

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order."""
        return self._source.read(number)[0]

    def shard_hashes(self, number: int) -> "Tensor":
        """Their hashes, int64 [shard_sizes[number]]."""
        from ..ops.rows.table import key_hashes

        return key_hashes(self.shard_keys(number))


@dataclass(frozen=True)
class CacheTools:
    """Describe text caches; verify, recode, import and merge them."""

    command: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[CacheInfo, tyro.conf.subcommand("info")]
            | Annotated[CacheVerify, tyro.conf.subcommand("verify")]
            | Annotated[CacheConvert, tyro.conf.subcommand("convert")]
            | Annotated[CacheImportParquet, tyro.conf.subcommand("import-parquet")]
            | Annotated[CacheMerge, tyro.conf.subcommand("merge")]
            | Annotated[CacheSample, tyro.conf.subcommand("sample")]
        ]
    ]

    def __call__(self) -> None:
        self.command()

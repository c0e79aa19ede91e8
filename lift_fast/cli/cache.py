"""lift-fast cache: info, verify, convert, import-parquet, merge and sample."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..errors import ConfigError
from ..text.spec import Pooling
from .common import CodecName, _tell_size, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.sources import Source


@dataclass(frozen=True)
class CacheInfo:
    """What a cache is: rows, dim, codec, size, encoder, rotation."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    json: Path | None = None
    """File for the figures."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import info

        told = info(Cache(self.cache))
        rotation = "".join(f", rotated ({r['kind']}, seed {r['seed']})" for r in [told["rotation"]] if r)
        missing = f" ({len(told['missing'])} missing)" if told["missing"] else ""
        lines = {
            "rows": f"{told['rows']} in {told['shards']} shards{missing}",
            "vectors": f"{told['dim']} numbers, {told['codec']}{rotation}",
            "size": f"{told['bytes'] / 1e6:.1f} MB; {told['bits_per_row']} bits a row, scale and key hash included",
            "captions": told["field"],
            "encoder": ", ".join(f"{key} {value!r}" for key, value in told["encoder"].items()),
            "format": f"version {told['format']}, identity {told['identity']}",
        }
        for name, line in lines.items():
            print(f"{name:9} {line}")
        if self.json:
            write_json(self.json, told)


@dataclass(frozen=True)
class CacheVerify:
    """Read every shard of a cache and compare its checksum; name each that is damaged."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    data: Path | None = None
    """What the cache was made from, as in embed: also compare its sample keys with the cache's."""
    threads: int | None = None
    """Shards read at a time. Default: the processors, 8 at most."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")

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
    """Write a cache's vectors with another codec. Goes on where it stopped."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    out: tyro.conf.Positional[Path]
    """Folder of the new cache."""
    codec: CodecName
    """How vectors are kept (docs/cache.md)."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import convert, info

        source = Cache(self.cache)
        convert(source, self.out, self.codec)
        kept = source.manifest.codec
        if kept != "f32":
            print(
                f"{self.cache} holds {kept}, so the errors of {kept} and of {self.codec} add up; for those of "
                f"{self.codec} alone embed the captions with it"
            )
        _tell_size(self.out, info(Cache(self.out)))


@dataclass(frozen=True)
class CacheImportParquet:
    """Read parquet embeddings, laid out as LIFT's authors do, into a cache. Goes on where it stopped."""

    data: tyro.conf.Positional[Path]
    """Folder with a folder of parquet files (key, embedding) for each data shard, or with the files themselves."""
    out: tyro.conf.Positional[Path]
    """Folder of the cache."""
    encoder: str
    """The text encoder that made them, as in embed: a name, a folder or a hub name. It is recorded and not loaded."""
    codec: CodecName = "int8"
    """How vectors are kept (docs/cache.md)."""
    field: str = "txt"
    """The caption that was embedded: the .txt, or an entry of the .json, of the data set it is trained with."""
    pooling: Pooling | None = None
    """These four say how the encoder was used, for evaluation. Default: as its model card says."""
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
        _tell_size(self.out, info(Cache(self.out)))


@dataclass(frozen=True)
class CacheMerge:
    """Join caches of one encoder and codec, one after the other: merge A B … OUT. Goes on where it stopped."""

    caches: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the caches, in order, and last the folder of the new one."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import info, merge

        *sources, out = self.caches or (Path(),)
        merge([Cache(folder) for folder in sources], out)
        _tell_size(out, info(Cache(out)))


@dataclass(frozen=True)
class CacheSample:
    """Show a few rows of a cache, and the mean cosine among them: near 1, the encoder tells no caption from another."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    rows: int = 8
    seed: int = 0
    data: Path | None = None
    """What the cache was made from, as in embed: show keys and captions."""
    json: Path | None = None
    """File for the figures."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import sample
        from ..data.sources import open_source

        cache = Cache(self.cache)
        told = sample(cache, self.rows, self.seed)
        if self.data:
            source = open_source(self.data, cache.manifest.field)
            cache.check_keys(SourceKeys(source))
            for entry in told["rows"]:
                keys, captions = source.read(entry["shard"])
                entry["key"], entry["caption"] = keys[entry["row_of_shard"]], captions[entry["row_of_shard"]]
        for entry in told["rows"]:
            first = " ".join(f"{number:+.4f}" for number in entry["first"])
            name = f"{entry['key']} {entry['caption']!r}" if self.data else f"key hash {entry['key_hash']}"
            print(f"row {entry['row']} ({entry['source']}): {name}; length {entry['length']:.4f}; {first} …")
        if told["mean_cosine"] is not None:
            print(f"mean cosine among them: {told['mean_cosine']:.4f} (1: all captions have one vector)")
        if self.json:
            write_json(self.json, told)


class SourceKeys:
    """The sample keys of a source of captions, as Cache.check_keys takes them."""

    def __init__(self, source: "Source"):
        self.folder, self.shard_sizes = source.path, source.sizes
        self._source = source

    def shard_keys(self, number: int) -> list[str]:
        return self._source.read(number)[0]

    def shard_hashes(self, number: int) -> "Tensor":
        from ..ops.rows.table import key_hashes

        return key_hashes(self.shard_keys(number))


@dataclass(frozen=True)
class CacheTools:
    """Look at text caches, check, recode, import and join them."""

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

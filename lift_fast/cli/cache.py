"""lift-fast cache: describes, verifies, recodes, imports, merges and samples text caches."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..data.options import DataOptions
from ..text.spec import Pooling
from .common import CodecName, check_threads, counted, print_problems, print_size, printable, write_json

if TYPE_CHECKING:
    from ..cache import Cache
    from ..data.samples import Samples


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
        left_out = f", {found['skipped']} of them without a vector" if found["skipped"] else ""
        read = ", ".join(f"{name} {value!r}" for name, value in found["read"].items())
        lines = {
            "rows": f"{found['rows']} in {found['shards']} shards{missing}{left_out}",
            "vectors": f"{found['dim']} numbers, {found['codec']}{rotation}",
            "size": f"{found['bytes'] / 1e6:.1f} MB; {found['bytes_per_row']} bytes a row, scale and key hash included",
            "captions": found["field"] + (f", read with {read}" if read else ""),
            "encoder": ", ".join(f"{key} {value!r}" for key, value in found["encoder"].items()),
            "format": f"version {found['format']}, identity {found['identity']}",
        }
        for name, line in lines.items():
            print(f"{name:9} {line}")
        if self.json:
            write_json(self.json, found)


@dataclass(frozen=True)
class CacheVerify:
    """Read every shard of a cache and compare its checksum; name each that is damaged.

    With --data also compare keys and captions. It is read as it was embedded, without repeating the options."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    data: Path | None = None
    """What the cache was made from, as in embed: also compare its sample keys and captions with the cache's."""
    threads: int | None = None
    """Shards read at a time. Default: the number of processors, 8 at most."""
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def __call__(self) -> None:
        from ..cache import Cache

        cache = Cache(self.cache)
        cache.verify(self.threads, progress=True)
        print(f"{self.cache}: {len(cache)} rows in {len(cache.manifest.shards)} shards are as written")
        if self.data:
            found = cache.check_data(open_as_embedded(self.data, self.reading, cache), self.threads, progress=True)
            print(f"every row belongs to its sample of {self.data} by its key")
            if found.unchanged:
                print(f"captions of {counted(found.unchanged, 'shard')}: the files were not written to since")
            if found.read:
                print(f"captions of {counted(found.read, 'shard')}: read, and the same")
            if found.unknown:
                print(f"captions of {counted(found.unknown, 'shard')}: not compared, the cache has no digest of them")


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

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return f"the shards that are complete stay in {self.out}; run the same command again to continue"


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

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return f"the shards that are complete stay in {self.out}; run the same command again to continue"


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

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return f"the shards that are complete stay in {self.caches[-1]}; run the same command again to continue"


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
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import sample

        cache = Cache(self.cache)
        found = sample(cache, self.rows, self.seed)
        if self.data:
            samples = open_as_embedded(self.data, self.reading, cache)
            cache.check_data(samples, progress=True)
            for entry in found["rows"]:
                entry["key"] = samples.shard_keys(entry["shard"])[entry["row_of_shard"]]
                entry["caption"] = None if entry["skipped"] else samples.caption(entry["row"], cache.manifest.field)
        for entry in found["rows"]:
            name = f"{entry['key']} {entry['caption']!r}" if self.data else f"key hash {entry['key_hash']}"
            first = " ".join(f"{number:+.4f}" for number in entry["first"])
            vector = "left out" if entry["skipped"] else f"length {entry['length']:.4f}; {first} …"
            print(printable(f"row {entry['row']} ({entry['source']}): {name}; {vector}"))
        if found["mean_cosine"] is not None:
            print(f"mean cosine among them: {found['mean_cosine']:.4f} (1: all captions have one vector)")
        if self.json:
            write_json(self.json, found)


def open_as_embedded(path: Path, options: DataOptions, cache: "Cache") -> "Samples":
    """Opens the data set that a cache was made from as `embed` did; it may lack the images. Prints its problems.

    Raises DataError and ConfigError as open_data does.
    """
    from ..data.open import open_data
    from ..train.setup import read_as_embedded

    samples = open_data(path, options=read_as_embedded(options, cache), captions_only=True)
    print_problems(samples.problems)
    return samples


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

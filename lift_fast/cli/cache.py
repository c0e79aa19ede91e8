"""lift-fast cache: describes, verifies, recodes, conditions, imports, merges and samples text caches."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..data.options import DataOptions
from ..errors import ConfigError
from ..text.spec import Pooling
from .common import (
    CodecName,
    check_threads,
    counted,
    print_conditioning,
    print_problems,
    print_size,
    say,
    write_json,
)

if TYPE_CHECKING:
    from ..cache import Cache, Conditioning
    from ..data.samples import Samples


@dataclass(frozen=True)
class CacheInfo:
    """What a cache is: rows, dim, codec, size, encoder, rotation, conditioning."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    json: Path | None = None
    """File to write the figures to."""

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import info

        cache = Cache(self.cache)
        found = info(cache)
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
            say(f"{name:9} {line}")
        if cache.conditioning is not None:
            found["conditioning"] |= {"report": cache.conditioning.report()}
            print_conditioning(found["conditioning"]["report"])
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
        say(f"{self.cache}: {len(cache)} rows in {len(cache.manifest.shards)} shards are as written")
        if self.data:
            found = cache.check_data(open_as_embedded(self.data, self.reading, cache), self.threads, progress=True)
            say(f"every row belongs to its sample of {self.data} by its key")
            if found.unchanged:
                say(f"captions of {counted(found.unchanged, 'shard')}: the files were not written to since")
            if found.read:
                say(f"captions of {counted(found.read, 'shard')}: read, and the same")
            if found.unknown:
                say(f"captions of {counted(found.unknown, 'shard')}: not compared, the cache has no digest of them")


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
        print_errors(source, self.codec)
        print_size(self.out, info(Cache(self.out)))

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return f"the shards that are complete stay in {self.out}; run the same command again to continue"


@dataclass(frozen=True)
class CacheCondition:
    """Write a cache's vectors conditioned: their mean subtracted, and what they have along each of their principal axes
    divided by a power of its deviation (docs/conditioning.md). Resumes where it stopped.

    The caches of one run need one conditioning: fit it to all of them with --fit, then give it to each with --like."""

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    out: tyro.conf.Positional[Path]
    """Folder of the new cache."""
    power: float | Literal["auto"] = "auto"
    """From 0, which only subtracts the mean, to 1, which makes all axes equal. auto: makes the effective rank half the
    axes."""
    dim: int | Literal["auto"] | None = None
    """Axes that are kept, those of the largest deviation first. auto: the fewest, a multiple of 32, that hold 99 % of
    the variance. Default: all."""
    fit: tuple[Path, ...] = ()
    """Caches that it is fitted to, of the same encoder. Default: the cache itself."""
    weights: tuple[float, ...] = ()
    """How much each cache of --fit counts, such as 1 1. Default: its rows."""
    like: Path | None = None
    """A conditioned cache, of the same encoder, whose conditioning to take instead of a new one."""
    rows: int | None = None
    """Rows in the sample of each cache, which must determine the axes. Default: 16384, or 4 times the length of the
    encoder's vectors if that is more."""
    seed: int = 0
    """Seed of the samples."""
    codec: CodecName | None = None
    """How vectors are stored (docs/cache.md). Default: as in the cache."""

    def __post_init__(self) -> None:
        fitted = (self.power, self.dim, self.fit, self.weights, self.rows, self.seed)
        if self.like is not None and fitted != ("auto", None, (), (), None, 0):
            raise ConfigError("--like takes a conditioning as it is; leave out the options that fit a new one")
        if self.weights and len(self.weights) != len(self.fit):
            raise ConfigError(f"--weights has {len(self.weights)} numbers for the {len(self.fit)} caches of --fit")

    def __call__(self) -> None:
        from ..cache import Cache
        from ..cache.tools import condition, info

        source = Cache(self.cache)
        conditioning = self.conditioning(source)
        print_conditioning(conditioning.report())
        condition(source, self.out, conditioning, self.codec)
        print_errors(source, self.codec or source.manifest.codec)
        print_size(self.out, info(Cache(self.out)))

    def conditioning(self, source: "Cache") -> "Conditioning":
        """The conditioning of the new cache: that of --like, the one that an interrupted run has fitted, or a new one.

        Raises ConfigError, CacheError, and CacheMismatch for caches of other encoders.
        """
        from ..cache import Cache
        from ..cache.tools import check_not_conditioned
        from ..text.conditioning import Request, check_encoder, check_folder, conditioning_of, fit_to_caches, found_in

        check_not_conditioned(source)
        encoder, dim, name = source.manifest.encoder, source.dim, str(self.cache)
        if self.like is not None:
            taken = conditioning_of(Cache(self.like), encoder, dim, name)
            check_folder(self.out, taken)
            return taken
        request = Request(self.power, self.dim, self.rows, self.seed)
        caches = [Cache(folder) for folder in self.fit] or [source]
        for cache in caches:
            check_not_conditioned(cache)
            check_encoder(cache, encoder, dim, name)
        request.check(dim, [len(cache) for cache in caches])
        weights = self.weights or [max(1, len(cache) - cache.manifest.skipped) for cache in caches]
        asked = request.of_caches(caches, weights)
        return found_in(self.out, asked) or fit_to_caches(request, caches, weights, asked)

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
            say(f"row {entry['row']} ({entry['source']}): {name}; {vector}")
        if found["mean_cosine"] is not None:
            say(f"mean cosine among them: {found['mean_cosine']:.4f} (1: all captions have one vector)")
        if self.json:
            write_json(self.json, found)


def print_errors(source: "Cache", codec: str) -> None:
    """Prints that the errors of two codecs add up, where a cache was made from the codes of another."""
    former = source.manifest.codec
    if former != "f32":
        say(
            f"{source.folder} holds {former}, so the errors of {former} and of {codec} add up; for those of {codec} "
            "alone embed the captions with it"
        )


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
    """Describe text caches; verify, recode, condition, import and merge them."""

    command: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[CacheInfo, tyro.conf.subcommand("info")]
            | Annotated[CacheVerify, tyro.conf.subcommand("verify")]
            | Annotated[CacheConvert, tyro.conf.subcommand("convert")]
            | Annotated[CacheCondition, tyro.conf.subcommand("condition")]
            | Annotated[CacheImportParquet, tyro.conf.subcommand("import-parquet")]
            | Annotated[CacheMerge, tyro.conf.subcommand("merge")]
            | Annotated[CacheSample, tyro.conf.subcommand("sample")]
        ]
    ]

    def __call__(self) -> None:
        self.command()

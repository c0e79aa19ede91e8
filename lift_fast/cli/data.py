"""lift-fast data: built-in data sets; index, stats, check and pack for the user's own."""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..errors import ConfigError, DataError
from .common import _check_threads, _counts, _many, _printable, write_json


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
        from ..data.stats import SMALL, stats

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
        from ..data.check import check

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
        from ..data.pack import pack

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

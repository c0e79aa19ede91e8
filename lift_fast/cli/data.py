"""lift-fast data: writes the built-in data sets; indexes, counts, checks and packs the user's own."""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data.options import DataOptions
from ..errors import ConfigError, DataError
from .common import check_threads, counted, listed, print_problems, say, write_json


@dataclass(frozen=True)
class Data:
    """The settings that the built-in data sets have in common."""

    out: Path
    train: int = 4000
    heldout: int = 400
    """Samples held out; none of their captions occurs in training."""
    px: int = 72
    """Width and height of an image."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"train": 1, "heldout": 1, "px": 8}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def __call__(self) -> None:
        splits = "train", "heldout", "heldout-reworded"
        made = [self.out / split for split in splits if (self.out / split).exists()]
        if made:
            raise DataError(f"{made[0]} exists already; remove it or name another --out")
        self.write()

    def write(self) -> None:
        """Writes the splits into OUT."""
        raise NotImplementedError


@dataclass(frozen=True)
class DataOpenMoji(Data):
    """About 3 900 named drawings, as tars in OUT/train and OUT/heldout."""

    train: int = 4000
    """Not used: every drawing that is not held out is for training."""

    def write(self) -> None:
        from ..demo import openmoji

        openmoji.write(self.out, heldout=self.heldout, seed=self.seed, px=self.px)


@dataclass(frozen=True)
class DataScenes(Data):
    """Generated images with captions and foils, as tars in OUT/train and OUT/heldout; OUT/heldout-reworded has the
    same images with captions and foils in another grammar."""

    train: int = 4000
    """Samples to train on."""

    def write(self) -> None:
        from ..demo import reworded, scenes

        captions = scenes.write(self.out / "train", self.train, self.seed, px=self.px)
        scenes.write(
            self.out / "heldout",
            self.heldout,
            self.seed,
            self.train,
            px=self.px,
            exclude_captions=set(captions),
        )
        reworded.write(self.out / "heldout", self.out / "heldout-reworded")


@dataclass(frozen=True)
class DataIndex:
    """Write the index of a folder of tars: opening it then costs the same for any number of samples."""

    data: tyro.conf.Positional[Path]
    """Folder of tar shards. Tars that are in its index and have not changed are not read again."""
    threads: int | None = None
    """Shards read at a time. Default: the number of processors."""
    skip_bad: bool = False
    """Index what can be read of damaged tars, and say what cannot. Reading the data then needs --skip-bad too."""
    image_suffix: str | None = None
    """What follows KEY. in the name of the image, such as input.jpg. Default: the first of png, jpg, jpeg, webp, gif
    and bmp that a sample has. Reading the data then needs the same option."""
    text_suffix: str | None = None
    """What follows KEY. in the name of the caption, such as cls. Default: txt. Reading the data then needs the same
    option."""

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def __call__(self) -> None:
        from ..data.index import build_index

        began = time.perf_counter()
        options = DataOptions(skip_bad=self.skip_bad, image_suffix=self.image_suffix, text_suffix=self.text_suffix)
        built = build_index(self.data, self.threads, options=options)
        print_problems(built.problems)
        say(
            f"{self.data}: {counted(built.samples, 'sample')} in {counted(built.shards, 'shard')}, {built.read} read "
            f"anew, in {time.perf_counter() - began:.1f} s; the index has {built.bytes} bytes"
        )


@dataclass(frozen=True)
class DataStats:
    """Count a data set: samples, formats and sizes of images, captions. Reads headers and decodes no image."""

    data: tyro.conf.Positional[Path]
    """Folder of tars, of images, or of parquet files; or one table: CSV, TSV, JSONL or parquet."""
    pictures: Path | None = None
    """Folder of the image files, where DATA does not hold them."""
    sample: int | Literal["all"] = 10_000
    """Number of samples to look at, drawn at random; or all."""
    threads: int | None = None
    """Samples read at a time. Default: the number of processors, 32 at most."""
    json: Path | None = None
    """File to write the figures to."""
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def __call__(self) -> None:
        from ..data.open import open_data
        from ..data.stats import SMALL, stats

        sample = None if self.sample == "all" else self.sample
        samples = open_data(self.data, self.pictures, self.reading)
        print_problems(samples.problems)
        figures = stats(samples, sample, self.threads)
        readable = sum(figures["formats"].values())
        size = "" if figures["bytes"] is None else f", {figures['bytes'] / 1e6:.1f} MB"
        shares = ", ".join(f"{name} {count / readable:.1%}" for name, count in figures["formats"].items())
        lines = {
            "samples": f"{figures['samples']} in {counted(figures['shards'], 'shard')} of {figures['smallest_shard']} "
            f"to {figures['largest_shard']}{size}",
            "looked at": f"{figures['sampled']}, {figures['picture_bytes'] / figures['sampled'] / 1e3:.1f} kB an image",
            "formats": shares or "no image can be read",
        }
        for name in ("width", "height"):
            if spread := figures[name]:
                lines[name] = f"{spread['min']} to {spread['max']} pixels, median {spread['median']}"
        if readable:
            lines["small"] = f"{figures[f'below_{SMALL}']:.1%} have a side below {SMALL} pixels"
        for field, found in figures["captions"].items():
            lines[f"text {field!r}"] = (
                f"{found['samples'] / figures['sampled']:.1%} have it, of {found['median']} characters (median), "
                f"{found['p95']} (95 %), {found['max']} (max); {found['repeats']:.1%} repeat another"
            )
        lines["no text"] = f"{figures['no_text'] / figures['sampled']:.1%}"
        lines["bad images"] = listed(figures["bad"])
        lines["bad captions"] = listed(figures["bad_captions"])
        width = max(map(len, lines))
        for name, line in lines.items():
            say(f"{name:{width}}  {line}")
        for remark in figures["remarks"]:
            say(remark)
        if self.json:
            write_json(self.json, figures)


@dataclass(frozen=True)
class DataCheck:
    """Decode every image and read every caption; exit status 1 when anything is bad. Always goes on past bad samples,
    as with --skip-bad."""

    data: tyro.conf.Positional[Path]
    """Data set, as in stats."""
    pictures: Path | None = None
    """Folder of the image files, where DATA does not hold them."""
    field: str = "txt"
    """Caption to read: txt, an entry of the .json, or a column. Tables: txt is the first of txt, caption, text, title
    and re_caption that there is."""
    bad: Path | None = None
    """File to list bad samples in, a line of JSON each: sample, row, cause, reason."""
    threads: int | None = None
    """Images decoded at a time. Default: the number of processors, 32 at most."""
    json: Path | None = None
    """File to write the figures to."""
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def __call__(self) -> None:
        from ..data.check import check

        with open(self.bad, "w") if self.bad else nullcontext() as file:
            figures = check(self.data, self.field, self.pictures, file, self.threads, options=self.reading)
        say(
            f"{self.data}: {counted(figures['samples'], 'sample')} in {counted(figures['shards'], 'shard')}, "
            f"{figures['bad']} bad ({listed(figures['causes'])}); {figures['images_per_s']:.0f} images/s"
        )
        for remark in figures["remarks"]:
            say(remark)
        for line in figures["first"]:
            say(f"  {line['sample']}: {line['cause']} ({line['reason']})")
        if self.json:
            write_json(self.json, figures)
        if figures["causes"]:
            sys.exit(1)


@dataclass(frozen=True)
class DataPack:
    """Write images with captions as WebDataset tars and their index. Bad samples are always left out, as with
    --skip-bad, and listed."""

    source: tyro.conf.Positional[Path]
    """Data set, as in stats."""
    out: tyro.conf.Positional[Path]
    """New folder for the tars."""
    pictures: Path | None = None
    """Folder of the image files, where SOURCE does not hold them."""
    samples_per_shard: int = 10_000
    size: int | None = None
    """Pixels: an image whose shorter side is longer is resized to it and written as JPEG. Default: images are copied
    as they are."""
    quality: int = 95
    """Quality of the JPEGs that --size writes, 1 to 100."""
    field: tuple[str, ...] = ("txt",)
    """Caption to write as KEY.txt, as in check; of several the first that a sample has."""
    threads: int | None = None
    """Images processed at a time. Default: the number of processors, 32 at most."""
    json: Path | None = None
    """File to write the figures to."""
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def __call__(self) -> None:
        from ..data.open import open_data
        from ..data.pack import pack

        figures = pack(
            open_data(self.source, self.pictures, replace(self.reading, skip_bad=True)),
            self.out,
            self.field,
            self.samples_per_shard,
            self.size,
            self.quality,
            self.threads,
        )
        say(
            f"{counted(figures['samples'], 'sample')} in {counted(figures['shards'], 'shard')}, {figures['resized']} "
            f"resized, in {self.out}"
        )
        if figures["causes"]:
            say(f"{figures['bad']} left out ({listed(figures['causes'])}); {self.out / 'bad.jsonl'} lists them")
        if self.json:
            write_json(self.json, figures)

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return f"{self.out} was not made"


@dataclass(frozen=True)
class DataTools:
    """Write built-in data sets; index, count, check and pack your own."""

    command: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[DataOpenMoji, tyro.conf.subcommand("openmoji")]
            | Annotated[DataScenes, tyro.conf.subcommand("scenes")]
            | Annotated[DataIndex, tyro.conf.subcommand("index")]
            | Annotated[DataStats, tyro.conf.subcommand("stats")]
            | Annotated[DataCheck, tyro.conf.subcommand("check")]
            | Annotated[DataPack, tyro.conf.subcommand("pack")]
        ]
    ]

    def __call__(self) -> None:
        self.command()

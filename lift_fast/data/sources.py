"""The captions of a data set, as embedding reads them: a shard at a time, with the keys and what is wrong with each."""

from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError
from .loose import LooseFiles
from .open import open_data
from .options import DataOptions
from .rows import DELIMITED, LINES
from .samples import BadText, Samples
from .shards import Shards
from .tables import TableSamples


class Read(NamedTuple):
    """Keys and captions of a shard, in order. captions: without surrounding space; None for a bad one. bad: row in the
    shard -> what is wrong with its caption or its key, in order."""

    keys: list[str]
    captions: list[str | None]
    bad: dict[int, BadText]


class Source:
    """The captions `field` of a data set; cache shard k holds those of its shard k.

    samples: the data set. options: with which it was opened. path: for messages. field: what holds the captions: "txt"
    of tars, a column, an entry of the metadata. names, sizes: name and number of samples of each shard.

    Raises DataError when the data set has no such captions.
    """

    def __init__(self, samples: Samples, field: str = "txt", options: DataOptions | None = None):
        self.samples, self.options = samples, options or DataOptions()
        self.path, self.field = samples.folder, samples.caption_field(field)
        self.names, self.sizes = samples.names, samples.shard_sizes

    def read(self, number: int) -> Read:
        """Reads keys and captions of shard `number`.

        Without skip_bad, raises BadText (a DataError), naming the shard, the row and the key, for the first caption or
        key that cannot be used; DataError for a shard that cannot be read or has changed.
        """
        captions = self.samples.captions(number, self.field)
        bad = {row: caption for row, caption in enumerate(captions) if isinstance(caption, BadText)}
        bad = dict(sorted((self.samples.bad_keys(number) | bad).items()))
        if not self.options.skip_bad:
            for error in bad.values():
                raise BadText(error.cause, f"{error.reason}; --skip-bad leaves such samples out")
        good = [None if isinstance(caption, BadText) else caption for caption in captions]
        return Read(self.samples.shard_keys(number), good, bad)

    def stamp(self, number: int) -> str:
        """A text that changes when a file with captions of the shard is written to."""
        return self.samples.shard_stamp(number)

    def where(self, number: int, row: int) -> str:
        """Names a row of a shard, for messages."""
        return self.samples.where(sum(self.sizes[:number]) + row)

    def __str__(self) -> str:
        """A description for the user: how many samples, where, and which captions and keys."""
        samples, shards = self.samples, f"{len(self.names)} shards"
        if isinstance(samples, TableSamples):
            return samples.described(self.field)
        if isinstance(samples, Shards):
            shards = f"{len(self.names)} tar shards"
        text = (self.options.text_suffix or "txt").lstrip(".")
        what = f"their .{text}" if self.field == "txt" else f"{self.field!r} of their .json"
        if isinstance(samples, LooseFiles) and samples.classes:
            what = "the names of their folders"
        return f"{len(samples)} samples in {shards} at {self.path}, captions from {what}"


def open_source(
    path: str | Path, field: str | None = None, options: DataOptions | None = None, images: str | Path | None = None
) -> Source:
    """Opens the captions of the data set at `path`, whatever its layout; there need be no images.

    field: "txt", a column, or an entry of the metadata; None for the usual one. images: the argument of open_data.

    Raises the errors of open_data; DataError when there are no such captions; ConfigError for an option that does not
    apply to the layout.
    """
    options = options or DataOptions()
    samples = open_data(path, images, options, captions_only=True)
    table, suffix = isinstance(samples, TableSamples), samples.folder.suffix.lower()
    lines, loose = table and suffix in LINES, isinstance(samples, LooseFiles)
    if options.shard_rows is not None and not (lines or loose):
        raise ConfigError(f"--shard-rows cuts one CSV, TSV or JSONL file; the files at {path} are the shards")
    if options.key is not None and not table:
        raise ConfigError(f"--key names a column; the samples at {path} have their keys in their names")
    if (options.delimiter is not None or options.quoting != "auto") and not (lines and suffix in DELIMITED):
        raise ConfigError(f"--delimiter and --quoting are for CSV and TSV, which {path} is not")
    if (options.image_suffix is not None or options.text_suffix is not None) and table:
        raise ConfigError(f"--image-suffix and --text-suffix are for tars and folders of files; {path} is a table")
    return Source(samples, field or "txt", options)

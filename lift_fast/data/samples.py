"""What a data set is to the pipelines: numbered samples, however they are stored."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ..errors import DataError

# Values of "cause" in skipped.jsonl, bad.jsonl and run.json (docs/data.md).
Cause = Literal[
    "missing",  # no image for the sample
    "unreadable",  # its file is gone, was cut short, or cannot be read
    "empty",
    "not a picture",
    "unsupported",  # an image in a format that is not read
    "too large",
    "truncated",
    "corrupt",
    "no caption",  # missing or blank
    "not text",  # a list, a number, … where a caption should be
    "not UTF-8",
    "no tokens",  # a caption that the text encoder's tokenizer makes nothing of
    "no key",
    "repeated key",
    "does not parse",  # a row of a table, or the metadata of a sample
    "damaged shard",  # the rest of a tar or a parquet file
    "unused file",  # it looks like an image or a caption, and belongs to no sample
]


class BadSample(Exception):
    """A sample that cannot be trained on: a pipeline skips it and counts it by its cause."""

    def __init__(self, cause: Cause, reason: str):
        super().__init__(f"{cause}: {reason}")
        self.cause, self.reason = cause, reason

    def __reduce__(self) -> tuple[Any, ...]:
        # For workers, which pass errors on pickled; else they would be made anew from the message alone.
        return type(self), (self.cause, self.reason), vars(self)


class BadText(DataError, BadSample):
    """A sample whose caption or key cannot be used. As a DataError it ends a command that does not skip bad samples."""

    def __init__(self, cause: Cause, reason: str):
        Exception.__init__(self, reason)
        self.cause, self.reason = cause, reason


class SeveralCaptions(BadText):
    """A list of captions where training takes one. captions: the list; evaluation takes it."""

    def __init__(self, reason: str, captions: Sequence[str]):
        super().__init__("not text", reason)
        self.captions = captions

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.captions), vars(self)


class Problem(NamedTuple):
    """Something in a data set that is not read and is no sample: the lost part of a shard, files without a use.

    where: the shard or the folder. count: how many files the reason is about.
    """

    where: str
    cause: Cause
    reason: str
    count: int = 1  # type: ignore[assignment]  # hides tuple.count


class Samples(Protocol):
    """One data set, cut into shards. Sample numbers run through all shards.

    Shard k of a text cache holds the captions of shard k. With DataOptions.skip_bad a sample keeps its number when it
    cannot be used: what is asked of it raises BadSample.

    folder: where it lies, for messages. names, shard_sizes: the name and the number of samples of each shard.
    problems: what opening found that belongs to no sample.
    """

    folder: Path
    names: list[str]
    shard_sizes: list[int]
    problems: list[Problem]

    def __len__(self) -> int: ...

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""

    def image_file(self, i: int) -> Path | None:
        """The file that is the image of sample i; None where the image is a part of a shard. Raises BadSample."""

    def caption_field(self, field: str = "txt") -> str:
        """The column or entry that holds the captions `field`: for "txt" the set's usual one. Raises DataError."""

    def text_fields(self) -> list[str]:
        """Fields of text that `meta` does not hold, such as the .txt of tars."""

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i. Raises BadText when it is missing, blank, or not text."""

    def captions(self, number: int, field: str = "txt") -> list[str | BadText]:
        """All captions of shard `number`, in order, with the errors that caption() raises. Raises DataError when the
        shard cannot be read at all or has changed."""

    def meta(self, i: int) -> dict:
        """The other metadata of sample i; {} where there is none."""

    def where(self, i: int) -> str:
        """Shard and key of sample i, for messages."""

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order. Raises DataError for one that is missing or occurs twice; with
        skip_bad a missing one is "", and bad_keys has both."""

    def bad_keys(self, number: int) -> dict[int, BadText]:
        """Row in shard `number` -> what is wrong with its key: "no key", "repeated key"."""

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of these keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]], as a cache stores them."""

    def shard_stamp(self, number: int) -> str:
        """A text that changes when a file with captions of shard `number` is written to: from sizes and times."""


def located(i: int, ends: Sequence[int], folder: Path) -> tuple[int, int]:
    """Sample number -> (shard, row in the shard). ends: cumulative sizes of the shards. Raises IndexError."""
    if not 0 <= i < ends[-1]:
        raise IndexError(f"sample {i} of {ends[-1]} at {folder}")
    number = bisect_right(ends, i)
    return number, i - (ends[number - 1] if number else 0)


class Collection:
    """Several data sets read as one: row numbers run through them in the order given."""

    def __init__(self, sets: Sequence[Samples]):
        self.sets = list(sets)
        self.starts = np.cumsum([0] + [len(samples) for samples in self.sets])
        self.shard_sizes = [size for samples in self.sets for size in samples.shard_sizes]
        self._left_out: dict[int, BadSample] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """Row number -> (number of the set, sample in the set)."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, row - int(self.starts[number])

    def leave_out(self, rows: Mapping[int, BadSample]) -> None:
        """Makes image_bytes raise these errors for these row numbers, so that a pipeline skips and counts them."""
        self._left_out.update(rows)

    def image_bytes(self, row: int) -> bytes:
        """The encoded image at a row number. Raises BadSample."""
        if (left_out := self._left_out.get(row)) is not None:
            # A new one each time: an error that is raised again keeps every earlier traceback alive.
            raise type(left_out)(left_out.cause, left_out.reason)
        number, sample = self.locate(row)
        return self.sets[number].image_bytes(sample)

    def caption(self, row: int, field: str) -> str:
        """The caption at a row number. Raises DataError when it is missing or blank."""
        number, sample = self.locate(row)
        return self.sets[number].caption(sample, field)

    def where(self, row: int) -> str:
        """Shard and key at a row number, for messages."""
        number, sample = self.locate(row)
        return self.sets[number].where(sample)

    def bad_keys(self) -> dict[int, BadText]:
        """Row number -> what is wrong with the key, in order."""
        bad: dict[int, BadText] = {}
        for samples, first in zip(self.sets, self.starts.tolist(), strict=False):
            for number, size in enumerate(samples.shard_sizes):
                bad |= {first + row: error for row, error in samples.bad_keys(number).items()}
                first += size
        return bad

    def bad_captions(
        self,
        field: str,
        has_tokens: Callable[[str], bool] = bool,
        read: Callable[[int, Sequence[str | BadText]], object] = lambda number, captions: None,
    ) -> dict[int, BadText]:
        """Reads every caption once: row number -> what is wrong with it, in order.

        has_tokens: whether the text encoder's tokenizer makes anything of a caption. read: called with the number of a
        set and the captions of each of its shards, in order.
        """
        bad: dict[int, BadText] = {}
        for turn, (samples, first) in enumerate(zip(self.sets, self.starts.tolist(), strict=False)):
            for number, size in enumerate(samples.shard_sizes):
                captions = samples.captions(number, field)
                read(turn, captions)
                for row, caption in enumerate(captions, first):
                    if isinstance(caption, BadText):
                        bad[row] = caption
                    elif not has_tokens(caption):
                        bad[row] = BadText(
                            "no tokens",
                            f"{self.where(row)}: the tokenizer makes no token of its caption {caption!r}; give it "
                            "another caption, or leave it out with --skip-bad",
                        )
                first += size
        return bad

"""What a data set is to the pipelines: numbered samples, however they are stored."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

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
]


class BadSample(Exception):
    """A sample that cannot be trained on: a pipeline skips it and counts it by its cause."""

    def __init__(self, cause: Cause, reason: str):
        super().__init__(f"{cause}: {reason}")
        self.cause, self.reason = cause, reason


class Samples(Protocol):
    """One data set, cut into shards. Sample numbers run through all shards.

    Shard k of a text cache holds the captions of shard k.

    folder: where it lies, for messages. names, shard_sizes: the name and the number of samples of each shard.
    """

    folder: Path
    names: list[str]
    shard_sizes: list[int]

    def __len__(self) -> int: ...

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i. Raises DataError when it is missing or blank."""

    def meta(self, i: int) -> dict:
        """The other metadata of sample i; {} where there is none."""

    def where(self, i: int) -> str:
        """Shard and key of sample i, for messages."""

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order."""

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of these keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]], as a cache stores them."""


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

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """Row number -> (number of the set, sample in the set)."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, row - int(self.starts[number])

    def image_bytes(self, row: int) -> bytes:
        """The encoded image at a row number. Raises BadSample."""
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

    def check_captions(self, field: str) -> None:
        """Reads every caption once. Raises DataError naming the first sample without one."""
        for samples in self.sets:
            for sample in range(len(samples)):
                samples.caption(sample, field)

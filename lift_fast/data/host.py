"""The host pipeline: tar shards -> shuffled batches of pixels and row numbers, decoded ahead on CPU threads.

What a batch holds depends on the seed alone: not on the number of threads, nor on which model asks. LIFT and
CLIP so see the same pictures in the same order.
"""

import random
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .shards import Shards
from .transforms import UndecodablePicture, centre_crop, decode, random_crop


class Collection:
    """Several data sets read as one: row numbers run through them in the order given."""

    def __init__(self, sets: Sequence[Shards]):
        self.sets = list(sets)
        self.starts = np.cumsum([0] + [len(shards) for shards in self.sets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """Row number -> (which set, sample within it)."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, row - int(self.starts[number])

    def image_bytes(self, row: int) -> bytes:
        """The encoded picture at a row number."""
        number, sample = self.locate(row)
        return self.sets[number].image_bytes(sample)

    def caption(self, row: int, field: str) -> str:
        """The caption at a row number."""
        number, sample = self.locate(row)
        return self.sets[number].caption(sample, field)

    def where(self, row: int) -> str:
        """Shard and key at a row number, for messages."""
        number, sample = self.locate(row)
        return self.sets[number].where(sample)

    def check_pictures(self) -> None:
        """Raises DataError naming the first sample that has no picture at all."""
        for shards in self.sets:
            shards.check_pictures()

    def check_captions(self, field: str) -> None:
        """Reads every caption once. Raises DataError naming the first sample without one."""
        for shards in self.sets:
            for sample in range(len(shards)):
                shards.caption(sample, field)


@dataclass(frozen=True)
class Batch:
    """pixels uint8 [rows, size, size, 3] on the CPU; rows int64 [rows], the samples' row numbers."""

    pixels: Tensor
    rows: Tensor


class HostPipeline:
    """Endless shuffled batches of a Collection; every epoch visits each sample at most once.

    `ahead` batches are decoded while the model works on one: for a GPU. On the CPU both would fight for the same
    cores, so 0 is faster there. A picture that does not decode is left out, its place taken by the next one, and
    recorded in `skipped` (row number -> reason). A batch never holds a sample twice.

    Raises ConfigError when a batch is larger than the data; DataError when a sample has no picture, or when too
    few pictures decode to fill a batch.
    """

    def __init__(
        self,
        data: Collection,
        *,
        batch_size: int,
        image_size: int,
        seed: int,
        min_crop_area: float = 0.9,
        threads: int = 2,
        ahead: int = 0,
    ):
        if batch_size > len(data):
            raise ConfigError(f"a batch of {batch_size} is larger than the data ({len(data)} samples)")
        data.check_pictures()
        self.data, self.batch_size, self.image_size = data, batch_size, image_size
        self.seed, self.min_crop_area, self.threads, self.ahead = seed, min_crop_area, threads, ahead
        self.skipped: dict[int, str] = {}

    def __iter__(self) -> Generator[Batch, None, None]:
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            for epoch in count():
                yield from self._epoch(epoch, pool)

    def _epoch(self, epoch: int, pool: ThreadPoolExecutor) -> Generator[Batch, None, None]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data)).tolist()
        queue: deque[tuple[int, Future[np.ndarray]]] = deque()
        upcoming = iter(order)
        rows: list[int] = []
        pixels: list[np.ndarray] = []
        filled = False
        while True:
            if not rows or not queue:
                for row in islice(upcoming, (1 + self.ahead) * self.batch_size - len(queue)):
                    queue.append((row, pool.submit(self._load, row, epoch)))
            if not queue:
                break
            row, future = queue.popleft()
            try:
                pixels.append(future.result())
                rows.append(row)
            except UndecodablePicture as error:
                self.skipped[row] = str(error)
            if len(rows) == self.batch_size:
                yield Batch(torch.from_numpy(np.stack(pixels)), torch.tensor(rows))
                filled, rows, pixels = True, [], []
        if not filled:
            raise DataError(
                f"only {len(rows)} of {len(self.data)} pictures decode, too few for a batch of {self.batch_size}; "
                f"first that does not: {self.data.where(next(iter(self.skipped)))}"
            )

    def _load(self, row: int, epoch: int) -> np.ndarray:
        rng = random.Random(f"{self.seed} {epoch} {row}")
        return random_crop(decode(self.data.image_bytes(row)), self.image_size, rng, self.min_crop_area)

    def report(self) -> dict[str, Any]:
        """What was left out: {"skipped_pictures": n, "skipped": [{"sample": where, "reason": …}, …]} (first 20)."""
        first = [{"sample": self.data.where(row), "reason": why} for row, why in sorted(self.skipped.items())[:20]]
        return {"skipped_pictures": len(self.skipped), "skipped": first}


def load_pictures(data: Shards, image_size: int) -> tuple[Tensor, list[int]]:
    """Every picture of a set for evaluation: uint8 [n, size, size, 3] and the samples they belong to.

    Pictures that do not decode are left out. Raises DataError when none does, or when a sample has none.
    """
    data.check_pictures()
    pixels, samples = [], []
    for sample in range(len(data)):
        try:
            pixels.append(centre_crop(decode(data.image_bytes(sample)), image_size))
            samples.append(sample)
        except UndecodablePicture:
            continue
    if not pixels:
        raise DataError(f"{data.folder}: not one picture decodes")
    return torch.from_numpy(np.stack(pixels)), samples

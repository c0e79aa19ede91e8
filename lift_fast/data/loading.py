"""What the pipelines share: settings, batches, the position in the data, and the bad samples that were skipped."""

import json
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .order import Order, uniform
from .samples import BadSample, Collection

Item = TypeVar("Item")
DRAWS = 26  # random numbers in [0, 1) that determine a sample's view; see transforms.view_of
_JUDGED_FROM = 1000  # samples: the share of bad ones among fewer means little
_LISTED = 20
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Loading:
    """Settings of a pipeline, for either decoder.

    image_size: pixels a side. min_crop_area: random crops keep at least this share of an image's area. flip:
    probability that an image is mirrored. colour: brightness, contrast and saturation are each scaled by a factor from
    1 - colour to 1 + colour. dtype, layout: of the pixels; torch.uint8 as decoded, or a floating dtype normalised by
    ImageNet's mean and std. shuffle_buffer, rank, world: the arguments of Order. max_skipped: share of bad samples
    above which the run ends. checked: `lift-fast data check` has decoded every image, so DALI, which silently accepts
    damaged JPEGs, needs no strict decode before it. threads: number of threads that read and decode. ahead: number of
    batches that are decoded while the model works on one.
    """

    batch_size: int
    image_size: int
    seed: int = 0
    min_crop_area: float = 0.9
    flip: float = 0.0
    colour: float = 0.0
    dtype: torch.dtype = torch.uint8
    layout: Literal["NHWC", "NCHW"] = "NHWC"
    shuffle_buffer: int | None = None
    rank: int = 0
    world: int = 1
    max_skipped: float = 0.1
    checked: bool = False
    threads: int = 2
    ahead: int = 0

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "image_size": 1, "seed": 0, "threads": 1, "ahead": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed must be below 2**63, not {self.seed}")
        for name in ("min_crop_area", "flip", "colour", "max_skipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if not self.min_crop_area:
            raise ConfigError("min_crop_area must be above 0")
        if self.dtype not in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
            raise ConfigError(f"pixels are uint8, float16, bfloat16 or float32, not {self.dtype}")


@dataclass(frozen=True)
class Place:
    """A position in the data: this rank has made `batch` batches of the epoch from `taken` samples, good and bad."""

    epoch: int
    batch: int
    taken: int


@dataclass(frozen=True)
class Assembled(Generic[Item]):
    """A batch before its items are stacked: the items, their row numbers int64 [rows], and the place after it."""

    items: list[Item]
    rows: Tensor
    after: Place


@dataclass(frozen=True)
class Batch:
    """pixels [rows, size, size, 3] or [rows, 3, size, size]; rows int64 [rows] on the CPU, the samples' row numbers."""

    pixels: Tensor
    rows: Tensor


class Loaded(NamedTuple):
    """Images for evaluation: pixels uint8 [n, size, size, 3]; samples, their n sample numbers; causes, the number of
    samples that were left out by cause."""

    pixels: Tensor
    samples: list[int]
    causes: dict[str, int]


class Pipeline:
    """Endless shuffled batches of a Collection, each sample at most once an epoch and never twice in a batch.

    A bad sample is left out and counted in `skipped`; the rank's next sample takes its place. The remainder of an
    epoch, fewer samples than a global batch and different ones in each epoch, is not used.

    Iterating starts at the pipeline's position, which state_dict() returns as of the batch yielded last. A pipeline
    that loads this state continues with the next sample. Only one iteration may run at a time.

    Raises ConfigError for a batch larger than the data; DataError, while iterating, for a share of bad samples above
    max_skipped, or too few good samples for one batch.
    """

    def __init__(self, data: Collection, loading: Loading):
        self.data, self.loading = data, loading
        self.order = Order(
            data.shard_sizes,
            seed=loading.seed,
            batch_size=loading.batch_size,
            rank=loading.rank,
            world=loading.world,
            shuffle_buffer=loading.shuffle_buffer,
        )
        self.skipped = Skipped(data, loading.max_skipped)
        self._place = Place(0, 0, 0)

    def __iter__(self) -> Generator[Batch, None, None]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, int | None]:
        """This rank's position: {"epoch", "batch", "taken"} and the settings that determine the order."""
        return {**asdict(self._place), **self._order_of()}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Continues after the batch at which `state` was taken. Raises ConfigError when its order is another."""
        for name, value in self._order_of().items():
            if state.get(name, "nothing") != value:
                raise ConfigError(
                    f"the loader's state was taken with {name} {state.get(name, 'unknown')}, and this one has {value}: "
                    "the rest of the epoch would be other samples"
                )
        self._place = Place(*(int(state[name] or 0) for name in ("epoch", "batch", "taken")))

    def _order_of(self) -> dict[str, int | None]:
        names = ("seed", "batch_size", "rank", "world", "shuffle_buffer")
        return {"samples": self.order.samples, **{name: getattr(self.loading, name) for name in names}}

    def _assembled(
        self, work: Callable[[int, np.ndarray], Item], depth: int
    ) -> "Generator[Assembled[Item], None, None]":
        """Yields full batches of what `work(row, draws)` returns, in order, from the pipeline's position.

        draws: the sample's random numbers in this epoch, float64 [DRAWS]. work runs on loading.threads threads, `depth`
        batches ahead; a sample for which it raises BadSample is skipped. The caller sets self._place to the `after` of
        each batch that it yields.
        """
        size, place = self.loading.batch_size, self._place
        queue: deque[tuple[_Sample, Future[Item] | None]] = deque()
        upcoming = self._upcoming(place)
        items: list[Item] = []
        rows: list[int] = []
        with ThreadPoolExecutor(self.loading.threads, thread_name_prefix="decode") as pool:
            try:
                while True:
                    if not rows or not queue:
                        while len(queue) < (1 + depth) * size:
                            sample = next(upcoming)
                            # The last samples of an epoch are needed only to replace bad ones.
                            spare = sample.taken >= self.order.batches * size
                            queue.append((sample, None if spare else pool.submit(work, sample.row, sample.draws)))
                    sample, future = queue.popleft()
                    if sample.epoch != place.epoch:
                        if not place.batch:
                            raise DataError(self.skipped.too_few(len(rows), len(self.order), size))
                        place, items, rows = Place(sample.epoch, 0, 0), [], []
                    if place.batch == self.order.batches:
                        continue
                    try:
                        items.append((future or pool.submit(work, sample.row, sample.draws)).result())
                    except BadSample as error:
                        self.skipped.add(sample.row, error)
                        continue
                    rows.append(sample.row)
                    self.skipped.looked_at += 1
                    if len(rows) == size:
                        place = Place(sample.epoch, place.batch + 1, sample.taken + 1)
                        yield Assembled(items, torch.tensor(rows), place)
                        items, rows = [], []
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _upcoming(self, place: Place) -> "Generator[_Sample, None, None]":
        """Yields this rank's samples from `place` on, without end."""
        epoch, taken = place.epoch, place.taken
        while True:
            while taken < len(self.order):
                rows = self.order.rows(epoch, taken, min(taken + _ROWS_AT_ONCE, len(self.order)))
                draws = uniform(DRAWS, self.loading.seed, epoch, rows)
                for i, row in enumerate(rows.tolist()):
                    yield _Sample(epoch, taken + i, row, draws[i])
                taken += len(rows)
            epoch, taken = epoch + 1, 0


class _Sample(NamedTuple):
    """One sample of the order. taken: number of this rank's samples before it in the epoch."""

    epoch: int
    taken: int
    row: int
    draws: np.ndarray


class RowSet:
    """A set of row numbers below `rows`, in a bit each. Memory that no number touches is never used."""

    def __init__(self, rows: int):
        self._bits = np.zeros(-(-rows // 8), dtype=np.uint8)

    def __contains__(self, row: int) -> bool:
        return bool(self._bits[row >> 3] & 1 << (row & 7))

    def add(self, row: int) -> None:
        """Adds a number."""
        self._bits[row >> 3] |= 1 << (row & 7)

    def discard(self, row: int) -> None:
        """Removes a number, if it is there."""
        self._bits[row >> 3] &= ~(1 << (row & 7)) & 0xFF


class Counts(NamedTuple):
    """What Skipped has counted up to a point: Skipped.counts() and back_to()."""

    looked_at: int
    causes: Counter[str]
    met: Counter[str]
    samples: int


class Skipped:
    """The bad samples of a run: counts them by cause, lists each in a file, and ends the run when they are too many.

    causes: number of bad samples by cause, each counted once. met: how often they came up, by cause; a sample that is
    bad in every epoch comes up in every epoch. looked_at: number of samples so far, good and bad, each as often as it
    came up. most: largest share of bad ones among these.
    """

    def __init__(self, data: Collection, most: float):
        self.data, self.most = data, most
        self.looked_at = 0
        self.causes: Counter[str] = Counter()
        self.met: Counter[str] = Counter()
        rows = sum(data.shard_sizes)
        self._counted, self._listed = RowSet(rows), RowSet(rows)
        self._order = array("q")  # the rows that are counted, in order
        self._first: list[dict[str, Any]] = []
        self._unwritten: list[str] = []
        self._path: Path | None = None

    def add(self, row: int, error: BadSample) -> None:
        """Counts one. Raises DataError when the share of bad samples is above `most`."""
        self.looked_at += 1
        self.met[error.cause] += 1
        if row not in self._counted:
            self._counted.add(row)
            self._order.append(row)
            self.causes[error.cause] += 1
        self.note(row, error)
        bad = self.met.total()
        if self.looked_at >= _JUDGED_FROM and bad > self.most * self.looked_at:
            raise DataError(
                f"{bad} of {self.looked_at} samples are bad ({in_words(self.met)}), more than --max-skipped "
                f"{self.most}; the last: {self.data.where(row)} ({error.reason}). lift-fast data check --bad FILE "
                "lists all"
            )

    def note(self, row: int, error: BadSample) -> None:
        """Lists one without counting it, unless it is listed already."""
        if row not in self._listed:
            self._listed.add(row)
            line = {"sample": self.data.where(row), "row": row, "cause": error.cause, "reason": error.reason}
            if len(self._first) < _LISTED:
                self._first.append(line)
            self._unwritten.append(json.dumps(line) + "\n")
            self._write()

    def counts(self) -> Counts:
        """What is counted so far."""
        return Counts(self.looked_at, self.causes.copy(), self.met.copy(), len(self._order))

    def back_to(self, counts: Counts) -> None:
        """Forgets what was counted after `counts`, because those samples come up again. They are not listed again."""
        self.looked_at, self.causes, self.met, samples = counts
        while len(self._order) > samples:
            self._counted.discard(self._order.pop())

    def write_to(self, path: Path) -> None:
        """Appends a JSON line for each bad sample to this file, once: at once for those so far, then as they occur.

        The file is made with the first line.
        """
        self._path = path
        self._write()

    def _write(self) -> None:
        if self._path is not None and self._unwritten:
            with self._path.open("a") as file:
                file.writelines(self._unwritten)
            self._unwritten.clear()

    def too_few(self, good: int, samples: int, wanted: int) -> str:
        """The message for an epoch of `samples` samples whose `good` ones do not fill a batch of `wanted`."""
        first = self._first[0]
        return (
            f"only {good} of {samples} images decode, too few for a batch of {wanted} (bad so far: "
            f"{in_words(self.causes)}); the first: {first['sample']} ({first['reason']})"
        )

    def report(self) -> dict[str, Any]:
        """{"skipped_pictures": samples, "skipped_causes": {cause: samples}, "skipped_met": n, "skipped": [{"sample",
        "row", "cause", "reason"}]}: each bad sample counts once, and skipped_met is how often they came up in all
        epochs. "skipped" lists the first 20 samples."""
        return {
            "skipped_pictures": self.causes.total(),
            "skipped_causes": dict(self.causes.most_common()),
            "skipped_met": self.met.total(),
            "skipped": self._first,
        }


def in_words(counts: Counter[str]) -> str:
    """Counts by cause: "3 truncated, 1 empty"."""
    return ", ".join(f"{count} {cause}" for cause, count in counts.most_common())

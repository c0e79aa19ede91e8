"""What the pipelines share: settings, batches, and the position in the data."""

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from .order import Order, uniform
from .samples import BadSample, Collection
from .skipped import Bad, Skipped, in_words
from .stand_ins import candidates, left_over

Item = TypeVar("Item")
DRAWS = 26  # random numbers in [0, 1) that determine a sample's view; see transforms.view_of
_ROWS_AT_ONCE = 1024
_TRIES = 8  # candidates of a slot that a thread tries before the share of bad samples is judged


@dataclass(frozen=True)
class Loading:
    """Settings of a pipeline, for either decoder.

    batch_size: samples of each rank in a batch. image_size: pixels a side. min_crop_area: random crops keep at least
    this share of an image's area. flip: probability that an image is mirrored. colour: brightness, contrast and
    saturation are each scaled by a factor from 1 - colour to 1 + colour. dtype, layout: of the pixels; torch.uint8 as
    decoded, or a floating dtype normalised by ImageNet's mean and std. shuffle_buffer, rank, world: the arguments of
    Order. max_skipped: share of bad samples above which the run ends. checked: `lift-fast data check` has decoded every
    image, so DALI, which silently accepts damaged JPEGs, needs no strict decode before it. threads: number of threads
    that read and decode. ahead: number of batches that are decoded while the model works on one.
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
    """A position in the data: `batch` global batches of the epoch have been made."""

    epoch: int
    batch: int


@dataclass(frozen=True)
class Assembled(Generic[Item]):
    """A batch before its items are stacked: the items, their row numbers int64 [rows], the bad samples for which others
    stand in, and the place after it."""

    items: list[Item]
    rows: Tensor
    bad: list[Bad]
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
    """Endless shuffled batches of a Collection, each sample at its own place once an epoch and never twice in a batch.

    Another sample stands in for a bad one, which is counted in `skipped` (stand_ins.py has the rule); so a sample may
    come up a second time in an epoch. Which samples a global batch holds depends on the seed, the epoch, the batch's
    number and on which samples are bad: not on ranks, threads or the decoder. The remainder of an epoch, fewer samples
    than a global batch and different ones in each epoch, is used for stand-ins alone.

    Iterating starts at the pipeline's position, which state_dict() returns as of the batch yielded last; `skipped` is
    of that batch, too. A pipeline that loads this state, as any rank of any number of ranks with the same global batch,
    continues with the next global batch. Only one iteration may run at a time.

    Raises ConfigError for a batch larger than the data; DataError, while iterating, for a share of bad samples above
    max_skipped, or fewer good samples than a global batch.
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
        self.skipped = Skipped(data, loading.max_skipped, loading.rank)
        self._place = Place(0, 0)

    def __iter__(self) -> Generator[Batch, None, None]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, int | None]:
        """The position, the same on every rank: {"epoch", "batch"} and the settings that determine the order."""
        return {**asdict(self._place), **self._order_of()}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Continues after the batch at which `state` was taken. Raises ConfigError when its order is another."""
        for name, value in self._order_of().items():
            if state.get(name, "nothing") != value:
                raise ConfigError(
                    f"the loader's state was taken with {name} {state.get(name, 'unknown')}, and this one has {value}: "
                    "the rest of the epoch would be other samples"
                )
        self._place = Place(*(int(state[name] or 0) for name in ("epoch", "batch")))

    def _order_of(self) -> dict[str, int | None]:
        names = ("samples", "seed", "global_batch", "shuffle_buffer")
        return {name: getattr(self.order, name) for name in names}

    def _assembled(
        self, work: Callable[[int, np.ndarray], Item], depth: int
    ) -> "Generator[Assembled[Item], None, None]":
        """Yields batches of what `work(row, draws)` returns, in order, from the pipeline's position.

        draws: the sample's random numbers in this epoch, float64 [DRAWS]. work runs on loading.threads threads, `depth`
        batches ahead; it raises BadSample for a sample that cannot be used. The caller passes each batch that it yields
        to _reach first.
        """
        begun: deque[tuple[Place, list[Future[_Tried[Item]]]]] = deque()
        upcoming = self._upcoming(self._place)
        with ThreadPoolExecutor(self.loading.threads, thread_name_prefix="decode") as pool:
            assembly = _Assembly(self, work, pool)
            try:
                while True:
                    while len(begun) <= depth:
                        at, rows, draws = next(upcoming)
                        begun.append((at, assembly.begin(at, rows, draws)))
                    yield assembly.finish(*begun.popleft())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _reach(self, made: "Assembled[Item]") -> None:
        """Moves the position behind a batch that is about to be yielded, and counts its samples. Raises DataError."""
        self.skipped.add(len(made.rows), made.bad)
        self._place = made.after

    def _upcoming(self, place: Place) -> Generator[tuple[Place, list[int], np.ndarray], None, None]:
        """Yields the place of each batch from `place` on, without end, and its samples of this rank: their rows, and
        their draws, float64 [batch_size, DRAWS]."""
        epoch, batch = place.epoch, place.batch
        some = max(1, _ROWS_AT_ONCE // self.loading.batch_size)
        while True:
            for start in range(batch, self.order.batches, some):
                batches = np.arange(start, min(start + some, self.order.batches))
                rows = self.order.rows(epoch, self.order.positions(batches))
                draws = uniform(DRAWS, self.loading.seed, epoch, rows)
                for i, number in enumerate(batches.tolist()):
                    yield Place(epoch, number), rows[i].tolist(), draws[i]
            epoch, batch = epoch + 1, 0


_Found = tuple[int, Item]  # a row number, and what `work` made of its sample
_Tried = tuple[_Found[Item] | None, list[Bad]]  # the first good sample, and the bad ones before it


class _Assembly(Generic[Item]):
    """Assembles a pipeline's batches: decodes their samples on threads, and finds stand-ins for bad ones."""

    def __init__(self, pipeline: Pipeline, work: Callable[[int, np.ndarray], Item], pool: ThreadPoolExecutor):
        self.order, self.skipped, self.seed = pipeline.order, pipeline.skipped, pipeline.loading.seed
        self.work, self.pool = work, pool
        first = self.order.rank * self.order.batch_size
        self.slots = range(first, first + self.order.batch_size)  # of this rank in a global batch
        self.verdicts: dict[int, BadSample | None] = {}  # of rows that were judged to find what is left over

    def begin(self, at: Place, rows: list[int], draws: np.ndarray) -> list[Future[_Tried[Item]]]:
        """Starts to decode the samples of this rank's slots."""
        return [
            self.pool.submit(self._first_good, chain([(row, draws[i])], self._candidates(at, slot, 1)))
            for i, (slot, row) in enumerate(zip(self.slots, rows, strict=True))
        ]

    def finish(self, at: Place, begun: list[Future[_Tried[Item]]]) -> Assembled[Item]:
        """Waits for the samples, and finds stand-ins for the bad ones. Raises DataError."""
        found: dict[int, _Found[Item]] = {}
        bad: list[Bad] = []
        waiting = dict(zip(self.slots, begun, strict=True))
        tried, without = Counter[int](), []
        while waiting:
            for slot in list(waiting):
                first, others = waiting.pop(slot).result()
                if others:
                    bad += others
                    tried[slot] += len(others)
                    if self.skipped.too_many(len(found), len(bad)):
                        self.skipped.add(len(found), bad)
                if first:
                    found[slot] = first
                elif tried[slot] < len(candidates(slot, self.order.global_batch, self.order.samples)):
                    waiting[slot] = self.pool.submit(self._first_good, self._candidates(at, slot, tried[slot]))
                else:
                    without.append(slot)
        if without:
            self._leave_over(at, without, found, bad)
        rows = torch.tensor([found[slot][0] for slot in self.slots])
        return Assembled([found[slot][1] for slot in self.slots], rows, bad, Place(at.epoch, at.batch + 1))

    def _first_good(self, samples: Iterable[tuple[int, np.ndarray]]) -> _Tried[Item]:
        bad: list[Bad] = []
        for row, draws in samples:
            error = self.skipped.known(row)
            if not error:
                try:
                    return (row, self.work(row, draws)), bad
                except BadSample as raised:
                    error = BadSample(raised.cause, raised.reason)  # without the frames that `raised` keeps alive
            bad.append((row, error))
        return None, bad

    def _candidates(self, at: Place, slot: int, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the row and the draws of a few candidates of a slot, from number `start` on."""
        some = candidates(slot, self.order.global_batch, self.order.samples)[start : start + _TRIES]
        rows = self._rows(at, np.array(some, dtype=np.int64))
        yield from zip(rows.tolist(), uniform(DRAWS, self.seed, at.epoch, rows), strict=True)

    def _rows(self, at: Place, positions: np.ndarray) -> np.ndarray:
        """The rows at positions that are counted from the beginning of a global batch."""
        return self.order.rows(at.epoch, (at.batch * self.order.global_batch + positions) % self.order.samples)

    def _leave_over(self, at: Place, without: list[int], found: dict[int, _Found[Item]], bad: list[Bad]) -> None:
        """Finds a sample for each slot that is without a good candidate, and adds to `found`."""
        batch, samples = self.order.global_batch, self.order.samples
        rows = self._rows(at, np.arange(samples)).tolist()
        self.verdicts |= dict(bad)
        self.verdicts |= {row: None for row, _ in found.values()}

        def good(position: int) -> bool:
            row = rows[position]
            if row not in self.verdicts:
                _, others = self._first_good([(row, uniform(DRAWS, self.seed, at.epoch, row))])
                self.verdicts[row] = others[0][1] if others else None
            return self.verdicts[row] is None

        list(self.pool.map(good, range(max(without))))  # on all threads what left_over asks for one after another
        for slot in without:
            while slot not in found:
                position = left_over(slot, batch, samples, good)
                if position is None:
                    list(self.pool.map(good, range(samples)))  # to say how many are
                    self.skipped.add(len(found), bad)
                    raise DataError(self._too_few())
                row = rows[position]
                first, others = self._first_good([(row, uniform(DRAWS, self.seed, at.epoch, row))])
                if first:
                    found[slot] = first
                self.verdicts |= dict(others)  # of one that has become bad since it was judged

    def _too_few(self) -> str:
        """The message for a set that was judged whole and has fewer good samples than a global batch."""
        bad = {row: error for row, error in self.verdicts.items() if error}
        row, error = next(iter(bad.items()))
        return (
            f"only {self.order.samples - len(bad)} of {self.order.samples} images decode, too few for a batch of "
            f"{self.order.global_batch} (bad: {in_words(Counter(error.cause for error in bad.values()))}); the first: "
            f"{self.skipped.data.where(row)} ({error.reason})"
        )

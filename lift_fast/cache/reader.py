"""Reads a cache: the manifest when it is opened, a shard's header on first use, then only the requested rows."""

import os
import shlex
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError, CacheMismatch
from ..ops.rows.quantized import QuantizedRows
from ..ops.rows.table import KeyTable, Table, key_hashes, lost_files, row_numbers
from ..progress import bar
from .conditioning import Conditioning
from .manifest import MANIFEST, PARTIAL, Manifest, digest_of
from .rotation import Rotation
from .shard import AGAIN, MappedShard, check_content, content_bytes, map_shard

# Linux allows a process 65 530 memory maps (vm.max_map_count); above this number the oldest shards are unmapped.
_MAX_MAPS = 30_000
_LOOK_SECONDS = 0.05  # between two looks at the files; longer where a look would take more than 1 % of the time


class Keyed(Protocol):
    """What `Cache.check_keys` needs of a data set; data.samples.Samples implements it."""

    folder: Path
    shard_sizes: list[int]

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order."""

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of those keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]]."""


class Captioned(Keyed, Protocol):
    """What `Cache.check_data` needs of a data set; data.samples.Samples implements it."""

    def captions(self, number: int, field: str) -> Sequence[object]:
        """All captions of shard `number`, in order; what is not text is a bad caption."""

    def shard_stamp(self, number: int) -> str:
        """A text that changes when a file with captions of shard `number` is written to."""


class Compared(NamedTuple):
    """How the captions of a data set's shards were compared. unchanged: by the stamp of the files, which says that they
    were not written to since the cache was made; read: by reading them; unknown: not, as the cache has no digest."""

    unchanged: int
    read: int
    unknown: int


class Cache:
    """A finished cache, opened for reading. Opening takes the same time for any number of rows.

    len(cache): number of rows. dim: length of a vector. manifest: how it was made, and its shards.

    Any number of threads and forked processes may read from it. A shard that is written to or cut short meanwhile is
    found with the next rows or, as looking takes time, with rows 0.05 s later, 0.3 s where there are 1 000 shards; see
    `check_unchanged`. A file that takes a shard's place changes nothing until the cache is opened again.

    Raises CacheError when the folder does not exist, is not a cache, is unfinished or damaged, or has another format
    version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            out = shlex.quote(str(self.folder))
            raise CacheError(f"no text cache at {self.folder}; make it with: lift-fast embed --data DATA --out {out}")
        if not (self.folder / MANIFEST).exists():
            raise CacheError(_why_no_manifest(self.folder))
        self.manifest = Manifest.load(self.folder / MANIFEST)
        self.dim = self.manifest.dim
        # Row r is in the shard k with starts[k] <= r < starts[k + 1].
        self._starts = np.cumsum([0, *(shard.rows for shard in self.manifest.shards)])
        self._table = Table(self.manifest.codec, self.dim, self._starts)
        self._mapped: dict[int, MappedShard] = {}  # by number, in the order in which they were mapped
        self._changed: set[int] = set()  # shards whose checksum is compared before they are used again
        self._pin = torch.cuda.is_available()
        self._keys: tuple[KeyTable, list[MappedShard]] | None = None
        self._searched: list[MappedShard] = []  # whose keys were searched since the last look
        self._lost = lost_files()
        self._look_at = 0.0  # on time.monotonic()
        self._rotation: Rotation | None = None
        self._conditioning: Conditioning | None = None
        self._renew()
        _open_caches.add(self)

    def _renew(self) -> None:
        """Starts with a lock that is free and without threads, as a forked process must."""
        self._lock = threading.RLock()  # held while shards are mapped, unmapped or read
        self._prefetcher: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Pickles the folder's path: a worker process opens the cache itself."""
        return Cache, (self.folder.absolute(),)

    def shard(self, number: int) -> MappedShard:
        """Returns shard `number`, mapped on first use. Raises CacheError when it is missing or damaged."""
        with self._lock:
            shard = self._mapped.get(number)
            if shard is not None and shard.lost:
                self._changed.add(number)
                self._forget(number)
                shard = None
            if shard is None:
                path = self.folder / self.manifest.shards[number].name
                shard = map_shard(self.manifest, number, path)
                if number in self._changed:
                    check_content(self.manifest, number, path)
                    shard.check()
                    self._changed.discard(number)
                self._mapped[number] = shard
            return shard

    def rows(self, rows: Tensor | np.ndarray) -> QuantizedRows:
        """Gathers rows as codes and scales, for training.

        rows: row numbers, int64 [m] or other integers, in any order, repeats allowed. The result is a copy on the CPU,
        in pinned memory if a GPU is available. Raises IndexError for a row number outside the cache, TypeError for a
        mask or floating point numbers, ValueError unless rows is [m], CacheError for a shard that is missing, damaged,
        or written to while it is read.
        """
        return self._rows(row_numbers(rows))

    def _rows(self, index: Tensor) -> QuantizedRows:
        with self._mapping(index):
            codes, scales = self._table.codes(index, self._pin)
        return QuantizedRows(codes, scales, self.manifest.codec, self.dim)

    def prefetch(self, rows: Tensor | np.ndarray) -> "Future[QuantizedRows]":
        """Starts `self.rows(rows)` in a background thread, to read the next batch while this one is trained on.

        The row numbers are copied before it returns; the caller's tensor may change then. Only the process that called
        this has the result. Raises TypeError and ValueError as `rows`, CacheError when no thread can be started; all
        else is raised by the future.
        """
        index = row_numbers(rows)
        if self._prefetcher is None:
            self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="lift-fast-cache")
        try:
            with self._starting_threads():
                return self._prefetcher.submit(self._rows, index)
        except CacheError:
            self._prefetcher = None
            raise

    def widen(self, rows: Tensor | np.ndarray, dtype: torch.dtype = torch.float32, normalize: bool = False) -> Tensor:
        """Gathers rows and converts them to floating point in one pass; they stay conditioned and rotated.

        rows: row numbers, int64 [m]. dtype: float32, bfloat16 or float16. normalize: whether each row is divided by
        its norm. Returns [m, dim] on the CPU. Raises as `rows`.
        """
        index = row_numbers(rows)
        with self._mapping(index):  # validates the manifest's dim against the shards before anything is allocated
            out = self._table.allocate(len(index), self.dim, dtype, self._pin)
            self._table.widen(index, out, normalize)
        return out

    def vectors(self, rows: Tensor | np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns rows as the encoder's vectors, conditioned if the cache is, [m, dim] of dtype, with the codec's
        rotation undone; for inspection and evaluation. Raises as `rows`."""
        wide = self.widen(rows)
        return (wide if self.rotation is None else self.rotation.undo(wide)).to(dtype)

    def transform(self, x: Tensor) -> Tensor:
        """Takes the encoder's vectors x [..., source dim] into the space of the codes, [..., dim], in which a head that
        was trained on this cache answers: conditions them if the cache is conditioned, and rotates them for codecs with
        a rotation. Raises CacheError as `conditioning`."""
        wide = x if self.conditioning is None else self.conditioning.apply(x)
        return (wide if self.rotation is None else self.rotation.apply(wide)).to(x.dtype)

    @property
    def rotation(self) -> Rotation | None:
        """The rotation of the codes, None for codecs without one."""
        if self._rotation is None and self.manifest.rotation is not None:
            self._rotation = self.manifest.rotated_by()
        return self._rotation

    @property
    def conditioning(self) -> Conditioning | None:
        """The conditioning of the vectors, None without one; read when it is first asked for.

        Raises CacheError when its file is missing or damaged.
        """
        if self._conditioning is None and self.manifest.conditioning is not None:
            self._conditioning = Conditioning.load(self.folder, self.manifest.conditioning, self.dim)
        return self._conditioning

    def find(self, keys: Sequence[str]) -> Tensor:
        """Finds samples by their keys: row numbers int64 [len(keys)], -1 for a key that is not in the cache.

        The first call reads all key hashes (8 bytes per row) and builds a hash table of about 8 bytes per row. If
        several samples have the same key, the first one's row is returned. Raises CacheError for a shard that is
        missing or damaged.
        """
        with self._lock:
            if self._keys is None:
                shards = [self.shard(number) for number in range(len(self.manifest.shards))]
                self._keys = KeyTable([shard.keys for shard in shards]), shards
                self._look_at = 0.0  # the table will read all of them
            table, shards = self._keys
        found = table.find(key_hashes(keys))
        with self._lock:
            self._searched = shards
            if self._must_look():
                self.check_unchanged()
        return found

    def check_unchanged(self) -> None:
        """Looks at the file of each shard that rows or keys were read from since the last look.

        Raises CacheError when one was written to or cut short since it was mapped: what was read meanwhile may be
        wrong. The shard is mapped anew on the next use, after its checksum was compared. `rows` and the other
        methods look by themselves, but not each time; this is for the end of an epoch, or before results are written.
        """
        with self._lock:
            begun = time.monotonic()
            files_lost = lost_files()  # counted first: one that is lost from here on is found by the next look
            changed = files_lost != self._lost
            lost = [number for number, shard in self._mapped.items() if changed and shard.lost]
            self._lost = files_lost
            touched = sorted({*self._table.touched(), *lost} & self._mapped.keys())
            searched, self._searched = self._searched, []
            self._check([*((number, self._mapped[number]) for number in touched), *enumerate(searched)])
            now = time.monotonic()
            self._look_at = now + max(_LOOK_SECONDS, 100 * (now - begun))

    def check_dim(self, dim: int, what: str) -> None:
        """Raises CacheMismatch unless the vectors have length dim. what: names what needs them, for the message."""
        if dim != self.dim:
            raise CacheMismatch(
                f"the vectors of {self.folder} have length {self.dim}, but {what} has {dim}; "
                f"set it to {self.dim}, or embed with another encoder"
            )

    def check_keys(self, data: Keyed) -> None:
        """Compares the key of every row with that of the same sample of `data`.

        Raises CacheMismatch, naming the first difference; CacheError for a shard that is missing or damaged.
        """
        remedy = self._remedy(data)
        if len(data.shard_sizes) != len(self.manifest.shards):
            raise CacheMismatch(
                f"{data.folder} has {len(data.shard_sizes)} shards, "
                f"{self.folder} has {len(self.manifest.shards)}; {remedy}"
            )
        for number, (size, entry) in enumerate(zip(data.shard_sizes, self.manifest.shards, strict=True)):
            hashes = data.shard_hashes(number).numpy()
            common = min(size, entry.rows)
            shard = self.shard(number)
            differ = hashes[:common] != shard.keys.numpy()[:common]
            self._check([(number, shard)])
            if size != entry.rows or differ.any():
                first = int(differ.argmax()) if differ.any() else common
                key = f"key {data.shard_keys(number)[first]!r}" if first < size else "where the data ends"
                raise CacheMismatch(
                    f"{self.folder} was not made from {data.folder}: data shard {number:05d} has {size} "
                    f"samples, cache shard {number:05d} has {entry.rows} rows "
                    f"(first difference at row {first}, {key}); {remedy}"
                )

    def check_data(self, data: Captioned, threads: int | None = None, progress: bool = False) -> Compared:
        """Compares the key and the caption of every row with those of the same sample of `data`.

        The captions of a shard are read only if its files have been written to, or copied, since the cache was made.
        threads: shards read at a time; None: one for each processor, at most 8. progress: whether to show a bar.

        Raises CacheMismatch, naming the first shard that differs; CacheError for a shard that is missing or damaged,
        and when no thread can be started.
        """
        self.check_keys(data)
        known = [number for number, shard in enumerate(self.manifest.shards) if shard.captions]
        changed = [number for number in known if not self._unchanged(number, data)]
        field = self.manifest.field
        pool = ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1))
        try:
            with self._starting_threads():
                digests = pool.map(lambda number: digest_of(data.captions(number, field)), changed)
            shown = bar(digests, f"compare {field}", len(changed), unit="shard", delay=1, disable=not progress)
            for number, digest in zip(changed, shown, strict=True):
                shard = self.manifest.shards[number]
                if digest != shard.captions:
                    raise CacheMismatch(
                        f"the captions {field!r} of data shard {number:05d} ({shard.source}) of {data.folder} are not "
                        f"those that {self.folder} was made from, though the keys are the same; restore them, or "
                        f"{self._remedy(data)}"
                    )
        finally:
            pool.shutdown(cancel_futures=True)
        return Compared(len(known) - len(changed), len(changed), len(self.manifest.shards) - len(known))

    def skipped(self, number: int) -> Tensor:
        """The numbers of the rows of shard `number` without a vector, int64, ascending: those of samples that were left
        out. Raises CacheError as `shard`."""
        if not self.manifest.shards[number].skipped:
            return torch.empty(0, dtype=torch.int64)
        return self.shard(number).skipped

    def verify(self, threads: int | None = None, progress: bool = False) -> None:
        """Reads every shard, several at a time, and compares its checksum with the manifest's; a row that is not finite
        is damage, too.

        threads: shards read at a time; None: one for each processor, at most 8. progress: whether to show a bar.

        Raises CacheError listing every shard that is missing or damaged, and every shard file in the folder that the
        manifest does not list; when the file of the conditioning is missing or damaged; and when no thread can be
        started.
        """
        if self.manifest.conditioning is not None:
            Conditioning.load(self.folder, self.manifest.conditioning, self.dim)
        shards = self.manifest.shards
        listed = {shard.name for shard in shards}
        problems = {
            len(shards) + k: f"{path} is in the folder and not in its manifest: the manifest is another cache's, or "
            "has lost its last entries"
            for k, path in enumerate(sorted(self.folder.glob("text-*.safetensors")))
            if path.name not in listed
        }
        sizes = [content_bytes(self.manifest, shard) for shard in shards]
        with (
            ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool,
            bar(desc="verify", total=sum(sizes), unit="B", unit_scale=True, disable=not progress) as shown,
        ):
            with self._starting_threads():
                numbers = {
                    pool.submit(check_content, self.manifest, number, self.folder / shard.name): number
                    for number, shard in enumerate(shards)
                }
            for done in as_completed(numbers):
                number = numbers[done]
                shown.update(sizes[number])
                try:
                    done.result()
                except CacheError as error:
                    problems[number] = str(error)
        if problems:
            count = f"{len(problems)} of {len(shards)} shards" if len(shards) > 1 else "its shard"
            lines = "".join(f"\n  {problems[number]}" for number in sorted(problems))
            raise CacheError(f"{self.folder}: {count} cannot be trusted:{lines}")

    def _unchanged(self, number: int, data: Captioned) -> bool:
        """Whether the stamp of a data shard is the one that the cache has."""
        stamp = self.manifest.shards[number].stamp
        return bool(stamp) and data.shard_stamp(number) == stamp

    def _remedy(self, data: Keyed) -> str:
        """What to do about a data set that the cache was not made from."""
        read = {"field": self.manifest.field, **self.manifest.read}
        if read["field"] == "txt":
            del read["field"]
        options = "".join(f" --{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in read.items())
        return (
            "re-embed it into another folder with: lift-fast embed "
            f"--data {shlex.quote(str(data.folder))} --out ANOTHER-FOLDER{options}"
        )

    @contextmanager
    def _mapping(self, rows: Tensor) -> Iterator[None]:
        """Keeps the shards of these rows mapped inside a `with` block. Raises IndexError, CacheError."""
        with self._lock:
            for number in self._table.unmapped(rows):
                shard = self.shard(number)
                self._table.map(number, shard.codes, shard.scales)
            yield
            if self._must_look():
                self.check_unchanged()
            while len(self._mapped) > _MAX_MAPS:
                oldest = next(iter(self._mapped))
                self._check([(oldest, self._mapped[oldest])])
                self._forget(oldest)

    def _must_look(self) -> bool:
        """Whether it is time to look at the files, or a file of the process was lost."""
        return self._lost != lost_files() or time.monotonic() >= self._look_at

    def _check(self, shards: Iterable[tuple[int, MappedShard]]) -> None:
        """Raises CacheError when one of these shards has changed, after it has forgotten all that have."""
        errors = []
        for number, shard in shards:
            try:
                shard.check()
            except CacheError as error:
                errors.append(error)
                self._changed.add(number)
                self._forget(number)
        if errors:
            raise errors[0]

    def _forget(self, number: int) -> None:
        """Unmaps a shard, as soon as nobody reads from it."""
        self._table.forget(number)
        self._mapped.pop(number, None)
        if number in self._changed:
            self._keys = None

    @contextmanager
    def _starting_threads(self) -> Iterator[None]:
        """Turns the error of a thread that cannot be started into a CacheError."""
        try:
            yield
        except RuntimeError as error:
            raise CacheError(
                f"reading {self.folder} needs a thread, and none was started ({error}); raise the limit on processes "
                "(ulimit -u), or close other programs"
            ) from error


_open_caches: "weakref.WeakSet[Cache]" = weakref.WeakSet()


def _renew_caches() -> None:
    for cache in _open_caches:
        cache._renew()
        cache._pin = False  # CUDA, which allocates pinned memory, does not work in a forked process


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_renew_caches)  # another thread may have held a lock during the fork


def _why_no_manifest(folder: Path) -> str:
    if not (folder / PARTIAL).exists():
        return f"{folder} is not a text cache: it has no {MANIFEST}; name the folder that lift-fast embed wrote"
    shards = Manifest.load(folder / PARTIAL).shards
    missing = [shard.name for shard in shards if not (folder / shard.name).exists()]
    return (
        f"{folder} is unfinished: {len(missing)} of {len(shards)} shards are missing"
        f"{f', the first is {missing[0]}' if missing else ''}; {AGAIN} to continue"
    )

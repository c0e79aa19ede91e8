"""Reads a cache: the manifest when it is opened, a shard's header on first use, then only the requested rows."""

import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import CacheError, CacheMismatch
from ..ops.rows.quantized import QuantizedRows
from ..ops.rows.table import KeyTable, Table, key_hashes
from .manifest import MANIFEST, PARTIAL, Manifest
from .rotation import Rotation
from .shard import AGAIN, MappedShard, check_content, content_bytes, map_shard

# Linux allows a process 65 530 memory maps (vm.max_map_count); above this number the oldest shards are unmapped.
_MAX_MAPS = 30_000


class Keyed(Protocol):
    """What `Cache.check_keys` needs of a data set; data.samples.Samples implements it."""

    folder: Path
    shard_sizes: list[int]

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order."""

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of those keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]]."""


class Cache:
    """A finished cache, opened for reading. Opening takes the same time for any number of rows.

    len(cache): number of rows. dim: length of a vector. manifest: how it was made, and its shards.

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
        self.manifest = Manifest.read(self.folder / MANIFEST)
        self.dim = self.manifest.dim
        # Row r is in the shard k with starts[k] <= r < starts[k + 1].
        self._starts = np.cumsum([0, *(shard.rows for shard in self.manifest.shards)])
        self._table = Table(self.manifest.codec, self.dim, self._starts)
        self._mapped: dict[int, MappedShard] = {}  # by number, in the order in which they were mapped
        self._pin = torch.cuda.is_available()
        self._lock = threading.RLock()  # held while shards are mapped, unmapped or read
        self._prefetcher: ThreadPoolExecutor | None = None
        self._keys: KeyTable | None = None
        self._rotation: Rotation | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        """Pickles the folder's path: a worker process opens the cache itself."""
        return Cache, (self.folder.absolute(),)

    def shard(self, number: int) -> MappedShard:
        """Returns shard `number`, mapped on first use. Raises CacheError when it is missing or damaged."""
        with self._lock:
            if number not in self._mapped:
                path = self.folder / self.manifest.shards[number].name
                mapped = self._mapped[number] = map_shard(self.manifest, number, path)
                self._table.map(number, mapped.codes, mapped.scales)
            return self._mapped[number]

    def rows(self, rows: Tensor | np.ndarray) -> QuantizedRows:
        """Gathers rows as codes and scales, for training.

        rows: row numbers, int64 [m], in any order, repeats allowed. The result is a copy on the CPU, in pinned memory
        if a GPU is available. Raises IndexError for a row number outside the cache, ValueError unless rows is [m],
        CacheError for a shard that is missing or damaged.
        """
        index = self._index(rows)
        with self._mapping(index):
            codes, scales = self._table.codes(index, self._pin)
        return QuantizedRows(codes, scales, self.manifest.codec, self.dim)

    def prefetch(self, rows: Tensor | np.ndarray) -> "Future[QuantizedRows]":
        """Starts `self.rows(rows)` in a background thread, to read the next batch while this one is trained on."""
        if self._prefetcher is None:
            self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="lift-fast-cache")
        return self._prefetcher.submit(self.rows, rows)

    def widen(self, rows: Tensor | np.ndarray, dtype: torch.dtype = torch.float32, normalize: bool = False) -> Tensor:
        """Gathers rows and converts them to floating point in one pass; rotated codecs stay rotated (see `rotate`).

        rows: row numbers, int64 [m]. dtype: float32, bfloat16 or float16. normalize: whether each row is divided by
        its norm. Returns [m, dim] on the CPU. Raises as `rows`.
        """
        index = self._index(rows)
        with self._mapping(index):  # validates the manifest's dim against the shards before anything is allocated
            out = self._table.allocate(len(index), self.dim, dtype, self._pin)
            self._table.widen(index, out, normalize)
        return out

    def vectors(self, rows: Tensor | np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns rows as the encoder's vectors, [m, dim] of dtype, with the codec's rotation undone; for inspection
        and evaluation. Raises as `rows`."""
        wide = self.widen(rows)
        return (wide if self.rotation is None else self.rotation.undo(wide)).to(dtype)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates the encoder's vectors x [..., dim] into the space of the codes, in which a head that was trained on
        this cache answers. Returns x itself for codecs without a rotation."""
        return x if self.rotation is None else self.rotation.apply(x).to(x.dtype)

    @property
    def rotation(self) -> Rotation | None:
        """The rotation of the codes, None for codecs without one."""
        if self._rotation is None and self.manifest.rotation is not None:
            self._rotation = self.manifest.rotated_by()
        return self._rotation

    def find(self, keys: Sequence[str]) -> Tensor:
        """Finds samples by their keys: row numbers int64 [len(keys)], -1 for a key that is not in the cache.

        The first call reads all key hashes (8 bytes per row) and builds a hash table of about 8 bytes per row. If
        several samples have the same key, the first one's row is returned. Raises CacheError for a shard that is
        missing or damaged.
        """
        with self._lock:
            if self._keys is None:
                shards = [self.shard(number) for number in range(len(self.manifest.shards))]
                self._keys = KeyTable([shard.keys for shard in shards])
        return self._keys.find(key_hashes(keys))

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
        field = "" if self.manifest.field == "txt" else f" --field {shlex.quote(self.manifest.field)}"
        remedy = (
            "re-embed it into another folder with: lift-fast embed "
            f"--data {shlex.quote(str(data.folder))} --out ANOTHER-FOLDER{field}"
        )
        if len(data.shard_sizes) != len(self.manifest.shards):
            raise CacheMismatch(
                f"{data.folder} has {len(data.shard_sizes)} shards, "
                f"{self.folder} has {len(self.manifest.shards)}; {remedy}"
            )
        for number, (size, entry) in enumerate(zip(data.shard_sizes, self.manifest.shards, strict=True)):
            hashes = data.shard_hashes(number).numpy()
            common = min(size, entry.rows)
            differ = hashes[:common] != self.shard(number).keys.numpy()[:common]
            if size != entry.rows or differ.any():
                first = int(differ.argmax()) if differ.any() else common
                key = f"key {data.shard_keys(number)[first]!r}" if first < size else "where the data ends"
                raise CacheMismatch(
                    f"{self.folder} was not made from {data.folder}: data shard {number:05d} has {size} "
                    f"samples, cache shard {number:05d} has {entry.rows} rows "
                    f"(first difference at row {first}, {key}); {remedy}"
                )

    def verify(self, threads: int | None = None, progress: bool = False) -> None:
        """Reads every shard, several at a time, and compares its checksum with the manifest's.

        threads: shards read at a time; None: one for each processor, at most 8. progress: whether to show a bar.

        Raises CacheError listing every shard that is missing or damaged, and every shard file in the folder that the
        manifest does not list.
        """
        shards = self.manifest.shards
        listed = {shard.name for shard in shards}
        problems = {
            len(shards) + k: f"{path} is in the folder and not in its manifest: the manifest is another cache's, or "
            "has lost its last entries"
            for k, path in enumerate(sorted(self.folder.glob("text-*.safetensors")))
            if path.name not in listed
        }
        sizes = [content_bytes(self.manifest, shard.rows) for shard in shards]
        with (
            ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool,
            tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="verify", disable=not progress) as bar,
        ):
            numbers = {
                pool.submit(check_content, self.manifest, number, self.folder / shard.name): number
                for number, shard in enumerate(shards)
            }
            for done in as_completed(numbers):
                number = numbers[done]
                bar.update(sizes[number])
                try:
                    done.result()
                except CacheError as error:
                    problems[number] = str(error)
        if problems:
            count = f"{len(problems)} of {len(shards)} shards" if len(shards) > 1 else "its shard"
            lines = "".join(f"\n  {problems[number]}" for number in sorted(problems))
            raise CacheError(f"{self.folder}: {count} cannot be trusted:{lines}")

    def _index(self, rows: Tensor | np.ndarray) -> Tensor:
        index = torch.as_tensor(rows, dtype=torch.int64, device="cpu").contiguous()
        if index.dim() != 1:
            raise ValueError(f"rows must be [m], not {list(index.shape)}")
        return index

    @contextmanager
    def _mapping(self, rows: Tensor) -> Iterator[None]:
        """Keeps the shards of these rows mapped inside a `with` block. Raises IndexError, CacheError."""
        with self._lock:
            for number in self._table.unmapped(rows):
                self.shard(number)
            yield
            while len(self._mapped) > _MAX_MAPS:
                oldest = next(iter(self._mapped))
                self._table.forget(oldest)
                del self._mapped[oldest]


def _why_no_manifest(folder: Path) -> str:
    if not (folder / PARTIAL).exists():
        return f"{folder} is not a text cache: it has no {MANIFEST}; name the folder that lift-fast embed wrote"
    shards = Manifest.read(folder / PARTIAL).shards
    missing = [shard.name for shard in shards if not (folder / shard.name).exists()]
    return (
        f"{folder} is unfinished: {len(missing)} of {len(shards)} shards are missing"
        f"{f', the first is {missing[0]}' if missing else ''}; {AGAIN} to continue"
    )

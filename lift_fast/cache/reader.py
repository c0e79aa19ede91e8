"""Reads a cache: the manifest on opening, a shard's header on first use, then the rows that are asked for."""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import CacheError, CacheMismatch
from ..quantized import QuantizedRows
from .codec import key_hash
from .manifest import MANIFEST, PARTIAL, Manifest, file_sha256

_TYPES = {"codes": ("I8", torch.int8), "scales": ("F32", torch.float32), "keys": ("I64", torch.int64)}
_LONGEST_HEADER = 1 << 20
_AGAIN = "run the same lift-fast embed again"  # it writes the shards that are missing


class Keyed(Protocol):
    """What check_keys asks of a data set; data.shards.Shards has it."""

    folder: Path
    keys: list[str]
    shard_sizes: list[int]


class Cache:
    """A finished cache, opened for reading; the cost does not depend on its rows.

    rows, dim: its size. manifest: what it is and how it was made.

    Raises CacheError: no such folder, unfinished, damaged, or of another format version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            out = shlex.quote(str(self.folder))
            raise CacheError(f"no text cache at {self.folder}; make it with: lift-fast embed --data DATA --out {out}")
        if not (self.folder / MANIFEST).exists():
            raise CacheError(_why_no_manifest(self.folder))
        self.manifest = Manifest.read(self.folder / MANIFEST)
        if self.manifest.codec != "int8":
            raise CacheError(f"{self.folder} holds codec {self.manifest.codec!r}; this lift-fast reads int8")
        self.rows = self.manifest.rows
        self.dim = self.manifest.dim
        # Row r is in the shard k with starts[k] <= r < starts[k + 1].
        self._starts = np.cumsum([0, *(shard.rows for shard in self.manifest.shards)])
        self._mapped: dict[int, MappedShard] = {}

    def __len__(self) -> int:
        return self.rows

    def shard(self, number: int) -> "MappedShard":
        """Shard `number`, mapped on first use. Raises CacheError when it is missing or damaged."""
        if number not in self._mapped:
            entry = self.manifest.shards[number]
            self._mapped[number] = map_shard(self.folder / entry.name, entry.rows, self.dim)
        return self._mapped[number]

    def take(self, rows: Tensor | np.ndarray) -> QuantizedRows:
        """Rows by number, any order, repeats allowed, as codes and scales in memory.

        rows: int64 [m]. Raises IndexError for a row that is not in the cache.
        """
        index = np.asarray(rows, dtype=np.int64)
        if index.ndim != 1:
            raise ValueError(f"rows must be [m], not {list(index.shape)}")
        outside = (index < 0) | (index >= self.rows)
        if outside.any():
            first = int(outside.argmax())
            raise IndexError(f"rows[{first}] is {index[first]}, outside a cache of {self.rows} rows")
        codes = torch.empty((len(index), self.dim), dtype=torch.int8)
        scales = torch.empty(len(index), dtype=torch.float32)
        owner = np.searchsorted(self._starts, index, side="right") - 1
        by_shard = np.argsort(owner, kind="stable")
        numbers, first_of = np.unique(owner[by_shard], return_index=True)
        groups = np.split(by_shard, first_of)[1:]
        for number, places in zip(numbers.tolist(), groups, strict=True):
            shard = self.shard(number)
            local = torch.from_numpy(index[places] - self._starts[number])
            if len(places) == len(index):
                torch.index_select(shard.codes, 0, local, out=codes)
                torch.index_select(shard.scales, 0, local, out=scales)
            else:
                where = torch.from_numpy(places)
                codes.index_copy_(0, where, shard.codes.index_select(0, local))
                scales.index_copy_(0, where, shard.scales.index_select(0, local))
        return QuantizedRows(codes, scales, self.manifest.codec, self.dim)

    def vectors(self, rows: Tensor | np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        """take(rows), widened to [m, dim]: for people; training hands the codes on."""
        return self.take(rows).widen(dtype)

    def check_dim(self, dim: int, what: str) -> None:
        """Raises CacheMismatch when `what` (the head, say) wants vectors of another length."""
        if dim != self.dim:
            raise CacheMismatch(
                f"{self.folder} holds vectors of {self.dim} and {what} wants {dim}; "
                f"set it to {self.dim} or embed with another encoder"
            )

    def check_keys(self, data: Keyed) -> None:
        """Raises CacheMismatch, with the first difference, unless row i belongs to sample i of `data`."""
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
        start = 0
        for number, (size, entry) in enumerate(zip(data.shard_sizes, self.manifest.shards, strict=True)):
            keys = data.keys[start : start + size]
            hashes = np.fromiter(map(key_hash, keys), dtype=np.int64, count=size)
            common = min(size, entry.rows)
            differ = hashes[:common] != self.shard(number).keys.numpy()[:common]
            if size != entry.rows or differ.any():
                first = int(differ.argmax()) if differ.any() else common
                key = f"key {keys[first]!r}" if first < size else "where the data ends"
                raise CacheMismatch(
                    f"{self.folder} was not made from {data.folder}: data shard {number:05d} has {size} "
                    f"samples, cache shard {number:05d} has {entry.rows} rows "
                    f"(first difference at row {first}, {key}); {remedy}"
                )
            start += size

    def verify(self) -> None:
        """Reads every shard and compares checksums. Raises CacheError naming the first that is damaged."""
        for number, entry in enumerate(self.manifest.shards):
            self.shard(number)
            path = self.folder / entry.name
            if file_sha256(path) != entry.sha256:
                raise CacheError(f"{path} is damaged: its checksum is not the manifest's; remove it and {_AGAIN}")


@dataclass(frozen=True)
class MappedShard:
    """codes int8 [rows, dim], scales float32 [rows], keys int64 [rows]: views of one mapped file."""

    codes: Tensor
    scales: Tensor
    keys: Tensor


def map_shard(path: Path, rows: int, dim: int) -> MappedShard:
    """Maps a shard; reads its header and nothing else.

    Raises CacheError: missing, cut short, or with a header that does not say what the manifest says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError("its header does not fit in it")
            header = json.loads(file.read(length))
        spans = {}
        for name, (code, dtype) in _TYPES.items():
            shape = [rows, dim] if name == "codes" else [rows]
            entry = header[name]
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            if entry["dtype"] != code or entry["shape"] != shape:
                raise ValueError(f"its {name} are {entry['dtype']} {entry['shape']}, not {code} {shape}")
            if begin < 8 + length or end > size or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"its {name} do not fit in it")
            if begin % dtype.itemsize:
                raise ValueError(f"its {name} are not aligned")
            spans[name] = (begin, end, dtype, shape)
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing; {_AGAIN}") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CacheError(f"{path} is damaged: {error}; remove it and {_AGAIN}") from error
    # A private map through torch: no file descriptor stays open, and a write would not reach the file.
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    views = {name: whole[begin:end].view(dtype).view(shape) for name, (begin, end, dtype, shape) in spans.items()}
    return MappedShard(**views)


def _why_no_manifest(folder: Path) -> str:
    if not (folder / PARTIAL).exists():
        return f"{folder} is not a text cache: it has no {MANIFEST}"
    intent = Manifest.read(folder / PARTIAL)
    missing = [shard.name for shard in intent.shards if not (folder / shard.name).exists()]
    return (
        f"{folder} is unfinished: {len(missing)} of {len(intent.shards)} shards are missing"
        f"{f', the first is {missing[0]}' if missing else ''}; {_AGAIN} to continue"
    )

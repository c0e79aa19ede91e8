"""Writes a cache shard by shard; a run that is killed continues at the first missing shard."""

import errno
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..errors import CacheError, CacheMismatch
from ..files import write_whole
from ..quantized import QuantizedRows
from .manifest import MANIFEST, PARTIAL, Manifest, Shard, file_sha256, shard_name
from .reader import map_shard

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the file system or a limit (ulimit -f) allows",
}


class CacheWriter:
    """Opens `folder` for writing, new or half-written by a run that wanted the same.

    encoder: how the text becomes vectors (id, revision, pooling, prompt, max_length). source: the data shards
    in order, [{"name": "00000.tar", "samples": 1000}, …], each with "captions", a digest of its texts, where other
    texts under the same keys shall be told. field: the caption field.

    A finished cache of the same kind is left as it is: nothing is missing, finish() does nothing. One that has lost
    shards since becomes unfinished again.

    Raises CacheMismatch when the folder holds another cache, saying what differs, and CacheError when it
    cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        dim: int,
        codec: str,
        encoder: dict[str, Any],
        source: Sequence[dict[str, Any]],
        field: str,
    ):
        self.folder = Path(folder)
        shards = tuple(
            Shard(shard_name(k), int(s["samples"]), str(s["name"]), captions=str(s.get("captions", "")))
            for k, s in enumerate(source)
        )
        # The encoder as it will be read back: JSON has no tuples and only string keys.
        self._intent = Manifest(dim, codec, field, json.loads(json.dumps(encoder)), shards)
        self._checksums: dict[int, str] = {}
        for name in (MANIFEST, PARTIAL):
            if (self.folder / name).exists():
                self._go_on_from(name)
                break
        else:
            if self.folder.is_dir() and any(self.folder.glob("text-*.safetensors")):
                raise CacheError(f"{self.folder} has shards and no manifest; remove it or name another")
            with self._explained(PARTIAL):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole({self.folder / PARTIAL: self._intent.to_json()})
        self._finished = (self.folder / MANIFEST).exists()
        if self._finished:  # a run may have been killed between its manifest and its tidying
            self._tidy()

    def missing(self) -> list[int]:
        """Numbers of the shards still to write."""
        if self._finished:
            return []
        return [k for k, shard in enumerate(self._intent.shards) if not (self.folder / shard.name).exists()]

    def write_shard(self, number: int, rows: QuantizedRows, keys: Sequence[int]) -> None:
        """Writes shard `number` whole or not at all: rows in the data shard's order, keys: key_hash of each.

        Raises ValueError for rows that are not the ones announced, CacheError when they cannot be written
        (a full disk among others; the shards that are whole stay, and nothing else does).
        """
        shard = self._intent.shards[number]
        if not len(rows) == len(keys) == shard.rows:
            raise ValueError(
                f"{shard.source} has {shard.rows} samples; {len(rows)} rows with {len(keys)} keys came for it"
            )
        if (rows.codec, rows.dim) != (self._intent.codec, self._intent.dim):
            raise ValueError(
                f"this cache holds {self._intent.codec} rows of {self._intent.dim}, not {rows.codec} rows of {rows.dim}"
            )
        tensors = {
            "codes": rows.codes.cpu().contiguous().numpy(),
            "scales": rows.scales.cpu().contiguous().numpy(),
            "keys": np.array(keys, dtype=np.int64),
        }
        data = save(tensors)
        with self._explained(shard.name):
            write_whole({self.folder / shard.name: data})
        self._checksums[number] = hashlib.sha256(data).hexdigest()

    def finish(self) -> None:
        """Writes the manifest, which makes the folder a cache. Raises CacheError while shards are missing."""
        if self._finished:
            return
        missing = self.missing()
        if missing:
            raise CacheError(f"{self.folder} lacks {len(missing)} of {len(self._intent.shards)} shards: {missing[:5]}")
        shards = []
        for number, shard in enumerate(self._intent.shards):
            path = self.folder / shard.name
            if number not in self._checksums:  # written by a run before this one: look at it once
                map_shard(path, shard.rows, self._intent.dim)
                self._checksums[number] = file_sha256(path)
            shards.append(replace(shard, sha256=self._checksums[number]))
        with self._explained(MANIFEST):
            write_whole({self.folder / MANIFEST: replace(self._intent, shards=tuple(shards)).to_json()})
        self._finished = True
        self._tidy()

    def _tidy(self) -> None:
        """Removes what only an unfinished cache needs, and what runs left that were killed in mid-write."""
        for left in [self.folder / PARTIAL, *self.folder.glob("*.part")]:
            left.unlink(missing_ok=True)

    def _go_on_from(self, name: str) -> None:
        """Takes over what the folder's manifest `name` knows. Raises CacheMismatch when it is another cache's."""
        there = Manifest.read(self.folder / name)
        differences = self._intent.differences(there)
        if differences:
            state = "a cache" if name == MANIFEST else "an unfinished cache"
            raise CacheMismatch(
                f"{self.folder} holds {state} of another kind ({'; '.join(differences)}); "
                "remove it or name another folder"
            )
        lost = {k for k, shard in enumerate(there.shards) if not (self.folder / shard.name).exists()}
        # Shards that are here keep their checksums: a new one would hide damage that came since.
        shards = tuple(replace(shard, sha256="") if k in lost else shard for k, shard in enumerate(there.shards))
        self._intent = replace(self._intent, shards=shards)
        self._checksums = {k: shard.sha256 for k, shard in enumerate(shards) if shard.sha256}
        if name == MANIFEST and lost:
            with self._explained(PARTIAL):
                write_whole({self.folder / PARTIAL: self._intent.to_json()})
                (self.folder / MANIFEST).unlink()

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turns an OSError on the way to `name` into one clear CacheError."""
        try:
            yield
        except OSError as error:
            why = _FULL.get(error.errno or 0, str(error.strerror or error))
            total = len(self._intent.shards)
            whole = sum((self.folder / shard.name).exists() for shard in self._intent.shards)
            raise CacheError(
                f"cannot write {self.folder / name}: {why}. {whole} of {total} shards are whole and nothing "
                "half-written is left; make room and run the same command again to continue"
            ) from error

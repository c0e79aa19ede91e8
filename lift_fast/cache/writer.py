"""Writes a cache shard by shard, by one process or by several at once; a run that is killed continues at the first
missing shard.

Processes that share a folder tell each other nothing but through it:

    partial.json    comes before the first shard and goes after manifest.json has come, so that one of them is there
                    whenever a shard is; what is in it follows from the data's sizes and the settings alone
    a shard         is whole when it appears; until then it is a .part file that only its writer knows, so that even a
                    forgotten process at the same shard does no harm
    manifest.json   follows from the shards; whoever finds none missing writes it, and all would write the same bytes
"""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheError, CacheMismatch
from ..files import write_whole
from ..ops.rows.quantized import QuantizedRows
from ..ops.rows.table import key_hashes
from .manifest import MANIFEST, PARTIAL, Manifest, Shard, shard_name
from .rotation import Rotation
from .shard import check_content, content, describe, header, map_shard, tensors

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the file system or a limit (ulimit -f) allows",
}


class CacheWriter:
    """Opens `folder` for writing: new, or half-written by runs that wanted the same. Writes nothing before it is asked
    what is missing.

    encoder: how the text becomes vectors (id, revision, pooling, prompt, max_length). source: the data shards
    in order, [{"name": "00000.tar", "samples": 1000}, …], each with "captions", a digest of its texts, where it is
    known already (`expect` tells it later). field: the caption field. rotation: for the codecs that rotate.

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
        rotation: Rotation | None = None,
    ):
        self.folder = Path(folder)
        shards = tuple(
            Shard(shard_name(k), int(s["samples"]), str(s["name"]), captions=str(s.get("captions", "")))
            for k, s in enumerate(source)
        )
        # The encoder as it will be read back: JSON has no tuples and only string keys.
        told = json.loads(json.dumps(encoder))
        # What is known so far: the captions that were told, the checksums of shards that were looked at or written.
        self._manifest = Manifest(dim, codec, field, told, shards, rotation.as_dict() if rotation else None)
        self._unchecked: set[int] = set()  # shards of earlier runs whose content nobody has read yet
        self._tag = f".{os.getpid()}-{secrets.token_hex(4)}"
        self._parts: list[Path] = []  # of other processes, alive or not
        self._begun = self._finished = False
        self._look()
        there = self._there()
        for number, shard in enumerate(shards):
            if shard.captions and number in there:
                self._check_captions(number, shard.captions)

    def expect(self, number: int, keys: Sequence[str], captions: str) -> None:
        """Tells the sample keys of data shard `number` and a digest of its captions.

        Raises CacheMismatch when its shard is there already and was made from others.
        """
        entry = self._manifest.shards[number]
        if len(keys) != entry.rows:
            raise ValueError(f"{entry.source} has {entry.rows} samples; {len(keys)} keys came for it")
        if not (self.folder / entry.name).exists():
            self._know(number, replace(entry, captions=captions))
            return
        found = self._describe(number)
        with open(self.folder / entry.name, "rb") as file:
            file.seek(len(header(self._manifest, number, found)))  # the keys come first
            theirs = np.fromfile(file, dtype="<i8", count=entry.rows)
        differ = key_hashes(keys).numpy() != theirs
        if differ.any():
            row = int(differ.argmax())
            raise CacheMismatch(
                f"{self.folder / entry.name} was made from other samples than {entry.source} (first difference at row "
                f"{row}, key {keys[row]!r}); name another folder, or remove this one"
            )
        self._check_captions(number, captions)

    def missing(self) -> list[int]:
        """Numbers of the shards still to write. From here on the folder is a cache, an unfinished one if there are
        any."""
        self._begin()
        if self._finished:
            return []
        there = self._there()
        return [number for number in range(len(self._manifest.shards)) if number not in there]

    def write_shard(self, number: int, rows: QuantizedRows, keys: Sequence[int]) -> None:
        """Writes shard `number` whole or not at all: rows in the data shard's order, keys: key_hash of each.

        Raises ValueError for rows that are not the ones announced, CacheError when they cannot be written
        (a full disk among others; the shards that are whole stay, and nothing else does).
        """
        shard = self._manifest.shards[number]
        if not len(rows) == len(keys) == shard.rows:
            raise ValueError(
                f"{shard.source} has {shard.rows} samples; {len(rows)} rows with {len(keys)} keys came for it"
            )
        if (rows.codec, rows.dim) != (self._manifest.codec, self._manifest.dim):
            raise ValueError(
                f"this cache holds {self._manifest.codec} rows of {self._manifest.dim}, "
                f"not {rows.codec} rows of {rows.dim}"
            )
        self._begin()
        data = content(self._manifest, rows, np.array(keys, dtype=np.int64))
        written = replace(shard, sha256=hashlib.sha256(data).hexdigest())
        for part in self._parts:  # half of this shard, by a run that was killed
            if part.name.startswith(shard.name):
                part.unlink(missing_ok=True)
        with self._explained(shard.name):
            write_whole({self.folder / shard.name: header(self._manifest, number, written) + data}, self._tag)
        self._know(number, written)
        self._unchecked.discard(number)

    def written(self, number: int) -> QuantizedRows:
        """The rows of a shard that is there, mapped. Raises CacheError when it is missing or damaged: what an earlier
        run wrote is read whole the first time."""
        self._describe(number)
        path = self.folder / self._manifest.shards[number].name
        if number in self._unchecked:
            check_content(self._manifest, number, path)
            self._unchecked.discard(number)
        mapped = map_shard(self._manifest, number, path)
        return QuantizedRows(mapped.codes, mapped.scales, self._manifest.codec, self._manifest.dim)

    def finish(self) -> None:
        """Writes the manifest, which makes the folder a cache. Raises CacheError while shards are missing."""
        missing = self.missing()
        if self._finished:
            return
        if missing:
            raise CacheError(
                f"{self.folder} lacks {len(missing)} of {len(self._manifest.shards)} shards: {missing[:5]}"
            )
        shards = tuple(map(self._entry, range(len(self._manifest.shards))))
        self._put(MANIFEST, replace(self._manifest, shards=shards))
        self._finished = True
        self._tidy()

    def size_on_disk(self, numbers: Sequence[int] | None = None) -> int:
        """Bytes that the finished cache will have, each shard's captions told; or only the shards `numbers`."""
        chosen = range(len(self._manifest.shards)) if numbers is None else numbers
        filled = [
            replace(shard, sha256="0" * 64, captions=shard.captions or "0" * 32)
            for shard in map(self._manifest.shards.__getitem__, chosen)
        ]
        total = len(replace(self._manifest, shards=tuple(filled)).to_json()) if numbers is None else 0
        for number, shard in zip(chosen, filled, strict=True):
            total += len(header(self._manifest, number, shard))
            for dtype, shape in tensors(self._manifest, shard.rows).values():
                total += int(np.prod(shape)) * dtype.itemsize
        return total

    def _there(self) -> set[int]:
        """Numbers of the shards in the folder: one listing, however many there are."""
        names = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return {number for number, shard in enumerate(self._manifest.shards) if shard.name in names}

    def _know(self, number: int, entry: Shard) -> None:
        shards = list(self._manifest.shards)
        shards[number] = entry
        self._manifest = replace(self._manifest, shards=tuple(shards))

    def _describe(self, number: int) -> Shard:
        """What shard `number`, which is there, says of itself. Raises CacheError, CacheMismatch."""
        found = self._entry(number)
        if found is not self._manifest.shards[number]:
            self._know(number, found)
            self._unchecked.add(number)
        return found

    def _entry(self, number: int) -> Shard:
        entry = self._manifest.shards[number]
        if entry.sha256:
            return entry
        found = describe(self._manifest, number, self.folder / entry.name)
        if found.rows != entry.rows:
            raise CacheMismatch(
                f"{self.folder / entry.name} has {found.rows} rows and {entry.source} has {entry.rows} samples; "
                "name another folder, or remove this one"
            )
        return found

    def _check_captions(self, number: int, told: str) -> None:
        """Raises CacheMismatch when a shard that is there was made from other texts than those that were told."""
        found = self._describe(number)
        if told and found.captions and told != found.captions:
            raise CacheMismatch(
                f"{self.folder} holds a cache of another kind (captions of {found.source}: other texts there than "
                "here); remove it or name another folder"
            )

    def _look(self) -> str:
        """The manifest that the folder has, "" when it is new. Raises CacheMismatch when it is another cache's."""
        # Shards first: one of the manifests is there whenever a shard is. It may change from the one to the other
        # under our eyes.
        shards = self.folder.is_dir() and any(self.folder.glob("text-*.safetensors"))
        for name in (MANIFEST, PARTIAL, MANIFEST):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                there = Manifest.read(path)
            except CacheError:
                if path.exists():
                    raise
                continue
            differences = self._manifest.differences(there)
            if differences:
                state = "a cache" if name == MANIFEST else "an unfinished cache"
                raise CacheMismatch(
                    f"{self.folder} holds {state} of another kind ({'; '.join(differences)}); "
                    "remove it or name another folder"
                )
            return name
        if shards:
            raise CacheError(f"{self.folder} has shards and no manifest; remove it or name another")
        return ""

    def _begin(self) -> None:
        """Makes the folder a cache that may grow, once."""
        if self._begun:
            return
        name = self._look()
        lost = name == MANIFEST and len(self._there()) < len(self._manifest.shards)
        if not name or lost:
            with self._explained(PARTIAL):
                self.folder.mkdir(parents=True, exist_ok=True)
            # Sizes and settings alone: texts may be mended until their shard is written.
            bare = tuple(replace(shard, sha256="", captions="") for shard in self._manifest.shards)
            if self._put(PARTIAL, replace(self._manifest, shards=bare)) and lost:
                (self.folder / MANIFEST).unlink(missing_ok=True)
        elif name == MANIFEST:
            self._finished = True
            self._tidy()  # a run may have been killed between its manifest and its tidying
        self._parts = list(self.folder.glob("*.part"))
        self._begun = True

    def _put(self, name: str, manifest: Manifest) -> bool:
        """Writes one of the manifests; False when another process has finished the cache meanwhile, and tidied up."""
        with self._explained(name):
            try:
                write_whole({self.folder / name: manifest.to_json()}, self._tag)
            except FileNotFoundError:
                if not (self.folder / MANIFEST).exists():
                    raise
                return False
        return True

    def _tidy(self) -> None:
        """Removes what only an unfinished cache needs, and what runs left that were killed in mid-write."""
        for left in [self.folder / PARTIAL, *self.folder.glob("*.part")]:
            left.unlink(missing_ok=True)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Turns an OSError on the way to `name` into one clear CacheError."""
        try:
            yield
        except OSError as error:
            why = _FULL.get(error.errno or 0, str(error.strerror or error))
            total = len(self._manifest.shards)
            raise CacheError(
                f"cannot write {self.folder / name}: {why}. {len(self._there())} of {total} shards are whole and "
                "nothing half-written is left; make room and run the same command again to continue"
            ) from error

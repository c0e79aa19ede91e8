"""Writes a cache shard by shard, in one process or in several; a killed run continues at the first missing shard.

Processes that write the same cache communicate only through its folder:

    conditioning.safetensors
                    of a conditioned cache, is written first of all: both manifests have its checksum
    partial.json    is written before the first shard and removed after manifest.json exists, so that a folder with
                    shards always has one of the two; its content depends only on the settings and the shards' sizes
    a shard         appears complete, by a rename. Until then it is a .part file of its process (files.py), so that two
                    processes that write the same shard do not disturb each other: the one that is there stays
    manifest.json   is written by every process that finds no shard missing; all write the same bytes
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import CacheError, CacheMismatch
from ..files import free_bytes, open_regular, remove_abandoned, write_first, write_whole
from ..ops.rows.quantized import QuantizedRows
from ..ops.rows.table import key_hashes
from .conditioning import CONDITIONING, Conditioning
from .manifest import CONDITIONED_FORMAT, MANIFEST, PARTIAL, Manifest, Shard, shard_name
from .rotation import Rotation
from .shard import check_content, content, content_bytes, describe, header, map_shard

_DISK_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would be larger than the file system or a limit (ulimit -f) allows",
}


class CacheWriter:
    """Writes a new cache, or continues an unfinished one with the same settings. `missing` is the first method that
    writes to the folder.

    dim: length of a vector. codec: a key of ops.rows.codecs.CODECS. encoder: the settings that turn a text into a
    vector, as JSON (name, revision, pooling, prompt, max_length, …). source: the data shards in order,
    [{"name": "00000.tar", "samples": 1000}, …]; an entry may have "captions", digest_of its captions, which `expect`
    can set later, and "stamp" (Shard). field: the caption field. rotation: for the rotated codecs. read: how the data
    set was read (Manifest). conditioning: that of the vectors, which goes into the folder, too.

    For a finished cache with the same settings `missing` returns no shard and `finish` does nothing. A finished cache
    of which shards were removed becomes unfinished again, and one that lost conditioning.safetensors gets it back. A
    cache of an older format keeps its format.

    Raises CacheMismatch, naming the differences, when the folder holds another cache; CacheError when it holds damaged
    files or cannot be written.
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
        read: dict[str, Any] | None = None,
        conditioning: Conditioning | None = None,
    ):
        self.folder = Path(folder)
        shards = tuple(
            Shard(
                shard_name(k),
                int(s["samples"]),
                str(s["name"]),
                captions=str(s.get("captions", "")),
                stamp=str(s.get("stamp", "")),
            )
            for k, s in enumerate(source)
        )
        # The encoder as it is read back: JSON has no tuples and only string keys.
        encoder = json.loads(json.dumps(encoder))
        # Its entries are filled in over time: captions by `expect`, checksums when a shard is written or examined.
        self._manifest = Manifest(
            dim, codec, field, encoder, shards, rotation.as_dict() if rotation else None, read or {}
        )
        self._conditioning = conditioning
        if conditioning is not None:
            if conditioning.dim != dim:
                raise ValueError(f"vectors of dim {dim} do not come from a conditioning that keeps {conditioning.dim}")
            self._manifest = replace(self._manifest, conditioning=conditioning.as_dict(), format=CONDITIONED_FORMAT)
        self._unverified: set[int] = set()  # shards of earlier runs whose checksum has not been compared
        self._started = self._finished = False
        self._check_manifest()
        present = self._present()
        for number, shard in enumerate(shards):
            if shard.captions and number in present:
                self._check_captions(number, shard.captions)

    def expect(self, number: int, keys: Sequence[str], captions: str) -> None:
        """Declares the sample keys of data shard `number`, and digest_of its captions.

        Raises CacheMismatch when the cache shard exists already and was made from other keys or captions, ValueError
        for a wrong number of keys.
        """
        entry = self._manifest.shards[number]
        if len(keys) != entry.rows:
            raise ValueError(f"{entry.source} has {entry.rows} samples, not {len(keys)} keys")
        if not self.is_written(number):
            self._set_entry(number, replace(entry, captions=captions))
            return
        if (row := self._other_key(number, key_hashes(keys).numpy())) is not None:
            raise CacheMismatch(
                f"{self.folder / entry.name} was made from other samples than {entry.source} (first difference at row "
                f"{row}, key {keys[row]!r}); name another folder, or remove this one"
            )
        self._check_captions(number, captions)

    def is_written(self, number: int) -> bool:
        """Whether shard `number` is in the folder by now, whichever process wrote it."""
        return (self.folder / self._manifest.shards[number].name).exists()

    def missing(self) -> list[int]:
        """Returns the numbers of the shards still to be written. The first call gives a new folder its partial.json.

        Raises CacheError when the folder cannot be written, CacheMismatch when it has become another cache's.
        """
        self._start()
        if self._finished:
            return []
        present = self._present()
        return [number for number in range(len(self._manifest.shards)) if number not in present]

    def write_shard(self, number: int, rows: QuantizedRows, keys: Sequence[int], skipped: Sequence[int] = ()) -> bool:
        """Writes shard `number`, whole or not at all; False where another process has written it meanwhile: that one
        stays.

        rows: in the order of the data shard's samples. keys: the samples' key hashes (key_hashes). skipped: the numbers
        of the rows without a vector, ascending; in `rows` they are codes of zeros.

        Raises ValueError when rows or keys do not have the number, codec or dim that the cache was opened with;
        CacheError when the shard cannot be written, such as on a full disk: the complete shards stay, and no part of
        this one does; and for rows without a vector in a cache of an older format, which has no place for them;
        CacheMismatch where the other process wrote it from other keys or captions.
        """
        shard = self._manifest.shards[number]
        if not len(rows) == len(keys) == shard.rows:
            raise ValueError(f"{shard.source} has {shard.rows} samples, not {len(rows)} rows and {len(keys)} keys")
        if (rows.codec, rows.dim) != (self._manifest.codec, self._manifest.dim):
            raise ValueError(
                f"this cache holds {self._manifest.codec} rows of dim {self._manifest.dim}, "
                f"not {rows.codec} rows of dim {rows.dim}"
            )
        self._start()
        if skipped and self._manifest.format < 3:
            raise CacheError(
                f"{self.folder} has format version {self._manifest.format}, in which no sample can be left out "
                f"({shard.source}, row {skipped[0]}); remove it or name another folder"
            )
        hashes = np.array(keys, dtype=np.int64)
        data = content(self._manifest, rows, hashes, skipped)
        written = replace(shard, sha256=hashlib.sha256(data).hexdigest(), skipped=len(skipped))
        with self._writing(shard.name):
            first = write_first(self.folder / shard.name, header(self._manifest, number, written) + data)
        if first:
            self._set_entry(number, written)
            self._unverified.discard(number)
            return True
        self._set_entry(number, replace(shard, sha256=""))  # of a file that is gone, if this run has written one
        if (row := self._other_key(number, hashes)) is not None:
            raise CacheMismatch(
                f"another process has written {self.folder / shard.name} from other samples than {shard.source} (first "
                f"difference at row {row}); name another folder"
            )
        self._check_captions(number, shard.captions)
        return False

    def written(self, number: int, rows: Tensor) -> QuantizedRows:
        """Returns a copy of rows of a shard that is written. rows: their numbers in the shard, int64 [m].

        The checksum of a shard from an earlier run is compared the first time. Raises CacheError when the shard is
        missing or damaged, and when it is written to meanwhile.
        """
        self._examine(number)
        path = self.folder / self._manifest.shards[number].name
        mapped = map_shard(self._manifest, number, path)
        if number in self._unverified:
            check_content(self._manifest, number, path)
            self._unverified.discard(number)
        taken = QuantizedRows(mapped.codes, mapped.scales, self._manifest.codec, self._manifest.dim)[rows]
        mapped.check()
        return taken

    def skipped(self, number: int) -> list[int]:
        """The numbers of the rows without a vector of a shard that is written, ascending. Raises as `written`, but does
        not compare a checksum."""
        if not self._examine(number).skipped:
            return []
        return map_shard(self._manifest, number, self.folder / self._manifest.shards[number].name).skipped.tolist()

    def finish(self) -> None:
        """Writes manifest.json, which makes the folder a finished cache. Raises CacheError while shards are missing."""
        missing = self.missing()
        if self._finished:
            return
        if missing:
            raise CacheError(
                f"{self.folder} lacks {len(missing)} of {len(self._manifest.shards)} shards: {missing[:5]}; write them "
                "before finish"
            )
        shards = tuple(map(self._entry, range(len(self._manifest.shards))))
        self._manifest = replace(self._manifest, shards=shards)
        self._write(MANIFEST, self._manifest.to_json())
        self._finished = True
        self._remove(PARTIAL)

    def check_space(self) -> None:
        """Raises CacheError unless the disk has space for the shards that are missing, the manifest, and the
        conditioning where its file is missing, too.

        Quotas are not known, nor what other processes write; write_shard reports those.
        """
        free = free_bytes(self.folder)  # before the shards are listed: another rank may complete one meanwhile
        missing = sorted(set(range(len(self._manifest.shards))) - self._present())
        rest = 0 if (self.folder / CONDITIONING).exists() else self._conditioning_bytes()
        needed = self.size_on_disk(missing) + len(self._manifest.to_json()) + rest if missing else 0
        if needed > free:
            raise CacheError(
                f"{self.folder} needs {needed} bytes ({needed / 1e9:.3g} GB) for {len(missing)} shards, and its disk "
                f"has {free} bytes ({free / 1e9:.3g} GB) free; free some, or name a folder on another disk"
            )

    def size_on_disk(self, numbers: Sequence[int] | None = None) -> int:
        """Size in bytes of the finished cache, or of the shards `numbers` alone. Assumes that every shard's entry will
        have a digest of its captions, and that no row is left out."""
        chosen = range(len(self._manifest.shards)) if numbers is None else numbers
        filled = [
            replace(shard, sha256="0" * 64, captions=shard.captions or "0" * 32)
            for shard in map(self._manifest.shards.__getitem__, chosen)
        ]
        total = 0
        if numbers is None:
            total = len(replace(self._manifest, shards=tuple(filled)).to_json()) + self._conditioning_bytes()
        for number, shard in zip(chosen, filled, strict=True):
            total += len(header(self._manifest, number, shard)) + content_bytes(self._manifest, shard)
        return total

    def _conditioning_bytes(self) -> int:
        return 0 if self._conditioning is None else len(self._conditioning.to_bytes())

    def _present(self) -> set[int]:
        """Numbers of the shards in the folder, by one listing of it."""
        names = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        return {number for number, shard in enumerate(self._manifest.shards) if shard.name in names}

    def _set_entry(self, number: int, entry: Shard) -> None:
        shards = list(self._manifest.shards)
        shards[number] = entry
        self._manifest = replace(self._manifest, shards=tuple(shards))

    def _examine(self, number: int) -> Shard:
        """Records and returns the entry of a shard that is written. Raises CacheError, CacheMismatch."""
        found = self._entry(number)
        if found is not self._manifest.shards[number]:
            self._set_entry(number, found)
            self._unverified.add(number)
        return found

    def _entry(self, number: int) -> Shard:
        """The entry of a shard that is written, from its file if this run has not written or examined it.

        Raises CacheError, CacheMismatch.
        """
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

    def _other_key(self, number: int, hashes: np.ndarray) -> int | None:
        """The first row of a shard that is written whose key hash is not the one of `hashes`, None without one. Raises
        CacheError, CacheMismatch."""
        found = self._examine(number)
        mapped = map_shard(self._manifest, number, self.folder / found.name)
        differ = hashes != mapped.keys.numpy()
        mapped.check()
        return int(differ.argmax()) if differ.any() else None

    def _check_captions(self, number: int, captions: str) -> None:
        """Raises CacheMismatch when a written shard was made from captions with another digest, if both are known."""
        found = self._examine(number)
        if captions and found.captions and captions != found.captions:
            raise CacheMismatch(
                f"{self.folder} holds a cache of another kind (the captions of {found.source} are different); "
                "remove it or name another folder"
            )

    def _check_manifest(self) -> str:
        """Compares the folder's manifest with the settings, and returns its name, "" for a new folder.

        Raises CacheMismatch when it is another cache's, CacheError when it is damaged, or when there are shards without
        one.
        """
        # The shards are listed first: a folder with shards always has a manifest. Meanwhile another process may
        # replace partial.json by manifest.json, so that MANIFEST is tried again at the end.
        shards = self.folder.is_dir() and any(self.folder.glob("text-*.safetensors"))
        for name in (MANIFEST, PARTIAL, MANIFEST):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                found = Manifest.load(path)
            except CacheError:
                if path.exists():
                    raise
                continue
            # `read` is not known of format 2
            if found.format != self._manifest.format and found.conditioning == self._manifest.conditioning:
                self._manifest = replace(self._manifest, format=found.format, read=found.read)
            differences = self._manifest.differences(found)
            if differences:
                state = "a cache" if name == MANIFEST else "an unfinished cache"
                raise CacheMismatch(
                    f"{self.folder} holds {state} of another kind ({'; '.join(differences)}); "
                    "remove it or name another folder"
                )
            return name
        if shards:
            raise CacheError(f"{self.folder} has shards and no manifest; remove it or name another folder")
        return ""

    def _start(self) -> None:
        """Prepares the folder for writing, the first time that it is called."""
        if self._started:
            return
        name = self._check_manifest()
        shards_lost = name == MANIFEST and len(self._present()) < len(self._manifest.shards)
        with self._writing(PARTIAL):
            self.folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.folder)
        self._write_conditioning()
        if not name or shards_lost:
            # Without the captions' digests and stamps: a caption may be corrected until its shard is written.
            bare = tuple(replace(shard, sha256="", captions="", stamp="") for shard in self._manifest.shards)
            self._write(PARTIAL, replace(self._manifest, shards=bare).to_json())
            if shards_lost and len(self._present()) < len(self._manifest.shards):  # no other process has replaced them
                self._remove(MANIFEST)
        elif name == MANIFEST:
            self._finished = True
            self._remove(PARTIAL)  # a run may have been killed after it wrote the manifest
        self._started = True

    def _write_conditioning(self) -> None:
        """Writes conditioning.safetensors unless it is there: before partial.json, which names its checksum, and again
        for a cache that has lost it."""
        if self._conditioning is None:
            return
        path, data = self.folder / CONDITIONING, self._conditioning.to_bytes()
        with self._writing(CONDITIONING):
            try:
                with open_regular(path) as file:
                    there = os.fstat(file.fileno()).st_size == len(data) and file.readall() == data
            except FileNotFoundError:
                there = False
        if not there:
            self._write(CONDITIONING, data)

    def _write(self, name: str, data: bytes) -> None:
        """Writes a file that all processes write alike."""
        with self._writing(name):
            write_whole({self.folder / name: data})

    def _remove(self, name: str) -> None:
        """Removes a file that need not be there."""
        if (self.folder / name).exists():  # a disk that cannot be written refuses to remove what is not there
            with self._writing(name):
                (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turns an OSError while the file `name` is written into a CacheError that says what to do."""
        try:
            yield
        except OSError as error:
            reason = _DISK_FULL.get(error.errno or 0, str(error.strerror or error))
            total = len(self._manifest.shards)
            raise CacheError(
                f"cannot write {self.folder / name}: {reason}. {len(self._present())} of {total} shards are complete, "
                "and no incomplete file is left; remove the cause and run the same command again to continue"
            ) from error

"""WebDataset tar shards: a folder of `00000.tar, 00001.tar, …`, a sample being the files that share a key.

`KEY.png|jpg|jpeg|webp` is the picture, `KEY.txt` the caption, `KEY.json` the metadata. A shard is indexed
once (names and offsets); samples are then read by offset, so any order costs the same.
"""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from types import TracebackType

from ..errors import DataError

PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_END_MARK = 1024  # bytes: two zero blocks


class ShardWriter:
    """Writes samples into `folder`, all or nothing.

    The shards grow in a sibling folder that is renamed into place on a clean exit; an error leaves nothing.

    Raises DataError when `folder` exists already.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000):
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        if self.folder.exists():
            raise DataError(f"{self.folder} exists already; remove it or name another folder")
        self._partial = self.folder.with_name(f"{self.folder.name}.partial-{os.getpid()}")
        self._tar: tarfile.TarFile | None = None
        self._written = 0

    def __enter__(self) -> "ShardWriter":
        self._partial.mkdir(parents=True)
        return self

    def write(self, key: str, image: bytes, caption: str, meta: dict) -> None:
        """Adds one sample: PNG bytes, its caption, and a JSON-able dict. Keys hold no dot and no slash."""
        if "." in key or "/" in key:
            raise DataError(f"sample key {key!r} holds a dot or a slash; WebDataset splits names there")
        if self._written % self.samples_per_shard == 0:
            self._close_tar()
            name = f"{self._written // self.samples_per_shard:05d}.tar"
            self._tar = tarfile.open(self._partial / name, "w", format=tarfile.USTAR_FORMAT)
        assert self._tar is not None
        for suffix, data in (
            ("png", image),
            ("txt", caption.encode()),
            ("json", json.dumps(meta, sort_keys=True).encode()),
        ):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._written += 1

    def _close_tar(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close_tar()
            if kind is None:
                os.replace(self._partial, self.folder)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)


class Shards:
    """A read-only view of the samples in one folder of tar shards, in order of shard, then position.

    Raises DataError: no such folder, no tar in it, no sample in them, or a tar that is cut short.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"no data set at {self.folder}: it is not a folder of tar shards")
        self.paths = sorted(self.folder.glob("*.tar"))
        if not self.paths:
            raise DataError(f"{self.folder} holds no .tar shard")
        self.keys: list[str] = []
        self.shard_sizes: list[int] = []
        self._members: list[dict[str, tuple[int, int]]] = []  # per sample: suffix -> (offset, size)
        self._shard_of: list[int] = []
        for number, path in enumerate(self.paths):
            samples = _index(path)
            self.shard_sizes.append(len(samples))
            self.keys.extend(samples)
            self._members.extend(samples.values())
            self._shard_of.extend([number] * len(samples))
        if not self.keys:
            raise DataError(f"{self.folder}: {len(self.paths)} tar shards and not one sample in them")

    def __len__(self) -> int:
        return len(self.keys)

    def check_pictures(self) -> None:
        """Raises DataError naming the first sample that has no picture; reads nothing."""
        for i, members in enumerate(self._members):
            if members.keys().isdisjoint(PICTURE_SUFFIXES):
                raise DataError(f"{self.where(i)} has no picture ({', '.join(PICTURE_SUFFIXES)})")

    def image_bytes(self, i: int) -> bytes:
        """The encoded picture of sample i, which has one."""
        return self._read(i, next(suffix for suffix in PICTURE_SUFFIXES if suffix in self._members[i]))

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i: its .txt, or the entry `field` of its .json.

        Raises DataError when it is missing or blank.
        """
        if field == "txt":
            text = self._read(i, "txt").decode(errors="replace") if "txt" in self._members[i] else ""
        else:
            text = str(self.meta(i).get(field, ""))
        text = text.strip()
        if not text:
            raise DataError(f"{self.where(i)} has no caption {field!r}; add one or drop the sample")
        return text

    def meta(self, i: int) -> dict:
        """The parsed .json of sample i, {} when it has none. Raises DataError when it is not a JSON object."""
        if "json" not in self._members[i]:
            return {}
        try:
            meta = json.loads(self._read(i, "json"))
        except ValueError as error:
            raise DataError(f"{self.where(i)}: its .json does not parse ({error})") from error
        if not isinstance(meta, dict):
            raise DataError(f"{self.where(i)}: its .json is not an object")
        return meta

    def where(self, i: int) -> str:
        """Shard and key of sample i, for messages."""
        return f"{self.paths[self._shard_of[i]]}: sample {self.keys[i]!r}"

    def _read(self, i: int, suffix: str) -> bytes:
        offset, size = self._members[i][suffix]
        # Opened for each read: a set has thousands of shards, a process may hold about a thousand files.
        with open(self.paths[self._shard_of[i]], "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise DataError(f"{self.where(i)}: the shard changed or was cut short while it was read")
        return data


def _index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> {suffix: (offset, size)} of one tar, in order. Raises DataError when it is cut short."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with open(path, "rb") as file:
            # tarfile takes a file cut between two members, or inside the last one, for a whole one: the mark
            # that ends an archive (two zero blocks) tells.
            file.seek(max(0, os.path.getsize(path) - _END_MARK))
            mark = file.read()
        if len(mark) < _END_MARK or any(mark) or os.path.getsize(path) % (_END_MARK // 2):
            raise tarfile.ReadError("its end-of-archive mark is missing")
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    key = f"{folder}/{stem}" if folder not in ("", ".") else stem
                    samples.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is not a whole tar ({error}); write or copy it again") from error
    return samples

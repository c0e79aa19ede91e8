"""WebDataset tar shards: a folder of `00000.tar, 00001.tar, …`, a sample being the files that share a key.

`KEY.png|jpg|jpeg|webp|gif|bmp` is the image, `KEY.txt` the caption, `KEY.json` the metadata. The key is the path up
to the first dot of the file's base name; files whose base name begins with a dot, or has no dot, are ignored. Samples
are read at the offsets in the index, so any order costs the same.
"""

import io
import json
import os
import shutil
import tarfile
from itertools import accumulate
from pathlib import Path
from types import TracebackType

from torch import Tensor

from ..errors import DataError
from .index import IMAGE, IMAGE_SUFFIXES, JSON, TXT, Index, open_index
from .reading import FILES, MOST_BYTES
from .samples import BadSample, located

_MOST_TEXT = 1 << 24  # bytes of one .txt or .json


class ShardWriter:
    """Writes samples into `folder`, all or nothing.

    The shards are written in a sibling folder, which takes the name of `folder` on a clean exit; after an error nothing
    is left.

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

    def write(self, key: str, image: bytes, caption: str, meta: dict, suffix: str = "png") -> None:
        """Adds one sample. image: the encoded image, `suffix` its format; meta: JSON-serialisable.

        Raises DataError for a key with a dot or a slash.
        """
        if "." in key or "/" in key:
            raise DataError(f"sample key {key!r} holds a dot or a slash; WebDataset splits names there")
        if self._written % self.samples_per_shard == 0:
            self._close_tar()
            name = f"{self._written // self.samples_per_shard:05d}.tar"
            self._tar = tarfile.open(self._partial / name, "w", format=tarfile.USTAR_FORMAT)
        assert self._tar is not None
        for kind, data in (
            (suffix, image),
            ("txt", caption.encode()),
            ("json", json.dumps(meta, sort_keys=True).encode()),
        ):
            info = tarfile.TarInfo(f"{key}.{kind}")
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
    """The Samples of one folder of tar shards, in order of shard, then position.

    The folder's index (`lift-fast data index` writes it) has their offsets; without an index the tars are scanned.

    Raises DataError for a folder that does not exist or holds no tar, tars without a sample, a tar that is cut short,
    and an index that is damaged or does not match the tars.
    """

    def __init__(self, folder: str | Path, index: Index | None = None):
        self.folder = Path(folder)
        self._index = index or open_index(self.folder)
        self.names = [entry.name for entry in self._index.entries]
        self.paths = [self.folder / name for name in self.names]
        self.shard_sizes = [entry.samples for entry in self._index.entries]
        self._ends = list(accumulate(self.shard_sizes))
        if not len(self):
            raise DataError(f"{self.folder}: {len(self.paths)} tar shards hold no sample")

    def __len__(self) -> int:
        return self._ends[-1]

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""
        number, row = self._locate(i)
        place = self._index.place(number, row, IMAGE)
        if place is None:
            raise BadSample("missing", f"{self.where(i)} has no image ({', '.join(IMAGE_SUFFIXES)})")
        if place[1] > MOST_BYTES:
            raise BadSample("too large", f"{self.where(i)} has {place[1]} bytes; {MOST_BYTES} are read at most")
        try:
            return self._read(number, place)
        except OSError as error:
            raise BadSample("unreadable", f"{self.where(i)}: {error.strerror}") from error

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i: its .txt, or the entry `field` of its .json.

        Raises DataError when it is missing or blank.
        """
        if field == "txt":
            text = (self._text(i, TXT) or b"").decode(errors="replace")
        else:
            value = self.meta(i).get(field)
            text = "" if value is None else str(value)
        text = text.strip()
        if not text:
            raise DataError(f"{self.where(i)} has no caption {field!r}; add one or drop the sample")
        return text

    def meta(self, i: int) -> dict:
        """The parsed .json of sample i, {} when it has none. Raises DataError when it is not a JSON object."""
        data = self._text(i, JSON)
        if data is None:
            return {}
        try:
            meta = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(i)}: its .json does not parse ({error})") from error
        if not isinstance(meta, dict):
            raise DataError(f"{self.where(i)}: its .json is not an object")
        return meta

    def where(self, i: int) -> str:
        """Shard and key of sample i, for messages."""
        number, row = self._locate(i)
        return f"{self.paths[number]}: sample {self._index.key(number, row)!r}"

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order."""
        return self._index.keys(number)

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of these keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]]; the index stores them."""
        return self._index.hashes(number)

    def _locate(self, i: int) -> tuple[int, int]:
        return located(i, self._ends, self.folder)

    def _read(self, number: int, place: tuple[int, int]) -> bytes:
        return FILES.read(self.paths[number], self._index.entries[number].stamp, *place)

    def _text(self, i: int, what: int) -> bytes | None:
        """The .txt or the .json of sample i, as `what` is TXT or JSON; None where there is none. Raises DataError."""
        number, row = self._locate(i)
        place = self._index.place(number, row, what)
        if place is None:
            return None
        if place[1] > _MOST_TEXT:
            raise DataError(f"{self.where(i)}: a text of {place[1]} bytes; {_MOST_TEXT} are read at most")
        try:
            return self._read(number, place)
        except OSError as error:
            raise DataError(f"{self.where(i)}: the shard cannot be read ({error.strerror})") from error

"""WebDataset tar shards: a folder of `00000.tar, 00001.tar, …`, a sample being the files that share a key.

`KEY.png|jpg|jpeg|webp|gif|bmp` is the image, `KEY.txt` the caption, `KEY.json` the metadata; options choose another
suffix for image and caption. The key is the path up to the first dot of the file's base name. Files that look like an
image or a caption and are not used are counted in `problems`. Samples are read at the offsets in the index, so any
order costs the same.
"""

import io
import json
import os
import tarfile
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..files import part_folder, remove_abandoned
from .captions import checked_caption, checked_captions, kept, parsed_meta
from .index import Index, open_index, unread_files
from .options import DataOptions
from .reading import FILES, MOST_BYTES, read_parts
from .samples import BadSample, BadText, Problem, located
from .scan import IMAGE, IMAGE_SUFFIXES, JSON, TXT

_MOST_TEXT = 1 << 24  # bytes of one .txt or .json


class ShardWriter:
    """Writes samples into `folder`, all or nothing.

    The shards are written in a sibling folder (files.part_folder), which takes the name of `folder` on a clean exit;
    after an error nothing is left.

    Raises DataError when `folder` exists already, at the beginning or, since another process has written it, at the
    end.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000):
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        check_new(self.folder)
        self._made = ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._written = 0

    def __enter__(self) -> "ShardWriter":
        self._partial = self._made.enter_context(part_folder(self.folder))
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
        with self._made:
            self._close_tar()
            if kind is None:
                give_name(self._partial, self.folder)


def give_name(part: Path, folder: Path) -> None:
    """Renames a folder. Raises DataError when there is something of that name, such as another process has written."""
    try:
        os.rename(part, folder)
    except OSError as error:
        if os.path.lexists(folder):
            raise exists(folder) from error
        raise


def check_new(folder: Path) -> None:
    """Raises DataError for a folder that is to be written and is there, without the parts of it that killed processes
    have left."""
    if os.path.lexists(folder):
        remove_abandoned(folder.parent, folder.name)
        raise exists(folder)


def exists(folder: Path) -> DataError:
    """The error for a folder that is to be written and is there."""
    return DataError(f"{folder} exists already; remove it or name another folder")


class Shards:
    """The Samples of one folder of tar shards, in order of shard, then position.

    The folder's index (`lift-fast data index` writes it) has their offsets; without an index the tars are scanned.

    With options.skip_bad a damaged tar has the samples before the damage. A sample that lost a file to it is bad.

    Raises DataError for a folder that does not exist or holds no tar, tars without a sample, and an index that is
    damaged, does not match the tars or was written for other suffixes; without options.skip_bad also for a tar that is
    damaged or holds a name that is not UTF-8. Raises ConfigError for suffixes that do not differ.
    """

    def __init__(self, folder: str | Path, index: Index | None = None, options: DataOptions | None = None):
        self.folder, self.options = Path(folder), options or DataOptions()
        self._index = index or open_index(self.folder, self.options)
        self.problems: list[Problem] = self._index.problems() + unread_files(self.folder)
        self.names = [entry.name for entry in self._index.entries]
        self.paths = [self.folder / name for name in self.names]
        self.shard_sizes = [entry.samples for entry in self._index.entries]
        self._ends = list(accumulate(self.shard_sizes))
        if not len(self):
            first = f" ({self.problems[0].where}: {self.problems[0].reason})" if self.problems else ""
            raise DataError(f"{self.folder}: {len(self.paths)} tar shards hold no sample{first}")

    def __len__(self) -> int:
        return self._ends[-1]

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""
        number, row = self._locate(i)
        place = self._index.place(number, row, IMAGE)
        if place is None:
            suffixes = self.options.image_suffix or ", ".join(IMAGE_SUFFIXES)
            raise BadSample("missing", f"{self.where(i)} has no image ({suffixes})")
        if place[1] > MOST_BYTES:
            raise BadSample("too large", f"{self.where(i)} has {place[1]} bytes; {MOST_BYTES} are read at most")
        try:
            return self._read(number, place)
        except OSError as error:
            raise BadSample("unreadable", f"{self.where(i)}: {error.strerror}") from error

    def image_file(self, i: int) -> None:
        """None: the images are parts of the tars."""

    def caption_field(self, field: str = "txt") -> str:
        """`field` itself: "txt" is the caption's own file, any other an entry of the .json."""
        return field

    def text_fields(self) -> list[str]:
        """["txt"]."""
        return ["txt"]

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i: its .txt, or the entry `field` of its .json. Raises BadText."""
        value = self._text(i, TXT) if field == "txt" else self.meta(i).get(field)
        return checked_caption(value, self._label(field), lambda: self.where(i))

    def captions(self, number: int, field: str = "txt") -> list[str | BadText]:
        """All captions of shard `number`, in order, with the errors that caption() raises. Raises DataError when the
        shard cannot be read or has changed."""
        offsets, sizes = self._index.places(number, TXT if field == "txt" else JSON)
        parts = [(at, size) for at, size in zip(offsets, sizes, strict=True) if at >= 0 and size <= _MOST_TEXT]
        try:
            read = iter(read_parts(self.paths[number], self._index.entries[number].stamp, parts))
        except OSError as error:
            raise DataError(f"{self.paths[number]}: the shard cannot be read ({error.strerror})") from error
        first = self._ends[number] - self.shard_sizes[number]

        def where(row: int) -> str:
            return self.where(first + row)

        values: list[Any] = []
        for row, (at, size) in enumerate(zip(offsets, sizes, strict=True)):
            if at < 0:
                values.append(None)
            elif size > _MOST_TEXT:
                values.append(_too_large(size, where(row)))
            elif field == "txt":
                data = next(read)
                # checked_captions is faster for str; what is not ASCII it decodes, and says what is wrong.
                values.append(data.decode("ascii") if data.isascii() else data)
            else:
                try:
                    values.append(parsed_meta(next(read), partial(where, row)).get(field))
                except BadText as error:
                    values.append(kept(error))
        return checked_captions(values, self._label(field), where)

    def meta(self, i: int) -> dict:
        """The parsed .json of sample i, {} when it has none. Raises BadText when it is not a JSON object."""
        return parsed_meta(self._text(i, JSON), lambda: self.where(i))

    def where(self, i: int) -> str:
        """Shard and key of sample i, for messages."""
        number, row = self._locate(i)
        return f"{self.paths[number]}: sample {self._index.key(number, row)!r}"

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order."""
        return self._index.keys(number)

    def bad_keys(self, number: int) -> dict[int, BadText]:
        """{}: files that share a key are one sample, so no key is missing or occurs twice."""
        return {}

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of these keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]]; the index stores them."""
        return self._index.hashes(number)

    def shard_stamp(self, number: int) -> str:
        """Size and time of last change of tar `number`, as the index has them."""
        return "{}-{}".format(*self._index.entries[number].stamp)

    def _locate(self, i: int) -> tuple[int, int]:
        return located(i, self._ends, self.folder)

    def _read(self, number: int, place: tuple[int, int]) -> bytes:
        return FILES.read(self.paths[number], self._index.entries[number].stamp, *place)

    def _text(self, i: int, what: int) -> bytes | None:
        """The .txt or the .json of sample i, as `what` is TXT or JSON; None where there is none. Raises BadText."""
        number, row = self._locate(i)
        place = self._index.place(number, row, what)
        if place is None:
            return None
        if place[1] > _MOST_TEXT:
            raise _too_large(place[1], self.where(i))
        try:
            return self._read(number, place)
        except OSError as error:
            raise BadText("unreadable", f"{self.where(i)}: the shard cannot be read ({error.strerror})") from error

    def _label(self, field: str) -> str:
        """The name of a caption in messages."""
        return self.options.text_suffix or field if field == "txt" else field


def _too_large(size: int, where: str) -> BadText:
    return BadText("too large", f"{where}: a text of {size} bytes; {_MOST_TEXT} are read at most")

"""Scans a tar for its samples, which are the files that share a key: where each lies, and which files are not used.

A sample's image, caption and metadata are known by their suffix, which begins at the first dot of the name. Files that
look like one of these and are not used are counted; nothing that looks like a part of a sample is dropped silently.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DataError
from ..files import open_regular
from ..ops.rows.table import key_hashes
from .options import DataOptions
from .reading import Stamp, stamp_of
from .samples import Cause
from .tars import NotWhole, members

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")  # the first that a sample has is its image
# Suffixes of images in formats that are not read.
OTHER_IMAGES = ("jfif", "jpe", "tif", "tiff", "heic", "heif", "avif", "jxl", "jp2", "svg", "psd", "ico", "tga", "ppm")
IMAGE, TXT, JSON = range(3)
RECORD = struct.Struct("<3q4I")
RECORDS = np.dtype([("offsets", "<i8", 3), ("sizes", "<u4", 3), ("key_end", "<u4")])
_TEXTS = ("txt", "text", "caption", "captions", "json", "cls")
_NAMED = 5  # files that a problem names
_LONGEST = 100  # characters of a name there
_UINT32_MAX = (1 << 32) - 1


@dataclass(frozen=True)
class Entry:
    """A tar in the index. bytes, mtime_ns: of the tar. at, length, crc32: of its segment.

    problems: what of the tar is not read, each with its cause, names or reason, and number of files.
    """

    name: str
    samples: int
    bytes: int
    mtime_ns: int
    at: int
    length: int
    crc32: int
    problems: list[tuple[Cause, str, int]]

    @property
    def stamp(self) -> Stamp:
        return self.bytes, self.mtime_ns

    @property
    def records(self) -> int:
        """Offset of the segment's records."""
        return self.at + 8 * self.samples


def scan(path: Path, options: DataOptions | None = None) -> tuple[Entry, bytes]:
    """Returns the entry and the segment of one tar.

    Raises DataError when it is unreadable; without options.skip_bad also when it is damaged or holds a name that is
    not UTF-8.
    """
    options = options or DataOptions()
    parts = _parts(*suffixes_of(options))
    known = {suffix.encode() for suffix in (*OTHER_IMAGES, *IMAGE_SUFFIXES, *_TEXTS)}
    known.update(suffix.rpartition(b".")[2] for suffix in parts)  # of suffixes with dots the last part
    # key -> three offsets and three lengths, in the order IMAGE, TXT, JSON, and the rank of the image's suffix
    samples: dict[str, list[int]] = {}
    names: dict[int, bytes] = {}  # offset -> name, of the members that samples have
    unused: list[bytes] = []
    links: list[bytes] = []
    labels: list[tuple[str, bytes]] = []
    undecoded: list[bytes] = []
    last: bytes | None = None
    key, sample = "", samples.get("")  # of the name before
    damage = ""
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            for name, offset, size in members(file.fileno(), status.st_size, links):
                named = key_and_suffix(name)
                if named is None:
                    if _looks_used(name, known):
                        unused.append(name)
                    continue
                if named[0] != last:  # most files are of the sample of the one before
                    last = named[0]
                    try:
                        key = last.decode()
                    except UnicodeDecodeError:
                        undecoded.append(name)
                        last = None
                        continue
                    sample = samples.get(key)
                suffix = named[1].lower()
                part = parts.get(suffix)
                if part is None:
                    if suffix == b"cls":
                        labels.append((key, name))
                    elif suffix.rpartition(b".")[2] in known:
                        unused.append(name)
                    continue
                if sample is None:  # README.md makes no sample
                    sample = samples[key] = [-1, -1, -1, 0, 0, 0, len(parts)]
                what, rank = part
                if what == IMAGE:
                    if rank > sample[6]:
                        unused.append(name)
                        continue
                    sample[6] = rank
                if sample[what] >= 0 and names[sample[what]] != name:  # of two equal names the last one counts
                    unused.append(names[sample[what]])
                names[offset] = name
                sample[what], sample[3 + what] = offset, size if size < _UINT32_MAX else _UINT32_MAX
    except NotWhole as error:
        damage = str(error)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
    # tar writes a second link to a file, and every symbolic one, without the data.
    unused += [name + b" (a link)" for name in links if _looks_used(name, known)]
    # A class label next to a caption is no second caption.
    unused += [name for key, name in labels if key not in samples or samples[key][TXT] < 0]
    problems: list[tuple[Cause, str, int]] = []
    if unused:
        problems.append(("unused file", first_names(unused), len(unused)))
    if undecoded:
        problems.append(("not UTF-8", first_names(undecoded), len(undecoded)))
    if damage:
        problems.append(("damaged shard", damage, 1))
    keys = [key.encode() for key in samples]
    numbers = np.array(list(samples.values()), dtype=np.int64).reshape(-1, 7)
    records = np.empty(len(keys), RECORDS)
    records["offsets"], records["sizes"] = numbers[:, :3], numbers[:, 3:6]
    records["key_end"] = np.cumsum([len(key) for key in keys])
    data = key_hashes(list(samples)).numpy().astype("<i8").tobytes() + records.tobytes() + b"".join(keys)
    data += bytes(-len(data) % 8)
    entry = Entry(path.name, len(keys), *stamp_of(status), 0, len(data), zlib.crc32(data), problems)
    if not options.skip_bad:
        refuse(path.parent, entry)
    return entry, data


def key_and_suffix(name: bytes) -> tuple[bytes, bytes] | None:
    """Splits the name of a file in a tar into the sample's key and the suffix, by WebDataset's rule.

    Returns None for names without a key or a suffix, such as README and ._x.jpg: they belong to no sample.
    """
    folder, _, base = name.rpartition(b"/")
    stem, dot, suffix = base.partition(b".")
    if not stem or not dot:
        return None
    return (folder + b"/" + stem if folder not in (b"", b".") else stem), suffix


def _looks_used(name: bytes, known: set[bytes]) -> bool:
    """Whether a file looks like an image or a text. known: the last parts of the suffixes of such files."""
    base = name.rpartition(b"/")[2]
    # macOS adds ._x.jpg to x.jpg: it holds attributes.
    return not base.startswith(b"._") and b"." in base and base.lower().rpartition(b".")[2] in known


def suffixes_of(options: DataOptions) -> tuple[str | None, str]:
    """The suffix of the image, None for the usual ones, and that of the caption. Raises ConfigError."""
    image, text = options.image_suffix, options.text_suffix or "txt"
    image = image and image.lower().lstrip(".")
    text = text.lower().lstrip(".")
    if text in (image, "json") or image == "json":
        raise ConfigError(f"the suffixes of image ({image}), caption ({text}) and metadata (json) must differ")
    return image, text


def _parts(image: str | None, text: str) -> dict[bytes, tuple[int, int]]:
    """Suffix -> IMAGE, TXT or JSON, and a rank: a sample's image is the member with the lowest."""
    images = (image,) if image else IMAGE_SUFFIXES
    parts = {suffix.encode(): (IMAGE, rank) for rank, suffix in enumerate(images)}
    return parts | {text.encode(): (TXT, 0), b"json": (JSON, 0)}


def first_names(names: Sequence[bytes]) -> str:
    """Lists up to five names and says how many more there are."""
    shown = [name.decode(errors="backslashreplace") for name in names[:_NAMED]]
    shown = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in shown]
    return ", ".join(shown) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def in_words(entry: Entry, cause: Cause, what: str) -> str:
    """The reason of a problem: `what` is as an Entry has it."""
    if cause == "unused file":
        return (
            "not used, for a suffix begins at the first dot of a name and a sample has one image and one caption "
            f"(--image-suffix, --text-suffix): {what}"
        )
    if cause == "not UTF-8":
        return f"not read, for their names are not UTF-8: {what}"
    return f"{what}; {f'the {entry.samples} samples before that are read' if entry.samples else 'no sample is read'}"


def refuse(folder: Path, entry: Entry) -> None:
    """Raises DataError when samples of a tar may be lost."""
    for cause, what, _ in entry.problems:
        if cause == "damaged shard":
            rest = f"read the {entry.samples} samples before that" if entry.samples else "leave it out"
            raise DataError(
                f"{folder / entry.name} is not a whole tar ({what}); write or copy it again, or pass --skip-bad to "
                f"{rest}"
            )
        if cause == "not UTF-8":
            raise DataError(
                f"{folder / entry.name}: the name of a file in it is not UTF-8 ({what}); write the tar again with "
                "other names, or pass --skip-bad to leave such files out"
            )

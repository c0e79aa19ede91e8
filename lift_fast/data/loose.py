"""Image files in folders, with captions in text files next to them or with the folders as classes.

    DATA/a/001.jpg, DATA/a/001.txt, DATA/a/001.json    what tars hold, unpacked: image, caption, metadata
    DATA/cat/1.jpg, DATA/dog/2.jpg                     class folders: the caption is the name of the image's folder

A sample's key is its path below DATA, without the suffix. The suffix is what follows the last dot, unlike in tars,
where it follows the first: 22.jpg and 22.05.jpg are two images with the keys 22 and 22.05.
"""

import errno
import hashlib
import os
import re
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import DataError
from ..files import read_regular
from ..ops.rows.table import key_hashes
from .captions import checked_caption, parsed_meta, sorted_out
from .links import Folder
from .options import DataOptions
from .reading import check_limit, read_image
from .samples import BadSample, BadText, Problem, located
from .scan import IMAGE_SUFFIXES, OTHER_IMAGES, suffixes_of

SHARD_ROWS = 10_000
_TEXTS = ("txt", "text", "caption", "captions", "cls")
# Folders with these names are parts of a data set, not classes.
_NO_CLASS = re.compile(r"train(ing)?|val(id(ation)?)?|dev|test(ing)?|images?|data|.*-\d+-of-\d+", re.IGNORECASE)
_OTHER_LAYOUT = re.compile(r"metadata\.(csv|tsv|jsonl|ndjson)|.*\.(parquet|arrow|tar)", re.IGNORECASE)
_LOOKED_AT = 10_000  # entries of folders, to detect the layout
_MOST_TEXT = 1 << 24  # bytes of a caption or of metadata
_NAMED = 3  # unused files that a problem names
_THREADS = 16  # that read captions: on a network file system each takes a millisecond
_IMAGE, _TEXT, _JSON, _OTHER = range(4)
_NO_FILE = (1 << 16) - 1  # in place of the number of a suffix


class _Suffixes:
    """What the suffix of a file says: its part of a sample, and its rank among the files of that part, first 0."""

    def __init__(self, options: DataOptions):
        images = (*IMAGE_SUFFIXES, *OTHER_IMAGES)
        image, text = suffixes_of(options)
        self._usual = dict.fromkeys((*images, *_TEXTS), (_OTHER, 0)) | {"json": (_JSON, 0)}
        self._chosen = {text: (_TEXT, 0)}  # these may hold dots
        if image is None:
            self._usual |= {suffix: (_IMAGE, rank) for rank, suffix in enumerate(images)}
        else:
            self._chosen[image] = _IMAGE, 0

    def split(self, name: str) -> tuple[str, str, int, int] | None:
        """Stem, suffix, part and rank of a file's name; None for a file that is no part of a sample."""
        lower = name.lower()
        for suffix, place in self._chosen.items():
            if lower.endswith(f".{suffix}") and len(name) > len(suffix) + 1:
                return name[: -len(suffix) - 1], name[-len(suffix) :], *place
        stem, _, suffix = name.rpartition(".")
        found = self._usual.get(suffix.lower())
        return (stem, suffix, *found) if stem and found else None


class _Unused:
    """Files that look like parts of a sample and are in none: how many, and the first names, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, reason: str, name: str) -> None:
        number, names = self._found.get(reason, (0, []))
        self._found[reason] = number + 1, [*names, name] if number < _NAMED else names

    def drop(self, reason: str) -> None:
        self._found.pop(reason, None)

    def problems(self, folder: Path) -> list[Problem]:
        problems = []
        for reason, (number, names) in self._found.items():
            shown = ", ".join(names) + (f" and {number - len(names)} more" if number > len(names) else "")
            problems.append(Problem(str(folder), "unused file", f"{reason}: {shown}", number))
        return problems


class _Listing:
    """The keys of samples and which files they have.

    keys: all keys in UTF-8, one after the other; ends: their ends. files: for image, caption and .json, the number of
    the file's suffix, or _NO_FILE. suffixes: suffix, as it is written -> its number.
    """

    def __init__(self) -> None:
        self.keys = bytearray()
        self.ends = array("q")
        self.files = tuple(array("H") for _ in range(3))
        self.suffixes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.ends)

    def add(self, key: str, suffixes: Sequence[str | None]) -> None:
        """Adds a sample. suffixes: of its image, caption and .json; None where it has no such file."""
        self.keys += os.fsencode(key)
        self.ends.append(len(self.keys))
        for files, suffix in zip(self.files, suffixes, strict=True):
            files.append(_NO_FILE if suffix is None else self.suffixes.setdefault(suffix, len(self.suffixes)))

    def key(self, i: int) -> str:
        return os.fsdecode(bytes(self.keys[self.ends[i - 1] if i else 0 : self.ends[i]]))

    def has(self, part: int) -> np.ndarray:
        """bool [samples]: which have this part."""
        return np.array(self.files[part], np.uint16) != _NO_FILE


_SECOND = "a second image or caption of a sample"
_LOST_JSON = "metadata without an image or a caption"
_OTHER_SUFFIX = "other suffixes than those that are read (--image-suffix, --text-suffix)"
_ALONE = "captions without an image"
_NO_IMAGE = "captions, where the folders are the classes"
_NO_FOLDER = "images that do not lie in a class folder"
_TOO_DEEP = "images in a folder within a class folder"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a folder, or a link to one; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def holds_images(folder: str | Path, options: DataOptions | None = None) -> bool:
    """Whether image files lie in a folder or below it, judged from the first 10 000 entries that are met."""
    suffixes, root = _Suffixes(options or DataOptions()), Folder(folder, options)
    folders, left = deque([str(folder)]), _LOOKED_AT
    while folders and left > 0:
        try:
            with os.scandir(folders.popleft()) as entries:
                for entry in entries:
                    left -= 1
                    if not entry.name.startswith("."):
                        if is_folder(entry):
                            if not (entry.is_symlink() and root.leads_out(entry.path)):
                                folders.append(entry.path)
                        elif (found := suffixes.split(entry.name)) and found[2] == _IMAGE:
                            return True
                    if left <= 0:
                        break
        except OSError:  # LooseFiles names the folder
            continue
    return False


class LooseFiles:
    """The Samples of a folder of image files, searched with all folders below it; 10 000 samples are a shard.

    Where images have a caption or a .json next to them, a sample is the files whose names differ in the suffix alone;
    one without image or caption is bad. Where no image has either, the images in the folders directly below this one
    are the samples: the caption "txt" is the name of the folder, the metadata {"label": name}. Names that begin with a
    dot are ignored.

    images_only: captions may be missing. Where no image has a caption or a .json, every image is a sample without
    either, wherever it lies.

    An image, text or folder that is a link out of this folder is not read, unless options.follow_links.

    A folder's own samples come before those of the folders in it, both in the order of their names. The key and 14
    bytes stay in memory for each sample.

    Raises DataError for a folder without images, for images that have neither captions nor class folders, unless
    images_only, and, without options.skip_bad, for a folder that cannot be listed.
    """

    def __init__(self, folder: str | Path, options: DataOptions | None = None, images_only: bool = False):
        self.folder = Path(folder)
        self._options = options or DataOptions()
        self._root = Folder(folder, options)
        self.problems: list[Problem] = []
        unused = _Unused()
        found, other = self._list(unused)
        images, jsons = found.has(_IMAGE), found.has(_JSON)
        if not images.any():
            raise DataError(f"{self.folder} holds no image file; name the folder that holds the images")
        alone = not (images & (found.has(_TEXT) | jsons)).any()
        self.classes = alone and not images_only
        self._with_json = not self.classes and bool(jsons.any())
        if self.classes:
            found = self._in_classes(found, other, unused)
        elif alone:
            found = _with_images(found, unused)
        if not self._with_json:
            unused.drop(_LOST_JSON)  # it describes something else
        self._found, self._suffixes = found, list(found.suffixes)
        rows, total = self._options.shard_rows or SHARD_ROWS, len(found)
        self.shard_sizes = [min(rows, total - start) for start in range(0, total, rows)]
        self._shard_ends = list(accumulate(self.shard_sizes))
        self.names = [f"{self.folder.name}#{number:05d}" for number in range(len(self.shard_sizes))]
        self.problems += unused.problems(self.folder)

    def __len__(self) -> int:
        return self._shard_ends[-1]

    def image_bytes(self, i: int) -> bytes:
        """The encoded image of sample i. Raises BadSample: "missing", "unreadable", "too large"."""
        return read_image(self.image_file(i))

    def image_file(self, i: int) -> Path:
        """The image of sample i. Raises BadSample: "missing"."""
        path = self._path(i, _IMAGE)
        if path is None:
            raise BadSample("missing", f"{self.where(i)} has no image ({self._image_names()})")
        self._root.check(path)
        return path

    def caption_field(self, field: str = "txt") -> str:
        """The field itself. Raises DataError for another than "txt" where no sample has a .json."""
        if field != "txt" and not self._with_json and not (self.classes and field == "label"):
            raise DataError(f"{self.folder} has no column {field!r}; choose the caption field among: txt")
        return field

    def text_fields(self) -> list[str]:
        """["txt"], but for class folders, whose `meta` has the same text."""
        return [] if self.classes else ["txt"]

    def caption(self, i: int, field: str = "txt") -> str:
        """The caption of sample i: its text file, or the entry `field` of its .json; of class folders the name of the
        folder. Raises BadText."""
        located(i, self._shard_ends, self.folder)
        self.caption_field(field)
        if self.classes:
            return checked_caption(self._found.key(i).partition("/")[0], field, lambda: self.where(i))
        if field != "txt":
            return checked_caption(self.meta(i).get(field), field, lambda: self.where(i))
        return checked_caption(self._text(i, _TEXT), field, lambda: self.where(i))

    def captions(self, number: int, field: str = "txt") -> list[str | BadText]:
        """All captions of shard `number`, in order, with the errors that caption() raises."""
        self.caption_field(field)

        def read(i: int) -> str | BadText:
            try:
                return self.caption(i, field)
            except BadText as error:
                return error

        rows = self._rows(number)
        if self.classes:
            return [read(i) for i in rows]
        part = -(-len(rows) // _THREADS)
        parts = [rows[at : at + part] for at in range(0, len(rows), part)]
        with ThreadPoolExecutor(_THREADS) as pool:
            return [caption for read_part in pool.map(lambda part: [*map(read, part)], parts) for caption in read_part]

    def meta(self, i: int) -> dict:
        """The parsed .json of sample i, {} where it has none; of class folders {"label": name}. Raises BadText."""
        located(i, self._shard_ends, self.folder)
        if self.classes:
            return {"label": self._found.key(i).partition("/")[0]}
        return parsed_meta(self._text(i, _JSON), lambda: self.where(i))

    def file_next_to(self, i: int, suffix: str) -> Path:
        """The file of another suffix next to the image of sample i, which need not exist. Raises BadSample."""
        path = self._root.path / f"{self._found.key(i)}.{suffix}"
        self._root.check(path)
        return path

    def where(self, i: int) -> str:
        """Folder and key of sample i, for messages."""
        return f"{self.folder}: sample {self._found.key(i)!r}"

    def shard_keys(self, number: int) -> list[str]:
        """The sample keys of shard `number`, in order. Raises BadText for one that is not UTF-8; with skip_bad it is
        "", and bad_keys has it."""
        keys, bad = self._checked_keys(number)
        if not self._options.skip_bad:
            for error in bad.values():
                raise error
        return keys

    def bad_keys(self, number: int) -> dict[int, BadText]:
        """Row in shard `number` -> what is wrong with its key: "no key" for a name that is not UTF-8."""
        return self._checked_keys(number)[1]

    def shard_hashes(self, number: int) -> Tensor:
        """The hashes of these keys (ops.rows.table.key_hashes), int64 [shard_sizes[number]]."""
        return key_hashes(self.shard_keys(number))

    def shard_stamp(self, number: int) -> str:
        """The digest of the sizes and times of all captions and .json files of a shard; the same for all class folders,
        whose captions are parts of the keys."""
        if self.classes:
            return "class folders"
        digest = hashlib.blake2b(digest_size=16)
        for i in self._rows(number):
            for part in (_TEXT, _JSON):
                path = self._path(i, part)
                try:
                    status = None if path is None else os.stat(path)
                except OSError:
                    status = None
                digest.update(b"-" if status is None else b"%d %d," % (status.st_size, status.st_mtime_ns))
        return digest.hexdigest()

    def _rows(self, number: int) -> range:
        return range(self._shard_ends[number] - self.shard_sizes[number], self._shard_ends[number])

    def _checked_keys(self, number: int) -> tuple[list[str], dict[int, BadText]]:
        rows = self._rows(number)
        return sorted_out([self._found.key(i) for i in rows], lambda row: self.where(rows[row]))

    def _path(self, i: int, part: int) -> Path | None:
        """The file of sample i that is its image, caption or .json; None where it has none."""
        located(i, self._shard_ends, self.folder)
        number = self._found.files[part][i]
        return None if number == _NO_FILE else self.folder / f"{self._found.key(i)}.{self._suffixes[number]}"

    def _text(self, i: int, part: int) -> bytes | None:
        """The caption or .json of sample i; None where it has none. Raises BadText."""
        path = self._path(i, part)
        try:
            if path is not None:
                self._root.check(path)
            return None if path is None else read_regular(path, _MOST_TEXT)
        except BadSample as error:
            raise BadText(error.cause, error.reason) from error
        except FileNotFoundError as error:
            raise BadText("unreadable", f"there is no file {path}") from error
        except (OSError, ValueError) as error:
            if isinstance(error, OSError):
                check_limit(error)
                if error.errno == errno.EFBIG:
                    raise BadText("too large", f"{path}: {error.strerror}") from error
            raise BadText("unreadable", f"{path}: {getattr(error, 'strerror', None) or error}") from error

    def _image_names(self) -> str:
        return self._options.image_suffix or ", ".join(IMAGE_SUFFIXES)

    def _list(self, unused: _Unused) -> tuple[_Listing, str]:
        """Lists the folder and all below it. Returns the samples, and a file of another layout, "" when there is none.

        Raises DataError for a folder that cannot be listed, unless bad ones are skipped.
        """
        found, other = _Listing(), ""
        suffixes = _Suffixes(self._options)
        # Links to folders are followed, except to one that is being listed.
        waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
        while waiting:
            folder, above = waiting.pop()
            try:
                if folder and self._root.leads_out(self._root.path / folder):
                    raise OSError(0, f"it is a link that leads out of {self.folder}; --follow-links follows it")
                status = os.stat(self.folder / folder)
                if (identity := (status.st_dev, status.st_ino)) in above:
                    continue
                with os.scandir(self.folder / folder) as entries:
                    named = sorted((e.name, is_folder(e)) for e in entries if not e.name.startswith("."))
            except OSError as error:
                where = str(self.folder / folder)
                if not self._options.skip_bad or not folder:
                    remedy = "; --skip-bad leaves it out" if folder else ""
                    raise DataError(f"{where} cannot be read ({error.strerror}){remedy}") from error
                self.problems.append(Problem(where, "unreadable", f"it cannot be listed ({error.strerror})"))
                continue
            files = [name for name, with_more in named if not with_more]
            other = other or next((folder + name for name in files if _OTHER_LAYOUT.fullmatch(name)), "")
            _add_samples(found, folder, files, suffixes, unused)
            below = [f"{folder}{name}/" for name, with_more in named if with_more]
            waiting += [(name, above | {identity}) for name in reversed(below)]
        return found, other

    def _in_classes(self, found: _Listing, other: str, unused: _Unused) -> _Listing:
        """The samples of class folders. Raises DataError where the folders cannot be classes."""
        kept, suffixes = _Listing(), list(found.suffixes)
        names: dict[str, None] = {}
        for i in range(len(found)):
            key = found.key(i)
            image, text = found.files[_IMAGE][i], found.files[_TEXT][i]
            if image == _NO_FILE:
                unused.add(_NO_IMAGE, f"{key}.{suffixes[text]}")
            elif (depth := key.count("/")) != 1:
                unused.add(_TOO_DEEP if depth else _NO_FOLDER, f"{key}.{suffixes[image]}")
            else:
                names.setdefault(key.partition("/")[0])
                kept.add(key, (suffixes[image], None, None))
        advice = (
            "put the caption of a.jpg into a.txt next to it (or name another ending with --text-suffix), name the "
            "images in a metadata.csv, or name a folder of class folders"
        )
        if len(names) < 2:
            raise DataError(f"{self.folder} holds images and no captions; {advice}")
        if all(map(_NO_CLASS.fullmatch, names)):
            shown = " and ".join(list(names)[:2])
            raise DataError(f"{self.folder} holds images and no captions, and {shown} name no classes; {advice}")
        if other:
            raise DataError(f"{self.folder} holds images and {other}, which is of another layout; name its folder")
        return kept


def _with_images(found: _Listing, unused: _Unused) -> _Listing:
    """The samples that have an image."""
    kept, suffixes = _Listing(), list(found.suffixes)
    for i in range(len(found)):
        image, text = found.files[_IMAGE][i], found.files[_TEXT][i]
        if image == _NO_FILE:
            unused.add(_ALONE, f"{found.key(i)}.{suffixes[text]}")
        else:
            kept.add(found.key(i), (suffixes[image], None, None))
    return kept


def _add_samples(found: _Listing, folder: str, names: list[str], suffixes: _Suffixes, unused: _Unused) -> None:
    """Adds the samples of one folder, whose files have these names."""
    stems: dict[str, list[tuple[int, str] | None]] = {}  # stem -> rank and suffix of image, caption and .json
    others = []
    for name in names:
        if (split := suffixes.split(name)) is None:
            continue
        stem, suffix, part, rank = split
        if part == _OTHER:
            others.append((stem, suffix))
            continue
        parts = stems.setdefault(stem, [None, None, None])
        before = parts[part]
        if before is None or rank < before[0]:
            parts[part] = rank, suffix
        else:
            before = rank, suffix
        if before is not None:
            unused.add(_SECOND, f"{folder}{stem}.{before[1]}")
    for stem in sorted(stems):
        image, text, meta = stems[stem]
        if image is None and text is None:
            unused.add(_LOST_JSON, f"{folder}{stem}.json")
        else:
            found.add(folder + stem, [part and part[1] for part in (image, text, meta)])
    for stem, suffix in others:
        # A class label next to a caption is no second caption.
        if suffix.lower() != "cls" or stems.get(stem, [None, None])[_TEXT] is None:
            unused.add(_OTHER_SUFFIX, f"{folder}{stem}.{suffix}")

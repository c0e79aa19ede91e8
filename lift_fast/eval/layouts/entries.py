"""Files that list images and texts: read whole, and each entry that cannot be used named or left out."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...data.captions import checked_caption, halved, kept
from ...data.reading import read_image
from ...data.samples import BadSample, BadText, Cause, Problem
from ...errors import DataError
from ...files import open_regular
from ...foreign import parse_json

_NAMED = 3  # entries that a problem names
_LONGEST = 60  # characters of a value in a message


class Entries:
    """The entries of one file. Without skip_bad the first that cannot be used is an error; with it they are left out
    and counted by cause. path: the file, for messages."""

    def __init__(self, path: Path, skip_bad: bool):
        self.path = path
        self._skip_bad = skip_bad
        self._bad: dict[Cause, list[str]] = {}

    @contextmanager
    def sorted_out(self) -> Iterator[None]:
        """Around the use of one entry: lets the BadText of one that cannot be used pass, or counts it."""
        try:
            yield
        except BadText as error:
            if not self._skip_bad:
                raise
            self._bad.setdefault(error.cause, []).append(kept(error).reason)

    def json(self) -> Any:
        """The content of a JSON file. Raises DataError when it does not parse; BadText, by sorted_out, for a key that
        occurs twice, of which the first counts."""

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                found = {}
                for key, value in pairs:
                    with self.sorted_out():
                        if key in found:
                            raise BadText("repeated key", f"{self.path}: the key {shown(key)} occurs twice")
                        found[key] = value
            return found

        try:
            return parse_json(self.bytes(), unique)
        except ValueError as error:
            raise DataError(f"{self.path} is no whole JSON file ({error}); write or download it again") from error

    def lines(self) -> list[str]:
        """The lines of a text file. Raises DataError when it is not UTF-8."""
        try:
            # Not splitlines, which also ends lines at characters that captions may hold.
            return [line.removesuffix("\r") for line in self.bytes().decode("utf-8-sig").split("\n")]
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path} is not UTF-8 (byte {error.start}); convert it to UTF-8") from error

    def bytes(self) -> bytes:
        """The content of the file. Raises DataError when it cannot be read."""
        try:
            return read_image(self.path)
        except BadSample as error:
            raise DataError(error.reason) from error

    def where(self, key: Any) -> str:
        """Names an entry, for messages."""
        return f"{self.path}: entry {shown(key)}"

    def problems(self) -> list[Problem]:
        """The entries that were left out, by cause."""
        found = []
        for cause, reasons in self._bad.items():
            more = f" and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
            found.append(Problem(str(self.path), cause, "; ".join(reasons[:_NAMED]) + more, len(reasons)))
        return found

    def nothing(self, what: str) -> DataError:
        """The error for a file of which nothing can be used."""
        causes = ", ".join(f"{len(reasons)} {cause}" for cause, reasons in self._bad.items()) or "it is empty"
        return DataError(f"{self.path} holds no {what} that can be used ({causes})")


def first_line(path: Path, most: int) -> str:
    """The first line of a text file, cut at `most` bytes. Raises DataError when it cannot be read."""
    try:
        with open_regular(path) as file:
            line = (file.read(most) or b"").partition(b"\n")[0]
            return line.decode("utf-8-sig", errors="replace").rstrip("\r")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted. Raises DataError when it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror})") from error


def object_of(value: Any, where: str) -> dict[str, Any]:
    """The value, which must be a JSON object. Raises BadText."""
    if not isinstance(value, dict):
        raise BadText("does not parse", f"{where} is {shown(value)}, not an object")
    return value


def list_of(value: Any, where: str) -> list[Any]:
    """The value, which must be a list. Raises BadText."""
    if not isinstance(value, list):
        raise BadText("does not parse", f"{where} is {shown(value)}, not a list")
    return value


def text_of(entry: dict[str, Any], field: str, where: str) -> str:
    """A caption in an entry. Raises BadText."""
    return checked_caption(entry.get(field), field, lambda: where)


def name_of(entry: dict[str, Any], field: str, where: str) -> str:
    """The name of an image in an entry. Raises BadText."""
    name = entry.get(field)
    if not isinstance(name, str) or not name or halved(name):
        raise BadText("no key", f"{where} names no image: its {field!r} is {shown(name)}")
    return name


def identity_of(entry: dict[str, Any], field: str, where: str) -> int | str:
    """A number or text that identifies an entry. Raises BadText."""
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadText("no key", f"{where} has no {field!r}, a number or a text")
    return value


def shown(value: Any) -> str:
    """A value for a message: short, however deep or long it is."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a long number"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

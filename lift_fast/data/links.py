"""Names and links that lead out of a folder: what they lead to is none of the data set's, and is not read unasked."""

import os
from pathlib import Path

from .options import DataOptions
from .samples import BadSample

_SNAPSHOTS, _BLOBS = "snapshots", "blobs"


class Folder:
    """A folder of which files are read by name.

    path: absolute; it may be a link itself. options: absolute_paths allows names that are absolute or lead out of it,
    follow_links links that do so. within: a folder around it, which links must not leave; None for the folder itself.
    In a cache of the Hugging Face Hub, whose folders snapshots/REVISION hold links to files in blobs, these belong to
    it.
    """

    def __init__(self, path: str | Path, options: DataOptions | None = None, within: Path | None = None):
        options = options or DataOptions()
        self.path = Path(os.path.abspath(path))
        self._any_name, self._any_link = options.absolute_paths, options.absolute_paths or options.follow_links
        real = os.path.realpath(within or self.path)
        self._within = [real]
        for at in (Path(real), *Path(real).parents):
            if at.name == _SNAPSHOTS:
                self._within.append(str(at.parent / _BLOBS))
                break
        self._folders: dict[str, bool] = {}  # path of a folder below -> whether it lies within

    def file(self, name: str) -> Path:
        """The path of a file. Raises BadSample ("unreadable") for a name or a link that leads out."""
        path = self.named(name)
        self.check(path)
        return path

    def named(self, name: str) -> Path:
        """The path of a file, which may be a link. Raises BadSample ("unreadable") for a name that leads out."""
        path = os.path.normpath(os.path.join(self.path, name))
        if "\0" in name:
            raise BadSample("unreadable", f"{name!r} is no name of a file")
        if not self._any_name and not path.startswith(os.path.join(self.path, "")):
            raise BadSample(
                "unreadable", f"{name!r} leads out of {self.path}; --absolute-paths allows such names in tables"
            )
        return Path(path)

    def check(self, path: Path) -> None:
        """Raises BadSample ("unreadable") for a path below the folder that leads out of it by a link."""
        if self.leads_out(path):
            raise BadSample(
                "unreadable", f"{path} is a link that leads out of {self.path}; --follow-links allows such links"
            )

    def leads_out(self, path: str | Path) -> bool:
        """Whether a path below the folder leads out of it, by a link, and links must not."""
        if self._any_link:
            return False
        try:
            folder = os.path.dirname(path)
            if (within := self._folders.get(folder)) is None:
                within = self._folders[folder] = self._lies_within(folder)
            return not within or (os.path.islink(path) and not self._lies_within(path))
        except ValueError:  # a name that no file can have
            return False

    def _lies_within(self, path: str | Path) -> bool:
        real = os.path.join(os.path.realpath(path), "")
        return any(real.startswith(os.path.join(folder, "")) for folder in self._within)

"""Atomic writing of files: each appears whole or not at all. And how much a disk has free."""

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path


def write_whole(files: Mapping[Path, bytes], tag: str = "") -> None:
    """Writes files of one folder: each to a temporary file in that folder, flushed to disk, then renamed, in order.

    files: path -> content. tag: a suffix for the temporary names, so that processes that write the same file at the
    same time do not share a temporary file.

    Raises OSError after removing the temporary files. No file is replaced unless all were written completely.
    """
    parts = {path: path.with_name(f"{path.name}{tag}.part") for path in files}
    try:
        for path, data in files.items():
            _write(parts[path], data)
        for path, part in parts.items():
            os.replace(part, path)
    except BaseException:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        flush_names(folder)


def write_first(path: Path, data: bytes, tag: str) -> None:
    """Writes a file unless there is one: when several processes write it, the first one's stays.

    tag: as for write_whole. A hard link makes the file appear. On a file system without them the file is looked for
    and then renamed to, so that of two processes that do so at once the second one's stays.

    Raises OSError after removing the temporary file.
    """
    part = path.with_name(f"{path.name}{tag}.part")
    try:
        _write(part, data)
        try:
            os.link(part, path)
        except FileExistsError:
            pass
        except OSError:
            if not path.exists():
                os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    flush_names(path.parent)


def free_bytes(path: Path) -> int:
    """Bytes free, for this user, on the disk that a file or folder at `path` would be written to."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return disk.free if disk.total else sys.maxsize  # some file systems do not say


def _write(path: Path, data: bytes) -> None:
    """Writes a file and waits until its content is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

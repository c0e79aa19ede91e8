"""Files of users, opened for reading, and files written whole: each appears complete under its name or not at all.

A file or folder that is being written has the name NAME.TAG.part, where TAG is 16 random hexadecimal digits: process
numbers repeat between containers on one disk. Its writer holds a lock on it (flock), which ends with the process,
however that ends. So `remove_abandoned` knows what killed processes have left, and takes nothing from those that run.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PART = re.compile(r".+\.[0-9a-f]{16}\.part", re.DOTALL)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading, unbuffered.

    Raises OSError when it cannot be opened, and for what is not a regular file: reading a pipe may wait for ever, and a
    device may have no end.
    """
    # Non-blocking: opening a pipe that nobody writes to would wait. It changes nothing for regular files.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'of another kind')}, not a file", str(path))
        return open(number, "rb", buffering=0)
    except BaseException:
        os.close(number)
        raise


def read_regular(path: str | Path, most: int) -> bytes:
    """Reads a whole file of at most `most` bytes. Raises OSError as open_regular, and for a longer file (EFBIG)."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= most:
            data = bytearray()
            while block := file.read(most + 1 - len(data)):  # it may grow meanwhile; a file of /proc says 0
                data += block
            size = len(data)
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes or more, and at most {most} are read", str(path))
    return bytes(data)


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Writes files of one folder: each to a part of its own, flushed to disk, then renamed, in order.

    files: path -> content. Raises OSError after removing the parts. No file is replaced unless all were written
    completely.
    """
    with ExitStack() as stack:
        parts = {}
        for path, data in files.items():
            part = parts[path] = stack.enter_context(_part(path))
            part.write(data)
            _flush(part)
        for path, part in parts.items():
            _name(part, path)
    for folder in {path.parent for path in files}:
        flush_names(folder)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that is flushed to disk and takes the name `path` at the end of the block, or is removed after
    an error. Raises OSError."""
    with _part(path) as part:
        yield part
        _flush(part)
        _name(part, path)
    flush_names(path.parent)


def write_first(path: Path, data: bytes) -> None:
    """Writes a file unless there is one: when several processes write it, the first one's stays.

    A hard link makes the file appear. On a file system without them the file is looked for and then renamed to, so that
    of two processes that do so at once the second one's stays.

    Raises OSError after removing the part.
    """
    with _part(path) as part:
        part.write(data)
        _flush(part)
        try:
            os.link(part.name, path)
        except FileExistsError:
            pass
        except OSError:
            if not path.exists():
                _name(part, path)
    flush_names(path.parent)


@contextmanager
def part_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Yields a new, empty folder, NAME.TAG.part, for what shall be the folder `path`; whatever is still there under
    that name at the end of the block is removed.

    within: the folder in which it is made, which is made, too, where it is not there; None: that of `path`. Raises
    OSError.
    """
    within = path.parent if within is None else within
    within.mkdir(parents=True, exist_ok=True)
    while True:
        part = within / _tagged(path.name)
        part.mkdir()
        number = os.open(part, os.O_RDONLY) if fcntl is not None else None
        try:
            if number is not None and not _claimed(number, part):
                continue
            try:
                yield part
            finally:
                if number is None or _is_still(number, part):
                    shutil.rmtree(part, ignore_errors=True)
            return
        finally:
            if number is not None:
                os.close(number)


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Removes the parts that ended processes have left in a folder. name: of what they were parts of, with wildcards.

    A part stays whose writer runs, and where the file system has no locks, or Python has none (Windows).
    """
    if fcntl is None:
        return
    for path in folder.glob(f"{name}.*.part"):
        if not _PART.fullmatch(path.name):
            continue
        try:
            kind = os.lstat(path).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                continue
            access = os.O_RDONLY if stat.S_ISDIR(kind) else os.O_RDWR  # an exclusive lock of NFS needs a writer
            number = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(number, path):
                shutil.rmtree(path) if stat.S_ISDIR(kind) else path.unlink()
        except OSError:  # its writer runs, there are no locks, or it may not be removed
            continue
        finally:
            os.close(number)


def free_bytes(path: Path) -> int:
    """Bytes free, for this user, on the disk that a file or folder at `path` would be written to."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return disk.free if disk.total else sys.maxsize  # some file systems do not say


def flush_names(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _part(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file, locked, for what shall be the file `path`. Whatever is still there under its name at the end
    of the block is removed. Raises OSError."""
    while True:
        name = path.with_name(_tagged(path.name))
        # A new file only, and through no link that somebody has put there.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        number = os.open(name, flags, 0o666)
        with open(name, "wb", opener=lambda *_, number=number: number) as file:
            if fcntl is not None and not _claimed(number, name):
                continue
            try:
                yield file
            finally:
                if fcntl is None or _is_still(number, name):
                    name.unlink(missing_ok=True)
            return


def _tagged(name: str) -> str:
    return f"{name}.{secrets.token_hex(8)}.part"


def _claimed(number: int, path: Path) -> bool:
    """Locks a part that was just made. False where remove_abandoned has met it before the lock, and so removed it."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # else this file system has no locks
    return _is_still(number, path)


def _is_still(number: int, path: Path) -> bool:
    """Whether an open file or folder has this name."""
    try:
        return os.path.samestat(os.fstat(number), os.lstat(path))
    except OSError:
        return False


def _name(part: BinaryIO, path: Path) -> None:
    """Gives a part its name, replacing what has it."""
    if fcntl is None:
        part.close()  # Windows renames no open file
    os.replace(part.name, path)


def _flush(file: BinaryIO) -> None:
    """Waits until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())

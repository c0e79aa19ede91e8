"""Files of users, opened for reading, and files written whole: each appears complete under its name or not at all.

A file or folder that is being written has the name NAME.TAG.part, where TAG is 16 random hexadecimal digits, since
process numbers repeat between containers on one disk, and 8 of the running system. Its writer holds a lock on it
(flock), which ends with the process, however that ends. So `remove_abandoned` knows what killed processes have left,
and takes nothing from those that run.
"""

import errno
import filecmp
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PART = re.compile(r"(.+)\.[0-9a-f]{16}([0-9a-f]{8})\.part", re.DOTALL)
_LONGEST = 255 - len(".0123456789abcdef01234567.part")  # bytes of a name that its parts have in whole
_DAY = 86400  # seconds
_LOCKED = (errno.EAGAIN, errno.EACCES)  # by another process
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | Path) -> FileIO:
    """Opens a file for reading, unbuffered.

    Raises OSError when it cannot be opened, and for what is not a regular file: reading a pipe may wait for ever, and a
    device may have no end.
    """
    return open(path, "rb", buffering=0, opener=regular_descriptor)


def for_appending(path: str, flags: int) -> int:
    """For open(path, "a", opener=for_appending): only a regular file is opened, and through no link, which somebody may
    have put there. Raises OSError."""
    return regular_descriptor(path, flags | getattr(os, "O_NOFOLLOW", 0))


def read_regular(path: str | Path, most: int) -> bytes:
    """Reads a whole file of at most `most` bytes. Raises OSError as open_regular, and for a longer file (EFBIG)."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= most:
            data = file.read(size + 1)
            # It may grow meanwhile, a file of /proc says 0, and Linux reads 2 GB at a time at most.
            while block := file.read(min(max(1 << 20, size - len(data)), most + 1 - len(data))):
                data += block
            size = len(data)
    if size > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes or more, and at most {most} are read", str(path))
    return data


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Writes files of one folder: each to a part of its own, flushed to disk, then renamed, in order.

    files: path -> content. A link that has a file's name is replaced, and what it leads to stays as it is.

    Raises OSError after removing the parts, also where a device has the name: /dev/null must stay one. No
    file is replaced unless all were written completely.
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
def written_whole(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """Yields a new file that is flushed to disk and takes the name `path` at the end of the block, or is removed after
    an error.

    replace: whether it replaces another file; else one with the same content stays, as of write_first, and any other is
    a FileExistsError. Raises OSError as write_whole.
    """
    with _part(path) as part:
        yield part
        _flush(part)
        if replace:
            _name(part, path)
        elif not _name_first(part, path) and not filecmp.cmp(part.name, path, shallow=False):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    flush_names(path.parent)


def write_first(path: Path, data: bytes) -> bool:
    """Writes a file unless there is one: when several processes write it, the first one's stays. Returns whether it is
    this one.

    A hard link makes the file appear. On a file system without them the file is looked for and then renamed to, so that
    of two processes that do so at once the second one's stays.

    Raises OSError after removing the part.
    """
    with _part(path) as part:
        part.write(data)
        _flush(part)
        first = _name_first(part, path)
    flush_names(path.parent)
    return first


@contextmanager
def part_folder(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Yields a new, empty folder, NAME.TAG.part, for what shall be the folder `path`, after removing those that ended
    processes have left; whatever is still there under that name at the end of the block is removed.

    within: the folder in which it is made, which is made, too, where it is not there; None: that of `path`. Raises
    OSError.
    """
    within = path.parent if within is None else within
    within.mkdir(parents=True, exist_ok=True)
    remove_abandoned(within, path.name)
    while True:
        part = within / _tagged(path.name)
        part.mkdir()
        try:
            number = _opened_folder(part)
        except FileNotFoundError:  # remove_abandoned has met it before the lock
            continue
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


@contextmanager
def locked_folder(path: Path, wait: bool = True) -> Iterator[None]:
    """Within it no other process is within it for the same folder. wait: whether it waits for that; else there is a
    BlockingIOError. Without locks it changes nothing.

    Raises OSError when the folder cannot be opened.
    """
    if fcntl is None:
        yield
        return
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _LOCKED:
                raise
        yield
    finally:
        os.close(number)


@contextmanager
def shared_folder(path: Path) -> Iterator[None]:
    """Makes a folder for files that several processes may write at once, such as intermediate results. After an error
    it stays; else the last process that leaves the block removes it.

    Each holds a shared lock of the file .lock within it. Without locks the first one removes it. Raises OSError.
    """
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(path / ".lock", "a+b", opener=for_appending)  # a shared lock of NFS needs a reader
        except FileNotFoundError:  # the last one has just removed the folder
            continue
        with lock:
            if fcntl is not None:
                with suppress(OSError):  # without locks
                    fcntl.flock(lock, fcntl.LOCK_SH)
                if not _is_still(lock.fileno(), path / ".lock"):
                    continue
            yield
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in _LOCKED:
                        return
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.rmdir()  # that of a file which is open stays on NFS until the file is closed
        return


def is_part(name: str) -> bool:
    """Whether a file or folder of this name is a part of one that is being written, or that a killed process left."""
    return _PART.fullmatch(name) is not None


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Removes the parts that ended processes have left in a folder. name: of what they were parts; None: of anything.

    A part stays whose writer runs, and where the file system has no locks, or Python has none (Windows). One that was
    made on another host, or before this one was last started, stays for a day: not all network file systems show one
    host the locks of another.
    """
    if fcntl is None:
        return
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for entry in names:
        found = _PART.fullmatch(entry)
        if found and (name is None or found[1] == _stem(name)):
            _remove_if_abandoned(folder / entry, found[2] == _system())


def _remove_if_abandoned(path: Path, made_here: bool) -> None:
    """Removes a part unless its writer runs, or may run on another host. made_here: whether it was made on this one."""
    try:
        kind = os.lstat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            return
        access = os.O_RDONLY if stat.S_ISDIR(kind) else os.O_RDWR  # an exclusive lock of NFS needs a writer
        number = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old = made_here or time.time() - os.fstat(number).st_mtime > _DAY
        if old and _is_still(number, path):
            shutil.rmtree(path) if stat.S_ISDIR(kind) else path.unlink()
    except OSError:  # its writer runs, there are no locks, or it may not be removed
        pass
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


def regular_descriptor(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Opens a file as os.open does; the caller closes it. Raises OSError, also for what is not a regular file."""
    flags |= getattr(os, "O_NOCTTY", 0)
    try:
        # Non-blocking: opening a pipe whose other end nobody has opened would wait.
        number = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except BlockingIOError:
        # A lease on a regular file, as Samba takes (F_SETLEASE): its holder gives it back within some seconds.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
        number = os.open(path, flags, 0o666)
    try:
        kind = stat.S_IFMT(os.fstat(number).st_mode)
        if kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'of another kind')}, not a file", str(path))
    except BaseException:
        os.close(number)
        raise
    return number


def _check_replaceable(path: Path) -> None:
    """Raises OSError where a device has this name, or a link to one or to a stream of this process (/dev/stdout)."""
    try:
        mode = os.stat(path).st_mode
        stream = path.is_symlink() and os.readlink(path).startswith("/proc/")
    except OSError:  # there is nothing, or what the system refuses to replace
        return
    if stream or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, f"it is {'a stream' if stream else 'a device'}, not a file", str(path))


@contextmanager
def _part(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file, locked, for what shall be the file `path`. Whatever is still there under its name at the end
    of the block is removed. Raises OSError."""
    _check_replaceable(path)
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
    """The name of a new part."""
    return f"{_stem(name)}.{secrets.token_hex(8)}{_system()}.part"


def _stem(name: str) -> str:
    """A name as its parts have it: cut, where they would be longer than a file system takes."""
    while len(os.fsencode(name)) > _LONGEST:
        name = name[:-1]
    return name


@cache
def _system() -> str:
    """8 hexadecimal digits of the running system, which containers share: of this start of this host."""
    try:
        with open_regular("/proc/sys/kernel/random/boot_id") as file:
            known = file.read(64)
    except OSError:
        known = socket.gethostname().encode(errors="replace")
    return hashlib.sha256(known).hexdigest()[:8]


def _opened_folder(path: Path) -> int | None:
    """A folder, opened to be locked; None where there are no locks."""
    return None if fcntl is None else os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)


def _claimed(number: int, path: Path) -> bool:
    """Locks a part that was just made. False where remove_abandoned has met it before the lock, and so removed it."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _LOCKED  # else this file system has no locks
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


def _name_first(part: BinaryIO, path: Path) -> bool:
    """Gives a part its name unless something has it. Returns whether it did."""
    try:
        os.link(part.name, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            return False
        _name(part, path)
    return True


def _flush(file: BinaryIO) -> None:
    """Waits until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())

"""Reads bytes from files, by any number of threads: parts of shards, and whole image files.

Windows can import this module, but has no os.pread to read with.
"""

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from ..errors import DataError
from ..files import read_regular, regular_descriptor
from .samples import BadSample

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MOST_BYTES = 1 << 28  # of one encoded image
Stamp = tuple[int, int]  # size in bytes, time of the last change in ns
_MOST_FILES = 128
_GAP = 1 << 14  # bytes between two parts: reading up to so many costs less than another call
_AT_ONCE = 1 << 20
_CHANGED = "it changed or was cut short"


def cpu_count() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stamp_of(status: os.stat_result) -> Stamp:
    """A file's size and time of last change: a file whose stamp differs is another file, or has been written to."""
    return status.st_size, status.st_mtime_ns


class _File:
    """A descriptor that is closed with its last reference, so never while a thread reads from it. Raises OSError."""

    def __init__(self, path: Path):
        try:
            self.number = regular_descriptor(path)
        except OSError as error:
            check_limit(error)
            raise

    def __del__(self, close=os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class OpenFiles:
    """Reads parts of files and keeps the files that were used last open.

    It keeps at most 128 of them, or a quarter of the descriptors that the process may open, where that is less.
    """

    def __init__(self) -> None:
        self._most = _MOST_FILES
        if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) != resource.RLIM_INFINITY:
            self._most = max(1, min(_MOST_FILES, limit // 4))
        self.forget()

    def forget(self) -> None:
        """Starts again without open files and with a lock that is free."""
        self._open: OrderedDict[tuple[Path, Stamp], _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, stamp: Stamp, offset: int, size: int) -> bytes:
        """Reads `size` bytes from `offset` of the file at `path`, which must still have this stamp.

        Raises OSError when it cannot be read, has another stamp, or ends before these bytes do.
        """
        name = path, stamp
        with self._lock:
            file = self._open.get(name)
            if file is not None:
                self._open.move_to_end(name)
        if file is None:
            file = _File(path)
            if stamp_of(os.fstat(file.number)) != stamp:
                raise OSError(0, _CHANGED)
            with self._lock:
                self._open[name] = file
                while len(self._open) > self._most:
                    self._open.popitem(last=False)
        data = _pread(file.number, size, offset)
        if stamp_of(os.fstat(file.number)) != stamp:  # it may have been overwritten while it was open
            with self._lock:
                self._open.pop(name, None)
            raise OSError(0, _CHANGED)
        return data


FILES = OpenFiles()
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=FILES.forget)  # another thread may have held the lock during the fork


class OpenFile:
    """One file that stays open, read by any number of threads, before a fork and after it: no lock, no position.

    stamp: of the file as it was opened. Raises OSError.
    """

    def __init__(self, path: Path):
        self._file = _File(path)
        self.stamp = stamp_of(os.fstat(self._file.number))

    def read(self, offset: int, size: int) -> bytes:
        """Reads `size` bytes from `offset`. Raises OSError when the file was written to since, or ends before."""
        data = _pread(self._file.number, size, offset)
        if stamp_of(os.fstat(self._file.number)) != self.stamp:
            raise OSError(0, _CHANGED)
        return data


def check_limit(error: OSError) -> None:
    """Raises DataError where no more files can be opened: then nothing is wrong with this one."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise DataError("too many files are open; raise the limit with ulimit -n, or use fewer threads") from error


def stamp_at(path: Path) -> Stamp:
    """The stamp of the file at `path`. Raises OSError, also for what is not a regular file: a library that opens it by
    name next might wait for a pipe for ever."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    return stamp_of(status)


def read_parts(path: Path, stamp: Stamp, parts: Iterable[tuple[int, int]]) -> list[bytes]:
    """Reads many parts of the file at `path`, each an offset and a size: fastest when they are in the file's order.

    Raises OSError when the file cannot be read, has another stamp, or ends before a part does.
    """
    read: list[bytes] = []
    run: list[tuple[int, int]] = []  # parts that lie close together
    begin = end = 0  # of the run
    file = _File(path)

    def take() -> None:
        data = _pread(file.number, end - begin, begin)
        read.extend(data[offset - begin : offset - begin + size] for offset, size in run)
        run.clear()

    if stamp_of(os.fstat(file.number)) != stamp:
        raise OSError(0, _CHANGED)
    for offset, size in parts:
        if run and not (end <= offset <= end + _GAP and offset + size - begin <= _AT_ONCE):
            take()
        if not run:
            begin = offset
        run.append((offset, size))
        end = offset + size
    take()
    if stamp_of(os.fstat(file.number)) != stamp:
        raise OSError(0, _CHANGED)
    return read


def _pread(file: int, size: int, offset: int) -> bytes:
    data = os.pread(file, size, offset)
    while len(data) < size:  # a network file system may return less than was asked for
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            raise OSError(0, _CHANGED)
        data += more
    return data


def read_image(path: Path) -> bytes:
    """Reads an image file whole. Raises BadSample: "missing"; "unreadable", also for what is no file; "too large"."""
    try:
        return read_regular(path, MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing", f"there is no {path}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            check_limit(error)
            if error.errno == errno.EFBIG:
                raise BadSample("too large", f"{path}: {error.strerror}") from error
        raise BadSample("unreadable", f"{path}: {error}") from error

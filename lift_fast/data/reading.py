"""Reads bytes from files, by any number of threads: parts of shards, and whole image files."""

import os
import resource
import stat
import threading
from collections import OrderedDict
from pathlib import Path

from .samples import BadSample

MOST_BYTES = 1 << 28  # of one encoded image
Stamp = tuple[int, int]  # size in bytes, time of the last change in ns
_MOST_FILES = 128
_CHANGED = "it changed or was cut short"


def stamp_of(status: os.stat_result) -> Stamp:
    """A file's size and time of last change: a file whose stamp differs is another file, or has been written to."""
    return status.st_size, status.st_mtime_ns


class _File:
    """A descriptor that is closed with its last reference, so never while a thread reads from it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class OpenFiles:
    """Reads parts of files and keeps the files that were used last open.

    It keeps at most 128 of them, or a quarter of the descriptors that the process may open, where that is less.
    """

    def __init__(self) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(1, min(_MOST_FILES, limit // 4)) if limit != resource.RLIM_INFINITY else _MOST_FILES
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
        data = os.pread(file.number, size, offset)
        while len(data) < size:  # a network file system may return less than was asked for
            more = os.pread(file.number, size - len(data), offset + len(data))
            if not more:
                raise OSError(0, _CHANGED)
            data += more
        if stamp_of(os.fstat(file.number)) != stamp:  # it may have been overwritten while it was open
            with self._lock:
                self._open.pop(name, None)
            raise OSError(0, _CHANGED)
        return data


FILES = OpenFiles()
os.register_at_fork(after_in_child=FILES.forget)  # another thread may have held the lock during the fork


def read_image(path: Path) -> bytes:
    """Reads an image file whole. Raises BadSample: "missing"; "unreadable", also for what is no file; "too large"."""
    try:
        # Non-blocking: opening a pipe that nobody writes to would wait forever.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(number, "rb", buffering=0) as file:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("unreadable", f"{path} is no file")
            if status.st_size > MOST_BYTES:
                raise BadSample("too large", f"{path} has {status.st_size} bytes; {MOST_BYTES} are read at most")
            return file.readall()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing", f"there is no {path}") from error
    except (OSError, ValueError) as error:
        raise BadSample("unreadable", f"{path}: {error}") from error

"""Bytes from files, for any number of threads: pieces of shards through few open files, and whole picture files."""

import os
import resource
import stat
import threading
from collections import OrderedDict
from pathlib import Path

from .samples import BadSample

MOST_BYTES = 1 << 28  # of one encoded picture
Stamp = tuple[int, int]
_MOST_FILES = 128
_CHANGED = "it changed or was cut short"


def stamp_of(told: os.stat_result) -> Stamp:
    """What tells a file from another, or from itself before a change: its bytes and the time of its last change."""
    return told.st_size, told.st_mtime_ns


class _File:
    """A descriptor that is closed when nobody holds it any more: not under a thread that reads from it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


class OpenFiles:
    """Reads pieces of files and keeps those last used open: at most 128, or a quarter of what the process may have."""

    def __init__(self) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(1, min(_MOST_FILES, limit // 4)) if limit != resource.RLIM_INFINITY else _MOST_FILES
        self.forget()

    def forget(self) -> None:
        """Begins anew, without a file and with a lock that nobody holds."""
        self._open: OrderedDict[tuple[Path, Stamp], _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, stamp: Stamp, offset: int, size: int) -> bytes:
        """`size` bytes of the file that was at `path` when it had this stamp. Raises OSError, also where the file is
        another now, or ends before them."""
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
        while len(data) < size:  # a network's file system may give less at a time
            more = os.pread(file.number, size - len(data), offset + len(data))
            if not more:
                raise OSError(0, _CHANGED)
            data += more
        if stamp_of(os.fstat(file.number)) != stamp:  # it may be written over while it is open
            with self._lock:
                self._open.pop(name, None)
            raise OSError(0, _CHANGED)
        return data


FILES = OpenFiles()
os.register_at_fork(after_in_child=FILES.forget)  # another thread may have held the lock


def read_image(path: Path) -> bytes:
    """A picture's file. Raises BadSample: missing, unreadable (no file, or not to be read), too large."""
    try:
        # Not to wait for a pipe that nobody writes to.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(number, "rb", buffering=0) as file:
            told = os.fstat(number)
            if not stat.S_ISREG(told.st_mode):
                raise BadSample("unreadable", f"{path} is no file")
            if told.st_size > MOST_BYTES:
                raise BadSample("too large", f"{path} has {told.st_size} bytes; {MOST_BYTES} are read at most")
            return file.readall()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadSample("missing", f"there is no {path}") from error
    except (OSError, ValueError) as error:
        raise BadSample("unreadable", f"{path}: {error}") from error

"""A bound of the memory that decoding takes, shared by all threads of the process.

An image of few bytes may have many pixels: with a thread for each of 32 processors they would take tens of GB.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """An amount of which threads take parts, in the order in which they ask; a thread waits until its part is free.

    most: the amount. A part that is larger waits until nothing else is taken.
    """

    def __init__(self, most: int):
        self.most = most
        self.forget()

    def forget(self) -> None:
        """Starts again with nothing taken and a lock that is free."""
        self._free = self.most
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Event]] = deque()
        self._thread = threading.local()

    @contextmanager
    def taken(self, part: int) -> Iterator[None]:
        """Takes a part for the time of the block. Within it, the same thread is given any other part at once."""
        if getattr(self._thread, "has_part", False):
            yield
            return
        part = min(part, self.most)
        self._take(part)
        self._thread.has_part = True
        try:
            yield
        finally:
            self._thread.has_part = False
            self._give(part)

    def _take(self, part: int) -> None:
        with self._lock:
            if not self._waiting and part <= self._free:
                self._free -= part
                return
            turn = part, threading.Event()
            self._waiting.append(turn)
        try:
            turn[1].wait()
        except BaseException:  # Ctrl-C
            with self._lock:
                given = turn not in self._waiting
                if not given:
                    self._waiting.remove(turn)
            self._give(part if given else 0)
            raise

    def _give(self, part: int) -> None:
        with self._lock:
            self._free += part
            while self._waiting and self._waiting[0][0] <= self._free:
                part, event = self._waiting.popleft()
                self._free -= part
                event.set()


DECODING = Budget(10 << 26)  # bytes: 671 MB
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=DECODING.forget)  # the threads that had taken parts are not in the child

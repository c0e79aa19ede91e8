"""Progress of commands on stderr: a bar on a terminal; elsewhere plain lines, so that log files stay readable.

A command's --quiet and --log-every set how, for the process, through `configure`.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from .printable import printable

_LINE = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {elapsed} gone, {remaining} left{postfix}"
_EVERY = 30.0
_settings = {"quiet": False, "every": _EVERY}


def configure(*, quiet: bool = False, every: float = _EVERY) -> None:
    """Sets how this process shows progress from now on. quiet: not at all. every: seconds between plain lines."""
    _settings.update(quiet=quiet, every=every)


def bar(
    iterable: Iterable[Any] | None = None,
    desc: str = "",
    total: int | None = None,
    *,
    unit: str = "it",
    unit_scale: bool = False,
    initial: int = 0,
    leave: bool = True,
    delay: float = 0,
    disable: bool | None = False,
) -> Any:
    """A tqdm with these arguments on a terminal; elsewhere an object with the methods used here, which prints plain
    lines: every so many seconds and, with `leave`, when it closes. desc may hold foreign names."""
    desc = printable(desc)
    hidden = bool(disable or _settings["quiet"])
    if hidden or _on_terminal():
        return _Bar(
            iterable,
            desc,
            total,
            leave,
            unit=unit,
            unit_scale=unit_scale,
            initial=initial,
            delay=delay,
            disable=hidden,
        )
    return _Lines(iterable, desc, total, unit, unit_scale, initial, leave, delay)


class _Bar(tqdm):
    """A tqdm with a lock of this process alone. Forked processes share tqdm's own with their parent: they would wait
    for ever where one was killed with it, or forked while another thread of the parent had it."""

    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=lambda: _Bar.set_lock(threading.RLock()))


class _Lines:
    """Progress as plain lines on stderr. Has tqdm's update, set_postfix_str and close; a context manager; iterable."""

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        desc: str,
        total: int | None,
        unit: str,
        unit_scale: bool,
        initial: int,
        leave: bool,
        delay: float,
    ):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)  # type: ignore[arg-type]
        self.iterable, self.total, self.leave = iterable, total, leave
        self.n = self.initial = initial
        scaled = unit_scale and (total is None or total >= 1000)  # "4.00/4.00" otherwise
        self.words = {"prefix": desc, "unit": unit, "unit_scale": scaled, "postfix": ""}
        self.began = time.monotonic()
        self.next = self.began + max(delay, _settings["every"])
        self.shown_from = self.began + delay
        self.printed: float = initial  # count of the last line; there is none before the first sample
        self.closed = False

    def update(self, n: float = 1) -> None:
        """Counts n more; prints a line when one is due."""
        self.n += n  # type: ignore[assignment]
        if time.monotonic() >= self.next:
            self.print()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Sets what the next lines end with; refresh: not used."""
        self.words["postfix"] = text

    def print(self) -> None:
        """Prints where it stands."""
        now = time.monotonic()
        self.next, self.printed = now + _settings["every"], self.n
        elapsed = now - self.began
        line = tqdm.format_meter(
            self.n, self.total, elapsed, initial=self.initial, bar_format=_LINE, ncols=None, **self.words
        )
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Prints the last line where the bar is to be left standing and this is not what the last line said."""
        if self.leave and not self.closed and self.n != self.printed and time.monotonic() >= self.shown_from:
            self.print()
        self.closed = True

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.iterable or ():
                yield item
                self.update()


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()

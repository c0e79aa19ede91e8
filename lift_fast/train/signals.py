"""Signals that ask a run to stop: they are noted, and the run ends after a step, with a checkpoint."""

import signal
import threading
import time
from types import FrameType

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # a scheduler's, Ctrl-C, and SLURM's warning before its time limit
_SAME = 1.0  # seconds within which further SIGINTs are the same Ctrl-C: launchers pass on what the terminal has sent


class StopRequests:
    """As a context manager notes SIGTERM, SIGINT and SIGUSR1 instead of what they do otherwise; requested: the name of
    the first that came, or None.

    A second SIGINT, more than a second after the first, raises KeyboardInterrupt. A signal that was ignored stays so,
    as Ctrl-C is in a shell's background. Outside of the main thread, which alone may handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._interrupted_at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_at and now - self._interrupted_at > _SAME:
                raise KeyboardInterrupt
            self._interrupted_at = self._interrupted_at or now
        self.requested = self.requested or signal.Signals(number).name

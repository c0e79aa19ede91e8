"""Ctrl-C while modules are imported: it waits until they are.

Imports of torch and others catch KeyboardInterrupt or turn it into an ImportError, so that the command would go on, or
end with another error.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # exit status, as shells have it
_AGAIN = 0.05  # seconds
_IMPORTING = "<frozen importlib._bootstrap>"


@contextmanager
def after_imports() -> Iterator[None]:
    """Within it SIGINT raises KeyboardInterrupt when no import is under way, at once or after it.

    Changes nothing where it is ignored, as in a shell's background, and where there are no timers (Windows).
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def arrived(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == _IMPORTING:
                signal.setitimer(signal.ITIMER_REAL, _AGAIN)
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    before = {kind: signal.signal(kind, arrived) for kind in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def say_interrupted(left: str = "") -> None:
    """Prints the line that an interrupted command ends with. left: what it leaves. Further SIGINTs are ignored."""
    # A launcher of ranks passes on what the terminal has sent already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("lift-fast: interrupted" + (f"; {left}" if left else ""), file=sys.stderr)

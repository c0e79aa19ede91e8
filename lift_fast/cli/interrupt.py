"""Ctrl-C where Python would lose it.

Imports of torch and others catch KeyboardInterrupt or turn it into an ImportError: it waits until they are done. Python
drops what is raised while an object is deleted or in a callback, and prints it: it is raised again, and not printed.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # exit status, as shells have it
_AFTER_IMPORT = 0.05  # seconds until the next look at whether the import is done
_AGAIN = 1.0  # seconds after which a KeyboardInterrupt that nothing handles has been dropped
_IMPORTING = "<frozen importlib._bootstrap>"


@contextmanager
def after_imports() -> Iterator[None]:
    """Within it SIGINT raises KeyboardInterrupt when no import is under way, at once or after it, and until it arrives.

    Changes nothing where it is ignored, as in a shell's background, and where there are no timers (Windows).
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def arrived(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM and _is_handled():  # the command cleans up
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            return
        while frame is not None:
            if frame.f_code.co_filename == _IMPORTING:
                signal.setitimer(signal.ITIMER_REAL, _AFTER_IMPORT)
                return
            frame = frame.f_back
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        raise KeyboardInterrupt

    show_dropped = sys.unraisablehook

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if what.exc_type is not KeyboardInterrupt:
            show_dropped(what)

    before = {kind: signal.signal(kind, arrived) for kind in (signal.SIGINT, signal.SIGALRM)}
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = show_dropped
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _is_handled() -> bool:
    """Whether a KeyboardInterrupt is on its way up: in a finally, an except or the end of a with block."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def say_interrupted(left: str = "") -> None:
    """Prints the line that an interrupted command ends with. left: what it leaves. Further SIGINTs are ignored."""
    # A launcher of ranks passes on what the terminal has sent already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from .common import say  # not at the top: what this module is for begins before other imports

    say("lift-fast: interrupted" + (f"; {left}" if left else ""), error=True)

"""Runs an operation or a command in a forked process and judges how it ends: with a right answer, or with a typed error
within limits of time and memory.

Forking takes some milliseconds, so that thousands of damaged files can be tried; a test module should import what its
operations import. The child has one thread of torch.
"""

import os
import pickle
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lift_fast.cli.main import main
from lift_fast.errors import LiftFastError

SECONDS, BYTES = 60.0, 1 << 30
LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS)


class Judged(NamedTuple):
    """How an operation ended. outcome: "right answer" or "error" (as the fixture tally counts them). value: what it
    returned. message: that of the error."""

    outcome: str
    value: Any = None
    message: str = ""


class Output(NamedTuple):
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


def judged(
    operation: Callable[[], Any],
    errors: tuple[type[Exception], ...] = (LiftFastError,),
    seconds: float = SECONDS,
    most: int = BYTES,
) -> Judged:
    """Runs operation() in a child. It should compare what it reads and assert that it is right; what it returns must
    be picklable.

    errors: those that it may end with. most: bytes that its resident memory may grow by. Raises AssertionError for
    another exception, for a signal, an exit, and for exceeding a limit.
    """
    ours, theirs = Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _child(theirs, operation, errors)
    theirs.close()
    try:
        answer = None
        if not ours.poll(seconds):
            os.kill(process, signal.SIGKILL)
            raise AssertionError(f"it has not ended after {seconds} s")
        try:
            answer = pickle.loads(ours.recv_bytes())
        except EOFError:
            pass
    finally:
        ours.close()
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert answer is not None, f"it has ended with status {status} (minus the number of a signal)"
    kind, value, grown = answer
    assert kind != "raised", value
    assert grown <= most, f"its memory grew by {grown >> 20} MiB"
    if kind == "error":
        assert 10 < len(value) < 5000, value
        return Judged("error", None, value)
    return Judged("right answer", value)


def _child(theirs: Connection, operation: Callable[[], Any], errors: tuple[type[Exception], ...]) -> None:
    """Runs the operation, sends how it ended, and ends this process without what a test's process does at its end."""
    try:
        torch.set_num_threads(1)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident("VmRSS")
        try:
            answer = "answer", operation()
        except errors as error:
            answer = "error", str(error)
        except BaseException:
            answer = "raised", traceback.format_exc()
        theirs.send_bytes(pickle.dumps((*answer, _resident("VmHWM") - before)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) << 10


def judged_command(
    arguments: Sequence[Any], stdin: str = "", before: Callable[[], None] | None = None, **limits: Any
) -> Judged:
    """Runs `lift-fast ARGUMENTS` in a child. value: an Output, for the right answers 0 and 1.

    Status 2 must come with one message on stderr. Neither output may hold a traceback or a command to the terminal.
    before: what to do in the child first, such as lowering a limit of the system. limits: as of `judged`.
    """

    def run() -> Output:
        with (
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
            tempfile.TemporaryFile() as given,
        ):
            given.write(stdin.encode())
            given.seek(0)
            for number, file in enumerate((given, out, err)):
                os.dup2(file.fileno(), number)
            sys.stdin, sys.stdout, sys.stderr = (
                open(number, mode, closefd=False, errors="backslashreplace") for number, mode in enumerate("rww")
            )
            status, allowed = 0, {kind: resource.getrlimit(kind) for kind in LIMITS}
            try:
                if before:
                    before()
                main([str(argument) for argument in arguments])
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1 if end.code else 0
            finally:
                for kind, values in allowed.items():
                    resource.setrlimit(kind, values)
            sys.stdout.flush()
            sys.stderr.flush()
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode(errors="backslashreplace"))
        return Output(status, *texts)

    value: Output = judged(run, (), **limits).value
    both = value.out + value.err
    assert "Traceback" not in both and "Exception ignored" not in both, both
    assert all(c.isprintable() or c in "\n\r\t" for c in both), repr(both)
    if value.status == 2:
        assert value.err.count("lift-fast: error: ") == 1, value
        return Judged("error", value, value.err)
    assert value.status in (0, 1), value
    return Judged("right answer", value)

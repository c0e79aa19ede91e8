"""Functions run in forked processes, to be killed or many at once. A fork takes milliseconds, a new process seconds."""

import faulthandler
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SECONDS = 60.0  # after which a process prints where it hangs, and ends


def forked(function: Callable[[], Any]) -> Any:
    """What function() returns in a forked process; fails where it raises."""
    return at_once(1, lambda number: function())[0]


@contextmanager
def forked_later(function: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """Runs function() in a forked process; yields what waits for its end and returns what it returned."""
    process, result = _start(function)
    done: list[Any] = []

    def join() -> Any:
        if not done:
            done.append(_join(process, result, killed=False))
        return done[0]

    try:
        yield join
    finally:
        join()


def killed_in(make: Callable[[], Iterator[Any]]) -> None:
    """Runs a generator in a forked process until it yields first, and kills the process there."""

    def run() -> None:
        next(making := make())
        os.kill(os.getpid(), signal.SIGKILL)
        del making

    process, result = _start(run)
    _join(process, result, killed=True)


def at_once(count: int, function: Callable[[int], Any], killed: Collection[int] = ()) -> list[Any]:
    """What function(number) returns in each of `count` processes, which begin at the same time. killed: the numbers of
    those that are killed in it, for which it is None."""
    ready, go = os.pipe()

    def wait(number: int) -> Any:
        os.close(go)
        os.read(ready, 1)  # until the parent has started all
        return function(number)

    started = [_start(lambda number=number: wait(number)) for number in range(count)]
    os.close(ready)
    os.close(go)
    return [_join(*each, killed=number in killed) for number, each in enumerate(started)]


def _start(function: Callable[[], Any]) -> tuple[int, int]:
    """The number of a process that runs function(), and the end of the pipe from which its result is read."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process:
        os.close(theirs)
        return process, ours
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)  # the threads of this process's OpenMP are not in the new one, which would wait for them
    try:
        outcome = ("returned", function())
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    try:
        with open(theirs, "wb") as file:
            pickle.dump(outcome, file)
    finally:
        os._exit(0)


def _join(process: int, result: int, killed: bool) -> Any:
    with open(result, "rb") as file:
        content = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == (-signal.SIGKILL if killed else 0), (status, content)
    if killed:
        return None
    kind, value = pickle.loads(content)
    assert kind == "returned", value
    return value

"""Runs commands in processes of their own, several at once, each with a time limit; one thread supervises them all."""

import ctypes
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

TIMED_OUT, NOT_STARTED = 124, -1000
POLL_S = 0.02
_LIBC = ctypes.CDLL(None)


@dataclass
class Ended:
    """How a task ended. status: exit status (negative for a signal), TIMED_OUT or NOT_STARTED; output: with stderr."""

    task: "Task"
    status: int
    seconds: float
    output: str

    def last_line(self) -> str:
        printed = [line.strip() for line in self.output.splitlines() if line.strip()]
        return printed[-1][:200] if printed else f"exit status {self.status}"


@dataclass
class Task:
    """A command to run. seconds: its time limit. ended: called at its end; `run` then runs the tasks it returns."""

    name: str
    command: Sequence[str]
    seconds: float
    ended: Callable[[Ended], "Iterable[Task] | None"] = lambda ended: None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    task: Task
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]
    started: float
    deadline: float


class Jobs:
    """Runs commands in the folder `root`, and appends the output of each to `log` when it ends."""

    def __init__(self, root: Path, log: Path, environment: Mapping[str, str]):
        self.root, self.log = root, log
        self.environment = {**os.environ, **environment}
        self.running: list[_Running] = []

    def start(self, task: Task) -> None:
        """Starts a task in the background. Its end is noticed during `run` or `wait`."""
        self._start_process(task, time.monotonic() + task.seconds)

    def run(self, tasks: Iterable[Task], slots: int, until: float) -> None:
        """Runs tasks, at most `slots` at once, and the tasks that these add, and returns when all have ended.

        until: the time.monotonic() at which running tasks are stopped and no more are started.
        """
        waiting, mine = deque(tasks), []
        while waiting or mine:
            now = time.monotonic()
            while waiting and len(mine) < slots and now < until:
                task = waiting.popleft()
                mine.append(self._start_process(task, min(until, now + task.seconds)))
            if waiting and now >= until:
                for task in waiting:
                    task.ended(Ended(task, NOT_STARTED, 0.0, "out of time"))
                waiting.clear()
            for one, more in self._reap():
                if one in mine:
                    mine.remove(one)
                waiting.extend(more)
            time.sleep(POLL_S)

    def wait(self, name: str, until: float) -> None:
        """Waits for the tasks of that name which `start` began, and stops them at `until`."""
        while found := [one for one in self.running if one.task.name == name]:
            for one in found:
                one.deadline = min(one.deadline, until)
            self._reap()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Stops all running tasks now."""
        for one in self.running:
            one.deadline = 0.0
        self._reap()

    def _start_process(self, task: Task, deadline: float) -> _Running:
        # A file, because workers that outlive the command would keep a pipe open.
        output = tempfile.TemporaryFile()
        process = subprocess.Popen(
            task.command,
            cwd=self.root,
            env={**self.environment, **task.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be stopped with it
            preexec_fn=_end_with_parent,
        )
        running = _Running(task, process, output, time.monotonic(), deadline)
        self.running.append(running)
        return running

    def _reap(self) -> list[tuple[_Running, list[Task]]]:
        """Stops tasks past their deadline, and returns those that have ended, each with the tasks it adds."""
        ended = []
        for one in list(self.running):
            status = one.process.poll()
            if status is None and time.monotonic() < one.deadline:
                continue
            _kill(one.process.pid)  # with any children it left running
            one.process.wait()
            self.running.remove(one)
            one.output.seek(0)
            output = one.output.read().decode(errors="replace")
            one.output.close()
            seconds = time.monotonic() - one.started
            if status is None:
                status = TIMED_OUT
                output += f"\nstopped after {seconds:.0f} s"
            with self.log.open("a") as log:
                log.write(f"$ {shlex.join(one.task.command)}\n{output}\n[{one.task.name}: exit status {status}]\n\n")
            more = one.task.ended(Ended(one.task, status, seconds, output))
            ended.append((one, list(more or ())))
        return ended


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _end_with_parent() -> None:
    """Sets Linux's PR_SET_PDEATHSIG, so that no process goes on measuring when its parent is killed."""
    _LIBC.prctl(1, signal.SIGKILL)

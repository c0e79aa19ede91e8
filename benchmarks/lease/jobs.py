"""Commands in processes of their own, several at once, each under a time limit; one thread looks after them all."""

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

TIMED_OUT, NOT_BEGUN = 124, -1000
POLL_S = 0.02
_LIBC = ctypes.CDLL(None)


@dataclass
class Ended:
    """How a task ended: an exit status (minus a signal's number), TIMED_OUT or NOT_BEGUN; standard error included."""

    task: "Task"
    status: int
    seconds: float
    output: str

    def last_line(self) -> str:
        spoken = [line.strip() for line in self.output.splitlines() if line.strip()]
        return spoken[-1][:200] if spoken else f"exit status {self.status}"


@dataclass
class Task:
    """seconds: its limit. ended: called at its end; what it returns is run too."""

    name: str
    command: Sequence[str]
    seconds: float
    ended: Callable[[Ended], "Iterable[Task] | None"] = lambda ended: None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    task: Task
    process: "subprocess.Popen[bytes]"
    said: IO[bytes]
    begun: float
    deadline: float


class Jobs:
    """Every command runs in `root`; what it says goes to `log` when it ends."""

    def __init__(self, root: Path, log: Path, environment: Mapping[str, str]):
        self.root, self.log = root, log
        self.environment = {**os.environ, **environment}
        self.running: list[_Running] = []

    def start(self, task: Task) -> None:
        """In the background; it ends while others are waited for, or in `wait`."""
        self._begin(task, time.monotonic() + task.seconds)

    def run(self, tasks: Iterable[Task], slots: int, until: float) -> None:
        """Runs them, `slots` at once, and what they ask for, until all have ended; `until`: of time.monotonic(), when
        what runs is stopped and nothing more begins."""
        waiting, mine = deque(tasks), []
        while waiting or mine:
            now = time.monotonic()
            while waiting and len(mine) < slots and now < until:
                task = waiting.popleft()
                mine.append(self._begin(task, min(until, now + task.seconds)))
            if waiting and now >= until:
                for task in waiting:
                    task.ended(Ended(task, NOT_BEGUN, 0.0, "out of time"))
                waiting.clear()
            for one, more in self._reap():
                if one in mine:
                    mine.remove(one)
                waiting.extend(more)
            time.sleep(POLL_S)

    def wait(self, name: str, until: float) -> None:
        """For what was started under that name; it is stopped at `until`."""
        while found := [one for one in self.running if one.task.name == name]:
            for one in found:
                one.deadline = min(one.deadline, until)
            self._reap()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Everything that runs, at once."""
        for one in self.running:
            one.deadline = 0.0
        self._reap()

    def _begin(self, task: Task, deadline: float) -> _Running:
        # A file: workers that outlive the command would keep a pipe open.
        said = tempfile.TemporaryFile()
        process = subprocess.Popen(
            task.command,
            cwd=self.root,
            env={**self.environment, **task.environment},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # all that it starts can be stopped together
            preexec_fn=_end_with_parent,
        )
        running = _Running(task, process, said, time.monotonic(), deadline)
        self.running.append(running)
        return running

    def _reap(self) -> list[tuple[_Running, list[Task]]]:
        """What has ended or was stopped since, and what is to run next."""
        ended = []
        for one in list(self.running):
            status = one.process.poll()
            if status is None and time.monotonic() < one.deadline:
                continue
            _kill(one.process.pid)  # whatever it left behind, too
            one.process.wait()
            self.running.remove(one)
            one.said.seek(0)
            output = one.said.read().decode(errors="replace")
            one.said.close()
            seconds = time.monotonic() - one.begun
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
    """Linux's PR_SET_PDEATHSIG: nothing goes on measuring when the parent is killed."""
    _LIBC.prctl(1, signal.SIGKILL)

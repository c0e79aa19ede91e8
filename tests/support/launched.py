"""Runs `lift-fast` as the ranks of a launcher, with towers of a few weights, and strikes ranks at chosen places.

python -m support.launched ARGUMENTS is `lift-fast ARGUMENTS` where the preset tiny is support.ranks.SMALL; the variable
BLOWS holds a list of Blows as JSON. A blow that falls is appended to the file that the variable STRUCK names.
"""

import functools
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lift_fast.train.config import TrainConfig
from support.ranks import SMALL, environment, free_port

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Blow:
    """A signal that a rank sends itself when a function is called for the `call`-th time, counted from 1.

    place: "module:name" or "module:class.name", where the function is looked up when it is called. attempt: the number
    of restarts before it. after: when the function returns, not when it is called. delay: seconds from then to the
    signal, while the rank goes on. pause: seconds that the function's caller then waits, or until there is a file "go"
    among the logs. name: of the signal; "": none.
    """

    place: str
    rank: int = 0
    attempt: int = 0
    call: int = 1
    after: bool = False
    delay: float = 0.0
    pause: float = 0.0
    name: str = "SIGKILL"

    def arm(self) -> None:
        """Replaces the function."""
        module, _, path = self.place.partition(":")
        *classes, function = path.split(".")
        owner = functools.reduce(getattr, classes, importlib.import_module(module))
        original = getattr(owner, function)
        calls = 0

        @functools.wraps(original)
        def struck(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            now = calls == self.call
            if now and not self.after:
                self.fall()
            value = original(*args, **options)
            if now and self.after:
                self.fall()
            return value

        setattr(owner, function, struck)

    def fall(self) -> None:
        """Sends the signal."""
        if self.delay:
            threading.Thread(target=lambda: (time.sleep(self.delay), self._send()), daemon=True).start()
        else:
            self._send()
        end, go = time.monotonic() + self.pause, Path(os.environ["STRUCK"]).with_name("go")
        while time.monotonic() < end and not go.exists():
            time.sleep(0.02)

    def _send(self) -> None:
        if not self.name:
            return
        with open(os.environ["STRUCK"], "a") as file:
            file.write(json.dumps(asdict(self)) + "\n")
        os.kill(os.getpid(), getattr(signal, self.name))


def arguments(config: TrainConfig) -> list[str]:
    """`train` and the options that make this config, whose preset must be tiny."""
    found = ["train"]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "options" or value in (field.default, {}):
            continue
        found.append("--" + field.name.replace("_", "-"))
        if value is not True:
            values = sum(value.items(), ()) if isinstance(value, dict) else value
            found += map(str, values if isinstance(values, tuple) else [values])
    return found


@dataclass
class Ended:
    """How a process ended. status: that of its exit; minus the number of the signal that killed it; None if it had to
    be killed in the end. seconds: from the start of `ended`."""

    status: int | None
    out: str
    err: str
    seconds: float


class Launched:
    """A run on `world` ranks, each a process, without a launcher, which would end the others when one ends.

    The processes are forked from one that has loaded torch, and so start at once. logs: a folder for their output.
    """

    def __init__(self, config: TrainConfig, world: int, logs: Path, blows: Sequence[Blow] = (), attempt: int = 0):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lift_fast.cli.main", "lift_fast.train.loop"])
        port = free_port()
        logs.mkdir(exist_ok=True)
        self.logs, self.processes = logs, []
        for number in range(world):
            ranks = environment(number, world, port) if world > 1 else {}
            target = (number, ranks | {"TORCHELASTIC_RESTART_COUNT": str(attempt)}, logs, blows, arguments(config))
            self.processes.append(context.Process(target=_forked, args=target))
            self.processes[-1].start()

    def ended(self, timeout: float = 120, without: int | None = None) -> list[Ended]:
        """Waits for the processes, at most `timeout` seconds in all; kills those that are left. without: a rank that
        is not waited for."""
        begun = time.monotonic()
        found: dict[int, Ended] = {}
        while len(found) < len(self.processes):
            left = {*range(len(self.processes))} - {*found}
            late = time.monotonic() - begun > timeout or left == {without}
            for number, process in enumerate(self.processes):
                if number in found or (process.is_alive() and not late):
                    continue
                status = None if process.is_alive() else process.exitcode
                process.kill()
                out, err = ((self.logs / f"{number}.{name}").read_text() for name in ("out", "err"))
                found[number] = Ended(status, out, err, time.monotonic() - begun)
            time.sleep(0.02)
        return [found[number] for number in range(len(self.processes))]

    def until_one_ends(self, timeout: float = 120) -> bool:
        """Waits; ends the others with SIGTERM, as torchrun does, when one fails. Whether all have succeeded."""
        end = time.monotonic() + timeout
        failed = False
        while not failed and any(process.is_alive() for process in self.processes):
            failed = any(process.exitcode for process in self.processes) or time.monotonic() > end
            time.sleep(0.02)
        for process in self.processes:
            if process.is_alive():
                process.terminate()
                process.join(30)
                process.kill()
            process.join()
        return not any(process.exitcode for process in self.processes)


def _forked(number: int, ranks: dict[str, str], logs: Path, blows: Sequence[Blow], arguments: list[str]) -> None:
    os.environ.update(ranks | {"STRUCK": str(logs / "struck")})
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(logs / f"{number}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    import torch

    torch.set_num_threads(1)
    run(blows, arguments)


def torchrun(config: TrainConfig, world: int, logs: Path, restarts: int, blows: Sequence[Blow]) -> subprocess.Popen:
    """Starts a run under torchrun, which starts the ranks again at most `restarts` times."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "--max-restarts"]
    logs.mkdir(exist_ok=True)
    with open(logs / "out", "w") as out, open(logs / "err", "w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, str(restarts), "-m", "support.launched", *arguments(config)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "BLOWS": json.dumps([asdict(blow) for blow in blows]),
                "STRUCK": str(logs / "struck"),
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "passive",
            },
            stdout=out,
            stderr=err,
            start_new_session=True,  # it has a process group of its own, as a terminal would give it
        )


def struck(logs: Path) -> list[Blow]:
    """The blows that have fallen, in order."""
    file = logs / "struck"
    return [Blow(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def run(blows: Sequence[Blow], arguments: list[str]) -> None:
    """Runs `lift-fast` in this process, as the rank that the environment tells."""
    from lift_fast.cli.main import main
    from lift_fast.nn import PRESETS

    PRESETS["tiny"] = SMALL
    number, attempt = (int(os.environ.get(name, 0)) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
    for blow in blows:
        if (blow.rank, blow.attempt) == (number, attempt):
            blow.arm()
    main(arguments)


if __name__ == "__main__":
    run([Blow(**blow) for blow in json.loads(os.environ["BLOWS"])], sys.argv[1:])

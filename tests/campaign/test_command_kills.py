"""Commands that are killed at any moment: the same command again succeeds, and then every file is as if nothing had
happened; no file that was being written is left.

A command runs in a fork of this process, which has imported what it needs. It is killed (SIGKILL) right before a random
one of the file operations that it does, or after a random time.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from support import complete  # noqa: F401
from support.small_commands import COMMANDS, made_in, prepare, written

from lift_fast.cli.main import main

# They replace nothing.
NEW = {"data pack", "embed-images", "embed-images npy", "export", "export hf"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    with made_in(tmp_path_factory.mktemp("sets")) as root:
        yield root


def run(line: list[str], moment: int = 0, seconds: float = 0.0, folder: Path | None = None, count=None) -> int:
    """Runs a command in a child and returns its status (minus the signal that killed it). moment: the number of the
    file operation in `folder` before which it is killed; 0: none. seconds: when it is killed; 0.0: never. count: a file
    that gets the number of operations."""
    process = os.fork()
    if process == 0:
        try:
            status = 1
            torch.set_num_threads(1)
            sys.stdout = open(os.devnull, "w")
            if folder is not None:
                done = strike(folder, moment)
            main(line)
            if count is not None:
                count.write_text(str(done[0]))
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(status)
    if seconds:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# Python reports these before they are done: the first argument is a path, or a descriptor.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def strike(folder: Path, moment: int) -> list[int]:
    """Kills this process before operation `moment`; returns a list with the number of those until now."""
    done, start = [0], str(folder)

    def hook(event: str, arguments: tuple) -> None:
        if event == "fcntl.flock" or (event in OPERATIONS and str(arguments[0]).startswith(start)):
            done[0] += 1
            if done[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return done


def kill(name: str, sets: Path, tmp_path: Path, kills: int, seed: int) -> int:
    """Kills a command `kills` times, each in a new folder and every third time twice; returns the number of kills that
    came before the end."""
    rng = random.Random(f"{name} {seed}")
    out = tmp_path / "out"
    line, begun = prepare(name, sets, out), time.monotonic()
    assert run(line, folder=out, count=tmp_path / "count") == 0
    seconds, count = time.monotonic() - begun, int((tmp_path / "count").read_text())
    whole = written(out)
    assert count > 3 and whole
    shutil.rmtree(out)
    killed = 0
    for turn in range(kills):
        line = prepare(name, sets, out)
        for _ in range(2 if turn % 3 == 2 else 1):
            if turn % 2:
                status = run(line, seconds=rng.uniform(0, seconds))
            else:
                status = run(line, rng.randint(1, count), folder=out)
            assert status in (0, -signal.SIGKILL) or (status == 2 and name in NEW)
            killed += status < 0
        state = sorted(path.name for path in out.rglob("*"))
        status = run(line)
        # Those of NEW say that their files are there when they had ended, or were killed just after that.
        assert status == 0 or (status == 2 and name in NEW and written(out) == whole), state
        assert written(out) == whole, state
        shutil.rmtree(out)
    return killed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on(sets, tmp_path, name):
    assert kill(name, sets, tmp_path, 1, 0) == 1


@pytest.mark.campaign
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_are_killed_many_times(sets, tmp_path, tally, name):
    kills = 8 if name == "export hf" else 20  # transformers takes seconds to make what it writes
    killed = kill(name, sets, tmp_path, kills, 1)
    assert killed >= kills / 2
    tally("kill", "right answer", killed)

"""Runs shell code of the docs in bash, whole and as pasted, without what is too heavy for a test.

Of programs, bash finds only those in TOOLS, and those that a test names: instead of each of these it starts a small
client, which asks the test's process what to do. So pipes, loops, variables and background jobs are bash's own, and
`lift-fast` still runs in the process that has loaded torch. A program that is neither is not found, and the code fails.
"""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

TOOLS = ("bash", "cat", "cp", "head", "ls", "mkdir", "mv", "rm", "tail", "tar")

_CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["BLOCK_SOCKET"])
    call = {"words": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
    server.sendall(json.dumps(call).encode())
    server.shutdown(socket.SHUT_WR)
    answer = json.load(server.makefile())
sys.stdout.write(answer["said"])
sys.stdout.flush()
if answer["instead"]:
    os.execvpe(answer["instead"][0], answer["instead"], os.environ | answer["env"])
sys.exit(answer["status"])
"""


@dataclass(frozen=True)
class Answer:
    """What a program does: it prints `said` and ends with `status`, or `instead` is run, with `env` added."""

    said: str = ""
    status: int = 0
    instead: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)


Program = Callable[[list[str]], Answer]  # of its arguments; the working directory and os.environ are the caller's


def run(script: str, folder: Path, programs: Mapping[str, Program]) -> tuple[int, str]:
    """Runs `script` in bash, in `folder`; returns its exit status, and what it printed on stdout and stderr.

    An exception in a program is raised here when the script has ended.
    """
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as listener:
        bin = Path(place, "bin")
        bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, f"there is no {tool}"
            (bin / tool).symlink_to(found)
        Path(place, "client.py").write_text(_CLIENT)
        for name in programs:
            (bin / name).write_text(f'#!/bin/sh\nexec {sys.executable} -IS {place}/client.py {name} "$@"\n')
            (bin / name).chmod(0o755)
        listener.bind(f"{place}/socket")
        listener.listen()
        variables = {"PATH": str(bin), "HOME": str(folder), "BLOCK_SOCKET": f"{place}/socket"}
        errors: list[BaseException] = []
        with open(f"{place}/printed", "w+") as printed:
            bash = subprocess.Popen(
                [bin / "bash", "-c", script],
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
            while bash.poll() is None:
                if select.select([listener], [], [], 0.02)[0]:
                    errors += _serve(listener.accept()[0], programs, variables)
            printed.seek(0)
            said = printed.read()
    if errors:
        raise errors[0]
    return bash.returncode, said


def _serve(client: socket.socket, programs: Mapping[str, Program], known: Mapping[str, str]) -> list[BaseException]:
    """Answers one client; returns the exception that its program raised, if it did."""
    with client:
        call = json.load(client.makefile())
        own = {*known, "_", "PWD", "OLDPWD", "SHLVL"}
        added = {name: value for name, value in call["env"].items() if name not in own}
        before = os.getcwd()
        os.chdir(call["cwd"])
        errors: list[BaseException] = []
        try:
            with mock.patch.dict(os.environ, added):
                name, *words = call["words"]
                answer = programs[name](words)
        except (Exception, SystemExit) as error:
            errors, answer = [error], Answer(f"{error!r}\n", 1)
        finally:
            os.chdir(before)
        client.sendall(json.dumps(asdict(answer)).encode())
    return errors

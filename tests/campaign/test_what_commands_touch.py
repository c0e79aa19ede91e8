"""What commands touch: no network and no other program, and no file or folder but those that they are to write."""

import os
import socket
import sys

import pytest
from support import complete  # noqa: F401
from support.judged import judged_command
from support.small_commands import COMMANDS, made_in, prepare

NETWORK = {"connect", "sendto", "sendmsg", "bind", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo"}


PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn"}
CHANGES = {"os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}


def confined(out):
    """Any call to a network, any other program, and any change outside of the folder `out` fails with an error that no
    command handles."""

    def hook(event, arguments):
        module, _, call = event.partition(".")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (module == "socket" and call in NETWORK) or event in PROGRAMS:
            raise AssertionError(f"{event}{arguments}")
        if (writes or event in CHANGES) and not isinstance(arguments[0], int):
            folder = arguments[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") and arguments[-1] > 0 else None
            folder = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
            path = os.path.normpath(os.path.join(folder, os.fsdecode(arguments[0])))
            if path != str(out) and not path.startswith((f"{out}/", "/dev/", "/proc/")):
                raise AssertionError(f"{event}{arguments}")

    return lambda: sys.addaudithook(hook)


@pytest.mark.campaign
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_touches(tmp_path, name):
    with made_in(tmp_path / "sets") as sets:
        line, before = prepare(name, sets, tmp_path / "out"), confined(tmp_path / "out")
        assert judged_command(line, before=before).outcome == "right answer"


@pytest.mark.campaign
def test_what_a_demo_touches(tmp_path):
    line = ["demo", "--out", tmp_path / "demo", "--steps", 3, "--batch-size", 16, "--scenes", 64, "--heldout", 32]
    ended = judged_command(line, before=confined(tmp_path), seconds=600, most=4 << 30)
    assert ended.outcome == "right answer", ended.message
    assert (tmp_path / "demo" / "report.html").exists()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda: socket.socket().bind(("127.0.0.1", 0)), "socket.bind"),
        (lambda: socket.getaddrinfo("localhost", 80), "socket.getaddrinfo"),
        (lambda: os.system("true"), "os.system"),
        (lambda: open("/tmp/lift-fast-was-here", "w"), "open"),
        (lambda: os.mkdir("/tmp/lift-fast-was-here"), "os.mkdir"),
    ],
)
def test_it_would_be_noticed(tmp_path, what, words):
    with pytest.raises(AssertionError, match=words):
        judged_command(["--version"], before=lambda: (confined(tmp_path)(), what()))

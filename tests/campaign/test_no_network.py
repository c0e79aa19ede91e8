"""No command opens a socket or asks for an address unless a name on the hub, --push or a gallery is asked for."""

import sys

import pytest
from support import complete  # noqa: F401
from support.judged import judged_command
from support.small_commands import COMMANDS, made_in, prepare

NETWORK = {"connect", "sendto", "sendmsg", "bind", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo"}


def without_network():
    """Any call to a network fails with an error that no command handles."""

    def hook(event, arguments):
        module, _, call = event.partition(".")
        if module == "socket" and call in NETWORK:
            raise AssertionError(f"{event}{arguments}")

    sys.addaudithook(hook)


@pytest.mark.campaign
@pytest.mark.parametrize("name", COMMANDS)
def test_no_socket(tmp_path, name):
    with made_in(tmp_path / "sets") as sets:
        assert judged_command(prepare(name, sets, tmp_path / "out"), before=without_network).outcome == "right answer"


@pytest.mark.campaign
def test_no_socket_in_a_demo(tmp_path):
    line = ["demo", "--out", tmp_path / "demo", "--steps", 3, "--batch-size", 16, "--scenes", 64, "--heldout", 32]
    ended = judged_command(line, before=without_network, seconds=600, most=4 << 30)
    assert ended.outcome == "right answer", ended.message
    assert (tmp_path / "demo" / "report.html").exists()


def test_a_socket_would_be_noticed(tmp_path):
    with pytest.raises(AssertionError, match="socket.bind"):
        judged_command(["gallery", tmp_path, "--data", tmp_path], before=lambda: (without_network(), bind()))


def bind():
    import socket

    socket.socket().bind(("127.0.0.1", 0))

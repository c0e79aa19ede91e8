"""lift-fast gallery, as a process: what it prints, and how it ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from support.tiny_gallery import make_demo
from support.tiny_sets import make_set

from lift_fast.cli.main import main, parse

COMMAND = [sys.executable, "-c", "from lift_fast.cli import main; main()", "gallery"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture
def started():
    """started(*arguments) -> the process, the lines that it printed, and the address in the last of them."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        )
        processes.append(process)
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                return process, lines, found[0]
        pytest.fail(process.stderr.read())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def asked(url: str, path: str = "", content=None):
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def test_a_demo_until_ctrl_c(demo, started):
    process, lines, url = started(demo, "--port", "0")
    assert lines == [
        "plain: 2 images left out (1 not a picture, 1 truncated)",
        f"39 images, 2 models: {url} (Ctrl-C ends it)",
    ]
    assert b"lift-fast" in asked(url)
    found = json.loads(asked(url, "api/text", {"text": "a red star"}))
    assert [len(model["images"]) for model in found["models"]] == [30, 30]
    stalled = socket.create_connection(("127.0.0.1", int(url.split(":")[2].strip("/"))))  # nor is it waited for
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "lift-fast: interrupted" and "Traceback" not in err
    assert "images, lift: 41/41" in err
    stalled.close()


def test_other_data_and_one_run(demo, started, tmp_path):
    make_set(tmp_path / "set", 5, broken=[3])
    arguments = [demo / "clip", "--data", "mine", tmp_path / "set", "--port", 0, "--field", "long", "--quiet"]
    process, lines, url = started(*arguments)
    assert lines == ["mine: 1 image left out (1 not a picture)", f"4 images, 1 model: {url} (Ctrl-C ends it)"]
    found = json.loads(asked(url, "api/gallery"))
    assert [model["name"] for model in found["models"]] == ["clip"]
    assert found["sets"] == [{"name": "mine", "images": 4, "left_out": 1}]
    assert json.loads(asked(url, "api/sample/0"))["caption"] == "long caption 0"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "lift-fast: interrupted\n"


def test_the_browser_is_opened_when_asked(demo, monkeypatch, capsys):
    opened = []

    def stop(server, library):
        library.close()
        raise KeyboardInterrupt

    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("lift_fast.gallery.Server.serve", stop)
    for more in ([], ["--open"]):
        with pytest.raises(SystemExit) as ended:
            main(["gallery", str(demo / "clip"), "--port", "0", *more])
        assert ended.value.code == 130
    assert len(opened) == 1 and opened[0] in capsys.readouterr().out


def test_errors_come_before_the_models_are_loaded(demo, capsys, monkeypatch):
    monkeypatch.setattr("lift_fast.inference.load", lambda *arguments, **options: pytest.fail("it was loaded"))

    def said(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["gallery", *map(str, arguments)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "no held-out sets lie with owner/model; name one: --data DIR" in said("owner/model")
    assert "is named twice" in said(demo, demo / "lift")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on port {port} of 127.0.0.1 (Address already in use)" in said(demo, "--port", port)
    assert "cannot listen on port 70000" in said(demo, "--port", 70000)


def test_defaults():
    command = parse(["gallery"])
    assert command.runs == ("runs/demo",) and command.data == {} and command.port == 8017 and not command.open

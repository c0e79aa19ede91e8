"""Progress: a bar on a terminal, plain lines elsewhere."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from support import complete  # noqa: F401
from support.forked import killed_in
from support.judged import judged
from support.tiny_sets import make_set

from lift_fast import progress
from lift_fast.progress import bar


@pytest.fixture(autouse=True)
def settings_of_their_own():
    yield
    progress.configure()


def lines(capfd) -> list[str]:
    return capfd.readouterr().err.splitlines()


def test_off_a_terminal_there_is_the_last_line_alone(capfd):
    """Line 15 of the issue: tqdm wrote \\r twice a step into log files."""
    with bar(total=300, desc="train", unit="step") as shown:
        for step in range(300):
            shown.set_postfix_str(f"loss {step}")
            shown.update()
    out = capfd.readouterr().err
    assert "\r" not in out and out.count("\n") == 1
    assert out.startswith("train: 300/300, ") and out.endswith(", loss 299\n")


def test_lines_come_at_the_given_interval(capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress.configure(every=10)
    for _ in bar(range(35), "read", unit="row"):
        now[0] += 1
    assert [line.split(",")[0] for line in lines(capfd)] == [f"read: {n}/35" for n in (10, 20, 30, 35)]


def test_a_bar_that_leaves_nothing_ends_without_a_line(capfd):
    assert list(bar([1, 2], "look", leave=False)) == [1, 2]
    assert lines(capfd) == []


def test_a_bar_that_waits_says_nothing_of_what_was_quick(capfd):
    assert list(bar([1, 2], "scan", delay=10)) == [1, 2]
    assert lines(capfd) == []


def test_an_error_leaves_a_line_of_how_far_it_came(capfd):
    with pytest.raises(KeyError), bar(total=9, desc="embed", unit_scale=True, unit="B") as shown:
        shown.update(5)
        raise KeyError
    assert [line.split(",")[0] for line in lines(capfd)] == ["embed: 5/9"]


def test_an_error_before_anything_was_done_leaves_no_line(capfd):
    with pytest.raises(KeyError), bar(total=9, desc="read"):
        raise KeyError
    assert lines(capfd) == []


def test_large_counts_are_shortened(capfd):
    with bar(total=2000, desc="embed", unit_scale=True, unit="B") as shown:
        shown.update(1500)
    assert [line.split(",")[0] for line in lines(capfd)] == ["embed: 1.50k/2.00k"]


def test_without_a_total(capfd):
    assert list(bar(iter("ab"), "read")) == ["a", "b"]
    assert [line.split(",")[0] for line in lines(capfd)] == ["read: 2/?"]


def test_quiet_and_disabled_bars_show_nothing(capfd):
    list(bar(range(3), "a", disable=True))
    progress.configure(quiet=True)
    list(bar(range(3), "b"))
    assert lines(capfd) == []


def test_on_a_terminal_it_is_a_bar_that_moves():
    code = "from lift_fast.progress import bar\nfor _ in bar(range(3), 'walk'): pass"
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=child, check=True)
    out = os.read(parent, 1 << 16).decode()
    os.close(child)
    os.close(parent)
    assert "walk: 100%" in out and "\r" in out


def shown_by(*args) -> str:
    """What a command writes to stderr where that is no terminal."""
    command = [sys.executable, "-c", "from lift_fast.cli import main; main()", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("command", ["embed", "check", "stats", "pack", "index", "train"])
def test_commands_write_few_plain_lines(tmp_path, command):
    data = make_set(tmp_path / "data", 30).folder
    args = {
        "embed": ("embed", "--data", data, "--out", tmp_path / "out"),
        "check": ("data", "check", data),
        "stats": ("data", "stats", data),
        "pack": ("data", "pack", data, tmp_path / "out"),
        "index": ("data", "index", data),
        "train": ("train", "--model", "clip", "--data", data, "--out", tmp_path / "out", "--steps", "12",
                  "--batch-size", "4"),
    }[command]  # fmt: skip
    out = shown_by(*args)
    assert "\r" not in out and len(out.splitlines()) <= 2
    if command == "train":
        assert "train clip: 12/12" in out
        assert "train clip" not in shown_by(*args[:-5], tmp_path / "again", *args[-4:], "--quiet")


def test_forked_processes_do_not_wait_for_the_lock_of_bars():
    """Forked while another thread has it, and after another process was killed with it."""

    def show():
        with bar(range(3), disable=True) as shown:
            return [*shown]

    def killed():
        with bar(disable=True)._lock:
            yield

    lock = bar(disable=True)._lock
    taken, done = threading.Event(), threading.Event()

    def hold():
        with lock:
            taken.set()
            done.wait()

    holder = threading.Thread(target=hold)
    killed_in(killed)
    assert judged(show, seconds=20).value == [0, 1, 2]
    holder.start()
    try:
        taken.wait()
        assert judged(show, seconds=20).value == [0, 1, 2]
    finally:
        done.set()
        holder.join()

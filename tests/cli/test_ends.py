"""How commands end: Ctrl-C, a reader that has gone, a disk without space; --version and shell completion."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import complete  # noqa: F401
from support.tiny_sets import make_set

from lift_fast import __version__
from lift_fast.cli.interrupt import after_imports
from lift_fast.cli.main import main, parse

COMMAND = [sys.executable, "-c", "from lift_fast.cli import main; main()"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_set(tmp_path_factory.mktemp("ends") / "data", 40).folder


@pytest.fixture(scope="module")
def many_captions(tmp_path_factory) -> Path:
    """So many that no machine has embedded them before a test interrupts it."""
    file = tmp_path_factory.mktemp("many") / "captions.csv"
    file.write_text("".join(["key,caption\n", *(f"{i},a photo of thing number {i}\n" for i in range(200_000))]))
    return file


def interrupted(command: str, ready, environment=None) -> tuple[int, str]:
    """Runs a command, sends it SIGINT as soon as ready() is true; returns its status and what it wrote to stderr."""
    running = subprocess.Popen(
        [*COMMAND, *shlex.split(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    for _ in range(600):
        if ready():
            break
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=180)
    return running.returncode, err


def last_line(err: str, begins: str = "lift-fast: interrupted") -> str:
    """The last line, which alone says how the command ended."""
    assert "Traceback" not in err and "KeyboardInterrupt" not in err, err
    lines = err.splitlines()
    assert sum(line.startswith(("lift-fast: interrupted", "lift-fast: stopped")) for line in lines) == 1, err
    assert lines[-1].startswith(begins), err
    return lines[-1]


def steps_in(out: Path) -> list[dict]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def assert_stopped(out: Path, status: int, err: str) -> None:
    """The run was stopped by Ctrl-C: status and last line, the steps until then, and the checkpoint after them."""
    assert status == 75
    steps = steps_in(out)
    assert [line["step"] for line in steps] == list(range(len(steps))) and len(steps) > 2
    assert last_line(err, "lift-fast: stopped") == (
        f"lift-fast: stopped by SIGINT after step {len(steps)} of 100000; the same command goes on from there, with "
        f"the checkpoint in {out}"
    )
    shown = [line for line in err.splitlines() if line.startswith("train clip: ")]
    assert len(shown) == 1 and shown[0].startswith(f"train clip: {len(steps)}/100000")
    assert not (out / "run.json").exists() and not (out / ".lock").exists()
    assert max(path.name for path in (out / "checkpoints").iterdir()) == f"step-{len(steps):08d}"


def test_ctrl_c_while_training(data, tmp_path):
    """It saves a checkpoint and ends with one line, and the same command goes on."""
    out = tmp_path / "run"
    command = f"train --model clip --data {data} --out {out} --steps 100000 --batch-size 4"
    assert_stopped(out, *interrupted(command, lambda: len(steps_in(out)) > 2))
    done = len(steps_in(out))
    assert_stopped(out, *interrupted(command, lambda: len(steps_in(out)) > done))


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.2, 1.6])
def test_ctrl_c_while_torch_is_imported(data, tmp_path, seconds):
    """Its import swallows a KeyboardInterrupt, or makes an ImportError of it: it has to wait."""
    began = time.monotonic()
    out = tmp_path / "run"
    command = f"train --model clip --data {data} --out {out} --steps 100000 --batch-size 4"
    status, err = interrupted(command, lambda: time.monotonic() - began > seconds)
    if status == 75:  # the first step was under way
        assert steps_in(out) and "stopped by SIGINT" in last_line(err, "lift-fast: stopped")
        return
    assert status == 130
    last_line(err)
    assert not out.exists()


class Dropping:
    """Its deletion is interrupted; Python drops the KeyboardInterrupt."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)


def test_a_ctrl_c_that_python_drops_arrives_all_the_same(monkeypatch):
    """And nothing is printed of the one that was dropped."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    with pytest.raises(KeyboardInterrupt), after_imports():
        Dropping()
        for _ in range(100):
            time.sleep(0.1)
    assert not shown and sys.unraisablehook == shown.append


def test_a_ctrl_c_comes_once():
    """Cleaning up, which may take long, is not interrupted."""
    cleaned = False
    with pytest.raises(KeyboardInterrupt), after_imports():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            try:
                time.sleep(1.5)
                raise ValueError
            except ValueError:
                time.sleep(1)
                cleaned = True
    assert cleaned and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@pytest.mark.parametrize("command", [
    "data scenes --out {out} --train 1000000",
    "embed --data {many_captions} --out {out}",
    "data check {data} --bad {pipe}",  # it waits for a reader of the pipe
    "demo --out {out} --scenes 1000000",
    "compare --preset vit-b16",
])  # fmt: skip
def test_ctrl_c_in_any_command(data, many_captions, tmp_path, command):
    began = time.monotonic()
    os.mkfifo(tmp_path / "pipe")
    line = command.format(data=data, many_captions=many_captions, out=tmp_path / "out", pipe=tmp_path / "pipe")
    status, err = interrupted(line, lambda: time.monotonic() - began > 1.2)
    assert status == 130
    last_line(err)


def test_ctrl_c_in_ranks(many_captions, tmp_path):
    """Each rank ends with one line; a launcher may send SIGINT after the terminal has."""
    began = time.monotonic()
    command = f"embed --data {many_captions} --out {tmp_path / 'out'}"
    status, err = interrupted(command, lambda: time.monotonic() - began > 2, {"RANK": "1", "WORLD_SIZE": "2"})
    assert status == 130
    last_line(err)


def test_further_ctrl_c_change_nothing(data, tmp_path):
    """A launcher passes on what the terminal has sent already."""
    out = tmp_path / "run"
    command = f"train --model clip --data {data} --out {out} --steps 100000 --batch-size 4"
    running = subprocess.Popen([*COMMAND, *shlex.split(command)], stderr=subprocess.PIPE, text=True)
    while len(steps_in(out)) < 3:
        assert running.poll() is None
        time.sleep(0.1)
    for _ in range(3):
        running.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, err = running.communicate(timeout=180)
    assert_stopped(out, running.returncode, err)


def test_where_ctrl_c_is_ignored_it_stays_so(tmp_path):
    """A shell starts what it runs in the background so."""
    out = tmp_path / "out"
    script = f"trap '' INT; exec {shlex.join(COMMAND)} data scenes --out {out} --train 300 --heldout 2 --px 24"
    running = subprocess.Popen(["bash", "-c", script], stderr=subprocess.PIPE, text=True)
    for _ in range(20):
        time.sleep(0.1)
        running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=180)[1] == "" and running.returncode == 0
    assert (out / "heldout").is_dir()


def test_a_reader_that_has_gone(data):
    """Line 14 of the issue: `lift-fast data stats DIR | head` said "Broken pipe"."""
    for command in (f"data stats {data}", "train --help"):
        line = f"{shlex.join(COMMAND)} {command} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.stdout.strip() == "141" and "roken" not in done.stderr, done.stderr


def test_the_disk_is_looked_at_before_the_first_step(data, tmp_path, capfd, monkeypatch):
    """Line 16 of the issue: a full disk was noticed after the last step."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=3_000_000))
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(f"train --model clip --data {data} --out {tmp_path}/a/b --steps 2 --batch-size 4"))
    assert stop.value.code == 2
    message = capfd.readouterr().err.splitlines()[-1]
    found = re.search(r"the run needs (\d+\.\d) MB in (.*) and its disk has 3\.0 MB free", message)
    assert found and float(found[1]) > 5 and found[2] == f"{tmp_path}/a/b"
    assert not (tmp_path / "a").exists()


def test_version(capfd):
    main(["--version"])
    assert capfd.readouterr().out == f"lift-fast {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell):
    done = subprocess.run([*COMMAND, "--tyro-print-completion", shell], capture_output=True, text=True, check=True)
    assert "vit-b16" in done.stdout and "openmoji" in done.stdout
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def help_of(command: str) -> str:
    done = subprocess.run([*COMMAND, *command.split(), "--help"], capture_output=True, text=True, check=True)
    return re.sub(r"\s*│\n│\s*", " ", done.stdout)


def test_the_options_of_train_are_in_groups():
    """In groups that fit on a screen, with the names of the presets."""
    out = help_of("train")
    groups = re.findall(r"╭─ (\w+) options", out)
    assert groups == ["run", "model", "optimizer", "images", "machine", "checkpoints", "reading"]
    boxes = re.split(r"╭─ ", out)[2:]
    assert max(len(re.findall(r"│ --\w", box)) for box in boxes) <= 13
    assert "--preset {tiny,vit-ti16,vit-s16,vit-b16," in out


def test_the_names_of_the_presets_are_those_that_there_are():
    from typing import get_args

    from lift_fast.nn import PRESETS
    from lift_fast.train.config import PresetName

    assert set(get_args(PresetName)) == set(PRESETS)


def test_options_of_all_commands_stand_anywhere():
    for line in ("--quiet train", "train --quiet", "--log-every 5 train"):
        parse([*line.split(), "--model", "clip", "--data", "a", "--out", "b"])
    with pytest.raises(Exception, match="log_every must be above 0"):
        parse(["--log-every", "0", "compare"])

"""lift-fast train: what it says when it begins, goes on, stops and is complete; --resume; several ranks say it once."""

import io
import json
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from support.ranks import SMALL, in_group, on_ranks
from support.tiny_sets import make_set

from lift_fast.cli.main import main
from lift_fast.nn import PRESETS
from lift_fast.ranks import Rank
from lift_fast.train.setup import Training


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_set(tmp_path_factory.mktemp("train") / "data", 30, broken={4}).folder


@pytest.fixture(autouse=True)
def as_small(monkeypatch):
    """vit-ti16 is the tests' smallest model: the command line takes only the names of presets that there are."""
    monkeypatch.setitem(PRESETS, "vit-ti16", SMALL)


def line(data: Path, out: Path, more: str = "") -> list[str]:
    return shlex.split(
        f"train --model clip --preset vit-ti16 --context 12 --data {data} --out {out} --steps 8 --batch-size 6 "
        f"--warmup 2 --precision fp32 --quiet {more}"
    )


def ended(capfd, arguments: list[str]) -> tuple[int, list[str], list[str]]:
    """Exit status, and the lines on stdout and stderr."""
    try:
        main(arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capfd.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def signal_in(step: int, number: int, monkeypatch) -> None:
    """This process gets a signal in this step, counted from 0."""
    kept = Training.kept

    def interrupted(self, now):
        if now == step:
            signal.raise_signal(number)
        return kept(self, now)

    monkeypatch.setattr(Training, "kept", interrupted)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_then_the_same_command_then_once_more(data, tmp_path, capfd, monkeypatch, name):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in(2, getattr(signal, name), patch)
        status, said, errors = ended(capfd, line(data, out))
    assert (status, said) == (75, [])
    assert errors == [
        f"lift-fast: stopped by {name} after step 3 of 8; the same command goes on from there, with the checkpoint in "
        f"{out}"
    ]
    status, said, errors = ended(capfd, line(data, out, "--resume"))
    assert (status, errors) == (0, [])
    assert said[0] == f"going on from the checkpoint of step 3 in {out}"
    assert said[1].startswith("clip: loss ") and said[1].endswith(f", in {out}") and "skipped 1 sample" in said[2]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    status, once_more, errors = ended(capfd, line(data, out))
    assert (status, errors) == (0, [])
    assert once_more == [f"the run in {out} is complete: nothing was left to train", *said[1:]]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_signal_in_the_last_step_lets_the_run_complete(data, tmp_path, capfd, monkeypatch):
    signal_in(7, signal.SIGTERM, monkeypatch)
    status, said, errors = ended(capfd, line(data, tmp_path / "run"))
    assert (status, errors) == (0, []) and said[0].startswith("clip: loss ")
    assert (tmp_path / "run/run.json").exists()


def test_resume_without_a_run(data, tmp_path, capfd):
    for out in (tmp_path / "a/b", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        status, said, errors = ended(capfd, line(data, out, "--resume"))
        assert (status, said) == (2, [])
        assert errors == [f"lift-fast: error: there is no run in {out} to go on with; leave out --resume"]
    assert not (tmp_path / "a").exists() and not list((tmp_path / "empty").iterdir())


def test_folders_that_are_refused_in_one_sentence(data, tmp_path, capfd, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in(2, signal.SIGTERM, patch)
        ended(capfd, line(data, out))
    status, said, errors = ended(capfd, line(data, out, "--seed 3 --lr 0.5"))
    assert (status, said) == (2, [])
    assert errors == [
        f"lift-fast: error: {out} holds another run (--lr 0.001, now 0.5; --seed 0, now 3); name another --out, or "
        f"remove {out}"
    ]
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import time; from pathlib import Path; from lift_fast.train.folder import locked\n"
         f"with locked(Path({str(out)!r})): print(flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline()
    status, said, errors = ended(capfd, line(data, out))
    holder.kill()
    holder.wait()
    assert (status, said) == (2, []) and len(errors) == 1
    assert errors[0].startswith(f"lift-fast: error: another process (pid {holder.pid} on host ")
    assert errors[0].endswith(f") is training into {out}; wait for it or name another --out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("of another")
    status, said, errors = ended(capfd, line(data, tmp_path / "mine"))
    assert (status, errors) == (
        2, [f"lift-fast: error: {tmp_path}/mine exists already; remove it or name another --out"]
    )  # fmt: skip
    assert ended(capfd, line(data, out))[0] == 0


def test_a_damaged_newest_checkpoint_is_said(data, tmp_path, capfd, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in(5, signal.SIGTERM, patch)
        assert ended(capfd, line(data, out, "--save-every 2"))[0] == 75
    [file, *_] = (out / "checkpoints/step-00000006").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    status, said, errors = ended(capfd, line(data, out))
    assert status == 0 and said[0] == f"going on from the checkpoint of step 4 in {out}"
    assert errors == [
        f"lift-fast: warning: the checkpoint of step 6 is damaged ({file.name} is cut short or altered); going on from "
        "that of step 4"
    ]


def test_a_spike(data, tmp_path, capfd):
    out = tmp_path / "run"
    status, said, errors = ended(capfd, line(data, out, "--lr inf"))
    assert (status, said) == (2, [])
    assert len(errors) == 1 and "that step changed no weights, and its samples are in" in errors[0]
    [spike] = [json.loads(text) for text in (out / "spikes.jsonl").read_text().splitlines()]
    assert len(spike["samples"]) == 6


def said_on_a_rank(arguments: list[str], step: int | None) -> tuple[object, str, str]:
    """Exit status, stdout and stderr of a command on this rank, which may get a signal in a step if it is rank 1."""
    import os

    PRESETS["vit-ti16"] = SMALL
    if step is not None and os.environ["RANK"] == "1":
        signal_in(step, signal.SIGTERM, pytest.MonkeyPatch())
    status: object = 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def commands_on_a_rank(rank: Rank, arguments: list[str]) -> list[tuple[object, str, str]]:
    return [said_on_a_rank(arguments, step) for step in (2, None, None)]


def test_ranks_say_it_once(data, tmp_path):
    """A signal to the second of two ranks, going on, and the run that is complete: the first rank alone speaks."""
    out = tmp_path / "run"
    first, second = on_ranks(2, in_group, commands_on_a_rank, line(data, out))
    assert [status for status, *_ in first] == [status for status, *_ in second] == [75, 0, 0]
    assert [said for _, *said in second] == [["", ""]] * 3
    stopped, went_on, complete = (said for _, *said in first)
    assert stopped[0] == "" and stopped[1].startswith(
        "lift-fast: stopped by a signal to another rank after step 4 of 8"
    )
    assert went_on[1] == "" and went_on[0].startswith(f"going on from the checkpoint of step 4 in {out}\nclip: loss ")
    assert complete[0].startswith(f"the run in {out} is complete: nothing was left to train\nclip: loss ")

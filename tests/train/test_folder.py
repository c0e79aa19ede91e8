"""train/folder.py: what stands in a run's folder, who may train into it, and its logs after a restart."""

import errno
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lift_fast import files
from lift_fast.data.samples import BadSample
from lift_fast.data.skipped import Skipped
from lift_fast.errors import ConfigError, TrainingError
from lift_fast.train import folder
from lift_fast.train.folder import locked, open_folder, read_started, rewind, start
from lift_fast.train.recorder import JsonLines

DATA = {"samples": 7, "shards": 1, "sizes": "aa", "captions": None, "images": ["bb"]}
CACHE = {"codec": "int8", "shards": "cc"}


def settings(codec="int8", **changes):
    mathematics = {"model": "lift", "lr": 0.001, "seed": 0, "steps": 9, "flip": 0.0, "read": {}, "init_from": None}
    return {
        "mathematics": mathematics | changes,
        "fingerprints": {
            "data": [DATA],
            "caches": [CACHE | {"codec": codec}],
            "left_out": {"samples": 0, "rows": "dd"},
        },
    }


@pytest.fixture
def out(tmp_path):
    return tmp_path / "räume ✓" / "mit leer" / "out"


@pytest.fixture
def begun(out):
    out.mkdir(parents=True)
    start(out, settings(), {"config": {"out": out}})
    return out


# What stands there


def test_a_new_folder(out):
    assert read_started(out, resume=False) is None
    assert open_folder(out, settings(), resume=False) == "new"
    assert not out.parent.exists()
    out.mkdir(parents=True)
    assert open_folder(out, settings(), resume=False) == "new"


def test_what_a_process_killed_before_the_start_leaves_is_new(out):
    """A part; and that of an older version, which stays."""
    out.mkdir(parents=True)
    (out / files._tagged("started.json")).write_text("{")
    (out / "started.json.part").write_text("{")
    (out / ".lock").write_text("")
    assert open_folder(out, settings(), resume=False) == "new"
    with locked(out):
        start(out, settings(), {})
    assert open_folder(out, settings(), resume=False) == "begun"
    assert sorted(path.name for path in out.iterdir()) == ["started.json", "started.json.part"]


@pytest.mark.parametrize("exists", [False, True])
def test_resume_needs_a_run(out, exists):
    if exists:
        out.mkdir(parents=True)
    with pytest.raises(ConfigError, match="there is no run in .*out to go on with; leave out --resume$"):
        open_folder(out, settings(), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_the_same_settings_go_on(begun, resume):
    (begun / "metrics.jsonl").write_text("")
    assert open_folder(begun, settings(), resume) == "begun"
    assert read_started(begun, resume)["about"] == {"config": {"out": str(begun)}}
    (begun / "run.json").write_text("{}")
    assert open_folder(begun, settings(), resume) == "complete"


@pytest.mark.parametrize("complete", [False, True])
def test_other_settings_are_refused_in_one_sentence(begun, complete):
    if complete:
        (begun / "run.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        open_folder(begun, settings(lr=0.01, codec="int4r"), resume=True)
    assert str(caught.value) == (
        f"{begun} holds another run (--lr 0.001, now 0.01; another cache: codec int8, now int4r); "
        f"name another --out, or remove {begun}"
    )


def test_a_message_lists_few_differences(begun):
    with pytest.raises(ConfigError, match="--flip.*--lr.*--seed 0, now 5; and 2 more differences"):
        open_folder(begun, settings(lr=0.01, seed=5, flip=0.5, steps=10, codec="int4r"), resume=False)


@pytest.mark.parametrize("names", [["run.json", "metrics.jsonl"], ["metrics.jsonl"], ["holiday.jpg"], ["checkpoints"]])
def test_a_folder_that_holds_something_else_is_left_alone(out, names):
    out.mkdir(parents=True)
    for name in names:
        (out / name).write_text("{}")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="exists already; remove it or name another --out$"):
            read_started(out, resume)
    assert sorted(path.name for path in out.iterdir()) == sorted(names)


def test_a_file_or_a_dangling_link_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(ConfigError, match=f"{name} exists already"):
            read_started(tmp_path / name, resume=False)
    with pytest.raises(TrainingError, match="cannot write the run to"), locked(tmp_path / "file" / "out"):
        pass
    with pytest.raises(TrainingError, match="cannot write the run to"), locked(tmp_path / "file"):
        pass


def test_started_json_cut_anywhere_or_changed_is_damaged(begun):
    file = begun / "started.json"
    content = file.read_bytes()
    cut = [content[:size] for size in range(0, len(content) - 2, 37)]
    flipped = [content[:k] + bytes([content[k] ^ 4]) + content[k + 1 :] for k in range(0, len(content), 29)]
    others = [b"[]", b"null", b"\xff\xfe", b'{"checksum": 3}', b"[" * 100_000, content.replace(b"0.001", b"0.003")]
    for damaged in (*cut, *flipped, *others):
        file.write_bytes(damaged)
        try:
            same = json.loads(damaged) == json.loads(content)
        except (ValueError, RecursionError):
            same = False
        if same:  # a space has become another
            assert read_started(begun, resume=False)
            continue
        with pytest.raises(
            ConfigError, match="started.json is damaged or cannot be read .*name another --out, or remove"
        ):
            open_folder(begun, settings(), resume=False)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match="is damaged or cannot be read"):
        read_started(begun, resume=False)


def test_started_json_of_another_version(begun, monkeypatch):
    monkeypatch.setattr(folder, "FORMAT", 2)
    with pytest.raises(ConfigError, match="has format version 1 and this lift-fast goes on with 2"):
        open_folder(begun, settings(), resume=False)


def test_the_checksum_tells_runs_apart(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    first = start(tmp_path / "a", settings(), {})["checksum"]
    assert read_started(tmp_path / "a", resume=False)["checksum"] == first
    assert start(tmp_path / "b", settings(), {})["checksum"] == first
    assert start(tmp_path / "c", settings(seed=1), {})["checksum"] != first


def test_a_start_that_cannot_be_written_leaves_nothing(out, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TrainingError, match="cannot write the run to .*No space left"):
        with locked(out):
            start(out, settings(), {})
    assert not out.parent.exists()


# The lock


def hold(out, pipe, child):
    os.setsid()
    with locked(out):
        if child and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        (out / "metrics.jsonl").touch()
        pipe.send("locked")
        pipe.recv()


@contextmanager
def holder(out, child=False):
    """Another process that holds the lock of `out`, until it is sent something or killed. child: whether it has forked
    a process that goes on to live."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(out, theirs, child))
    process.start()
    try:
        assert ours.poll(30)
        ours.recv()
        yield process, ours
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def test_a_second_process_is_refused_until_the_first_ends(out):
    with holder(out) as (process, pipe):
        began = time.perf_counter()
        with pytest.raises(ConfigError) as caught, locked(out):
            pass
        assert time.perf_counter() - began < 1
        assert f"(pid {process.pid} on host " in str(caught.value)
        assert str(caught.value).endswith(f"is training into {out}; wait for it or name another --out")
        assert (out / ".lock").exists()
        pipe.send("end")
        process.join()
        with locked(out):
            assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]


def test_a_killed_process_frees_the_lock_though_its_children_live(out):
    with holder(out, child=True) as (process, _):
        process.kill()
        process.join()
        assert (out / ".lock").exists()
        os.killpg(process.pid, 0)  # the child lives
        with locked(out):
            pass


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "spikes.jsonl", "skipped.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_planted_at_a_name_is_not_written_to(begun, tmp_path, name, kind):
    """A link would lead the lock, which is emptied first, or the lines of a log to another file; opening a pipe would
    wait for ever."""
    (tmp_path / "other").write_text("precious")
    (begun / name).symlink_to(tmp_path / "other") if kind == "link" else os.mkfifo(begun / name)
    reason = "symbolic links" if kind == "link" else "No such device|it is a pipe"
    with pytest.raises((TrainingError, OSError), match=reason):
        if name == ".lock":
            with locked(begun):
                pass
        elif name == "skipped.jsonl":
            skipped = Skipped(Three(), 1.0)
            skipped.note(1, BadSample("empty", "it is empty"))
            skipped.write_to(begun / name)
        else:
            JsonLines(begun / name).log({})
    assert (tmp_path / "other").read_text() == "precious"


class Three:
    """A data set, as far as Skipped knows one."""

    shard_sizes = (3,)

    def where(self, row):
        return f"sample {row}"


def test_logs_with_a_pipe_or_a_long_line_in_their_place(begun, tmp_path):
    os.mkfifo(begun / "metrics.jsonl")
    with pytest.raises(TrainingError, match="cannot write the run to .*it is a pipe, not a file"):
        rewind(begun, 3)
    (begun / "metrics.jsonl").unlink()
    (begun / "metrics.jsonl").write_text(line(0) + "[" * (1 << 25) + "\n" + line(1) + line(7))
    assert len(rewind(begun, 3).losses) == 2
    assert (begun / "metrics.jsonl").read_text() == line(0) + line(1)


def test_a_lock_file_that_says_nothing(out):
    with holder(out):
        for content in (b"", b"[]", b"{}", b"\xff", b"9" * 5000):
            (out / ".lock").write_bytes(content)
            with pytest.raises(ConfigError, match="another process is training into"), locked(out):
                pass


def test_a_folder_without_a_file_is_removed_with_the_parents_that_were_made(out, tmp_path):
    for make in ((), [out]):
        for path in make:
            path.mkdir(parents=True)
        with suppress(KeyboardInterrupt), locked(out):
            assert out.is_dir()
            raise KeyboardInterrupt
        assert out.exists() == bool(make)
        assert not list(out.parent.glob("out/*"))
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "other").mkdir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locked(Path("out")):
        start(Path("out"), settings(), {})
    assert open_folder(Path("out"), settings(), resume=True) == "begun"
    assert not list(tmp_path.glob("out/.lock"))


def test_a_folder_that_cannot_be_written_to(out, monkeypatch):
    out.mkdir(parents=True)
    usual = open

    def read_only(path, mode="r", *rest, **named):
        if "r" not in mode:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, mode, *rest, **named)

    monkeypatch.setattr(folder, "open", read_only, raising=False)  # root may write to any folder
    with pytest.raises(TrainingError, match="cannot write the run to .*Permission denied"), locked(out):
        pass
    assert out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_without_permission(out):
    out.mkdir(parents=True)
    out.chmod(0o500)
    try:
        with pytest.raises(TrainingError, match="cannot write the run to"), locked(out):
            pass
    finally:
        out.chmod(0o700)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(out, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locked(out):
        start(out, settings(), {})
    assert [path.name for path in out.iterdir()] == ["started.json"]


def test_a_system_without_locks(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with locked(out):
        assert not list(out.iterdir())
    assert not out.parent.exists()


def test_a_lock_that_fails_for_another_reason_is_an_error(out, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fcntl.lockf", broken)
    with pytest.raises(TrainingError, match="cannot write the run to .*Input/output error"), locked(out):
        pass


def test_a_full_disk_does_not_stop_the_lock(out, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "open", lambda path, *_, **named: Full(path, "a+"), raising=False)
    with locked(out):
        assert (out / ".lock").read_bytes() == b""
    assert not out.parent.exists()


def test_a_lock_file_that_is_removed_meanwhile_is_locked_anew(out, monkeypatch):
    import fcntl

    usual, left = fcntl.lockf, [3]

    def lockf(file, how):
        usual(file, how)
        if left[0]:
            left[0] -= 1
            shutil.rmtree(out)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(out):
        assert (out / ".lock").read_text()
    assert left == [0]
    left[0] = 1000
    with pytest.raises(TrainingError, match="removed again and again"), locked(out):
        pass


def test_processes_that_lock_and_remove_one_folder_are_never_within_at_once(out, tmp_path):
    def enter(times):
        while times:
            with suppress(ConfigError), locked(out):
                (tmp_path / "alone").mkdir()  # fails if another process is within
                (tmp_path / "alone").rmdir()
                times -= 1

    racing = [multiprocessing.get_context("fork").Process(target=enter, args=(150,)) for _ in range(3)]
    for process in racing:
        process.start()
    for process in racing:
        process.join()
    assert [process.exitcode for process in racing] == [0, 0, 0]
    assert not list(out.glob("*"))


# The logs


def line(step, **others):
    return json.dumps({"step": step, "loss": step / 7, "step_ms": 10.0 + step} | others) + "\n"


def test_logs_are_cut_back_to_the_checkpoint(begun):
    scores = json.dumps({"step": 3, "eval": {"held out": 0.5}}) + "\n"
    later = json.dumps({"step": 6, "eval": {"held out": 0.6}}) + "\n"
    lines = [*map(line, range(4)), scores, *map(line, range(4, 7)), later]
    (begun / "metrics.jsonl").write_text("".join(lines))
    spikes = [json.dumps({"step": step, "keys": ["ü"]}) + "\n" for step in (1, 4, 5)]
    (begun / "spikes.jsonl").write_text("".join(spikes))
    history = rewind(begun, 5)
    assert (begun / "metrics.jsonl").read_text() == "".join(lines[:6])
    assert (begun / "spikes.jsonl").read_text() == "".join(spikes[:2])
    assert history.losses == [step / 7 for step in range(5)]
    assert history.step_ms == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert history.warnings == []
    assert rewind(begun, 5) == history
    assert rewind(begun, 0) == folder.History()
    assert (begun / "metrics.jsonl").read_text() == (begun / "spikes.jsonl").read_text() == ""


@pytest.mark.parametrize("step", [3, 4])
def test_a_line_cut_anywhere_is_dropped(begun, step):
    whole, last = "".join(map(line, range(3))), line(3)
    for size in range(len(last)):
        (begun / "metrics.jsonl").write_text(whole + last[:size])
        history = rewind(begun, step)
        assert (begun / "metrics.jsonl").read_text() == whole
        assert len(history.losses) == 3
        assert len(history.warnings) == step - 3
    (begun / "metrics.jsonl").write_text(whole + last)
    assert len(rewind(begun, step).losses) == step


def test_lost_steps_are_a_warning(begun):
    assert rewind(begun, 0).warnings == []
    (warning,) = rewind(begun, 12).warnings
    assert "metrics.jsonl lacks 12 of the 12 steps before the checkpoint" in warning
    damaged = [b"\0" * 300 + b"\n", b"[3]\n", b'{"step": "4"}\n', b'{"step": 4, "loss": "low"}\n', b"\xff\xfe\n", b"\n"]
    whole = [line(step).encode() for step in range(6)]
    (begun / "metrics.jsonl").write_bytes(b"".join(whole[:2] + damaged + whole[3:]))
    history = rewind(begun, 6)
    assert (begun / "metrics.jsonl").read_bytes() == b"".join(whole[:2] + whole[3:])
    assert history.losses == [step / 7 for step in (0, 1, 3, 4, 5)]
    assert "lacks 1 of the 6 steps" in history.warnings[0]


def test_the_loss_of_a_skipped_step_may_be_nan(begun):
    (begun / "metrics.jsonl").write_text(line(0) + line(1, loss=math.nan) + line(2, loss=-math.inf))
    losses = rewind(begun, 3).losses
    assert math.isnan(losses[1])
    assert losses[2] == -math.inf


def test_logs_that_cannot_be_rewritten_stay(begun, monkeypatch):
    content = "".join(map(line, range(5)))
    (begun / "metrics.jsonl").write_text(content)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(folder.os, name, full)
            with pytest.raises(TrainingError, match="cannot write the run to .*No space left"):
                rewind(begun, 3)
        assert sorted(path.name for path in begun.iterdir()) == ["metrics.jsonl", "started.json"]
        assert (begun / "metrics.jsonl").read_text() == content


def test_a_process_killed_while_it_cuts_leaves_the_old_log_or_the_new_one(begun):
    content = "".join(map(line, range(5)))
    (begun / "metrics.jsonl").write_text(content)

    def cut(name):
        setattr(folder.os, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        rewind(begun, 3)

    for name in ("fsync", "replace"):
        process = multiprocessing.get_context("fork").Process(target=cut, args=(name,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(begun.glob("metrics.jsonl.*.part"))) == 1
        assert (begun / "metrics.jsonl").read_text() == content
        with locked(begun):  # as the next run does
            assert not list(begun.glob("*.part"))
    assert len(rewind(begun, 3).losses) == 3
    assert sorted(path.name for path in begun.iterdir()) == ["metrics.jsonl", "started.json"]


@pytest.mark.parametrize("torn", [0, 5])
@pytest.mark.parametrize("purge", [6, 0])
def test_tensorboard_shows_each_step_once(out, torn, purge):
    """What the trainer relies on: SummaryWriter(purge_step=…) hides the steps that a killed process wrote after it.

    torn: bytes of the killed process's last event that are missing."""

    def write(steps, offset, **named):
        writer = SummaryWriter(str(out), **named)
        for step in steps:
            writer.add_scalar("loss", step + offset, step)
            if step % 5 == 4:
                writer.add_scalar("eval/held out", step + offset, step)
        writer.close()
        return max(out.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)

    first = write(range(10), 0)
    os.truncate(first, first.stat().st_size - torn)
    os.rename(first, out / first.name.replace(".tfevents.1", ".tfevents.0"))  # written some seconds before
    write(range(purge, 20), 100, purge_step=purge)
    accumulator = EventAccumulator(str(out), size_guidance={"scalars": 0})
    accumulator.Reload()
    shown = {event.step: event.value for event in accumulator.Scalars("loss")}
    assert shown == {step: step + (100 if step >= purge else 0) for step in range(20)}
    for tag in ("loss", "eval/held out"):
        steps = [event.step for event in accumulator.Scalars(tag)]
        assert steps == sorted(set(steps))

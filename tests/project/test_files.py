"""lift_fast/files.py: odd kinds of files, parts of running and of killed processes, links that somebody has planted."""

import errno
import os
import resource
import signal
import socket
import stat
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from support.forked import at_once, forked, forked_later, killed_in

from lift_fast import files
from lift_fast.cli.common import write_json
from lift_fast.files import (
    for_appending,
    is_part,
    locked_folder,
    open_regular,
    part_folder,
    read_regular,
    remove_abandoned,
    shared_folder,
    write_first,
    write_whole,
    written_whole,
)

LATIN = os.fsdecode(b"\xe4\xff.json")  # a name that is not UTF-8
NAMES = ["a.json", "a b[1]*?.json", ".hidden", "n" * 255, "ä" * 127, LATIN, os.fsdecode(b"\xff" * 250), "a\nb"]


def names(folder):
    return sorted(os.listdir(folder))


def parts(folder):
    return [name for name in names(folder) if is_part(name)]


# Reading


def odd(path: Path, kind: str) -> str:
    """Makes what is no file; what the error says."""
    if kind == "folder":
        path.mkdir()
        return "Is a directory|it is a folder, not a file"
    if kind == "pipe":
        os.mkfifo(path)
        return "it is a pipe, not a file"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.open(path.parent, os.O_RDONLY)  # its address has 108 bytes at most
            made.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
        return "No such device|it is a socket, not a file"
    target = {"device": "/dev/zero", "terminal": "/dev/tty", "loop": path, "nothing": path.with_name("gone")}[kind]
    path.symlink_to(target)
    return {"device": "it is a device", "terminal": "it is a device|No such device", "loop": "symbolic link"}.get(
        kind, "No such file"
    )


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "terminal", "loop", "nothing"])
def test_what_is_no_file_is_an_error_at_once(tmp_path, kind):
    reason = odd(tmp_path / "x", kind)
    signal.setitimer(signal.ITIMER_REAL, 10)  # a pipe that is waited for ends the test run
    try:
        for read in (open_regular, lambda path: read_regular(path, 10)):
            with pytest.raises(OSError, match=reason):
                read(tmp_path / "x")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(os.listdir("/proc/self/fd")) < 200


def test_no_descriptor_is_left(tmp_path):
    os.mkfifo(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(OSError):
            open_regular(tmp_path / "x")
        with pytest.raises(OSError), open(tmp_path / "x", "a", opener=for_appending):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_whole_and_a_link_to_one_too(tmp_path, name):
    (tmp_path / name).write_bytes(b"content")
    (tmp_path / "link").symlink_to(name)
    for path in (tmp_path / name, tmp_path / "link"):
        assert read_regular(path, 7) == b"content"
        with pytest.raises(OSError, match="it has 7 bytes or more, and at most 6 are read") as raised:
            read_regular(path, 6)
        assert raised.value.errno == errno.EFBIG and raised.value.filename == str(path)


def test_a_file_that_grows_and_one_that_says_no_size(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    real = os.fstat

    def grown(number):
        found = real(number)
        with open(path, "ab") as file:
            file.write(b"67890")
        return found

    monkeypatch.setattr(files.os, "fstat", grown)
    with pytest.raises(OSError, match="it has 10 bytes or more|it has 8 bytes or more"):
        read_regular(path, 7)
    monkeypatch.undo()
    assert read_regular("/proc/self/status", 1 << 16).startswith(b"Name:")
    with pytest.raises(OSError, match="at most 4 are read"):
        read_regular("/proc/self/status", 4)


def test_a_file_on_which_another_process_holds_a_lease(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    ours, theirs = os.pipe()

    def hold():
        file, asked = os.open(path, os.O_RDWR), []
        signal.signal(signal.SIGIO, lambda *_: asked.append(True))
        files.fcntl.fcntl(file, files.fcntl.F_SETLEASE, files.fcntl.F_WRLCK)
        os.write(theirs, b"held")
        while not asked:
            time.sleep(0.01)
        files.fcntl.fcntl(file, files.fcntl.F_SETLEASE, files.fcntl.F_UNLCK)

    with forked_later(hold):
        os.close(theirs)
        assert os.read(ours, 4) == b"held" and read_regular(path, 10) == b"12345"
    os.close(ours)


def test_only_as_much_is_read_as_may_be(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(1 << 40)  # without a block on the disk
    with pytest.raises(OSError, match=f"it has {1 << 40} bytes or more"):
        read_regular(tmp_path / "x", 1 << 20)


# Writing


@pytest.mark.parametrize("name", NAMES)
def test_files_appear_whole_and_no_part_is_left(tmp_path, name):
    path = tmp_path / name
    for content in (b"one", b"another"):
        write_whole({path: content, tmp_path / "second": content})
        assert path.read_bytes() == (tmp_path / "second").read_bytes() == content
    with written_whole(path) as part:
        part.write(b"third")
        assert path.read_bytes() == b"another" and is_part(Path(part.name).name)
    assert path.read_bytes() == b"third" and write_first(path, b"fourth") is False
    assert path.read_bytes() == b"third" and names(tmp_path) == sorted([name, "second"])
    usual = tmp_path / "usual"
    usual.touch()
    assert path.stat().st_mode == usual.stat().st_mode


def test_an_error_leaves_what_was_there_and_no_part(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "a") as part:
        part.write(b"new")
        raise ZeroDivisionError
    for write in (write_whole, lambda files: [write_first(*file) for file in files.items()]):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(files, "_flush", full)
            write({tmp_path / "a": b"new", tmp_path / "b": b"new"})
        with pytest.raises(OSError, match="No such file"):
            write({tmp_path / "gone" / "a": b"new"})
    with pytest.raises(TypeError):
        write_whole({tmp_path / "a": b"new", tmp_path / "b": "no bytes"})
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def full(part):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_real_limit_leaves_no_part(tmp_path):
    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for action in (lambda: write_whole({tmp_path / "a": b"x" * 999, tmp_path / "b": b"x" * 1001}),):
            with pytest.raises(OSError, match="File too large"):
                action()
        assert names(tmp_path) == []

    forked(write)


def test_a_link_at_the_name_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    for name, target in (("link", "victim"), ("dangling", "new"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
        write_whole({tmp_path / name: b"mine"})
        assert not (tmp_path / name).is_symlink() and (tmp_path / name).read_bytes() == b"mine"
    assert (tmp_path / "victim").read_bytes() == b"precious" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["x", "/dev/null", "/dev/full", "/dev/stdout", "/dev/fd/1"])
def test_a_device_or_a_stream_is_not_replaced(tmp_path, name):
    """As root `--json /dev/null` would put a file in its place, for all programs of the machine."""
    path = tmp_path / name
    if name == "x":
        path.symlink_to("/dev/null")
    before = os.lstat(path)
    for write in (lambda: write_whole({path: b"mine"}), lambda: written_whole(path).__enter__()):
        with pytest.raises(OSError, match="it is a (device|stream), not a file|No such file|Permission"):
            write()
    assert os.path.samestat(before, os.lstat(path)) and stat.S_IFMT(before.st_mode) == stat.S_IFMT(path.lstat().st_mode)


def test_planted_links_at_guessed_names_of_parts_lead_nowhere(tmp_path, monkeypatch):
    """Even where the tag is known beforehand."""
    (tmp_path / "victim").write_bytes(b"precious")
    tags = iter(["0" * 16, "1" * 16, "2" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: next(tags))
    planted = [f"a.{tag * 16}{files._system()}.part" for tag in "012"]
    for name in ("a.part", planted[0], planted[1]):
        (tmp_path / name).symlink_to("victim")
    for write in (lambda: write_whole({tmp_path / "a": b"x"}), lambda: write_first(tmp_path / "a", b"x")):
        with pytest.raises(FileExistsError):
            write()
    (tmp_path / planted[2]).symlink_to(tmp_path)
    with pytest.raises(FileExistsError), part_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert names(tmp_path) == sorted(["victim", "a.part", *planted])


def test_a_json_file_of_a_command(tmp_path):
    """--json wrote through a link planted at PATH.part."""
    (tmp_path / "victim").write_bytes(b"precious")
    path = tmp_path / "inner" / "x.json"
    path.parent.mkdir()
    for name in ("x.json.part", "x.json"):
        (path.parent / name).symlink_to("../victim")
    killed_in(lambda: opened(written_whole(path)))
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}' and not path.is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"precious" and names(path.parent) == ["x.json", "x.json.part"]
    with pytest.raises(OSError, match="it is a device, not a file"):
        write_json(Path("/dev/null"), {})


def test_logs_are_appended_to_files_alone(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("victim")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "/dev/null", "."):
        with pytest.raises(OSError), open(tmp_path / name, "a", opener=for_appending):
            pass
    for text in ("one", "two"):
        with open(tmp_path / "log", "a", opener=for_appending) as file:
            file.write(text)
    assert (tmp_path / "log").read_text() == "onetwo" and (tmp_path / "victim").read_bytes() == b"precious"


def test_a_file_that_is_there_stays_when_it_may_not_be_replaced(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links")

    for links in (True, False):
        if not links:
            monkeypatch.setattr(files.os, "link", refuse)
        path = tmp_path / str(links)
        for content, error in ((b"one", None), (b"one", None), (b"two", FileExistsError)):
            with pytest.raises(error) if error else ExitStack(), written_whole(path, replace=False) as part:
                part.write(content)
        assert write_first(path, b"two") is False and write_first(tmp_path / f"new {links}", b"one") is True
        assert path.read_bytes() == b"one"
    assert not parts(tmp_path)


# Parts of processes that run, and of those that were killed


def write_a(folder):
    with written_whole(folder / "a") as part:
        part.write(b"half")
        part.flush()
        yield


def make_a(folder):
    with part_folder(folder / "a") as part:
        (part / "inner").mkdir()
        (part / "inner" / "x").write_bytes(b"half")
        yield


@pytest.mark.parametrize("making", [write_a, make_a])
def test_parts_of_killed_processes_are_removed_and_of_running_ones_not(tmp_path, making):
    for _ in range(3):
        killed_in(lambda: making(tmp_path))
    running = making(tmp_path)
    next(running)
    (tmp_path / "b").touch()
    assert len(parts(tmp_path)) == (4 if making is write_a else 1)  # part_folder removes those of its name itself
    forked(lambda: remove_abandoned(tmp_path, "b"))
    assert len(parts(tmp_path)) == (4 if making is write_a else 1)
    forked(lambda: remove_abandoned(tmp_path, "a"))
    [left] = parts(tmp_path)
    remove_abandoned(tmp_path)
    assert parts(tmp_path) == [left]
    with suppress(StopIteration):
        next(running)
    assert not parts(tmp_path) and ("a" in names(tmp_path)) == (making is write_a)


def test_a_part_stays_while_a_child_of_its_writer_may_write(tmp_path):
    """A child that was forked has the open file, and so the lock."""
    ours, theirs = os.pipe()

    def write():
        with written_whole(tmp_path / "a"):
            if os.fork():
                os.kill(os.getpid(), signal.SIGKILL)
            os.close(theirs)
            os.read(ours, 1)
            os._exit(0)

    child = os.fork()
    if not child:
        write()
    os.close(ours)
    os.waitpid(child, 0)
    remove_abandoned(tmp_path)
    assert len(parts(tmp_path)) == 1
    os.close(theirs)
    for _ in range(500):
        remove_abandoned(tmp_path)
        if not parts(tmp_path):
            break
        threading.Event().wait(0.01)
    assert not parts(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_any_name_are_found(tmp_path, name):
    killed_in(lambda: opened(written_whole(tmp_path / name)))
    killed_in(lambda: opened(part_folder(tmp_path / name, within=tmp_path / "inner")))
    assert len(parts(tmp_path)) == len(parts(tmp_path / "inner")) == 1
    remove_abandoned(tmp_path, "another")
    remove_abandoned(tmp_path / "inner", "*")
    assert len(parts(tmp_path)) == len(parts(tmp_path / "inner")) == 1
    remove_abandoned(tmp_path, name)
    remove_abandoned(tmp_path / "inner")
    assert not parts(tmp_path) and not parts(tmp_path / "inner")


def opened(context):
    with context:
        yield


def test_what_only_looks_like_a_part_stays(tmp_path):
    tag = f"{'0' * 16}{files._system()}"
    others = [".part", "a.part", "a.7.part", "a.7-ab.part", f"a.{tag[1:]}.part", f"a.{tag}x.part", f".{tag}.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "x").touch()
    links = [f"b.{tag}.part", f"c.{tag}.part"]
    (tmp_path / links[0]).symlink_to("victim")
    (tmp_path / links[1]).symlink_to("victim/x")
    os.mkfifo(tmp_path / f"d.{tag}.part")
    (tmp_path / f"e.{tag}.part").mkdir()
    (tmp_path / f"e.{tag}.part" / "link").symlink_to("../victim")
    remove_abandoned(tmp_path)
    assert names(tmp_path) == sorted([*others, *links, f"d.{tag}.part", "victim"])
    assert names(tmp_path / "victim") == ["x"]
    remove_abandoned(tmp_path / "nothing")
    remove_abandoned(tmp_path / "a.part")


@pytest.mark.parametrize("folder", [False, True])
def test_a_part_of_another_host_stays_for_a_day(tmp_path, folder):
    """Its lock may not be seen here."""
    path = tmp_path / f"a.{'0' * 16}{'f' * 8}.part"
    path.mkdir() if folder else path.touch()
    remove_abandoned(tmp_path)
    assert parts(tmp_path)
    os.utime(path, (0, 0))
    remove_abandoned(tmp_path)
    assert not parts(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_without_locks_parts_stay_and_writing_works(tmp_path, monkeypatch, number):
    """None: as on Windows, without the module."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    killed_in(lambda: write_a(tmp_path))
    if number is None:
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    remove_abandoned(tmp_path)
    assert len(parts(tmp_path)) == 1
    write_whole({tmp_path / "b": b"x"})
    with part_folder(tmp_path / "c") as part, locked_folder(tmp_path), shared_folder(tmp_path / "d"):
        (part / "x").touch()
        part.rename(tmp_path / "c")
    assert names(tmp_path)[1:] == ["b", "c"] and write_first(tmp_path / "b", b"y") is False


def test_a_part_that_is_met_before_its_lock_is_made_again(tmp_path, monkeypatch):
    """Another process removes it after it was made and before it is locked, or holds the lock just then."""
    real, claims = files._claimed, []

    def claimed(number, path):
        claims.append(path)
        if len(claims) in (1, 3):
            forked(lambda: remove_abandoned(tmp_path))
            assert not path.exists()
        if len(claims) == 2:
            other = os.open(path, os.O_RDONLY)
            files.fcntl.flock(other, files.fcntl.LOCK_EX)
            try:
                return real(number, path)
            finally:
                os.close(other)
        return real(number, path)

    monkeypatch.setattr(files, "_claimed", claimed)
    write_whole({tmp_path / "a": b"x"})
    assert len(claims) == 4 and (tmp_path / "a").read_bytes() == b"x"
    claims.clear()
    with part_folder(tmp_path / "b") as part:
        part.rename(tmp_path / "b")
    assert len(claims) == 4
    remove_abandoned(tmp_path)
    assert names(tmp_path) == ["a", "b"]


def test_a_folder_that_is_removed_before_it_is_opened_is_made_again(tmp_path, monkeypatch):
    real, made = files._opened_folder, []

    def open_late(path):
        made.append(path)
        if len(made) == 1:
            forked(lambda: remove_abandoned(tmp_path))
        return real(path)

    monkeypatch.setattr(files, "_opened_folder", open_late)
    with part_folder(tmp_path / "a") as part:
        assert part == made[1] and not made[0].exists()
    assert names(tmp_path) == []


# Folders


def test_a_folder_is_renamed_or_removed(tmp_path):
    with part_folder(tmp_path / "x" / "out") as part:
        assert part.parent == tmp_path / "x" and not any(part.iterdir())
        (part / "file").write_bytes(b"x")
        part.rename(tmp_path / "x" / "out")
        assert not part.exists()
    assert names(tmp_path / "x") == ["out"]
    with pytest.raises(ZeroDivisionError), part_folder(tmp_path / "x" / "out") as part:
        (part / "file").write_bytes(b"x")
        raise ZeroDivisionError
    with part_folder(tmp_path / "out", within=tmp_path / "x" / "out") as part:
        assert part.parent == tmp_path / "x" / "out"
    assert names(tmp_path / "x") == ["out"] and names(tmp_path / "x" / "out") == ["file"]
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "x" / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_another_folder_under_the_name_of_a_part_is_not_removed(tmp_path):
    with part_folder(tmp_path / "out") as part:
        part.rename(tmp_path / "moved")
        part.mkdir()
        (part / "theirs").touch()
    assert (part / "theirs").exists()
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "a") as file:
        os.rename(file.name, tmp_path / "moved file")
        Path(file.name).write_bytes(b"theirs")
        raise ZeroDivisionError
    assert Path(file.name).read_bytes() == b"theirs"


def test_the_last_process_removes_a_shared_folder(tmp_path):
    path = tmp_path / "shared"
    ours, theirs = os.pipe()
    back, forth = os.pipe()

    def other():
        os.close(theirs)
        with shared_folder(path):
            (path / "file").touch()
            os.write(forth, b"in")
            os.read(ours, 1)
        os.write(forth, b"out")

    with forked_later(other) as join:
        os.close(ours)
        with shared_folder(path):
            assert os.read(back, 2) == b"in"
        assert (path / "file").exists()  # the other is within still
        os.close(theirs)
        join()
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), shared_folder(path):
        (path / "file").touch()
        raise ZeroDivisionError
    killed_in(lambda: opened(shared_folder(path)))
    assert (path / "file").exists()
    with shared_folder(path):
        assert (path / "file").exists()
    assert not path.exists()
    (tmp_path / "victim").write_bytes(b"precious")
    path.mkdir()
    (path / ".lock").symlink_to("../victim")
    with pytest.raises(OSError), shared_folder(path):
        pass
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_a_shared_folder_on_nfs_is_removed(tmp_path, monkeypatch):
    """There a removed file that is open keeps its folder from being removed, under another name."""
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, ignore_errors: (path / ".lock").unlink())
    with shared_folder(tmp_path / "shared"):
        pass
    assert not names(tmp_path)


# Several at once


def test_of_many_that_write_first_one_wins_and_all_know_it(tmp_path):
    for turn in range(3):
        path = tmp_path / str(turn)
        wins = at_once(8, lambda number, path=path: write_first(path, b"%d" % number * 1000))
        assert sum(wins) == 1
        assert path.read_bytes() == b"%d" % wins.index(True) * 1000
    assert not parts(tmp_path)


def test_many_that_write_and_tidy_do_not_disturb_each_other(tmp_path):
    """Each process writes files and folders, and removes what others have abandoned; some are killed."""

    def work(number):
        for turn in range(15):
            remove_abandoned(tmp_path)
            write_whole({tmp_path / "a": b"%d" % number * 500, tmp_path / f"b{number}": b"%d" % turn})
            with part_folder(tmp_path / "out") as part:
                (part / "x").touch()
                assert names(part) == ["x"]
            if number == 7 and turn == 7:
                with written_whole(tmp_path / "a"):
                    os.kill(os.getpid(), signal.SIGKILL)
        return True

    ended = at_once(8, work, killed={7})
    assert ended == [True] * 7 + [None]
    remove_abandoned(tmp_path)
    assert names(tmp_path) == sorted(["a", *(f"b{number}" for number in range(8))])
    assert len({*(tmp_path / "a").read_bytes()}) == 1 and (tmp_path / "a").stat().st_size == 500


def test_threads_of_one_process_do_not_take_each_others_parts(tmp_path):
    errors = []

    def work(number):
        try:
            for _ in range(30):
                write_whole({tmp_path / f"{number}": b"x"})
                remove_abandoned(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and names(tmp_path) == ["0", "1", "2", "3"]

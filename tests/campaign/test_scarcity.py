"""Commands without space on the disk, or with few descriptors: each ends with one message and leaves nothing
unfinished, and with what it lacked the same command then gives the usual files."""

import errno
import os
import random
import resource
import shutil
import sys

import pytest
from support import complete  # noqa: F401
from support.judged import judged_command
from support.small_commands import COMMANDS, made_in, prepare, written


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    with made_in(tmp_path_factory.mktemp("sets")) as root:
        yield root


def full_disk(folder, moment):
    """From the file operation number `moment` on, those that need space in the folder fail."""
    done = [0]

    def hook(event, arguments):
        if event not in ("open", "os.mkdir", "os.rename", "os.link") or not str(arguments[0]).startswith(str(folder)):
            return
        # An existing file is opened whether there is space or not.
        if event != "open" or (arguments[2] & os.O_CREAT and not os.path.exists(arguments[0])):
            done[0] += 1
            if done[0] >= moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))

    return lambda: sys.addaudithook(hook)


def largest_file(size):
    """No file may become larger."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def descriptors(spare):
    """At most so many more files may be opened."""

    def lower():
        used = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        limit = spare
        while limit - sum(number < limit for number in used) < spare:
            limit += 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    return lower


def lacking(name, sets, out, before):
    """What the command ended with; what it has left must not hinder it the next time."""
    line = prepare(name, sets, out)
    ended = judged_command(line, before=before)
    left = [path.name for path in out.rglob("*") if path.name.endswith(".part")]
    again = ended if ended.outcome == "right answer" else judged_command(line)
    assert again.outcome == "right answer", (left, again.message)
    files = written(out)
    shutil.rmtree(out)
    return ended.outcome, files, left


def causes(rng, folder, cases):
    """What a command lacks: space for names, then for bytes, then descriptors."""
    for _ in range(cases):
        yield full_disk(folder, rng.choice([1, 2, 3, rng.randint(1, 20)]))
        yield largest_file(rng.choice([2000, rng.randint(2000, 20_000)]))
        yield descriptors(rng.randint(25, 40))


@pytest.mark.campaign
@pytest.mark.parametrize("name", COMMANDS)
def test_without_space_or_descriptors(sets, tmp_path, tally, name):
    rng, out = random.Random(name), tmp_path / "out"
    outcome, whole, _ = lacking(name, sets, out, None)
    assert outcome == "right answer"
    for before in causes(rng, out, 3):
        outcome, files, left = lacking(name, sets, out, before)
        assert files == whole and left == []
        tally("fault", outcome)


@pytest.mark.parametrize("name", ["data pack", "cache convert", "train"])
def test_forty_descriptors_are_enough(sets, tmp_path, name):
    assert lacking(name, sets, tmp_path / "out", descriptors(40))[0] == "right answer"

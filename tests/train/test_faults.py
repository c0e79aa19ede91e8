"""Faults of a run: each ends in completion, or in one clear error with the checkpoints intact; none goes on wrong.

`make campaign` injects 300 of them (COUNTS), `make test` some of each kind (SHORT). A fault is a function of its kind
and its number.
"""

import errno
import random
import shutil

import pytest
from support import complete  # noqa: F401
from support.faults import (
    DAMAGE,
    DATA,
    PLACES,
    STEPS,
    VARIANTS,
    Act,
    Base,
    Disk,
    Folder,
    Killed,
    Written,
    copy_of,
    intact,
    remove,
    run,
)

from lift_fast.data.reading import FILES
from lift_fast.errors import LiftFastError, RankLost, Stopped
from lift_fast.nn import PRESETS

pytestmark = [
    pytest.mark.threads(1),  # runs are compared bit for bit, also with those of ranks, which have one
    # Files that could not be flushed; TensorBoard's thread.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

TIMEOUT, SLACK = 5.0, 25.0  # seconds
COUNTS = {"damage": 110, "disk": 80, "data": 40, "stop": 10, "ranks": 60}
SHORT = {
    "damage": {5, 9, 10, 12, 14, 17, 19, 20, 26, 27},
    "disk": {*range(0, 80, 9)},
    "data": {0, 5, 12},
    "stop": {0},
    "ranks": {12, 18, 33},  # in the loader, in the exchange, in the thread that saves; the same undisturbed run
}
ALONE = [name for name in VARIANTS if name != "lift fsdp"]
ON_RANKS = ["lift", "clip eval", "lift fsdp"]


def numbers(kind):
    return [
        pytest.param(number, marks=() if number in SHORT[kind] else pytest.mark.campaign)
        for number in range(COUNTS[kind])
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    yield Base(tmp_path_factory.mktemp("faults"))
    PRESETS.pop("small", None)


def clear(ended):
    """Checks that an error is one that a user can act on."""
    error = ended.error
    assert isinstance(error, LiftFastError) and len(str(error)) > 20, ended.trace or repr(error)


def check_whole(base, variant, out, world=1, logs=True):
    """Checks that a complete run is as one without faults. logs: whether its logs must be, too."""
    written, want = Written.by(out), base.whole(variant, world)
    assert written.weights == want.weights
    if logs:
        assert (written.loss, written.skipped) == (want.loss, want.skipped)
        counts = {} if world == 1 else {"skipped_pictures": None}  # what two ranks have met counts twice until a stop
        assert [line | counts for line in written.lines] == [line | counts for line in want.lines]
    left = [path.name for folder in (out, out / "checkpoints") for path in folder.glob(".*")]
    assert not [name for name in left if not name.startswith(".nfs")], left


def go_on(base, variant, config, world=1, logs=True, tries=2):
    """Runs the same command until it completes, and checks what it writes."""
    for _ in range(tries):
        ended = run(config, world)
        if all(one.error is None for one in ended):
            return check_whole(base, variant, config.out, world, logs)
        for one in ended:
            clear(one)
    raise AssertionError(f"not complete: {ended}")


@pytest.mark.parametrize("number", numbers("damage"))
def test_damage(base, tmp_path, number, tally):
    """Files of a stopped run are damaged: it goes on from what is intact, or says what is wrong."""
    rng = random.Random(f"damage {number}")
    kind = [*DAMAGE][number % len(DAMAGE)]
    variant, step = rng.choice(ALONE), rng.choice([5, 6, 7, 8, 9, 10, 11])
    out = tmp_path / "run"
    config = base.config(variant, out)
    copy = base.stopped(variant, step)
    shutil.copytree(copy, out)
    damaged = Folder(out, lambda: base.stopped(variant, step, seed=1), rng)
    DAMAGE[kind](damaged)
    before = intact(out)

    names = [path.name[5:] for path in damaged.checkpoints()]
    newest = max((int(name) for name in names if name.isdigit() and len(name) > 7), default=0)
    (ended,) = run(config)
    if ended.error is None and before and newest > before[-1]:
        assert any("is damaged" in warning for warning in ended.warnings), kind
    logs = kind not in ("metrics.jsonl", "skipped.jsonl") or not ended.warnings
    if ended.error is None:
        check_whole(base, variant, out, logs=logs)
        return tally("fault", "right answer")
    clear(ended)
    assert intact(out)[-1:] >= before[-1:]
    damaged.put_back(copy)
    go_on(base, variant, config, logs=logs)
    tally("fault", "error")


@pytest.mark.parametrize("number", numbers("disk"))
def test_disk(base, tmp_path, number, tally):
    """A file operation fails, once, or all from then on, at the beginning, on the way or at the end."""
    rng = random.Random(f"disk {number}")
    variant, step = rng.choice(ALONE), rng.choice([0, 0, 7])
    out = tmp_path / "run"

    def prepare(out):
        if step:
            shutil.copytree(base.stopped(variant, step), out)
        return base.config(variant, out)

    def calls(out):
        config = prepare(out)
        with Disk(out) as disk:
            (ended,) = run(config)
        assert ended.error is None
        return disk.calls

    counted = base.once((variant, step, "calls"), calls)
    what = sorted(counted)[number % len(counted)]
    moment = rng.randint(1, counted[what])
    code = rng.choice([errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
    config = prepare(out)
    before = intact(out)
    with Disk(out, what, moment, code, lasting=rng.random() < 0.4) as disk:
        (ended,) = run(config)
    assert disk.failed, (what, moment)
    if ended.error is None:
        check_whole(base, variant, out)
        return tally("fault", "right answer")
    clear(ended)
    assert intact(out)[-1:] >= before[-1:]
    go_on(base, variant, config)
    tally("fault", "error")


@pytest.mark.parametrize("number", numbers("data"))
def test_data(base, tmp_path, number, tally):
    """Data sets or caches change, go, or are damaged, while a run is stopped or while it trains."""
    rng = random.Random(f"data {number}")
    kind = [*DATA][number % len(DATA)]
    variant = rng.choice(["lift", "lift ema"] if "cache" in kind else ALONE)
    # The shards of a cache are mapped: a change in place shows while a run trains, and ends it where a file is cut.
    while_training = rng.random() < 0.4 and kind not in ("cache shard cut", "cache shard flipped", "cache code flipped")
    root, out = copy_of(base, tmp_path / "data"), tmp_path / "run"
    config = base.config(variant, out, root)
    FILES.forget()
    if while_training:
        moment = rng.randint(2, STEPS)
        act = Act("votes", moment, "call", lambda: DATA[kind](root, rng))
        (ended,) = run(config, fault=act)
        assert act.calls >= moment
    else:
        shutil.copytree(base.stopped(variant, 7), out)
        DATA[kind](root, rng)
        (ended,) = run(config)
    if ended.error is None:
        written, want = Written.by(out), base.whole(variant)
        # Other weights only where the samples that could not be read are counted.
        assert written.weights == want.weights or written.skipped > want.skipped, kind
        return tally("fault", "right answer")
    clear(ended)
    assert intact(out)
    for path in root.iterdir():
        remove(path)
    copy_of(base, root)
    FILES.forget()
    (ended,) = run(config)
    assert ended.error is None, ended.trace
    written, want = Written.by(out), base.whole(variant)
    assert written.weights == want.weights or written.skipped > want.skipped
    tally("fault", "error")


@pytest.mark.parametrize("number", numbers("stop"))
def test_stops(base, tmp_path, number, tally):
    """Signals and errors, again and again, at any place of one process."""
    rng = random.Random(f"stop {number}")
    variant, out = rng.choice(ALONE), tmp_path / "run"
    config = base.config(variant, out)
    actions = ["SIGTERM", "SIGINT", "SIGUSR1", "raise RuntimeError", "raise MemoryError", "raise KeyboardInterrupt"]
    for _ in range(4):
        action, place = rng.choice(actions), rng.choice(PLACES["lift"] if variant[0] == "l" else PLACES["clip"])
        if action.startswith("SIG"):
            place = rng.choice(
                ["step", "votes", "log", "commit"]
            )  # before the first step a signal does what it always does
        # A run that goes on has fewer steps.
        calls, _ = Act.calls_of(place)
        before = intact(out)
        (ended,) = run(config, fault=Act(place, rng.randint(1, max(1, calls // 3)), action))
        if action.startswith("SIG") and ended.error is not None:
            assert isinstance(ended.error, Stopped), ended.trace
        assert intact(out)[-1:] >= before[-1:]
    go_on(base, variant, config)
    tally("fault", "error")


@pytest.mark.parametrize("number", numbers("ranks"))
def test_ranks(base, tmp_path, number, tally):
    """One of two ranks dies, raises an error that nobody expected, or falls behind: the other ends in time."""
    rng = random.Random(f"ranks {number}")
    variant = ON_RANKS[number % len(ON_RANKS)]
    going_on = rng.random() < 0.25
    places = PLACES["on" if going_on else variant]
    place = places[number // len(ON_RANKS) % len(places)]
    calls, rank = Act.calls_of(place)
    rank = rng.randrange(2) if rank is None else rank
    raising = ["raise RuntimeError", "raise MemoryError", "raise OSError"]
    action = rng.choice(["kill", "kill", "exit", "sleep", *raising[: 3 if rng.random() < 0.5 else 1]])
    out = tmp_path / "run"
    config = base.config(variant, out, timeout=TIMEOUT)
    if going_on:
        shutil.copytree(base.stopped(variant, 7, 2), out)
        calls = min(calls, 10)
    before = intact(out)
    fault = Act(place, rng.randint(1, calls), action, 2 * TIMEOUT + 4, rank, tmp_path / "mark")
    ended = run(config, 2, fault)
    what = (variant, place, fault.moment, action, rank)
    if fault.fired() is None:  # on a machine that is too busy for TIMEOUT
        assert all(isinstance(one.error, RankLost) for one in ended), what
        go_on(base, variant, base.config(variant, out), 2)
        return tally("fault", "error")
    if all(one.error is None for one in ended):
        check_whole(base, variant, out, 2)
        return tally("fault", "right answer")
    for number, one in enumerate(ended):
        assert one.seconds < (2 * TIMEOUT + 4 if action == "sleep" else 2 * TIMEOUT) + SLACK, (what, one)
        if number == rank and action in ("kill", "exit"):
            assert isinstance(one.error, Killed), what
        elif number == rank and action.startswith("raise"):
            assert isinstance(one.error, LiftFastError) or "injected" in str(one.error), (what, one.trace)
        else:
            assert isinstance(one.error, LiftFastError), (what, one)
            if action in ("kill", "exit"):
                assert isinstance(one.error, RankLost), (what, one.trace)
    assert intact(out)[-1:] >= before[-1:]
    go_on(base, variant, base.config(variant, out), 2)
    tally("fault", "error")


def test_there_are_300():
    assert sum(COUNTS.values()) == 300

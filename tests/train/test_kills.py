"""Ranks that are killed, stopped or asked to stop, anywhere: the run ends as if nothing had happened.

Ranks strike themselves (support/launched.py), at places in the setup, a step, the exchange and a save, or when a thread
comes to it. `make test` runs a few cases with a launcher of its own, `make campaign` nearly all, some under torchrun;
`make soak` runs the one that is killed 30 times.
"""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support import complete  # noqa: F401
from support.launched import Blow, Ended, Launched, struck, torchrun
from support.tiny_caches import cache_of
from support.tiny_sets import make_set

from lift_fast.train.config import TrainConfig

STEPS = 40
STEP = "lift_fast.train.loop:Run._step"
# What differs between two runs with the same result: times, and the folder.
OF_A_STEP = {"data_ms", "step_ms"}
OF_A_RUN = {"seconds", "step_ms", "step_ms_spread", "images_per_s", "config", "ranks"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A LIFT run over 61 samples, of which 4 have no image."""
    folder = tmp_path_factory.mktemp("kills")
    data = make_set(folder / "data", 61, per_shard=20, broken={3, 40, 41, 60})
    return TrainConfig(
        "lift",
        (data.folder,),
        folder / "run",
        (cache_of(folder / "cache", data),),
        steps=STEPS,
        batch_size=12,
        precision="fp32",
        warmup=3,
        save_every=3,
        ema=0.9,
        flip=0.5,
        timeout=60,
    )


@pytest.fixture(scope="module")
def undisturbed(config):
    """undisturbed(world, **changes): the config of such a run that nothing has disturbed."""
    runs = {}

    def ran(world: int, **changes) -> TrainConfig:
        key = world, *changes.items()
        if key not in runs:
            runs[key] = replace(config, out=config.out / f"undisturbed {len(runs)}", **changes)
            config.out.mkdir(exist_ok=True)
            check_complete(Launched(runs[key], world, runs[key].out.with_suffix(".logs")).ended())
        return runs[key]

    return ran


def check_complete(ended: list[Ended]) -> None:
    """That all ranks have succeeded."""
    assert [(one.status, one.err.count("error")) for one in ended] == [(0, 0)] * len(ended), ended


def until_logged(run: TrainConfig, steps: int) -> None:
    """Waits until so many steps are logged."""
    end = time.monotonic() + 120
    while not (run.out / "metrics.jsonl").exists() or len(metrics(run.out)) < steps:
        assert time.monotonic() < end
        time.sleep(0.05)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_same(run: TrainConfig, other: TrainConfig) -> None:
    """That two runs have the same weights, bit for bit, the same run.json and the same logs, each step once."""
    first, second = ((config.out / "model.safetensors").read_bytes() for config in (run, other))
    assert first == second
    check_logs(run, other)
    for a, b in zip(metrics(run.out), metrics(other.out), strict=True):
        assert {name: a[name] for name in a.keys() - OF_A_STEP} == {name: b[name] for name in b.keys() - OF_A_STEP}
    ours, theirs = (json.loads((config.out / "run.json").read_text()) for config in (run, other))
    names = ours.keys() | theirs.keys()
    assert {name: ours[name] for name in names - OF_A_RUN} == {name: theirs[name] for name in names - OF_A_RUN}


def check_logs(run: TrainConfig, other: TrainConfig) -> None:
    """That each step is logged once, with the loss of run.json; that bad samples are listed once, as in the other run;
    and that nothing unfinished is left."""
    lines = metrics(run.out)
    assert [line["step"] for line in lines] == [*range(run.steps)]
    assert [line["loss"] for line in lines] == json.loads((run.out / "run.json").read_text())["loss"]
    rows = [
        sorted(json.loads(line)["row"] for line in (config.out / "skipped.jsonl").read_text().splitlines())
        for config in (run, other)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    left = [path.name for path in run.out.rglob("*") if path.name.startswith(".") or path.name.endswith(".part")]
    assert left == []


# Kills.

ANYWHERE = [0, 1]
# Places in which a rank may be killed, by what it does; the ranks that come there; the largest number of a call.
PLACES = {
    "setup": [
        ("torch.distributed:init_process_group", ANYWHERE, 1),
        ("lift_fast.train.setup:open_run", ANYWHERE, 1),
        ("lift_fast.train.setup:make_pipeline", ANYWHERE, 1),
        ("lift_fast.train.setup:decode_first", ANYWHERE, 1),
        ("lift_fast.train.checkpoints:Checkpoints.newest", ANYWHERE, 1),
        ("lift_fast.train.checkpoints:Checkpoints._read", ANYWHERE, 1),
        ("lift_fast.train.folder:rewind", [0], 1),
    ],
    "step": [
        (STEP, ANYWHERE, 8),
        ("lift_fast.train.step:clip_gradients", ANYWHERE, 8),
        ("torch.optim:AdamW.step", ANYWHERE, 8),
        ("lift_fast.train.ema:Ema.update", ANYWHERE, 8),
        ("lift_fast.train.recorder:JsonLines.log", [0], 6),
    ],
    "exchange": [
        ("torch.distributed:all_reduce", ANYWHERE, 25),
        ("lift_fast.ops.pairs.exchange:gather", ANYWHERE, 8),
        ("lift_fast.ops.pairs.exchange:Gathered.merge", ANYWHERE, 8),
        ("lift_fast.ops.pairs.exchange:Gathered.mean", ANYWHERE, 8),
    ],
    "save": [
        ("lift_fast.train.loop:Run._save", ANYWHERE, 2),
        ("lift_fast.train.checkpoints:Checkpoints._written", ANYWHERE, 2),
        ("lift_fast.train.storage:_header", ANYWHERE, 2),
        ("lift_fast.train.storage:_bytes", ANYWHERE, 60),
        ("lift_fast.train.checkpoints:Checkpoints._begin", [0], 2),
        ("lift_fast.train.checkpoints:Checkpoints._commit", [0], 2),
        ("lift_fast.train.checkpoints:Checkpoints._prune", [0], 2),
        ("lift_fast.train.checkpoints:flush_names", [0], 4),
        ("os:replace", [0], 4),
    ],
    "any time": [(STEP, ANYWHERE, 2)],
}


def plan(count: int, seed: int) -> list[Blow]:
    """A kill for each of the first `count` attempts, spread evenly over PLACES; the first is in a step."""
    chosen = random.Random(seed)
    kinds = [[*PLACES][number % len(PLACES)] for number in range(count)]
    chosen.shuffle(kinds)
    first = kinds.index("step")
    kinds[0], kinds[first] = kinds[first], kinds[0]
    found = []
    for attempt, kind in enumerate(kinds):
        place, ranks, most = chosen.choice(PLACES[kind])
        delay = chosen.uniform(0.001, 0.3) if kind == "any time" else 0.0
        call, after = chosen.randint(6 if attempt == 0 else 1, most), chosen.random() < 0.5
        found.append(Blow(place, chosen.choice(ranks), attempt, call, after, delay))
    return found


OTHERS = [{"parallel": "fsdp"}, {"model": "clip", "cache": (), "context": 12}]


@pytest.mark.parametrize("changes", [{}, *(pytest.param(other, marks=pytest.mark.campaign) for other in OTHERS)])
def test_two_kills(config, undisturbed, tmp_path, tally, changes):
    """One in the exchange, one while a checkpoint gets its name, and a restart of each."""
    run = replace(config, out=tmp_path / "run", **changes)
    blows = [
        Blow("lift_fast.ops.pairs.exchange:Gathered.merge", 1, 0, 8),
        Blow("lift_fast.train.checkpoints:Checkpoints._commit", 0, 1, 2),
    ]
    for attempt in range(3):
        assert Launched(run, 2, tmp_path / "logs", blows, attempt).until_one_ends() == (attempt == 2)
    assert struck(tmp_path / "logs") == blows
    check_same(run, undisturbed(2, **changes))
    check_clear((tmp_path / "logs" / "0.err").read_text() + (tmp_path / "logs" / "1.err").read_text())
    tally("kill", "right answer", len(blows))


def check_clear(err: str) -> None:
    """That nothing but sentences was printed."""
    assert "Traceback" not in err, err


@pytest.mark.soak
def test_thirty_kills(config, undisturbed, tmp_path, tally):
    """Under torchrun, of random ranks at random places."""
    changes = {"steps": 200, "save_every": 2}
    whole = undisturbed(2, **changes)
    run = replace(config, out=tmp_path / "run", **changes)
    blows, begun = plan(30, seed=16), time.monotonic()
    process = torchrun(run, 2, tmp_path / "logs", len(blows), blows)
    try:
        assert process.wait(3000) == 0, (tmp_path / "logs" / "err").read_text()[-4000:]
    finally:
        process.kill()
    print(f"30 kills and restarts, {time.monotonic() - begun:.0f} s")
    assert struck(tmp_path / "logs") == blows
    check_same(run, whole)
    check_clear((tmp_path / "logs" / "err").read_text())
    tally("kill", "right answer", len(blows))


@pytest.mark.parametrize("place", [place for kind in PLACES.values() for place, *_ in kind])
@pytest.mark.parametrize(
    "after", [pytest.param(False, marks=pytest.mark.campaign), pytest.param(True, marks=pytest.mark.soak)]
)
def test_a_kill_at_each_place(config, undisturbed, tmp_path, tally, place, after):
    """Each place is struck once on each rank that comes there, in a run that has been restarted once."""
    run = replace(config, out=tmp_path / "run")
    ranks = next(ranks for kind in PLACES.values() for name, ranks, _ in kind if name == place)
    blows = [Blow(STEP, 0, 0, 8), *(Blow(place, rank, 1 + i, 1, after) for i, rank in enumerate(ranks))]
    for attempt in range(len(blows) + 1):
        assert Launched(run, 2, tmp_path / "logs", blows, attempt).until_one_ends() == (attempt == len(blows))
    assert struck(tmp_path / "logs") == blows
    check_same(run, undisturbed(2))
    check_clear((tmp_path / "logs" / "0.err").read_text() + (tmp_path / "logs" / "1.err").read_text())
    tally("kill", "right answer", len(blows))


@pytest.mark.parametrize("changes", [{}, *(pytest.param(other, marks=pytest.mark.campaign) for other in OTHERS)])
def test_other_ranks_go_on(config, undisturbed, tmp_path, changes):
    """A run that was stopped on 2 ranks, then on 1, ends on 4."""
    run = replace(config, out=tmp_path / "run", **changes)
    for attempt, (world, status) in enumerate([(2, 75), (1, 75), (4, 0)]):
        blows = [Blow(STEP, 0, attempt, 8, name="SIGTERM")] if status else []
        ended = Launched(run, world, tmp_path / "logs", blows, attempt).ended()
        assert [one.status for one in ended] == [status] * world, ended
    check_logs(run, undisturbed(2, **changes))
    worst = check_losses(run, undisturbed(2, **changes))
    print(f"ranks 2, 1, 4: {worst:.1e}")


@pytest.mark.campaign
@pytest.mark.parametrize("stop", [3, 7, 20, 39])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_goes_on(config, undisturbed, tmp_path, tally, world, stop):
    """A run that was killed on 2 ranks."""
    run = replace(config, out=tmp_path / "run")
    Launched(run, 2, tmp_path / "logs", [Blow(STEP, 1, 0, stop)]).ended()
    check_complete(Launched(run, world, tmp_path / "others").ended())
    check_logs(run, undisturbed(2))
    print(f"2 ranks until step {stop}, then {world}: {check_losses(run, undisturbed(2)):.1e}")
    tally("kill", "right answer")


def check_losses(run: TrainConfig, other: TrainConfig) -> float:
    """The largest relative difference of the losses of two runs, which must be below 1e-5."""
    ours, theirs = ([line["loss"] for line in metrics(config.out)] for config in (run, other))
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-5
    return worst


# Signals.

SIGNALS = [("SIGTERM", 2, 1), ("SIGINT", 1, 0)]
MORE = [(name, world, rank) for name in ("SIGTERM", "SIGINT", "SIGUSR1") for world, rank in ((1, 0), (2, 0), (2, 1))]


@pytest.mark.parametrize(
    ("name", "world", "rank"),
    [*SIGNALS, *(pytest.param(*case, marks=pytest.mark.campaign) for case in MORE if case not in SIGNALS)],
)
def test_a_signal_to_one_rank_stops_all(config, undisturbed, tmp_path, name, world, rank):
    """All ranks end soon, with status 75 and a checkpoint; the same command goes on."""
    run = replace(config, out=tmp_path / "run", save_every=None)
    ended = Launched(run, world, tmp_path / "logs", [Blow(STEP, rank, 0, 6, name=name)]).ended()
    assert [one.status for one in ended] == [75] * world, ended
    assert max(one.seconds for one in ended) < 30
    check_clear("".join(one.err for one in ended))
    assert [one.err.count(" stopped by ") for one in ended] == [1, 0][:world]
    steps = len(metrics(run.out))
    assert 6 <= steps <= 8 and f"after step {steps} of {STEPS}" in ended[0].err
    assert [path.name for path in (run.out / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    check_complete(Launched(run, world, tmp_path / "again").ended())
    check_same(run, undisturbed(world))


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_launcher(config, undisturbed, tmp_path, name):
    """torchrun passes it on to the ranks, and gives them 30 seconds. SIGINT as Ctrl-C sends it: to all processes."""
    run = replace(config, out=tmp_path / "run", save_every=None, steps=400)
    process = torchrun(run, 2, tmp_path / "logs", 3, [])
    until_logged(run, 6)
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    assert process.wait(60) != 0
    err = (tmp_path / "logs" / "err").read_text()
    assert f"lift-fast: stopped by {name} after step" in err
    steps = len(metrics(run.out))
    assert [path.name for path in (run.out / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert torchrun(run, 2, tmp_path / "again", 0, []).wait(300) == 0
    check_same(run, undisturbed(2, save_every=None, steps=400))


@pytest.mark.campaign
def test_a_rank_that_is_asked_to_stop_is_started_again(config, undisturbed, tmp_path):
    """By torchrun, which knows no difference between status 75 and an error."""
    run = replace(config, out=tmp_path / "run")
    assert torchrun(run, 2, tmp_path / "logs", 1, [Blow(STEP, 1, 0, 8, name="SIGTERM")]).wait(300) == 0
    check_same(run, undisturbed(2))
    check_clear((tmp_path / "logs" / "err").read_text())


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_a_second_ctrl_c_ends_at_once(config, undisturbed, tmp_path, world):
    run = replace(config, out=tmp_path / "run")
    blows = [
        Blow(STEP, 0, 0, 6, name="SIGINT", pause=20),
        Blow(STEP, 0, 0, 6, name="SIGINT", delay=1.5),  # armed later, it falls first
    ]
    ended = Launched(run, world, tmp_path / "logs", blows).ended()
    assert [one.status for one in ended] == [130, 2][:world], ended
    assert ended[0].seconds < 15
    check_clear("".join(one.err for one in ended))
    assert "the same command goes on from the newest checkpoint" in ended[0].err
    check_complete(Launched(run, world, tmp_path / "again").ended())
    check_same(run, undisturbed(world))


# A rank that is gone, without a launcher that ends the others.


@pytest.mark.parametrize(("world", "rank"), [(2, 1), *[pytest.param(3, r, marks=pytest.mark.campaign) for r in (0, 2)]])
def test_a_rank_that_hangs(config, tmp_path, world, rank):
    """The others end when the time is over, each with one sentence."""
    run = replace(config, out=tmp_path / "run", timeout=5)
    launched = Launched(run, world, tmp_path / "logs", [Blow(STEP, rank, 0, 6, name="SIGSTOP")])
    check_lost(launched.ended(40, without=rank), world, rank, within=20)


OF_A_DEATH = {
    place: ranks[-1]
    for kind in ("setup", "step", "exchange", "save")
    for place, ranks, _ in PLACES[kind]
    # The ranks still meet in one of these, or it is not called in a new run.
    if not place.endswith((":init_process_group", ".newest", "._read", ":rewind"))
}
AT_ONCE = "lift_fast.ops.pairs.exchange:gather"


@pytest.mark.parametrize(
    "place",
    [AT_ONCE, *(pytest.param(place, marks=pytest.mark.campaign) for place in OF_A_DEATH if place != AT_ONCE)],
)
def test_a_rank_that_dies(config, tmp_path, tally, place):
    """The other ends at once, with one sentence."""
    run = replace(config, out=tmp_path / "run", timeout=60)
    rank = OF_A_DEATH[place]
    check_lost(Launched(run, 2, tmp_path / "logs", [Blow(place, rank)]).ended(), 2, rank, within=20)
    tally("kill", "error")


def check_lost(ended: list[Ended], world: int, lost: int, within: float) -> None:
    """That all ranks but `lost` have ended with RankLost in time."""
    for number, one in enumerate(ended):
        if number == lost:
            continue
        assert one.status == 2 and one.seconds < within, (number, one)
        assert one.err.count("lift-fast: error: ") == 1 and "has lost another rank" in one.err
        assert ".cc:" not in one.err and "This is typically" not in one.err  # what gloo adds
        check_clear(one.err)


# The folder.


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_run_into_the_same_folder(config, undisturbed, tmp_path, world):
    run = replace(config, out=tmp_path / "run")
    first = Launched(run, world, tmp_path / "logs", [Blow(STEP, 0, 0, 8, name="", pause=60)])
    until_logged(run, 6)
    check_sentence(Launched(run, world, tmp_path / "second").ended(), "is training into")
    for process in first.processes:
        process.terminate()
    (tmp_path / "logs" / "go").touch()
    assert [one.status for one in first.ended()] == [75] * world
    check_sentence(Launched(replace(run, lr=0.5), world, tmp_path / "third").ended(), "holds another run (--lr")
    check_complete(Launched(run, world, tmp_path / "fourth").ended())
    check_same(run, undisturbed(world))


def check_sentence(ended: list[Ended], what: str) -> None:
    """That all ranks end with status 2, and the first alone says why."""
    assert [one.status for one in ended] == [2] * len(ended), ended
    assert [one.err.count("lift-fast: error: ") for one in ended] == [1] + [0] * (len(ended) - 1), ended
    assert what in ended[0].err
    check_clear("".join(one.err for one in ended))

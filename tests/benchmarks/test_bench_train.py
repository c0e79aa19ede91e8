"""The benchmark of whole runs: settings that its processes get, what is left out, figures and targets."""

import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import complete  # noqa: F401

from benchmarks import bench_train
from benchmarks.bench_train import Sets, Turn
from benchmarks.harness import Suite
from lift_fast.cli.main import parse

SETS = Sets(Path("train"), Path("cache"), Path("heldout"))


@pytest.fixture
def suite(monkeypatch) -> Suite:
    """A suite whose parts find data at once and never wait for other processes."""

    @contextmanager
    def sets(suite):
        yield SETS

    monkeypatch.setattr(bench_train, "_sets", sets)
    monkeypatch.setattr(bench_train, "OTHERS", math.inf)
    monkeypatch.setattr(bench_train, "IDLE_S", 0.0)
    made = Suite("train", quick=True)
    made.repeats = 4
    return made


def bars(suite: Suite) -> dict[str, float | None]:
    return {bar["name"]: bar["value"] and round(bar["value"], 6) for bar in suite.bars}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_every": 7, "batch_size": 8},
        {"save_minutes": 2.5, "eval_data": {"heldout": SETS.held_out}, "eval_every": 3},
    ],
)
def test_the_command_line_is_that_of_the_settings(settings):
    config = SETS.config(Path("out"), steps=11, **settings)
    assert parse(bench_train._arguments(config)).config == config


def test_a_wait_is_set_for_processes_that_are_started_meanwhile(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for rounds, expected in ((5, "5"), (0, "0"), (None, None)):
        with bench_train._wait(rounds):
            assert os.environ.get("GOMP_SPINCOUNT") == expected and "OMP_WAIT_POLICY" not in os.environ
        assert os.environ["OMP_WAIT_POLICY"] == "passive" and "GOMP_SPINCOUNT" not in os.environ


def test_cpu_time_of_our_processes_and_of_all():
    with bench_train._busy() as first, bench_train._busy() as second:

        def used() -> list[float]:
            return [bench_train._our_seconds(pids) for pids in ([], first, first + second)]

        before, total = used(), bench_train._all_seconds()
        for _ in range(600):
            none, one, both = (now - then for now, then in zip(used(), before, strict=True))
            if min(one - none, both - one) > 0.2:
                break
            time.sleep(0.05)
        assert none < 0.2 < one < both < bench_train._all_seconds() - total + 0.1
    ended = bench_train._our_seconds([])
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"])
    assert 0.5 <= bench_train._our_seconds([]) - ended < 0.8


def test_what_others_disturb_is_measured_again_and_then_left_out(suite, monkeypatch):
    monkeypatch.setattr(bench_train, "OTHERS", 0.05)
    monkeypatch.setattr(bench_train, "PATIENCE_S", 0.0)
    shares = iter([0.01, 0.3, 0.01, 0.02])
    monkeypatch.setattr(bench_train, "_others", lambda call, pids: (call(), next(shares)))
    calls = count()
    assert bench_train._quiet(suite, "x", lambda: next(calls)) == 1 and not suite.notes
    monkeypatch.setattr(bench_train, "_others", lambda call, pids: (call(), 0.3))
    assert bench_train._quiet(suite, "x", lambda: next(calls)) is None
    assert next(calls) == 2 + bench_train.TRIES
    assert suite.notes == ["x: not measured once: other processes used 30 % of a CPU"]


def test_shared(suite, monkeypatch):
    busy = []

    @contextmanager
    def counted():
        busy.append(1)
        yield []
        busy.clear()

    def run(sets, steps):
        ours = "GOMP_SPINCOUNT" not in os.environ
        assert os.sched_getaffinity(0) <= cpus and len(os.sched_getaffinity(0)) <= 2
        return {"seconds": (3 if busy else 2) if ours else (30 if busy else 1.9)}

    cpus = os.sched_getaffinity(0)
    monkeypatch.setattr(bench_train, "_busy", counted)
    monkeypatch.setattr(bench_train, "_run", run)
    bench_train.shared(suite)
    assert os.sched_getaffinity(0) == cpus
    assert [row["seconds"] for row in suite.rows] == [2, 3, 1.9, 30]
    assert bars(suite) == {
        "a run with a busy process on its 2 CPUs, over alone": 1.5,
        "a run alone, over one with libgomp's wait": round(2 / 1.9, 6),
    }


@pytest.mark.parametrize("steps", [1, 4, 60])
def test_a_run_in_turns_trains_so_many_steps_a_turn(monkeypatch, steps):
    made: list[int] = []

    def endless():
        for number in count():
            made.append(number)
            yield number

    def train(config, progress, opened):
        training = SimpleNamespace(batches=endless())
        opened(training)
        assert list(islice(training.batches, 5 + 3 * steps)) == made

    monkeypatch.setattr("lift_fast.train.loop.train", train)
    ours, theirs = multiprocessing.Pipe()
    run = threading.Thread(target=bench_train._train_in_turns, args=(None, steps, theirs), daemon=True)
    run.start()
    for turn in range(3):
        assert ours.poll(60) and ours.recv().cpu >= 0
        assert len(made) == 5 + turn * steps
        ours.send(None)
    run.join(60)
    assert not run.is_alive() and not ours.poll() and len(made) == 5 + 3 * steps


class Fake:
    """A run whose turns of 20 steps take 2 s, and 0.5 s more with checkpoints; every third of those is disturbed."""

    made: list = []

    def __init__(self, config, steps):
        self.process, self.every = subprocess.Popen(["sleep", "100"]), config.save_every
        assert self.every in (None, steps // 2) and steps == 20
        if self.every:
            (config.out / "checkpoints/step-00000020").mkdir(parents=True)
            (config.out / "checkpoints/step-00000020/x.safetensors").write_bytes(bytes(1_500_000))
            (config.out / "checkpoints/.step-00000040.part").mkdir()
        self.turns = count(1)
        self.made.append(self)

    def turn(self):
        return Turn(2.0, 4.0) if self.every is None else Turn(2.5, 5.0 if next(self.turns) % 3 else 9.0)

    def close(self):
        self.process.kill()
        self.process.wait()


def test_saving(suite, monkeypatch):
    monkeypatch.setattr(bench_train, "Paced", Fake)
    bench_train.saving(suite)
    ours, without, more = suite.rows
    assert ours["what of"] == "20 steps, 2 checkpoints of 1.5 MB" and ours["repeats"] == without["repeats"] == 4
    assert (ours["seconds"], without["seconds"], more["seconds"], more["cpu_s"]) == (2.5, 2.0, 0.25, 0.5)
    assert bars(suite) == {
        "a checkpoint every 10 minutes: cost, of the run": round(0.25 / 600, 6),
        "a checkpoint every 100 steps: cost, of the run": 0.025,
    }
    assert all(run.process.poll() is not None for run in Fake.made)


def test_saving_that_others_disturb_misses_its_target(suite, monkeypatch):
    monkeypatch.setattr(bench_train, "Paced", Fake)
    monkeypatch.setattr(bench_train, "_quiet", lambda suite, what, call, pids: call() if "without" in what else None)
    bench_train.saving(suite)
    assert not suite.rows and [bar["ok"] for bar in suite.bars] == [False]


@pytest.mark.parametrize("growth, ok", [(0.0, True), (0.0004, True), (0.0012, False)])
def test_memory(suite, monkeypatch, growth, ok):
    """Growth by so much at each window: ten windows of thirty steps, after a hundred that do not count."""

    def resident(command, metrics):
        return ((step, int(2**30 * (1 + growth * (step - 100) / 30 + (step < 100)))) for step in range(400))

    monkeypatch.setattr(bench_train, "_resident", resident)
    bench_train.memory(suite)
    assert [row["what"] for row in suite.rows] == [f"steps from {100 + 30 * k}" for k in range(10)]
    (bar,) = suite.bars
    assert bar["value"] == pytest.approx(9 * growth, rel=0.01, abs=1e-6) and bar["ok"] == ok


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert bench_train._last_step(metrics) is None
    metrics.write_text('{"step": 0')
    assert bench_train._last_step(metrics) is None
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(5000)) + '{"step": 5000')
    assert bench_train._last_step(metrics) == 4999


def test_resident_memory_is_read_until_the_command_ends(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    code = f"open({str(metrics)!r}, 'w').write('{{\"step\": 3}}\\n'); x = b'1' * (64 << 20); import time; time.sleep(1)"
    samples = list(bench_train._resident([sys.executable, "-c", code], metrics))
    assert samples[-1][0] == 3 and 64 << 20 < samples[-1][1] < 128 << 20
    with pytest.raises(subprocess.CalledProcessError):
        list(bench_train._resident([sys.executable, "-c", "raise SystemExit(2)"], metrics))
    assert bench_train._resident_bytes(2**22 + 1) is None


@pytest.mark.soak
def test_a_run(monkeypatch, tmp_path):
    """All parts, as they are, in the short form."""
    monkeypatch.setattr(bench_train, "OTHERS", math.inf)
    monkeypatch.setattr(bench_train, "BATCH", 16)
    monkeypatch.setattr(bench_train, "ROUNDS", (0, 2000))
    suite = Suite("train", quick=True)
    suite.repeats = 1
    bench_train.run(suite)
    assert all(bar["value"] is not None for bar in suite.bars), suite.bars
    assert {row["what of"] for row in suite.rows} >= {"a step", "logging a step", "a run of 400 steps"}
    suite.write(tmp_path / "train.json")

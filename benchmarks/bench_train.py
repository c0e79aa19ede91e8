"""A training run as a whole: on a CPU that it shares, its checkpoints, its logs, its memory over many steps.

The model is the demo's: LIFT, `tiny`, on generated images, batch 128 unless a row says otherwise.

- shared: a run by the command line alone and with one busy process on the same two CPUs; with libgomp's own wait for
  comparison. Figure: seconds of the run, without the start of Python and opening the data (`seconds` of run.json).
- waiting: the same for several lengths of libgomp's wait, step by step. cli/threads.py has the length that is used.
- saving: two runs in turn, one of which writes a checkpoint every SAVE_EVERY steps. The difference of their turns is
  what its checkpoints cost, with all that is written in the background: in seconds of the run and of CPU.
- logging: records given to the logs of a run, the closing included, against the step of a run.
- memory: resident memory (VmRSS) of a run with checkpoints, evaluations and logs at batch 8. Growth: the largest over
  the smallest median of ten windows that divide the steps after the first quarter.

What is measured while other processes use more than OTHERS of a CPU is measured again, at most TRIES times, and left
out if they never rest. This needs Linux's /proc.
"""

import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch

from lift_fast.cli.demo import Demo
from lift_fast.cli.threads import SPINS
from lift_fast.data.loading import Batch
from lift_fast.data.shards import Shards
from lift_fast.demo import scenes
from lift_fast.measure.time import quartile_distance
from lift_fast.text.embed import embed
from lift_fast.text.encoder import Encoder
from lift_fast.text.spec import EncoderSpec
from lift_fast.train.config import TrainConfig
from lift_fast.train.recorder import HostCopy, Recorder, StepRecord, open_loggers

from .harness import Suite

T = TypeVar("T")
BATCH = Demo.batch_size
CPUS = 2  # that the runs share with the busy process
OTHERS, TRIES, PATIENCE_S, IDLE_S = 0.05, 5, 120.0, 0.5
WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # the environment's settings of libgomp's wait
LIBGOMP = 300_000  # rounds of libgomp's wait where the environment says nothing
ROUNDS = (0, 500, 1000, SPINS, 3000, 5000, 20_000, LIBGOMP)
SMALL_BATCH = 16
SAVE_EVERY = 10  # steps between the checkpoints whose cost is measured
SAVE_MINUTES, SAVE_STEPS = 10, 100  # how often they are written: TrainConfig's default, and often
BUSY_TARGET, ALONE_TARGET, SAVING_TARGET, LOGGING_TARGET, MEMORY_TARGET = 2.5, 1.03, 0.01, 0.01, 0.01
COMMAND = (sys.executable, "-c", "from lift_fast.cli import main; main()")


def run(suite: Suite) -> None:
    for part in PARTS.values():
        part(suite)


# ---------------------------------------------------------------------------------------- the data and the runs on it


class Sets(NamedTuple):
    """Folders with the data of the runs: to train on, its text cache, held-out samples."""

    train: Path
    cache: Path
    held_out: Path

    def config(self, out: Path, **settings: Any) -> TrainConfig:
        """A run of LIFT that writes no checkpoints unless `settings` say so."""
        settings = {"batch_size": BATCH, "save_minutes": None, **settings}
        return TrainConfig("lift", (self.train,), out, (self.cache,), **settings)


@contextmanager
def _sets(suite: Suite) -> Iterator[Sets]:
    """The demo's scenes, in a folder that is removed in the end."""
    with tempfile.TemporaryDirectory() as name:
        sets = Sets(*(Path(name) / part for part in ("train", "cache", "heldout")))
        captions = scenes.write(sets.train, 512 if suite.quick else 4000, seed=0)
        scenes.write(sets.held_out, 64 if suite.quick else 400, 0, len(captions), exclude_captions=set(captions))
        embed(Shards(sets.train), sets.cache, Encoder(EncoderSpec()), progress=False)
        yield sets


def _arguments(config: TrainConfig) -> list[str]:
    """The command line of a run."""
    given: list[object] = ["--model", config.model, "--data", *config.data, "--cache", *config.cache]
    given += ["--out", config.out, "--steps", config.steps, "--batch-size", config.batch_size]
    given += ["--save-minutes", config.save_minutes]
    if config.save_every is not None:
        given += ["--save-every", config.save_every]
    if config.eval_every is not None:
        given += ["--eval-every", config.eval_every, "--eval-data"]
        given += [word for named in config.eval_data.items() for word in named]
    return ["train", *map(str, given), "--quiet"]


def _run(sets: Sets, **settings: Any) -> dict[str, Any]:
    """Trains by the command line; the content of run.json."""
    with tempfile.TemporaryDirectory() as folder:
        config = sets.config(Path(folder) / "run", **settings)
        subprocess.run([*COMMAND, *_arguments(config)], check=True, stdout=subprocess.DEVNULL)
        return json.loads((config.out / "run.json").read_text())


@contextmanager
def _wait(rounds: int | None) -> Iterator[None]:
    """Processes that are started meanwhile have this length of libgomp's wait; None: as the environment is without."""
    before = {name: os.environ.pop(name, None) for name in WAITS}
    if rounds is not None:
        os.environ["GOMP_SPINCOUNT"] = str(rounds)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _two_cpus() -> Iterator[None]:
    """This process and those that it starts run on CPUS of its CPUs."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cpus)[:CPUS])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


@contextmanager
def _busy() -> Iterator[list[int]]:
    """A process that keeps one CPU busy; [its process id]."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    try:
        yield [process.pid]
    finally:
        process.kill()
        process.communicate()


# ----------------------------------------------------------------------------------------------- what else is running


def _all_seconds() -> float:
    """CPU seconds of all processes on our CPUs."""
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in ours:
            user, nice, system, _, _, irq, soft, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _our_seconds(pids: list[int]) -> float:
    """CPU seconds of this process, its children that have ended, and the living processes `pids`."""
    ended, ticks = resource.getrusage(resource.RUSAGE_CHILDREN), 0
    for pid in pids:
        # Splits after the name in parentheses, which may contain spaces: state is field 3, utime 14 and stime 15.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ended.ru_utime + ended.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def _others(call: Callable[[], T], pids: list[int]) -> tuple[T, float]:
    """What call() returns, and how much of a CPU other processes used meanwhile. pids: ours that live all the time."""
    begun, total, own = time.perf_counter(), _all_seconds(), _our_seconds(pids)
    result = call()
    others = (_all_seconds() - total) - (_our_seconds(pids) - own)
    return result, others / (time.perf_counter() - begun)


def _quiet(suite: Suite, what: str, call: Callable[[], T], pids: list[int] | None = None) -> T | None:
    """What call() returns when other processes rest meanwhile; None where they do not."""
    used = math.inf
    for _ in range(TRIES):
        end = time.monotonic() + PATIENCE_S
        while _others(lambda: time.sleep(IDLE_S), pids or [])[1] > OTHERS and time.monotonic() < end:
            pass
        result, used = _others(call, pids or [])
        if used <= OTHERS:
            return result
    suite.note(f"{what}: not measured once: other processes used {100 * used:.0f} % of a CPU")
    return None


# ------------------------------------------------------------------------------------------------------ runs in turns


class Turn(NamedTuple):
    """Wall-clock and CPU seconds of a run's turn."""

    seconds: float
    cpu: float


class Paced:
    """A run in a process of its own that trains `steps` steps for each turn() and waits in between.

    Before the first turn it trains SAVE_EVERY / 2 steps, so that no turn ends while a checkpoint is being written.
    """

    def __init__(self, config: TrainConfig, steps: int):
        spawning = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=_train_in_turns, args=(config, steps, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def turn(self) -> Turn:
        """Lets the run train. Raises EOFError when it has ended."""
        self.pipe.send(None)
        return self.pipe.recv()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def _train_in_turns(config: TrainConfig, steps: int, pipe: Connection) -> None:
    from lift_fast.train.loop import train

    def batches(of_run: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        begun, cpu = 0.0, 0.0
        with closing(of_run):
            for step in count(-(SAVE_EVERY // 2)):
                if step >= 0 and step % steps == 0:
                    pipe.send(Turn(time.perf_counter() - begun, time.process_time() - cpu))
                    pipe.recv()
                    begun, cpu = time.perf_counter(), time.process_time()
                yield next(of_run)

    def opened(training: Any) -> None:
        training.batches = batches(training.batches)

    train(config, progress=False, opened=opened)


# ---------------------------------------------------------------------------------------------------------- the parts


def shared(suite: Suite) -> None:
    """A run alone and with a busy process, by the command line, with its own wait and with libgomp's."""
    waits = {"lift-fast": None, "libgomp's wait": LIBGOMP}
    found: dict[tuple[str, bool], list[float]] = {(what, busy): [] for what in waits for busy in (False, True)}
    steps = 10 if suite.quick else 30
    with _sets(suite) as sets, _two_cpus():

        def seconds(wait: int | None) -> float:
            with _wait(wait):
                return _run(sets, steps=steps)["seconds"]

        order = list(found)
        for _ in range(math.ceil(suite.repeats / 4)):
            for what, busy in order:
                with ExitStack() as stack:
                    pids = stack.enter_context(_busy()) if busy else []
                    call = lambda wait=waits[what]: seconds(wait)  # noqa: E731
                    if (one := _quiet(suite, f"a run, {what}", call, pids)) is not None:
                        found[what, busy].append(one)
            order.reverse()
            if suite.over():
                break
    for (what, busy), each in found.items():
        if each:
            case = {"what of": f"a run of {steps} steps", "what": what, "busy": busy, "batch": BATCH}
            suite.add({**case, "repeats": len(each), "seconds": median(each), "spread": quartile_distance(each)})

    def ratio(one: tuple[str, bool], other: tuple[str, bool]) -> float | None:
        return median(found[one]) / median(found[other]) if found[one] and found[other] else None

    ours, theirs = waits
    suite.bar("a run with a busy process on its 2 CPUs, over alone", ratio((ours, True), (ours, False)), BUSY_TARGET,
              at_most=True)  # fmt: skip
    suite.bar("a run alone, over one with libgomp's wait", ratio((ours, False), (theirs, False)), ALONE_TARGET,
              at_most=True)  # fmt: skip


def waiting(suite: Suite) -> None:
    """Steps alone and with a busy process for each length of libgomp's wait."""
    with _sets(suite) as sets, _two_cpus(), tempfile.TemporaryDirectory() as folder:
        for batch, steps in ((BATCH, 4), (SMALL_BATCH, 20)):
            with ExitStack() as stack:
                runs: dict[int, Paced] = {}
                for rounds in ROUNDS:
                    config = sets.config(Path(folder) / f"{batch}-{rounds}", steps=10_000, batch_size=batch)
                    with _wait(rounds):
                        runs[rounds] = stack.enter_context(closing(Paced(config, steps)))
                _add_waits(suite, batch, steps, runs)


def _add_waits(suite: Suite, batch: int, steps: int, runs: Mapping[int, Paced]) -> None:
    """Lets the runs train in turn, alone and with a busy process, and adds a row for each of both."""
    found: dict[tuple[int, bool], list[float]] = {(rounds, busy): [] for rounds in runs for busy in (False, True)}
    order = list(found)
    for _ in range(math.ceil(suite.repeats / 3)):
        for rounds, busy in order:
            with ExitStack() as stack:
                pids = stack.enter_context(_busy()) if busy else []
                pids = [*pids, *(run.process.pid or 0 for run in runs.values())]
                turn = _quiet(suite, f"{rounds} rounds, batch {batch}", runs[rounds].turn, pids)
            if turn is not None:
                found[rounds, busy].append(1e3 * turn.seconds / steps)
        order.reverse()
        if suite.over():
            break
    for (rounds, busy), each in found.items():
        if each:
            case = {"what of": "a step", "what": f"{rounds} rounds", "busy": busy, "batch": batch}
            suite.add({**case, "repeats": len(each), "median_ms": median(each), "spread_ms": quartile_distance(each)})


def saving(suite: Suite) -> None:
    """What a checkpoint costs: turns of a run that writes them, and of a run that writes none."""
    steps = SAVE_EVERY * (2 if suite.quick else 6)
    turns: dict[str, list[Turn]] = {"with checkpoints": [], "without": []}
    with _sets(suite) as sets, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs = {}
        for what, every in zip(turns, (SAVE_EVERY, None), strict=True):
            config = sets.config(Path(folder) / what, steps=100_000, save_every=every)
            with _wait(SPINS):
                runs[what] = stack.enter_context(closing(Paced(config, steps)))
        pids = [run.process.pid or 0 for run in runs.values()]
        order = list(runs)
        for _ in range(suite.repeats):
            for what in order:
                if (turn := _quiet(suite, f"a turn {what}", runs[what].turn, pids)) is None:
                    break
                turns[what].append(turn)
            fewest = min(map(len, turns.values()))
            for each in turns.values():
                del each[fewest:]  # a turn without its pair
            order.reverse()
            if suite.over():
                break
        size = _newest_bytes(Path(folder) / "with checkpoints")
    if not turns["without"]:
        suite.bar("a checkpoint: not measured", None, SAVING_TARGET, at_most=True)
        return
    saves = steps // SAVE_EVERY
    more = [
        Turn((ours.seconds - without.seconds) / saves, (ours.cpu - without.cpu) / saves)
        for ours, without in zip(*turns.values(), strict=True)
    ]
    for what, each in {**turns, "a checkpoint, paired": more}.items():
        seconds = [turn.seconds for turn in each]
        figures = {"seconds": median(seconds), "spread": quartile_distance(seconds)}
        case = {"what of": f"{steps} steps, {saves} checkpoints of {size / 1e6:.1f} MB", "what": what, "batch": BATCH}
        suite.add({**case, "repeats": len(each), **figures, "cpu_s": median(turn.cpu for turn in each)})
    cost, step = median(turn.seconds for turn in more), median(turn.seconds for turn in turns["without"]) / steps
    for often, between in ((f"{SAVE_MINUTES} minutes", 60 * SAVE_MINUTES), (f"{SAVE_STEPS} steps", SAVE_STEPS * step)):
        suite.bar(f"a checkpoint every {often}: cost, of the run", cost / between, SAVING_TARGET, at_most=True)


def _newest_bytes(out: Path) -> int:
    """Size of the newest checkpoint of a run."""
    newest = max(folder for folder in (out / "checkpoints").iterdir() if not folder.name.startswith("."))
    return sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())


def logging(suite: Suite) -> None:
    """What the logs of a run cost a step."""
    records = 500 if suite.quick else 5000
    with _sets(suite) as sets, tempfile.TemporaryDirectory() as folder:
        with _wait(None):
            step = _quiet(suite, "a run", lambda: _run(sets, steps=10 if suite.quick else 30)["step_ms"])
        config = sets.config(Path(folder), steps=records, spike=3.0)
        cost = _quiet(suite, "logs", lambda: _log(config))
    if cost is not None:
        for what, seconds in zip(("seconds of the run", "seconds of CPU"), cost, strict=True):
            case = {"what of": "logging a step", "what": what}
            suite.add({**case, "repeats": records, "median_ms": 1e3 * seconds / records})
    if step is not None:
        suite.add({"what of": "a step", "what": "lift_fast", "batch": BATCH, "median_ms": step})
    share = 1e3 * cost.cpu / records / step if cost and step else None
    suite.bar(f"CPU time of logging, of a step of batch {BATCH}", share, LOGGING_TARGET, at_most=True)


def _log(config: TrainConfig) -> Turn:
    """Time of logging config.steps records into a new folder in config.out, with all threads, until they are closed."""
    config = replace(config, out=Path(tempfile.mkdtemp(dir=config.out)))
    stats, rows = torch.rand(config.steps, 3).add_(1), torch.arange(config.batch_size)
    begun, cpu = time.perf_counter(), time.process_time()
    with Recorder(config, open_loggers(config, progress=True)) as recorder:
        for step in range(config.steps):
            figures = HostCopy(stats[step]), 1e-3, HostCopy([0.0, False, False])
            record = StepRecord(step, *figures, rows, recorder.limit(step), data_ms=1.0)
            recorder.add(record)
            record.step_ms = 100.0
        recorder.flush()
    return Turn(time.perf_counter() - begun, time.process_time() - cpu)


def memory(suite: Suite) -> None:
    """Resident memory of a long run with everything on."""
    steps = 400 if suite.quick else 20_000
    with _sets(suite) as sets, tempfile.TemporaryDirectory() as folder, _wait(None):
        config = sets.config(
            Path(folder) / "run",
            steps=steps,
            batch_size=8,
            save_every=steps // 20,
            eval_data={"heldout": sets.held_out},
            eval_every=steps // 10,
        )
        samples = list(_resident([*COMMAND, *_arguments(config)], config.out / "metrics.jsonl"))
    first = steps // 4
    width = (steps - first) / 10
    windows: list[list[int]] = [[] for _ in range(10)]
    for step, size in samples:
        if first <= step < steps:
            windows[int((step - first) / width)].append(size)
    medians = [median(window) / 2**20 for window in windows if window]
    for number, window in enumerate(windows):
        if window:
            begins = f"steps from {first + round(number * width)}"
            figures = {"resident_mib": median(window) / 2**20, "most_mib": max(window) / 2**20}
            suite.add({"what of": f"a run of {steps} steps", "what": begins, "batch": 8, **figures})
    growth = max(medians) / min(medians) - 1 if len(medians) == 10 else None
    suite.bar(f"resident memory, last {steps - first} of {steps} steps: growth", growth, MEMORY_TARGET, at_most=True)


def _resident(command: list[str], metrics: Path) -> Iterator[tuple[int, int]]:
    """Runs a command; meanwhile, ten times a second: the last step in `metrics`, and the bytes of resident memory.

    Raises CalledProcessError when the command fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            step, size = _last_step(metrics), _resident_bytes(process.pid)
            if step is not None and size is not None:
                yield step, size
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def _last_step(metrics: Path) -> int | None:
    """The step of the last whole line; None where there is none."""
    if not metrics.exists():
        return None
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        lines = file.read().split(b"\n")
    return json.loads(lines[-2])["step"] if len(lines) > 1 else None


def _resident_bytes(pid: int) -> int | None:
    """VmRSS of a process; None when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return 1024 * found[0] if found else None


PARTS: dict[str, Callable[[Suite], None]] = {
    "shared": shared,
    "waiting": waiting,
    "saving": saving,
    "logging": logging,
    "memory": memory,
}

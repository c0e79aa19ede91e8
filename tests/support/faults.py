"""Faults of a training run: damage to its files, a failing disk, data that change, ranks that die or fall behind."""

import builtins
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lift_fast.cache import CacheWriter, encode
from lift_fast.cache.manifest import digest_of
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.nn import PRESETS
from lift_fast.train import checkpoints, folder
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train
from lift_fast.train.setup import Training

from .ranks import SMALL, environment, free_port
from .tiny_sets import make_set, png

STEPS, SAVE_EVERY, DIM = 12, 2, 24
# Settings that, together, reach every part of a run that writes, reads or waits.
VARIANTS: dict[str, dict[str, Any]] = {
    "lift": {"model": "lift", "flip": 0.5, "micro_batch": 2},
    "lift ema": {"model": "lift", "ema": 0.9, "patch_dropout": 0.25, "save_weights": True, "shuffle_buffer": 9},
    "clip": {"model": "clip", "context": 12, "colour": 0.2, "keep_every": 4},
    "clip eval": {"model": "clip", "context": 12, "eval_every": 3, "save_weights": True},
    "lift fsdp": {"model": "lift", "parallel": "fsdp"},
}


class Hang(BaseException):
    """Raised where a run takes too long. No Exception: nothing may handle it."""


# Runs.


class Base:
    """Data sets with caches, and what undisturbed runs on them write; each is made when it is first asked for."""

    def __init__(self, root: Path):
        self.root = root
        PRESETS["small"] = SMALL
        for seed, count in ((1, 21), (2, 14)):
            shards = make_set(root / f"data{seed}", count, per_shard=8, seed=seed, broken={3, 9})
            write_cache(root / f"cache{seed}", shards, seed)
        make_set(root / "held out", 10, seed=5)
        self._made: dict[Any, Any] = {}
        self._folders = 0

    def config(self, variant: str, out: Path, data: Path | None = None, **changes: Any) -> TrainConfig:
        """The settings of a run. data: the folder that has the data sets and caches, where it is not root."""
        root = data or self.root
        settings: dict[str, Any] = {"preset": "small", "steps": STEPS, "batch_size": 8, "warmup": 2, "lr": 3e-3}
        settings |= {"precision": "fp32", "save_minutes": None, "save_every": SAVE_EVERY, "timeout": 60.0}
        settings |= VARIANTS[variant] | changes
        settings |= {"data": tuple(root / f"data{seed}" for seed in (1, 2)), "out": out}
        if settings["model"] == "lift":
            settings["cache"] = tuple(root / f"cache{seed}" for seed in (1, 2))
        if "eval_every" in settings:
            settings["eval_data"] = {"held out": root / "held out"}
        return TrainConfig(**settings)

    def once(self, name: Any, make: Callable[[Path], Any]) -> Any:
        """What make(a new folder) returned when it was first called for this name."""
        if name not in self._made:
            self._folders += 1  # make() may call this again
            self._made[name] = make(self.root / f"made{self._folders}")
        return self._made[name]

    def undisturbed(self, variant: str, world: int = 1, seed: int = 0) -> Path:
        """The folder of a run on `world` ranks; in "copies" beside it are those of its folder before each step."""

        def make(folder: Path) -> Path:
            fault = Act("step", 1, "copies", folder / "copies")
            for ended in run(self.config(variant, folder / "run", seed=seed), world, fault):
                assert ended.error is None, ended.trace or repr(ended)
            return folder / "run"

        return self.once((variant, world, seed), make)

    def whole(self, variant: str, world: int = 1) -> "Written":
        """What an undisturbed run writes."""
        return self.once(("written", variant, world), lambda _: Written.by(self.undisturbed(variant, world)))

    def stopped(self, variant: str, step: int, world: int = 1, seed: int = 0) -> Path:
        """The folder of a run that was killed in `step`, when all saves before it were done."""
        return self.undisturbed(variant, world, seed).parent / "copies" / str(step)


def write_cache(path: Path, data: Shards, seed: int) -> None:
    """A cache of random vectors for a data set."""
    random = torch.Generator().manual_seed(seed)
    source = [{"name": path.name, "samples": size} for path, size in zip(data.paths, data.shard_sizes, strict=True)]
    writer = CacheWriter(path, DIM, "int8", {"name": "test"}, source, "txt")
    for shard, size in enumerate(data.shard_sizes):
        vectors = torch.nn.functional.normalize(torch.randn(size, DIM, generator=random))
        writer.expect(shard, data.shard_keys(shard), digest_of(data.captions(shard)))
        writer.write_shard(shard, encode(vectors, "int8"), data.shard_hashes(shard).tolist())
    writer.finish()


class Written(NamedTuple):
    """What must be the same after a fault. lines: of metrics.jsonl, without times."""

    weights: bytes
    loss: list[float]
    skipped: int
    lines: list[dict[str, Any]]

    @staticmethod
    def by(out: Path) -> "Written":
        """What a complete run has written."""
        about = json.loads((out / "run.json").read_bytes())
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            del line["data_ms"], line["step_ms"]
        return Written((out / "model.safetensors").read_bytes(), about["loss"], about["skipped_pictures"], lines)


class Ended(NamedTuple):
    """How a rank ended. error: the exception, None after success; a process that was killed has a Killed, one that
    had not ended a Hang. seconds: from the start, or from the fault where there was one, to the end."""

    error: BaseException | None
    warnings: list[str] = []
    seconds: float = 0.0
    trace: str = ""


class Killed(Exception):
    """Stands for the error of a process that has died; its exit code."""


def run(config: TrainConfig, world: int = 1, fault: "Act | None" = None, limit: float = 120.0) -> list[Ended]:
    """Trains in this process, or as `world` ranks in processes of their own. limit: seconds until a run hangs."""
    if world == 1:
        return [_train(config, fault, limit)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lift_fast.train.loop"])  # a rank then starts in a fraction of a second
    port, processes, results = free_port(), [], []
    for number in range(world):
        mine, theirs = context.Pipe(duplex=False)
        acts = fault if fault is not None and fault.rank == number else None
        args = (environment(number, world, port), theirs, config, acts, limit)
        processes.append(context.Process(target=_rank, args=args))
        processes[-1].start()
        theirs.close()
        results.append(mine)
    started, ended_at = time.time(), dict[int, float]()
    running = {process.sentinel: number for number, process in enumerate(processes)}
    while running and (left := started + limit - time.time()) > 0:
        for sentinel in wait([*running], left):
            ended_at[running.pop(sentinel)] = time.time()  # type: ignore[index]
    begin = fault.fired() if fault else None
    found = []
    for number, (process, result) in enumerate(zip(processes, results, strict=True)):
        seconds = ended_at.get(number, time.time()) - (begin or started)
        if number not in ended_at:
            process.kill()
        process.join()
        try:
            ended = pickle.loads(result.recv_bytes())._replace(seconds=seconds)
        except EOFError:
            ended = Ended(Killed(process.exitcode), seconds=seconds)
        found.append(Ended(Hang(), seconds=seconds) if number not in ended_at else ended)
    return found


def _rank(variables: dict[str, str], result: Any, config: TrainConfig, fault: "Act | None", limit: float) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    PRESETS["small"] = SMALL
    ended = _train(config, fault, limit)
    result.send_bytes(pickle.dumps(ended))


def _train(config: TrainConfig, fault: "Act | None", limit: float) -> Ended:
    warnings: list[str] = []
    started = time.monotonic()
    try:
        with limited(limit), fault or nullcontext():
            train(config, progress=False, warn=warnings.append, opened=fault and fault.opened)
    except BaseException as error:
        return Ended(error, warnings, time.monotonic() - started, traceback.format_exc())
    return Ended(None, warnings, time.monotonic() - started)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang in the main thread after so many seconds."""

    def end(*_: object) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def intact(out: Path) -> list[int]:
    """The steps of the checkpoints that are whole, ascending."""
    found = []
    for path in (out / "checkpoints").glob("step-*"):
        try:
            found.append(checkpoints.verified(path, int(path.name[5:])).step)
        except Exception:
            continue
    return sorted(found)


# What a process does, at a place, at a moment.


def _places() -> dict[str, tuple[Any, str, int, int | None]]:
    """Place -> (owner, attribute, number of calls in a run of STEPS steps on 2 ranks or fewer, rank that calls it)."""
    from lift_fast.data.host import HostPipeline
    from lift_fast.ops.pairs import exchange
    from lift_fast.text.cached import CachedText
    from lift_fast.text.tokenized import TokenizedText
    from lift_fast.train import best, held_out, loop, parallel, recorder, setup, step
    from lift_fast.train.storage import Writer

    saves = (STEPS - 1) // SAVE_EVERY
    return {
        "opening": (setup, "open_run", 1, None),
        "identity": (setup, "identity", 1, 0),
        "spread": (parallel, "spread", 1, None),
        "pipeline": (setup, "make_pipeline", 1, None),
        "first batch": (setup, "decode_first", 1, None),
        "start": (folder, "start", 1, 0),
        "rewind": (folder, "rewind", 1, 0),
        "loader": (HostPipeline, "_render", 4 * STEPS, None),
        "cached text": (CachedText, "rows", STEPS, None),
        "captions": (TokenizedText, "rows", STEPS, None),
        "step": (step.Step, "_run", STEPS, None),
        "exchange": (exchange, "gather", 3 * STEPS, None),
        "votes": (loop, "sum_over_ranks", STEPS, None),
        "log": (recorder.JsonLines, "log", STEPS, 0),
        "bad samples": (loop, "gathered", saves + 1, None),
        "save": (checkpoints.Checkpoints, "save", saves, None),
        "copy": (checkpoints._Copies, "take", saves, None),
        "write": (Writer, "write_data", saves, None),
        "commit": (checkpoints.Checkpoints, "_commit", saves, 0),
        "prune": (checkpoints.Checkpoints, "_prune", saves, 0),
        "weights": (loop, "final_weights", 1, None),
        "finish": (loop.Run, "_finish", 1, None),
        "summary": (loop, "summarise", 1, None),
        "held out": (setup, "HeldOut", 1, None),
        "best": (best.Best, "_written", 1, 0),
        "evaluation": (held_out.HeldOut, "scores", STEPS // 3, None),
        "features": (held_out, "image_features", STEPS // 3, None),
        "search": (checkpoints.Checkpoints, "_search", 1, 0),
        "load": (checkpoints.Checkpoints, "_read", 1, None),
    }


ALWAYS = "opening identity spread pipeline loader step exchange votes log save copy write commit prune finish".split()
PLACES: dict[str, list[str]] = {  # that a run comes to, from its beginning; and where it goes on
    "lift": [*ALWAYS, "first batch", "start", "rewind", "cached text", "bad samples", "weights", "summary"],
    "lift fsdp": [*ALWAYS, "weights", "cached text"],
    "clip": [*ALWAYS, "captions"],
    "clip eval": [*ALWAYS, "captions", "held out", "evaluation", "features"],
    "on": ["search", "load", "rewind", "spread", "first batch", "loader"],
}


@dataclass
class Act:
    """What a rank does at the call number `moment` (from 1) of a place. As a context manager it lies in wait.

    action: "kill", "exit", a signal's name, "sleep", "raise RuntimeError" or another exception, "call", "copies" (of
    the run's folder, at each call). argument: seconds to sleep, what to call, or where to copy to. mark: a file that
    says when it acted.
    """

    place: str
    moment: int
    action: str
    argument: Any = None
    rank: int = 0
    mark: Path | None = None
    calls: int = 0
    training: Training | None = None
    lock: Any = field(default_factory=nullcontext)  # a lock cannot be pickled

    @staticmethod
    def calls_of(place: str) -> tuple[int, int | None]:
        """How often a place is called in a run of STEPS steps, and by which rank; None: by all."""
        return _places()[place][2:]

    def fired(self) -> float | None:
        """When it acted, None where it has not."""
        return float(self.mark.read_text()) if self.mark is not None and self.mark.exists() else None

    def opened(self, training: Training) -> None:
        """For train(opened=)."""
        self.training = training

    def __enter__(self) -> None:
        self.lock = threading.Lock()
        self.owner, self.name, *_ = _places()[self.place]
        self.original = original = getattr(self.owner, self.name)

        def disturbed(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                self.calls += 1
                now = self.calls == self.moment or self.action == "copies"
            if now:
                self.act()
            return original(*args, **kwargs)

        setattr(self.owner, self.name, disturbed)

    def __exit__(self, *exception: object) -> None:
        setattr(self.owner, self.name, self.original)
        self.lock = nullcontext()

    def act(self) -> None:
        """Does it."""
        if self.mark is not None:
            self.mark.write_text(str(time.time()))
        kind, _, name = self.action.partition(" ")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "exit":
            os._exit(1)
        elif kind == "sleep":
            time.sleep(self.argument)
        elif kind == "raise":
            error = getattr(builtins, name)
            raise error(errno.EIO, "injected") if error is OSError else error("injected")
        elif kind == "call":
            self.argument()
        elif kind == "copies":
            assert self.training is not None
            self.training.checkpoints.close()
            shutil.copytree(self.training.config.out, self.argument / str(self.calls - 1))
        else:
            signal.raise_signal(getattr(signal, self.action))


# A disk that fails.


class Disk:
    """As a context manager makes a file operation below `folder` fail: the call number `moment` of an operation
    (open, read, write, fsync, replace, mkdir, truncate) on files of a kind, and where `lasting` all calls of all
    operations that need space after it. moment 0: none, so that `calls` are those of a run.

    A write that fails has written the first half, as on a disk that is full.
    """

    SPACE = ("write", "mkdir", "open", "fsync")

    def __init__(self, folder: Path, what: tuple[str, str] = ("", ""), moment: int = 0, code: int = 0, lasting=False):
        self.folder, self.what, self.moment, self.code, self.lasting = str(folder), what, moment, code, lasting
        self.calls: Counter[tuple[str, str]] = Counter()
        self.failed = 0
        self.lock = threading.RLock()

    def kind(self, path: str) -> str:
        """What kind of file it is."""
        relative = os.path.relpath(path, self.folder)
        for part in ("checkpoint.json", "rank-", "metrics.jsonl", "tfevents", "started.json", "skipped.jsonl", ".lock"):
            if part in relative:
                return part
        for part in ("checkpoints", "weights"):
            if relative.startswith(part):
                return part
        return "." if relative == "." else "final"

    def check(self, operation: str, path: Any) -> None:
        """Raises the OSError that is due. path: anything that names a file."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if not path.startswith(self.folder):
            return
        with self.lock:
            key = operation, self.kind(path)
            self.calls[key] += 1
            due = key == self.what and self.calls[key] == self.moment
            if due or self.lasting and self.failed and operation in self.SPACE:
                self.failed += 1
                raise OSError(self.code, os.strerror(self.code), path)

    def open(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        """`open`, with files that fail."""
        if isinstance(file, int) or not os.fsdecode(file).startswith(self.folder):
            return self.originals["open"](file, mode, buffering, *rest, **options)
        if mode.strip("bt") == "r":
            self.check("read", file)
            return self.originals["open"](file, mode, buffering, *rest, **options)
        self.check("open", file)
        raw = _FailingFile(self, file, mode.replace("b", "").replace("t", ""), options.pop("opener", None))
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **options)

    def __enter__(self) -> "Disk":
        self.originals: dict[str, Any] = {"open": builtins.open}
        builtins.open = io.open = self.open  # type: ignore[assignment]
        for name in ("fsync", "replace", "mkdir", "truncate"):
            self.originals[name] = getattr(os, name)
            setattr(os, name, self._failing(name))
        return self

    def _failing(self, name: str) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.check(name, path)
            return self.originals[name](path, *args, **kwargs)

        return call

    def __exit__(self, *exception: object) -> None:
        builtins.open = io.open = self.originals.pop("open")  # type: ignore[assignment]
        for name, original in self.originals.items():
            setattr(os, name, original)


class _FailingFile(io.FileIO):
    def __init__(self, disk: Disk, path: Any, mode: str, opener: Callable[[str, int], int] | None):
        super().__init__(path, mode, opener=opener)
        self.disk, self.path = disk, path

    def write(self, data: Any) -> int:
        try:
            self.disk.check("write", self.path)
        except OSError:
            super().write(memoryview(data)[: len(data) // 2])
            raise
        return super().write(data)


# Damage to files between a stop and going on.


@dataclass
class Folder:
    """The folder of a stopped run that is damaged. other: makes that of another run. touched: what to put back."""

    out: Path
    other: Callable[[], Path]
    rng: random.Random
    touched: list[Path] = field(default_factory=list)

    def touch(self, path: Path) -> Path:
        """Notes what will be damaged."""
        self.touched.append(path)
        return path

    def checkpoints(self) -> list[Path]:
        """The folders of its checkpoints, the newest first."""
        return sorted((self.out / "checkpoints").glob("step-*"), reverse=True)

    def some(self) -> list[Path]:
        """The newest checkpoint, mostly, an older one or all."""
        found = self.checkpoints()
        return self.rng.choice([found[:1], found[:1], found[1:2], found])

    def files(self) -> list[Path]:
        """A file of each of some checkpoints."""
        return [self.touch(self.rng.choice(sorted(path.iterdir()))) for path in self.some()]

    def put_back(self, copy: Path) -> None:
        """Makes what was damaged as it is in a copy of the folder."""
        for path in self.touched:
            remove(path)
            if (saved := copy / path.relative_to(self.out)).exists():
                (shutil.copytree if saved.is_dir() else shutil.copy2)(saved, path)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cut(path: Path, rng: random.Random) -> None:
    """Cuts the end off."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random) -> None:
    """Flips a bit."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def garbage(path: Path, rng: random.Random) -> None:
    """Overwrites a part."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at : at + 50] = rng.randbytes(50)
    path.write_bytes(data)


def _cut(f: Folder) -> None:
    for path in f.files():
        cut(path, f.rng)


def _flip(f: Folder) -> None:
    for path in f.files():
        flip(path, f.rng)


def _missing(f: Folder) -> None:
    for path in f.files():
        path.unlink()


def _empty(f: Folder) -> None:
    for path in f.files():
        path.write_bytes(b"")


def _longer(f: Folder) -> None:
    for path in f.files():
        path.write_bytes(path.read_bytes() + f.rng.choice([b"\n", b"\0" * 8, b"}"]))


def _swapped_files(f: Folder) -> None:
    one, two = f.checkpoints()[:2]
    name = f.rng.choice(sorted(one.iterdir())).name
    pair = f.touch(one / name), f.touch(two / name)
    contents = [path.read_bytes() for path in pair]
    for path, content in zip(pair, reversed(contents), strict=True):
        path.write_bytes(content)


def _swapped_folders(f: Folder) -> None:
    one, two = map(f.touch, f.checkpoints()[:2])
    one.rename(one.with_name("aside"))
    two.rename(one)
    one.with_name("aside").rename(two)


def _renamed(f: Folder) -> None:
    one = f.touch(f.checkpoints()[0])
    one.rename(f.touch(one.with_name(f"step-{f.rng.choice([1, 3, 11, 12, 99, 10**9]):08d}")))


def _older_as_newer(f: Folder) -> None:
    shutil.copytree(f.checkpoints()[1], f.touch(f.out / f"checkpoints/step-{f.rng.choice([10, 11]):08d}"))


def _file_of_another_run(f: Folder) -> None:
    for path in f.files():
        shutil.copy2(f.other() / path.relative_to(f.out), path)


def _of_another_run(f: Folder) -> None:
    for path in f.some():
        remove(f.touch(path))
        shutil.copytree(f.other() / path.relative_to(f.out), path)


def _altered(f: Folder) -> None:
    for path in f.some():
        manifest = f.touch(path / "checkpoint.json")
        text = manifest.read_text()
        old, new = f.rng.choice([('"seed": 0', '"seed": 1'), ('"step": ', '"step": 1'), ("float32", "float16")])
        manifest.write_text(text.replace(old, new, 1))


def _checkpoint_gone(f: Folder) -> None:
    for path in f.some():
        remove(f.touch(path))


def _all_gone(f: Folder) -> None:
    remove(f.touch(f.out / "checkpoints"))


def _folder_is_a_file(f: Folder) -> None:
    path = f.touch(f.rng.choice([f.out / "checkpoints", f.checkpoints()[0], f.out / "weights"]))
    remove(path)
    path.write_text("no folder")


def _foreign_in_checkpoint(f: Folder) -> None:
    path = f.touch(f.checkpoints()[0] / f.rng.choice(["notes.txt", "rank-00007.safetensors", ".nfs0001"]))
    path.write_text("of another")


def _foreign_among_checkpoints(f: Folder) -> None:
    name = f.rng.choice(["notes.txt", "step-7", "step-0000000x", "latest", "step-00000013"])
    path = f.touch(f.out / "checkpoints" / name)
    if f.rng.random() < 0.5:
        path.mkdir()
    else:
        path.write_text("of another")


def _left_over(f: Folder) -> None:
    step = f.rng.choice([2, 4, 6, 8, 10])
    for ending in ("part", "old"):
        path = f.touch(f.out / f"checkpoints/.step-{step:08d}.{ending}")
        if f.rng.random() < 0.3:
            path.write_text("no folder")
        else:
            shutil.copytree(f.checkpoints()[-1], path)
            if f.rng.random() < 0.5:
                (path / "checkpoint.json").unlink()


def _linked(f: Folder) -> None:
    path = f.touch(f.checkpoints()[0])
    path.rename(f.touch(f.out / "elsewhere"))
    path.symlink_to(f.out / "elsewhere")


def _one_file(name: str, *ways: Callable[[Folder, Path], object]) -> Callable[[Folder], None]:
    def damage(f: Folder) -> None:
        path = f.touch(f.out / name)
        if path.exists():
            f.rng.choice(ways)(f, path)
        else:
            path.write_bytes(f.rng.randbytes(60))

    return damage


def _to_folder(f: Folder, path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unlink(f: Folder, path: Path) -> None:
    path.unlink()


def _by(damage: Callable[[Path, random.Random], None]) -> Callable[[Folder, Path], None]:
    return lambda f, path: damage(path, f.rng)


def _others(f: Folder, path: Path) -> None:
    shutil.copy2(f.other() / path.name, path)


def _events(f: Folder) -> None:
    for path in f.out.glob("events*"):
        f.rng.choice([_unlink, _by(cut), _by(garbage)])(f, f.touch(path))


def _parts(f: Folder) -> None:
    for name in ("started.json.part", "metrics.jsonl.part", "run.json.part", "model.safetensors.part"):
        f.touch(f.out / name).write_bytes(f.rng.randbytes(30))


def _final_weights(f: Folder) -> None:
    f.touch(f.out / "model.safetensors").write_bytes(f.rng.randbytes(100))


DAMAGE: dict[str, Callable[[Folder], None]] = {
    "cut": _cut,
    "flipped": _flip,
    "missing": _missing,
    "empty": _empty,
    "longer": _longer,
    "swapped files": _swapped_files,
    "swapped folders": _swapped_folders,
    "renamed": _renamed,
    "older as newer": _older_as_newer,
    "file of another run": _file_of_another_run,
    "checkpoint of another run": _of_another_run,
    "checkpoint.json altered": _altered,
    "checkpoint gone": _checkpoint_gone,
    "all checkpoints gone": _all_gone,
    "folder is a file": _folder_is_a_file,
    "foreign file in a checkpoint": _foreign_in_checkpoint,
    "foreign among checkpoints": _foreign_among_checkpoints,
    "left over": _left_over,
    "linked": _linked,
    "started.json": _one_file("started.json", _by(cut), _by(flip), _by(garbage), _unlink, _others, _to_folder),
    "metrics.jsonl": _one_file("metrics.jsonl", _by(cut), _by(garbage), _unlink, _to_folder),
    "skipped.jsonl": _one_file("skipped.jsonl", _by(cut), _by(garbage), _unlink, _to_folder),
    "spikes.jsonl": _one_file("spikes.jsonl"),
    "events": _events,
    "left over files": _parts,
    "final weights": _final_weights,
}


# Data that change. Each takes the folder that has data sets and caches.


def _some_tar(root: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(root.glob("data*/*.tar")))


def _some_shard(root: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(root.glob("cache*/*.safetensors")))


def _rewrite(root: Path, rng: random.Random, other_images: bool, other_captions: bool) -> None:
    """Writes a data set anew, with the same keys and shards."""
    seed, count = rng.choice([(1, 21), (2, 14)])
    folder, random_ = root / f"data{seed}", random.Random(99 if other_images else seed)
    remove(folder)
    with ShardWriter(folder, 8) as writer:
        for i in range(count):
            image = b"no picture" if i in (3, 9) else png(random_)
            word = "other" if other_captions else "caption"
            writer.write(f"s{seed}-{i:03d}", image, f"{word} {i}", {"long": f"long caption {i}"})


def _cut_tar(root: Path, rng: random.Random) -> None:
    cut(_some_tar(root, rng), rng)


def _another_tar(root: Path, rng: random.Random) -> None:
    path = _some_tar(root, rng)
    shutil.copy(rng.choice([other for other in sorted(root.glob("data*/*.tar")) if other != path]), path)


def _flip_code(root: Path, rng: random.Random) -> None:
    """In the part of a cache's shard that opening it does not read."""
    path = _some_shard(root, rng)
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    codes = json.loads(data[8:begin])["codes"]["data_offsets"]
    data[begin + rng.randrange(*codes)] ^= 0x40
    path.write_bytes(data)


def _cache_manifest(root: Path, rng: random.Random) -> None:
    rng.choice([cut, flip, garbage, lambda path, rng: path.unlink()])(root / "cache1/manifest.json", rng)


def _swapped_caches(root: Path, rng: random.Random) -> None:
    (root / "cache1").rename(root / "aside")
    (root / "cache2").rename(root / "cache1")
    (root / "aside").rename(root / "cache2")


DATA: dict[str, Callable[[Path, random.Random], object]] = {
    "tar gone": lambda root, rng: _some_tar(root, rng).unlink(),
    "tar cut": _cut_tar,
    "tar flipped": lambda root, rng: flip(_some_tar(root, rng), rng),
    "another tar": _another_tar,
    "set gone": lambda root, rng: remove(root / f"data{rng.choice([1, 2])}"),
    "other images": lambda root, rng: _rewrite(root, rng, True, False),
    "other captions": lambda root, rng: _rewrite(root, rng, False, True),
    "copied": lambda root, rng: _rewrite(root, rng, False, False),
    "cache gone": lambda root, rng: remove(root / f"cache{rng.choice([1, 2])}"),
    "cache shard gone": lambda root, rng: _some_shard(root, rng).unlink(),
    "cache shard cut": lambda root, rng: cut(_some_shard(root, rng), rng),
    "cache shard flipped": lambda root, rng: flip(_some_shard(root, rng), rng),
    "cache code flipped": _flip_code,
    "cache manifest": _cache_manifest,
    "caches swapped": _swapped_caches,
}


def copy_of(base: Base, to: Path) -> Path:
    """A copy of the data sets and caches, with their times of last change."""
    for name in ("data1", "data2", "cache1", "cache2", "held out"):
        shutil.copytree(base.root / name, to / name)
    return to

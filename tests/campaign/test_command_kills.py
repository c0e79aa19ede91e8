"""Commands that are killed at any moment: the same command again succeeds, and then every file is as if nothing had
happened; no file that was being written is left.

A command runs in a fork of this process, which has imported what it needs. It is killed (SIGKILL) right before a random
one of the file operations that it does, or after a random time.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from support import complete  # noqa: F401
from support.ranks import SMALL
from support.tiny_caches import cache_of
from support.tiny_sets import make_set
from support.tiny_text import TinyEncoder, captions_of, write_lines

import lift_fast.export  # noqa: F401
import lift_fast.train.loop  # noqa: F401
from lift_fast.cli.main import main
from lift_fast.nn import PRESETS

TRAIN = "train --preset tiny --steps 6 --batch-size 6 --warmup 1 --save-every 2 --precision fp32 --quiet"
# What a command writes goes to OUT; the rest is made once.
COMMANDS = {
    "embed": "embed --data SETS/captions.jsonl --out OUT/cache --shard-rows 9",
    "embed conditioned": "embed --data SETS/captions.jsonl --out OUT/cache --shard-rows 9 --condition 0.5",
    "data index": "data index OUT/set",
    "data pack": "data pack SETS/set OUT/packed --samples-per-shard 7 --threads 1",
    "cache convert": "cache convert SETS/cache OUT/cache --codec int4r",
    "cache condition": "cache condition SETS/cache OUT/cache --power 0.5",
    "cache merge": "cache merge SETS/cache SETS/cache OUT/cache",
    "cache import-parquet": "cache import-parquet SETS/parquet OUT/cache --encoder some/encoder --pooling mean",
    "embed-images": "embed-images SETS/clip --data SETS/set --out OUT/features.safetensors --device cpu",
    "embed-images npy": "embed-images SETS/clip --data SETS/set --out OUT/features.npy --device cpu",
    "eval": "eval --run SETS/clip --data SETS/set --features OUT/kept --json OUT/eval.json --device cpu --loader host",
    "export": "export SETS/clip --to safetensors --out OUT/export",
    "export hf": "export SETS/clip --to hf --out OUT/export",
    "train": TRAIN + " --model lift --data SETS/set --cache SETS/cache --out OUT/run --device cpu --loader host",
    "train clip": TRAIN + " --model clip --context 12 --data SETS/set --out OUT/run --device cpu --loader host",
}
# What differs between two runs with the same result: times.
TIMES = {"data_ms", "step_ms", "seconds", "step_ms_spread", "images_per_s", "config"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with data sets, a cache, parquet embeddings and a CLIP run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("kills")
    data = make_set(root / "set", 40, per_shard=8)
    cache_of(root / "cache", data)
    write_lines(root / "captions.jsonl", captions_of(100, 60))
    for shard in range(3):
        folder = root / "parquet" / f"{shard:05d}"
        folder.mkdir(parents=True)
        vectors = torch.randn(8, 24).tolist()
        pq.write_table(pa.table({"key": data.shard_keys(shard), "embedding": vectors}), folder / "0.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL)
        patch.setattr("lift_fast.text.encoder.Encoder", lambda spec, device: TinyEncoder())
        line = COMMANDS["train clip"].replace("SETS", str(root)).replace("OUT/run", str(root / "clip"))
        assert run(line.split()) == 0
        yield root


def run(line: list[str], moment: int = 0, seconds: float = 0.0, folder: Path | None = None, count=None) -> int:
    """Runs a command in a child and returns its status (minus the signal that killed it). moment: the number of the
    file operation in `folder` before which it is killed; 0: none. seconds: when it is killed; 0.0: never. count: a file
    that gets the number of operations."""
    process = os.fork()
    if process == 0:
        try:
            status = 1
            torch.set_num_threads(1)
            sys.stdout = open(os.devnull, "w")
            if folder is not None:
                done = strike(folder, moment)
            main(line)
            if count is not None:
                count.write_text(str(done[0]))
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(status)
    if seconds:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


# Python reports these before they are done: the first argument is a path, or a descriptor.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def strike(folder: Path, moment: int) -> list[int]:
    """Kills this process before operation `moment`; returns a list with the number of those until now."""
    done, start = [0], str(folder)

    def hook(event: str, arguments: tuple) -> None:
        if event == "fcntl.flock" or (event in OPERATIONS and str(arguments[0]).startswith(start)):
            done[0] += 1
            if done[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return done


def written(folder: Path) -> dict[str, object]:
    """All files of a folder by their relative names and contents, but for what depends on the time."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name, data = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else None
        if path.name.startswith("events.out.tfevents"):
            name, data = "events", None
        elif path.name == "checkpoint.json" or (name.startswith("packed") and path.name == "index.lift-fast"):
            data = None  # it has times: of steps, of the last change of tars
        elif path.name in ("run.json", "eval.json"):
            data = without_times(json.loads(data))
        elif path.name == "metrics.jsonl":
            data = [without_times(json.loads(line)) for line in data.splitlines()]
        found[name] = data
    return found


def without_times(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in TIMES}


def prepare(name: str, sets: Path, out: Path) -> list[str]:
    """A new folder for what the command writes; its arguments."""
    out.mkdir()
    if name == "data index":
        shutil.copytree(sets / "set", out / "set")
        (out / "set" / "index.lift-fast").unlink(missing_ok=True)
    return COMMANDS[name].replace("SETS", str(sets)).replace("OUT", str(out)).split()


def kill(name: str, sets: Path, tmp_path: Path, kills: int, seed: int) -> int:
    """Kills a command `kills` times, each in a new folder and every third time twice; returns the number of kills that
    came before the end."""
    rng = random.Random(f"{name} {seed}")
    out = tmp_path / "out"
    line, begun = prepare(name, sets, out), time.monotonic()
    assert run(line, folder=out, count=tmp_path / "count") == 0
    seconds, count = time.monotonic() - begun, int((tmp_path / "count").read_text())
    whole = written(out)
    assert count > 3 and whole
    shutil.rmtree(out)
    killed = 0
    for turn in range(kills):
        line = prepare(name, sets, out)
        for _ in range(2 if turn % 3 == 2 else 1):
            if turn % 2:
                status = run(line, seconds=rng.uniform(0, seconds))
            else:
                status = run(line, rng.randint(1, count), folder=out)
            assert status in (0, -signal.SIGKILL)
            killed += status != 0
        state = sorted(path.name for path in out.rglob("*"))
        assert run(line) == 0, state
        assert written(out) == whole, state
        shutil.rmtree(out)
    return killed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on(sets, tmp_path, name):
    assert kill(name, sets, tmp_path, 1, 0) == 1


@pytest.mark.campaign
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_are_killed_many_times(sets, tmp_path, tally, name):
    killed = kill(name, sets, tmp_path, 20, 1)
    assert killed >= 10
    tally("kill", "right answer", killed)

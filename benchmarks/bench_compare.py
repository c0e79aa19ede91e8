"""LIFT and CLIP compared: exact FLOPs and memory of ViT-B/16, and the measured time of a step's text part."""

import tempfile
import time
from pathlib import Path

from lift_fast.cache import Cache
from lift_fast.data.shards import Shards
from lift_fast.demo import scenes
from lift_fast.measure.compare import paper_scale
from lift_fast.measure.time import clip_text_ms, lift_text_ms
from lift_fast.nn import Clip, preset
from lift_fast.text.embed import embed
from lift_fast.text.encoder import Encoder
from lift_fast.text.spec import EncoderSpec

from .harness import Suite

FIELDS = {77: "txt", 128: "long"}  # CLIP's context length -> the field with captions that fill it


def run(suite: Suite) -> None:
    counted(suite)
    timed(suite, batch_size=64 if suite.quick else 256)


def counted(suite: Suite) -> None:
    """FLOPs and memory, counted without running a model, and how long the counting takes."""
    begun = time.perf_counter()
    scale = paper_scale("vit-b16", tuple(FIELDS))
    seconds = time.perf_counter() - begun
    for row in scale["rows"]:
        suite.add({"what": "counted", "preset": "vit-b16", "dtype": "bf16 autocast", **row})
    suite.bar("vit-b16: part of forward FLOPs saved, n = 77", scale["n77"]["flops_saved"], 0.146, tolerance=0.002)
    suite.bar("vit-b16: part of forward FLOPs saved, n = 128", scale["n128"]["flops_saved"], 0.222, tolerance=0.002)
    suite.bar("vit-b16: seconds that counting all of this takes", seconds, 60, at_most=True)


def timed(suite: Suite, batch_size: int) -> None:
    """The text part of a step: LIFT's from caches of short and of long captions, CLIP's text tower at both lengths."""
    with tempfile.TemporaryDirectory() as folder:
        scenes.write(Path(folder) / "data", 2 * batch_size, seed=0)
        data, encoder = Shards(Path(folder) / "data"), Encoder(EncoderSpec())
        caches: dict[int, Cache] = {
            n: embed(data, Path(folder) / field, encoder, field=field, progress=False) for n, field in FIELDS.items()
        }
        lift = lift_text_ms(caches, batch_size, repeats=40 * suite.repeats)
        sizes = preset("tiny")
        towers = {
            n: (Clip(sizes.with_context(n)), [data.caption(i, field) for i in range(batch_size)])
            for n, field in FIELDS.items()
        }
        clip = clip_text_ms(towers, "fp32", repeats=suite.repeats)
    for model, timings in (("lift", lift), ("clip", clip)):
        for n, (median, spread) in timings.items():
            suite.add(
                {
                    "what": f"{model}'s text a step",
                    "preset": "tiny",
                    "dtype": "fp32",
                    "context": n,
                    "batch_size": batch_size,
                    "repeats": suite.repeats * (40 if model == "lift" else 1),
                    "median_ms": median,
                    "spread_ms": spread,
                }
            )
    ratio = lift[128].median / lift[77].median
    suite.bar("LIFT's text time at n = 77 and 128, the smaller over the larger", min(ratio, 1 / ratio), 0.9)
    suite.bar("CLIP's text time, n = 128 over n = 77", clip[128].median / clip[77].median, 1.1)


def test_lift_text(benchmark):
    """pytest-benchmark: gathers and widens the rows of one batch of random vectors."""
    import torch

    from lift_fast.cache import encode

    rows = encode(torch.randn(4096, 384), "int8")
    benchmark(lambda: rows[torch.randint(4096, (256,))].widen(torch.float32))

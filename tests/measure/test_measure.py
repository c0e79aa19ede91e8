"""FLOPs are tested against formulas by hand, memory against torch's MemTracker and by hand, timing on a fake clock."""

import json
from dataclasses import replace
from itertools import count as counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lift_fast.errors import ConfigError
from lift_fast.measure import compare, time
from lift_fast.measure.compare import cost_against_length, format_table, paper_scale
from lift_fast.measure.flops import clip_flops, count, lift_flops, saved
from lift_fast.measure.memory import LiveBytes, peak_training_memory
from lift_fast.measure.paper import rows_for
from lift_fast.measure.time import Timing, clip_text_ms, interleaved_ms, lift_text_ms, median_ms
from lift_fast.nn import Clip, Lift, Preset, TextConfig, VitConfig, preset, transformer
from lift_fast.ops.pairs.contrastive import contrastive
from lift_fast.ops.rows.quantized import QuantizedRows
from lift_fast.sugarcrepe import TASKS

TINY = preset("tiny")
VIT_B16 = preset("vit-b16")
ODD = Preset(
    VitConfig(image_size=35, patch_size=7, width=33, layers=3, heads=3),
    TextConfig(context=19, vocab_size=101, width=26, layers=2, heads=2),
    embed_dim=11,
    text_dim=51,
)
GIB = 2**30


# FLOPs by hand: a linear layer of m rows is 2·m·k·n, its backward twice that (once where the input needs no
# gradient); attention is 4·N²·width a layer, its backward 10·N²·width (with the recomputed scores).


def blocks(tokens, width, layers):
    return layers * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


def blocks_backward(tokens, width, layers):
    return layers * (2 * 2 * tokens * 12 * width**2 + 10 * tokens**2 * width)


def recomputed(tokens, width, layers, checkpointing):
    """FLOPs of recomputing up to the last tensor that backward needs: without the last linear layer, and without the
    one before a sum that is kept."""
    squares = {"none": 0, "mlp": 4, "branches": 7, "block": 8}[checkpointing]
    attention = 4 * tokens**2 * width if checkpointing in ("branches", "block") else 0
    return layers * (2 * tokens * squares * width**2 + attention)


def by_hand(p: Preset, text_dim: int, training: bool, checkpointing: str):
    """(LIFT image, CLIP image, CLIP text)"""
    v, t = p.vit, p.text
    patches = (v.image_size // v.patch_size) ** 2
    patch_embed = 2 * patches * 3 * v.patch_size**2 * v.width
    vit = (patches + 1, v.width, v.layers)
    txt = (t.context, t.width, t.layers)
    head = 2 * (v.width * text_dim + text_dim**2)
    image_projection, text_projection = 2 * v.width * p.embed_dim, 2 * t.width * p.embed_dim
    image, text = patch_embed + blocks(*vit), blocks(*txt) + text_projection
    if training:  # no gradient for the pixels
        image += patch_embed + blocks_backward(*vit)
        text += blocks_backward(*txt) + 2 * text_projection
        head, image_projection = 3 * head, 3 * image_projection
        image, text = image + recomputed(*vit, checkpointing), text + recomputed(*txt, checkpointing)
    return image + head, image + image_projection, text


@pytest.mark.parametrize("p", [TINY, VIT_B16, TINY.with_context(323), ODD], ids=["tiny", "b16", "long", "odd"])
@pytest.mark.parametrize(
    "training, checkpointing", [(False, "none"), (True, "none"), (True, "mlp"), (True, "branches"), (True, "block")]
)
def test_flops_are_the_hand_formulas(p, training, checkpointing):
    how = {"training": training, "checkpointing": checkpointing}
    lift, clip = lift_flops(p, **how), clip_flops(p, **how)
    assert (lift.image, clip.image, clip.text) == by_hand(p, p.text_dim, training, checkpointing)
    assert lift.text == 0
    assert lift.total == lift.image and clip.total == clip.image + clip.text


def test_flops_of_another_head():
    assert lift_flops(ODD, 13).image == by_hand(ODD, 13, False, "none")[0]


@pytest.mark.parametrize("context, fraction", [(77, 0.146), (128, 0.222)])
def test_forward_flops_saved_at_paper_scale(context, fraction):
    clip = clip_flops(VIT_B16.with_context(context))
    assert saved(lift_flops(VIT_B16), clip) == pytest.approx(fraction, abs=0.002)


def test_count_linear_and_attention_on_real_and_fake_tensors():
    def attend():
        q = torch.randn(2, 3, 17, 8, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

    linear = nn.Linear(7, 5)
    assert count(lambda: linear(torch.randn(3, 7))) == 2 * 3 * 7 * 5
    attention = (4 + 10) * 2 * 17**2 * 24
    assert count(attend) == attention
    with FakeTensorMode():
        assert count(attend) == attention
    assert count(lambda: torch.randn(3, 7).exp()) == 0


def test_measuring_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    p = replace(ODD, embed_dim=12)  # a preset whose count is not cached yet
    lift_flops(p, training=True), clip_flops(p, training=True)
    peak_training_memory("lift", p, 4), peak_training_memory("clip", p, 4)
    assert torch.equal(torch.get_rng_state(), before)


# Memory.


def two_steps(kind: str, p: Preset, batch: int, checkpointing: str, optimizer: dict):
    """Runs two whole training steps and yields after each."""
    model = Lift(p) if kind == "lift" else Clip(p)
    model.set_checkpointing(checkpointing)
    adamw = torch.optim.AdamW(model.parameters(), **optimizer)
    for _ in range(2):
        pixels = torch.empty(batch, 3, p.vit.image_size, p.vit.image_size)
        with torch.autocast("cpu", torch.bfloat16):
            if kind == "lift":
                codes = torch.empty(batch, p.text_dim, dtype=torch.int8)
                text = QuantizedRows(codes, torch.empty(batch), "int8", p.text_dim)
                image = model.encode_image(pixels)
            else:
                tokens = torch.empty(batch, p.text.context, dtype=torch.long)
                image = model.encode_image(pixels)
                text = model.encode_text(tokens)
                del tokens
            loss = contrastive(image, text, model.logit_scale.exp())
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        del pixels, image, text, loss
        yield


@pytest.mark.parametrize("kind", ["lift", "clip"])
@pytest.mark.parametrize("checkpointing", ["none", "mlp", "branches", "block"])
def test_peak_is_what_mem_tracker_sees_in_a_second_step(kind, checkpointing):
    tracker_module = pytest.importorskip("torch.distributed._tools.mem_tracker")
    tracker = tracker_module.MemTracker()
    with FakeTensorMode(), tracker:
        for _ in two_steps(kind, ODD, 13, checkpointing, {"fused": True}):
            tracker.reset_mod_stats()
    seen = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    ours = peak_training_memory(kind, ODD, 13, checkpointing=checkpointing)
    assert ours == pytest.approx(seen, rel=0.01)


def test_live_bytes_counts_storages_once_and_forgets_them():
    with LiveBytes() as live:
        x = torch.empty(1000)
        view = x.view(10, 100)[2:]
        y = x + 1
        assert (live.now, live.peak) == (8000, 8000)
        del x, y
        assert (live.now, live.peak) == (4000, 8000)  # the view keeps x's storage
        del view
        assert live.now == 0


@pytest.mark.parametrize("kind, model", [("lift", Lift), ("clip", Clip)])
def test_a_batch_of_one_is_parameters_gradients_and_moments_at_least(kind, model):
    wide = replace(ODD, text=replace(ODD.text, vocab_size=100_003), text_dim=1501)
    parameters = 4 * sum(x.numel() for x in model(wide).parameters())
    peak = peak_training_memory(kind, wide, 1, precision="fp32")
    assert 4 * parameters <= peak <= 4.2 * parameters


def test_the_loss_grows_no_faster_than_the_batch():
    """The dense float32 logits of the larger batch alone would take 37 GiB."""
    few, many = (peak_training_memory("lift", ODD, batch) for batch in (10_000, 100_000))
    assert many <= 10 * few


@pytest.mark.parametrize(
    "kind, context, checkpointing, batch, gib",
    [
        ("lift", 77, "none", 256, 15.8),
        ("clip", 77, "none", 256, 20.4),
        ("clip", 128, "none", 256, 23.1),
        ("lift", 77, "block", 2048, 20.9),
        ("clip", 77, "block", 2048, 21.6),
    ],
)
def test_peaks_of_plain_blocks_are_near_those_found_with_open_clips(
    kind, context, checkpointing, batch, gib, monkeypatch
):
    """The expected values leave out the float32 pixels, which take 0.14 GiB at a batch of 256 and 1.15 at 2 048."""
    monkeypatch.setattr(transformer, "block", plain_block)
    monkeypatch.setattr(transformer.LayerNorm, "forward", nn.LayerNorm.forward)
    pixels = batch * 3 * 224**2 * 4 / GIB
    sizes = VIT_B16.with_context(context)
    peak = peak_training_memory(kind, sizes, batch, checkpointing=checkpointing)
    assert peak / GIB - pixels == pytest.approx(gib, rel=0.02)


def plain_block(x, branch, *weights, heads, causal, checkpointing, **_):
    """The block of ops/block.py by torch's functions under autocast. Returns the sum, and no branch left to add."""

    def run(x):
        ln1_w, ln1_b, w_qkv, b_qkv, w_o, b_o, ln2_w, ln2_b, w1, b1, w2, b2 = weights
        qkv = F.linear(F.layer_norm(x, x.shape[2:], ln1_w, ln1_b), w_qkv, b_qkv)
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + F.linear(attended.transpose(1, 2).flatten(2), w_o, b_o)
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[2:], ln2_w, ln2_b), w1, b1)), w2, b2)

    x = checkpoint(run, x, use_reentrant=False) if checkpointing == "block" else run(x)
    return x, None


@pytest.mark.parametrize("checkpointing", ["none", "mlp", "branches", "block"])
def test_a_sample_costs_what_the_tower_says_it_keeps(checkpointing):
    few, many = (peak_training_memory("lift", VIT_B16, batch, checkpointing=checkpointing) for batch in (512, 1024))
    with torch.device("meta"):
        tower = Lift(VIT_B16).visual
    tower.transformer.checkpointing = checkpointing
    kept = tower.activation_bytes(512)
    embedded = 512 * tower.config.tokens * 768 * 2
    # Further memory: pixels, tokens before and after the first layernorm, and temporary tensors of one block's
    # backward, 11 to 20 widths a token.
    assert kept + 5 * embedded < many - few < kept + 27 * embedded


def test_peak_grows_with_batch_and_context_and_falls_with_checkpointing():
    def peak(kind, batch, context, **how):
        return peak_training_memory(kind, ODD.with_context(context), batch, **how)

    for kind in ("lift", "clip"):
        one = peak(kind, 63, 77)
        assert peak(kind, 62, 77) < one < peak(kind, 257, 77)
        assert peak(kind, 63, 77, checkpointing="block") < one < peak(kind, 63, 77, precision="fp32")
    assert peak("clip", 63, 76) < peak("clip", 63, 77) < peak("clip", 63, 323)
    assert peak("lift", 63, 16) == peak("lift", 63, 323) < peak("lift", 63, 77, text_dim=5000)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kind": "siglip"}, "no model 'siglip'; there are: lift, clip"),
        ({"batch_size": 0}, "at least one sample"),
        ({"precision": "fp8"}, "no precision 'fp8'; there are: bf16, fp32"),
    ],
)
def test_memory_refuses(wrong, message):
    with pytest.raises(ConfigError, match=message):
        peak_training_memory(**{"kind": "lift", "preset": TINY, "batch_size": 8, **wrong})


# Time.


class Clock:
    """A fake perf_counter that only work() advances."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += next(seconds)

        return run


def test_interleaved_is_round_robin_with_a_turning_order(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    a = clock.work("a", iter([9.0, 9.0, 1e-3, 2e-3, 3e-3, 4e-3, 100.0]))  # two to warm up, then one outlier
    b = clock.work("b", iter([5.0, 5.0] + [7e-3] * 5))
    timings = interleaved_ms({"a": a, "b": b}, repeats=5, warmup=2)
    assert timings["a"] == (pytest.approx(3.0), pytest.approx(2.0))
    assert timings["b"] == (pytest.approx(7.0), pytest.approx(0.0, abs=1e-6))
    rounds = ["".join(clock.calls[i : i + 2]) for i in range(0, len(clock.calls), 2)]
    assert rounds == ["ab", "ba", "ab", "ba", "ab", "ba", "ab"]


def test_drift_meets_all_alike(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    drift = (1e-3 * 1.01**i for i in counter())  # every call is slower than the one before, whichever it is
    fns = {name: clock.work(name, drift) for name in "abc"}
    medians = [timing.median for timing in interleaved_ms(fns, repeats=60, warmup=0).values()]
    assert max(medians) / min(medians) < 1.03


def test_median_ms(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    assert median_ms(clock.work("", iter([8.0, 1e-3, 2e-3, 9e-3])), repeats=3, warmup=1) == pytest.approx(2.0)
    once = interleaved_ms({"": clock.work("", iter([4e-3]))}, repeats=1, warmup=0)
    assert once == {"": Timing(pytest.approx(4), 0)}


class MemoryCache:
    """A cache in memory, with length and `rows`, that records which rows were requested."""

    def __init__(self, rows, dim, seed):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-127, 128, (rows, dim), dtype=torch.int8, generator=generator)
        self.all, self.requested = QuantizedRows(codes, torch.rand(rows) + 0.1, "int8", dim), []

    def __len__(self):
        return len(self.all)

    def rows(self, rows):
        self.requested.append(rows.tolist())
        return self.all[rows]


def test_lift_text_takes_fresh_rows_every_time():
    caches = {77: MemoryCache(997, 33, 0), 128: MemoryCache(1009, 33, 1)}
    timings = lift_text_ms(caches, batch_size=65, repeats=30)
    assert set(timings) == {77, 128} and all(t.median > 0 for t in timings.values())
    for cache in caches.values():
        assert len(cache.requested) >= 30 and all(len(rows) == 65 for rows in cache.requested)
        assert len({tuple(rows) for rows in cache.requested}) == len(cache.requested)


def test_lift_text_time_does_not_know_the_caption_length():
    caches = {77: MemoryCache(4000, 384, 0), 128: MemoryCache(4000, 384, 1)}
    threads = torch.get_num_threads()
    # The fastest of three rounds, because other processes on the machine disturb some of them.
    rounds = [[t.median for t in lift_text_ms(caches, batch_size=256).values()] for _ in range(3)]
    short, long = map(min, zip(*rounds, strict=True))
    assert torch.get_num_threads() == threads
    assert long == pytest.approx(short, rel=0.1)


def test_clip_text_time_grows_with_the_context():
    captions = ["a red cat sits on two small boxes", "das grüne Haus", ""] * 3
    models = {n: (Clip(TINY.with_context(n)), captions) for n in (16, 128)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two would mostly wait for each other
    timings = clip_text_ms(models, repeats=3)
    torch.set_num_threads(threads)
    assert timings[128].median > 1.5 * timings[16].median
    assert all(p.grad is None for p in models[16][0].parameters())
    assert clip_text_ms({"bf16": models[16]}, precision="bf16", repeats=2)["bf16"].median > 0


# The paper's figures, and ours compared with them.


PROMPTS = "4186863f7cfe1005e11d76ffd467b870cd3c8f511536d62e942444a2f9dbe2a1"
PAPER = [
    (("sugarcrepe", "composition", {"preset": "vit-b16"}, 7511), {"replace_rel": 0.768, "add_att": 0.922}),
    (("imagenet", "zero_shot", {"preset": "vit-b16"}, 50_000, PROMPTS), {"top1": 0.436}),
    (("coco-val2017", "first_caption", {"preset": "vit-b16"}, 5000), {"i2t_r1": 0.346, "t2i_r1": 0.36}),
    (("flickr30k", "first_caption", {"preset": "vit-b16"}, 1000), {"i2t_r1": 0.691, "t2i_r1": 0.729}),
]


@pytest.mark.parametrize(("asked", "scores"), PAPER)
def test_the_papers_rows(asked, scores):
    rows = rows_for(*asked)
    assert [row[:2] for row in rows] == [(m, d) for d in ("DataComp", "Recap") for m in ("CLIP", "LIFT")]
    assert {name: rows[3].scores[name] for name in scores} == scores
    assert all(row.scores.keys() == rows[3].scores.keys() for row in rows)
    if asked[0] == "sugarcrepe":
        assert set(rows[0].scores) == set(TASKS)


@pytest.mark.parametrize(("asked", "scores"), PAPER)
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, None),
        (0, "coco-karpathy"),
        (0, "sugarcrepe++"),
        (1, "retrieval"),
        (2, {"preset": "tiny"}),
        (2, {"preset": "vit-b32"}),
        (2, {"preset": "vit-b16", "vit": {"layers": 10}}),
        (2, {}),
        (3, 4999),
        (3, 0),
    ],
)
def test_no_row_of_the_paper_where_data_protocol_or_size_are_not_its(asked, scores, place, value):
    changed = [*asked]
    changed[place] = value
    assert rows_for(*changed) == []


@pytest.mark.parametrize("prompts", [None, "", PROMPTS[:-1] + "0"])
def test_no_imagenet_row_for_other_prompts(prompts):
    assert rows_for("imagenet", "zero_shot", {"preset": "vit-b16"}, 50_000, prompts) == []


def test_paper_scale(monkeypatch):
    peaks = {"lift": 60, "clip": 80}
    monkeypatch.setattr(compare, "peak_training_memory", lambda kind, p, size, checkpointing: peaks[kind])
    scale = paper_scale(contexts=(77, 100), batch_size=96)
    json.dumps(scale)
    assert [(row["context"], row["checkpointing"], row["batch_size"]) for row in scale["rows"]] == [
        (77, "none", 96),
        (77, "block", 96),
        (100, "none", 96),
        (100, "block", 96),
    ]
    assert scale["batch_size"] == 96
    short, other = scale["n77"], scale["n100"]
    assert short["flops_saved"] == pytest.approx(0.146, abs=0.002)
    assert short["memory_saved"] == 0.25
    assert (short["paper_flops_saved"], short["paper_memory_saved"]) == (0.255, 0.068)
    assert (other["paper_flops_saved"], other["paper_memory_saved"]) == (None, None)
    for row in scale["rows"]:
        assert (row["memory_saved"], row["lift_memory_bytes"], row["clip_memory_bytes"]) == (0.25, 60, 80)
        assert row["flops_saved"] == 1 - row["lift_flops"] / row["clip_flops"]
    table = format_table(scale)
    assert "14.4%" in table and "the paper at n=77: 25.5% of FLOPs, 6.8% of memory" in table
    assert "n=100" not in table


def test_another_preset_at_an_odd_batch():
    scale = paper_scale("tiny", (77,), 37)
    assert scale["n77"]["paper_flops_saved"] is None  # the paper has no figures for this preset
    assert scale["n77"]["memory_saved"] == scale["rows"][1]["memory_saved"] > 0
    assert scale["rows"][0]["clip_memory_bytes"] == peak_training_memory("clip", TINY, 37)
    assert scale["rows"][1]["lift_memory_bytes"] == peak_training_memory("lift", TINY, 37, checkpointing="block")


def test_default_regimes(monkeypatch):
    monkeypatch.setattr(compare, "peak_training_memory", lambda kind, p, size, checkpointing: size)
    scale = compare.paper_scale("tiny", (77,))
    assert [(row["checkpointing"], row["batch_size"]) for row in scale["rows"]] == list(compare.REGIMES)
    assert scale["batch_size"] == 2048


@pytest.mark.parametrize("contexts", [(), (77, 0)])
def test_paper_scale_refuses_contexts(contexts):
    with pytest.raises(ConfigError, match="at least 1 token"):
        paper_scale("tiny", contexts)


def test_cost_against_length_is_flat_for_lift_and_grows_for_clip():
    rows = cost_against_length(TINY, (16, 77, 323), text_dim=100)
    assert len({row["lift_flops"] for row in rows}) == 1
    clip = [row["clip_flops"] for row in rows]
    assert clip == sorted(clip) and clip[0] > rows[0]["lift_flops"]
    assert rows[0]["lift_flops"] == lift_flops(TINY, 100, training=True).total
    assert clip[1] == clip_flops(TINY.with_context(77), training=True).total
    assert rows[0]["clip_text_ms"] is None


def test_memory_needs_no_memory():
    """A batch too large for any machine."""
    assert peak_training_memory("lift", TINY, 1_000_000, checkpointing="block") > 4e11

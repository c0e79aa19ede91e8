"""The benchmarks of the tower and of the training step at tiny sizes: peers, counts, rows and targets."""

import math

import pytest
import torch
from torch import nn

from benchmarks import bench_step, bench_vit, vit_peers
from benchmarks.harness import Suite
from lift_fast.measure import peaks
from lift_fast.nn import Lift, Preset, TextConfig, Vit, VitConfig
from lift_fast.nn.transformer import Transformer
from lift_fast.ops.pairs.contrastive import contrastive

TOY = VitConfig(image_size=24, patch_size=8, width=16, layers=2, heads=2)
PRESET = Preset(TOY, TextConfig(width=16, layers=1, heads=2), embed_dim=8, text_dim=12)


def copied(vit: Vit, checkpointing: bool = False) -> vit_peers.Tower:
    """The tower of torch's modules with the weights of ours."""
    tower = vit_peers.Tower(vit.config, checkpointing).to(vit.positional_embedding.dtype)
    pairs = [
        (tower.conv, vit.patch_embed),
        (tower.ln_pre, vit.ln_pre),
        (tower.ln_post, vit.ln_post),
    ]
    with torch.no_grad():
        tower.class_embedding.copy_(vit.class_embedding)
        tower.positional_embedding.copy_(vit.positional_embedding)
        for theirs, ours in zip(tower.blocks, vit.transformer.blocks, strict=True):
            theirs.attn.in_proj_weight.copy_(ours.qkv.weight)
            theirs.attn.in_proj_bias.copy_(ours.qkv.bias)
            pairs += [(theirs.ln_1, ours.ln_1), (theirs.ln_2, ours.ln_2), (theirs.attn.out_proj, ours.proj)]
            pairs += [(theirs.mlp[0], ours.fc_1), (theirs.mlp[2], ours.fc_2)]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    return tower


def perturbed(module: nn.Module) -> nn.Module:
    """The module with noise added to its weights, so that none stays at an initial 0 or 1 and has no effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("checkpointing", [False, True])
def test_torchs_modules_are_our_tower(checkpointing):
    vit = perturbed(Vit(TOY)).double()
    tower = copied(vit, checkpointing)
    pixels = torch.randn(3, 3, 24, 24, dtype=torch.float64)
    features = [model(pixels) for model in (vit, tower)]
    torch.testing.assert_close(features[1], features[0], rtol=1e-9, atol=1e-9)
    for out in features:
        out.square().sum().backward()
    grads = [(vit.patch_embed, tower.conv), (vit.transformer.blocks[0].fc_1, tower.blocks[0].mlp[0])]
    for ours, theirs in grads:
        torch.testing.assert_close(theirs.weight.grad, ours.weight.grad, rtol=1e-8, atol=1e-8)


def test_the_peers_step_is_ours():
    """The peer's step has our loss for the same weights; it changes every weight and lowers the loss."""
    lift = perturbed(Lift(PRESET))
    peer = vit_peers.PeerLift(copied(lift.visual), TOY.width, PRESET.text_dim)
    peer.head[0].load_state_dict(lift.head.fc_1.state_dict())
    peer.head[2].load_state_dict(lift.head.fc_2.state_dict())
    pixels, text = torch.randn(6, 3, 24, 24), torch.randn(6, PRESET.text_dim)
    right = contrastive(lift.encode_image(pixels), text, lift.logit_scale.exp(), normalize=True)
    before = [p.detach().clone() for p in peer.parameters()]
    step = vit_peers.peer_step(peer, vit_peers.adamw(peer, fused=True), "cpu", torch.float32)
    loss, norm = step(pixels, text)
    torch.testing.assert_close(loss, right.detach(), rtol=1e-4, atol=1e-5)
    assert 0 < float(norm) < math.inf
    assert all(not torch.equal(p, q) for p, q in zip(peer.parameters(), before, strict=True))
    for _ in range(20):
        loss = step(pixels, text)[0]
    assert loss < right


def test_hugging_faces_tower_is_the_same_but_for_its_norms_and_biases():
    """It has no layer norm before the first block, and a bias in the patch embedding."""
    notes: list[str] = []
    found = vit_peers.installed_peers(notes.append)
    assert vit_peers.TORCH in found and len(found) + len(notes) == len(vit_peers.TOWERS)
    tower = found["huggingface"](TOY)
    assert tower.model.config._attn_implementation == "sdpa"
    pixels = torch.randn(2, 3, 24, 24)
    assert tower(pixels).shape == (2, TOY.width)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tower, Vit(TOY))]
    assert sizes[0] == sizes[1] - 2 * TOY.width + TOY.width


def test_the_widths_that_are_kept():
    x = torch.randn(2, 5, 8, requires_grad=True)
    linear = nn.Linear(8, 8)
    assert vit_peers.kept_widths(lambda x: x.sin().cos(), x, torch.float32) == 2  # x and sin(x)
    assert vit_peers.kept_widths(linear, x, torch.float32) == 1  # weights do not count
    assert vit_peers.kept_widths(linear, x, torch.bfloat16) == 1  # nor do their casts
    assert vit_peers.kept_widths(lambda x: x * x.view(-1).view_as(x), x, torch.float32) == 1  # each storage counts once
    block = vit_peers.Block(8, 2, 32)
    statistics = 8 / 8 + 0.5  # mean and rstd of two norms; lse of each head of attention
    assert 16 < vit_peers.kept_widths(block, x, torch.float32) < 16 + statistics
    assert 9 < vit_peers.kept_widths(Transformer(8, 1, 2), x, torch.float32) < 9 + statistics


def test_the_peak_from_fake_tensors_has_what_blocks_keep():
    config = VitConfig(image_size=64, patch_size=8, width=64, layers=4, heads=2)
    unit = 2 * config.tokens * config.width  # bytes of an image's activations in bfloat16
    more = {}
    for what, build, wide in (("ours", Vit, False), ("torch", vit_peers.Tower, False), ("wide", vit_peers.Tower, True)):
        few, many = (vit_peers.fake_peak(build, config, batch, wide) for batch in (64, 128))
        more[what] = (many - few) / 64 / unit / config.layers
    assert 9 < more["ours"] < more["torch"] < more["wide"] and 16 < more["torch"]
    # The float32 inputs of two norms in place of bfloat16 ones.
    assert more["wide"] - more["torch"] == pytest.approx(2, abs=1.2)
    assert more["ours"] / more["torch"] < 0.75


def test_flops_by_hand():
    width, tokens, patches = TOY.width, TOY.tokens, TOY.grid**2
    linear = 3 * 2 * tokens * 12 * width**2  # of a block; the backward has twice the FLOPs of the forward
    attention = 3.5 * 4 * tokens**2 * width
    embedding = 2 * 2 * patches * 3 * TOY.patch_size**2 * width  # images need no gradient
    tower = TOY.layers * (linear + attention) + embedding
    assert bench_vit.tower_flops(TOY) == tower
    head = 3 * 2 * (width * 12 + 12 * 12)
    assert bench_step.step_flops(PRESET, 5) == 5 * (tower + head) + 2 * 2 * 25 * 12


@pytest.mark.parametrize(
    "name, found",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_datasheet_peaks(name, found):
    assert peaks.peak(name) == found
    assert peaks.peak(name, "nothing") is None


def test_fp8_is_twice_as_fast_as_bf16():
    """Except for the rounding of the datasheets."""
    for name, bf16, fp8 in peaks.PEAKS:
        assert fp8 is None or fp8 == pytest.approx(2 * bf16, rel=0.02), name


def test_the_gemm_and_mfu():
    assert peaks.mfu(6e12, 2.0, 4e12) == 0.75
    call, flops = peaks.gemm("cpu", torch.float32, 8)
    assert flops == 2 * 8**3 and call().shape == (8, 8) and peaks.GEMM_SIZE["cuda"] == 8192


@pytest.fixture
def toy(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for module in (bench_vit, bench_step):
        monkeypatch.setattr(module, "device", lambda: "cpu")
    for name, value in {
        "WIDTHS": {16: 2, 8: 1},
        "TOKENS": 7,
        "OTHER_TOKENS": (3,),
        "HEADS": 2,
        "HEAD_DIM": 8,
        "BATCH": {"cpu": 2},
        "BASE": TOY,
        "TINY": TOY,
        "FAKE_BATCH": 2,
    }.items():
        monkeypatch.setattr(bench_vit, name, value)
    monkeypatch.setattr(bench_step, "PRESETS", {"toy": PRESET})
    monkeypatch.setattr(bench_step, "CPU_CASES", (("toy", 4),))
    monkeypatch.setattr(bench_step, "GEMM_SIZE", 16)
    monkeypatch.setattr(bench_step, "FLOAT8_VIT", VitConfig(32, 16, 32, 1, 2))
    monkeypatch.setattr(bench_step, "FLOAT8_STEPS", 26)
    yield
    torch.set_num_threads(threads)


def quick(module) -> Suite:
    suite = Suite("x", quick=True)
    suite.repeats = 1
    module.run(suite)
    return suite


def test_bench_vit(toy, capsys):
    suite = quick(bench_vit)
    suite.print()
    measured = {(row["what of"], row["what"]) for row in suite.rows}
    both = {"lift_fast", "torch modules"}
    for part in ("block", "residual and layernorm", "mlp", "linear"):
        assert {what for of, what in measured if of == part} == both
    attention = {what for of, what in measured if of == "attention"}
    assert attention >= {"lift_fast torch", "torch sdpa"}
    assert {what for of, what in measured if of == "tower"} >= both | {"huggingface"}
    assert {row["tokens"] for row in suite.rows if row["what of"] == "attention"} == {7, 3}
    for row in suite.rows:
        if row["what of"] == "tower":
            assert row["images_per_s"] == pytest.approx(2e3 / row["median_ms"])
            tflops = 2 * bench_vit.tower_flops(TOY) / 1e12
            assert row["tflop_per_s"] == pytest.approx(tflops / row["median_ms"] * 1e3)
    kinds = 1 if vit_peers.native_dtype("cpu") == torch.float32 else 2
    bars = {bar["name"]: bar for bar in suite.bars}
    assert sum("speed against torch modules" in name for name in bars) == 2 * kinds
    kept = next(bar for name, bar in bars.items() if "activations kept" in name)
    assert kept["at_most"] and 9 / 18 < kept["value"] < 0.75
    assert next(bar for name, bar in bars.items() if "peak of a step" in name)["value"] > 0
    assert all(bar["value"] is not None for bar in bars.values())


def test_bench_step(toy, capsys):
    suite = quick(bench_step)
    suite.print()
    *timed, plain, fp8 = suite.rows
    rows = {row["what"]: row for row in timed}
    assert set(rows) == {"torch.mm", "lift_fast", "authors' step", "torch modules"}, suite.notes
    assert len({tuple(row) for row in timed}) == 1  # all rows print as one table
    assert (plain["what"], fp8["what"]) == ("bf16", "float8")
    assert plain["last 25 steps"] != fp8["last 25 steps"] > 0
    gemm = rows["torch.mm"]
    assert gemm["mfu_gemm"] == pytest.approx(1) and gemm["tflop_per_s"] == pytest.approx(
        2 * 16**3 / gemm["median_ms"] / 1e9
    )
    for what in set(rows) - {"torch.mm"}:
        row = rows[what]
        assert row["images_per_s"] == pytest.approx(4e3 / row["median_ms"])
        assert row["tflop_per_s"] == pytest.approx(bench_step.step_flops(PRESET, 4) / row["median_ms"] / 1e9)
        assert row["mfu_gemm"] == pytest.approx(row["tflop_per_s"] / gemm["tflop_per_s"])
        assert row["mfu_datasheet"] is None
    bar, apart = suite.bars
    assert apart["value"] > 0 and apart["bar"] == bench_step.FLOAT8_TARGET
    assert bar["value"] == pytest.approx(rows["torch modules"]["median_ms"] / rows["lift_fast"]["median_ms"])


def test_bars_of_the_step_on_a_gpu():
    """The targets compare our fastest variant with the fastest compiled peer."""
    rows = {
        "torch.mm": {"median_ms": 1.0, "mfu_gemm": 1.0},
        "lift_fast": {"median_ms": 30.0, "mfu_gemm": 0.4},
        "lift_fast compiled graph": {"median_ms": 20.0, "mfu_gemm": 0.6},
        "torch modules": {"median_ms": 22.0, "mfu_gemm": 0.5},
        "torch modules compiled": {"median_ms": 28.0, "mfu_gemm": 0.4},
        "timm compiled": {"median_ms": 26.0, "mfu_gemm": 0.4},
        "authors' step": {"median_ms": 50.0, "mfu_gemm": 0.2},
    }
    suite = Suite("x", True)
    bench_step._targets(suite, "cuda", "toy", rows)
    assert [(bar["value"], bar["ok"]) for bar in suite.bars] == [(0.6, True), (1.3, True), (2.5, False)]
    assert "timm compiled" in suite.bars[1]["name"] and "lift_fast compiled graph" in suite.bars[0]["name"]
    suite = Suite("x", True)
    bench_step._targets(suite, "cuda", "toy", {})
    assert [bar["value"] for bar in suite.bars] == [None] * 3 and not any(bar["ok"] for bar in suite.bars)


def test_what_fails_is_noted_and_the_others_go_on():
    def broken():
        raise RuntimeError("no such shape\nmore")

    suite = Suite("x", True)
    builds = {"broken": broken, "built, broken": lambda: broken, "good": lambda: lambda: None}
    rows = vit_peers.measure(suite, {"size": 3}, builds, "cpu", {"images_per_s": 2.0})
    assert set(rows) == {"good"} and suite.rows == [rows["good"]]
    assert suite.notes == [f"{what}: 3: RuntimeError: no such shape" for what in ("broken", "built, broken")]
    assert vit_peers.faster(rows, "good", "broken") is None
    assert vit_peers.fastest(rows, lambda what: what != "good") == ""


def test_what_takes_too_long_is_not_measured():
    calls = []
    suite = Suite("x", True)
    builds = {name: lambda: lambda: calls.append(1) for name in "ab"}
    assert vit_peers.measure(suite, {"size": 3}, builds, "cpu", {}, most=1e-9) == {}
    assert calls == [1] and suite.notes == ["would take more than 0 s: not measured: 3"]
    suite = Suite("x", True, seconds=-1)
    assert vit_peers.measure(suite, {"size": 3}, builds, "cpu", {}) == {}
    assert calls == [1] and suite.notes == ["out of time: not measured: 3"]


@pytest.mark.gpu
def test_on_a_gpu():
    suite = Suite("x", True)
    suite.repeats = 1
    pixels = torch.randn(4, 3, 24, 24, device="cuda")
    config = VitConfig(image_size=24, patch_size=8, width=128, layers=2, heads=2)
    builds = bench_vit._builds(suite, {"torch": lambda: vit_peers.Tower(config)}, (pixels,), "cuda", torch.bfloat16)
    builds = {"torch": builds["torch"]}
    rows = vit_peers.measure(suite, {"size": 3}, builds, "cuda", {"images_per_s": 4.0}, spend=0.1)
    weights = sum(p.numel() * 4 for p in vit_peers.Tower(config).parameters()) / 2**20
    assert 2 * weights < rows["torch"]["peak_mib"] < 20 * weights, suite.notes

"""train/step.py: one training step, in which the host never waits for the device."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lift_fast.losses import ClipLoss
from lift_fast.nn import Clip, Lift, Preset, TextConfig, VitConfig
from lift_fast.ops.rows.quantized import QuantizedRows
from lift_fast.train.config import TrainConfig
from lift_fast.train.ema import Ema
from lift_fast.train.optimizer import lock, make_optimizer
from lift_fast.train.parallel import Towers
from lift_fast.train.step import Step

SMALL = Preset(VitConfig(16, 8, 32, 2, 2), TextConfig(9, 60, 16, 2, 2), embed_dim=12, text_dim=24)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def make(kind, device, capturable=False, preset=SMALL, compiled=False, **options):
    torch.manual_seed(0)
    with torch.device(device):
        model = Lift(preset) if kind == "lift" else Clip(preset)
    lr = torch.tensor(1e-3, device=device) if capturable else 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True, capturable=capturable)
    towers = Towers(model, compiled)
    return model, Step(model, ClipLoss(normalize=True), optimizer, towers=towers, **options)


def batch(kind, device, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size, 16, 16, 3), dtype=torch.uint8, generator=generator)
    if kind == "clip":
        return pixels.to(device), torch.randint(60, (size, 9), generator=generator).to(device)
    codes = torch.randint(-127, 128, (size, 24), dtype=torch.int8, generator=generator)
    return pixels.to(device), QuantizedRows(codes, torch.ones(size), "int8", 24).to(device)


@pytest.fixture
def deterministic():
    """cuDNN's gradient of the patch embedding's weight is deterministic only on request."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False
    torch.use_deterministic_algorithms(False)


class Waits(TorchDispatchMode):
    """Lists the operations that would synchronise the host with a GPU: values read back, shapes that depend on values,
    and tensors made from Python numbers, which are copied to the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.startswith(self.NAMES) or masks:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("patch_dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_the_host_never_waits(kind, patch_dropout):
    """Every operation of two steps, the loss included, on fake tensors."""
    preset = replace(SMALL, vit=replace(SMALL.vit, patch_dropout=patch_dropout))
    with FakeTensorMode():
        _, step = make(kind, "cpu", precision=torch.bfloat16, preset=preset)
        inputs = batch(kind, "cpu")
        with Waits() as waits:
            for _ in range(2):
                assert step(*inputs, 1e-3).shape == (3,)
        assert waits.found == []


@pytest.mark.parametrize("kind", ["lift", "clip"])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"capturable": True}])
def test_the_host_never_waits_for_what_a_run_adds(kind, options):
    """Patches to keep, the limit of a spike, layer-wise decay, a locked tower, and the averages."""
    options = dict(options)
    config = TrainConfig(
        kind, (), out="", preset="small", layer_decay=0.7, lock="tower", unlocked_blocks=1,
        graph=options.pop("capturable", False),
    )  # fmt: skip
    with FakeTensorMode():
        model = Lift(SMALL) if kind == "lift" else Clip(SMALL)
        lock(model, config)
        step = Step(model, ClipLoss(normalize=True), make_optimizer(model, config), clip_grad=0.3, **options)
        ema = Ema(model, 0.9)
        inputs, kept = batch(kind, "cpu"), torch.zeros(6, 2, dtype=torch.int64)
        with Waits() as waits:
            for limit in (torch.inf, 2.5):
                assert step(*inputs, 1e-3, kept, limit).shape == (3,)
                ema.update()
        assert waits.found == []


def test_the_test_sees_what_waits():
    with Waits() as waits:
        x = torch.ones(3)
        x.sum().item(), x[x > 0], torch.tensor([1.0, 2.0]), bool(x.any())
    assert len(waits.found) == 4


@pytest.mark.parametrize("kind", ["lift", "clip"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_step_is_the_plain_one(kind, device, deterministic):
    """A step gives what torch's own calls give, one by one."""
    from lift_fast.data.pixels import normalise

    model, step = make(kind, device, clip_grad=0.3)
    other, _ = make(kind, device)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, fused=True)
    for turn, lr in enumerate((1e-3, 5e-4, 2e-3)):
        pixels, text = batch(kind, device, seed=turn)
        got = step(pixels, text, lr)
        optimizer.param_groups[0]["lr"] = lr
        features = other.encode_text(text) if kind == "clip" else text
        loss = ClipLoss(normalize=True)(other.encode_image(normalise(pixels)), features, other.logit_scale.exp())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        other.clamp_logit_scale()
        want = torch.stack([loss, norm, other.logit_scale.exp()])
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_whole_tower_compiles_without_a_break():
    import torch._dynamo

    torch._dynamo.reset()
    model, step = make("lift", "cpu")
    _, compiled = make("lift", "cpu")
    compiled.towers.encode_image = torch.compile(compiled.model.encode_image, fullgraph=True, backend="aot_eager")
    explained = torch._dynamo.explain(model.encode_image)(torch.zeros(2, 3, 16, 16))
    assert explained.graph_break_count == 0 and explained.graph_count == 1
    for turn in range(3):
        inputs = batch("lift", "cpu", seed=turn)
        torch.testing.assert_close(compiled(*inputs, 1e-3), step(*inputs, 1e-3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_inductor_compiles_the_tower(checkpointing):
    model, step = make("lift", "cpu")
    other, compiled = make("lift", "cpu", compiled=True)
    for m in (model, other):
        m.set_checkpointing(checkpointing)
    inputs = batch("lift", "cpu")
    for _ in range(2):
        torch.testing.assert_close(compiled(*inputs, 1e-3), step(*inputs, 1e-3), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_a_captured_step_is_the_same_step(kind, deterministic):
    model, step = make(kind, "cuda", capturable=True)
    other, graphed = make(kind, "cuda", capturable=True, graphed=True)
    for turn in range(8):
        # The sixth batch has another size: it runs eagerly, and the graph is replayed again after it.
        inputs = batch(kind, "cuda", seed=turn, size=5 if turn == 5 else 6)
        lr = 1e-3 / (turn + 1)
        torch.testing.assert_close(graphed(*inputs, lr), step(*inputs, lr), rtol=1e-4, atol=1e-5)
    assert graphed.graph is not None
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if name.endswith("qkv.bias"):
            # The keys' bias does not change the softmax. Its gradient is rounding, which Adam makes full steps of.
            (p_q, p_k, p_v), (q_q, q_k, q_v) = p.chunk(3), q.chunk(3)
            torch.testing.assert_close(p_k, q_k, rtol=0, atol=2 * sum(1e-3 / (turn + 1) for turn in range(8)))
            p, q = torch.cat([p_q, p_v]), torch.cat([q_q, q_v])
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_no_step_waits_on_a_real_gpu(kind):
    _, step = make(kind, "cuda", precision=torch.bfloat16)
    inputs = batch(kind, "cuda")
    step(*inputs, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*inputs, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")

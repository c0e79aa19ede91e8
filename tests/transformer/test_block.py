"""ops/block.py: values and gradients, what it keeps for the backward, autocast, and torch.compile."""

import pytest
import torch
from support.block_cases import DEVICES, DTYPES, gradients, near
from support.tensors import leaves
from torch.nn import functional as F

from lift_fast.ops.attention.op import reference as attention
from lift_fast.ops.block import Checkpointing, block, kept_bytes
from lift_fast.ops.transformer.layernorm import reference as layernorm
from lift_fast.ops.transformer.mlp import reference as mlp

LEVELS = ("none", "mlp", "branches", "block")
HEADS = 3


def reference(x, residual, *weights, heads=HEADS, eps=1e-5, activation="gelu", causal=False):
    ln1_w, ln1_b, w_qkv, b_qkv, w_o, b_o, ln2_w, ln2_b, w1, b1, w2, b2 = weights
    s = x if residual is None else x + residual
    qkv = (layernorm(s, ln1_w, ln1_b, eps) @ w_qkv.T + b_qkv).unflatten(-1, (3, heads, -1))
    s = s + attention(qkv, causal=causal).flatten(-2) @ w_o.T + b_o
    return s, mlp(layernorm(s, ln2_w, ln2_b, eps), w1, b1, w2, b2, activation)


def case(batch, tokens, width, hidden, dtype, device="cpu"):
    def linear(out, into):
        return [torch.randn(out, into) / into**0.5, torch.randn(out) / 2]

    def norm():
        return [torch.randn(width) / 4 + 1, torch.randn(width) / 4]

    parts = [*norm(), *linear(3 * width, width), *linear(width, width), *norm()]
    parts += [*linear(hidden, width), *linear(width, hidden)]
    x, r = torch.randn(batch, tokens, width), torch.randn(batch, tokens, width) / 2
    return [t.to(device, dtype) for t in (x, r, *parts)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 50, 197])
def test_values_and_gradients_are_the_definition_s(tokens, dtype, device):
    inputs = case(2, tokens, 48, 160, dtype, device)
    wide = leaves(*inputs, dtype=torch.float64)
    want = reference(*wide)
    seeds = [torch.randn_like(t) for t in want]
    wanted = gradients(want, seeds, wide)
    for level in LEVELS:
        mine = leaves(*inputs)
        got = block(*mine, heads=HEADS, checkpointing=level)
        for g, o in zip(got, want, strict=True):
            near(g, o, dtype)
        for i, (g, o) in enumerate(zip(gradients(got, seeds, mine), wanted, strict=True)):
            # The keys' bias has no effect on the softmax: its gradient is rounding error.
            keys = slice(48, 96)
            if i == 5:
                assert g[keys].norm() <= 1e-2 * o.norm()
                g, o = (torch.cat([t[:48], t[96:]]) for t in (g, o))
            near(g, o, dtype, floor=1e-3 if tokens == 1 and dtype != torch.float64 else 0)


@pytest.mark.parametrize("option", [{"activation": "quick_gelu"}, {"causal": True}, {"eps": 0.5}], ids=str)
def test_options_and_no_residual(option):
    inputs = case(1, 9, 24, 40, torch.float64)
    inputs[1] = None
    wide, mine = leaves(*inputs), leaves(*inputs)
    want, got = reference(*wide, **option), block(*mine, heads=HEADS, **option)
    seeds = [torch.randn_like(t) for t in want]
    for g, o in zip(
        [*got, *gradients(got, seeds, mine)], [*want, *gradients(want, seeds, wide)], strict=True
    ):  # fmt: skip
        torch.testing.assert_close(g, o, rtol=1e-9, atol=1e-11)


def kept_by(run, weights):
    """Bytes of the storages that autograd keeps, without those of weights and their casts."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = run()
    shapes = {t.shape for t in weights} | {t.shape[::-1] for t in weights}
    return sum(t.untyped_storage().nbytes() for t in kept.values() if t.shape not in shapes), outputs


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("level", LEVELS)
def test_it_keeps_what_it_says(level, autocast):
    inputs = leaves(*case(3, 197, 96, 384, torch.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept, _ = kept_by(lambda: block(*inputs, heads=HEADS, checkpointing=level), inputs[2:])
    assert kept == kept_bytes(3 * 197, 96, 384, HEADS, 2 if autocast else 4, level)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_it_keeps_at_most_62_percent_of_what_torch_s_modules_keep(autocast):
    width = 96
    inputs = leaves(*case(3, 197, width, 384, torch.float32))
    x, _, *weights = inputs
    attend = torch.nn.MultiheadAttention(width, HEADS, batch_first=True)
    parameters = [*weights, *attend.parameters()]

    def plain():
        y = F.layer_norm(x, (width,), weights[0], weights[1])
        s = x + attend(y, y, y, need_weights=False)[0]
        y = F.layer_norm(s, (width,), weights[6], weights[7])
        return s + F.linear(F.gelu(F.linear(y, weights[8], weights[9])), weights[10], weights[11])

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, _ = kept_by(plain, parameters)
        ours, _ = kept_by(lambda: block(x, None, *weights, heads=HEADS), parameters)
    assert ours <= 0.62 * theirs


def test_frozen_weights_get_no_gradient_and_cost_no_product():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = leaves(*case(2, 9, 24, 96, torch.float32))
    flops = []
    for frozen in (False, True):
        for t in inputs[2:]:
            t.grad = None
            t.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            sum(t.sum() for t in block(*inputs, heads=HEADS)).backward()
        flops.append(counter.get_total_flops())
        assert all((t.grad is None) == frozen for t in inputs[2:])
    assert flops[0] - flops[1] == 2 * 18 * 12 * 24**2


@pytest.mark.parametrize("level", LEVELS)
def test_it_compiles_whole(level):
    inputs = leaves(*case(2, 9, 24, 96, torch.float32))

    def run(*args):
        return block(*args, heads=HEADS, checkpointing=level)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(*inputs), compiled(*inputs)
    seeds = [torch.randn_like(t) for t in want]
    for g, o in zip([*got, *gradients(got, seeds, inputs)], [*want, *gradients(want, seeds, inputs)], strict=True):
        torch.testing.assert_close(g, o, rtol=1e-5, atol=1e-5)


def test_refusals():
    inputs = case(1, 4, 24, 96, torch.float32)
    with pytest.raises(ValueError, match="no checkpointing 'some'"):
        block(*inputs, heads=HEADS, checkpointing="some")
    with pytest.raises(ValueError, match="with 5 heads"):
        block(*inputs, heads=5)
    assert set(LEVELS) == set(Checkpointing.__args__)

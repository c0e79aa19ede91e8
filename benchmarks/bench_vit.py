"""The image tower, forward and backward, against torch's own modules and other towers that are installed.

Measures whole blocks, their parts, attention with every available backend, and whole towers; the activations that a
block keeps for its backward; and, from fake tensors, the peak memory of a training step of ViT-B/16. Gradients are
those of the input and of all weights. vit_peers.py describes the peers and how they are measured.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lift_fast.measure.flops import count
from lift_fast.nn import PRESETS, Vit, VitConfig
from lift_fast.nn.transformer import Transformer
from lift_fast.ops.attention.contract import backends_here
from lift_fast.ops.attention.op import attention
from lift_fast.ops.transformer import contract
from lift_fast.ops.transformer.layernorm import layernorm
from lift_fast.ops.transformer.linear import input_product, product, weight_product
from lift_fast.ops.transformer.mlp import mlp

from .harness import Suite
from .pairs import DTYPES, device
from .start import small
from .vit_peers import (
    COMPILED,
    OURS,
    TORCH,
    Block,
    Call,
    LayerNorm,
    Tower,
    dtype_name,
    fake_peak,
    faster,
    fastest,
    forward_backward,
    installed_peers,
    kept_widths,
    measure,
    native_dtype,
)

WIDTHS = {768: 12, 384: 6, 192: 3}  # width -> heads
TOKENS, HEADS, HEAD_DIM = 197, 12, 64
OTHER_TOKENS = small((50, 257, 577), ())
BATCH = {"cpu": 8, "cuda": small(256, 2)}
BASE, TINY = PRESETS["vit-b16"].vit, PRESETS["tiny"].vit
FAKE_BATCH = 256
SDPA = "torch sdpa"
BLOCK_TARGET, KEPT_TARGET, PEAK_TARGET, ATTENTION_TARGET = 0.97, 0.62, 0.65, 1.3
TOWER_MOST_S = 10.0  # limit for the larger tower on the CPU, with --quick


Modules = dict[str, Callable[[], nn.Module]]


def run(suite: Suite) -> None:
    where = device()
    if where == "cuda":
        _attention(suite, where, TOKENS)
        _towers(suite, where, "vit-b16", BASE)
        _memory(suite, where)
        _blocks(suite, where)
        for part in (_layernorm, _linear, _mlps):
            part(suite, where)
    else:
        _blocks(suite, where)
        _memory(suite, where)
        _attention(suite, where, TOKENS)
        for part in (_layernorm, _linear, _mlps):
            part(suite, where)
        _towers(suite, where, "tiny", TINY)
        _towers(suite, where, "vit-b16", BASE, TOWER_MOST_S if suite.quick else None)
    for tokens in OTHER_TOKENS:
        _attention(suite, where, tokens)


def _attentions(suite: Suite, where: str) -> None:
    for tokens in (TOKENS, *OTHER_TOKENS):
        _attention(suite, where, tokens)


PARTS: dict[str, Callable[[Suite], None]] = {
    "layernorm": lambda suite: _layernorm(suite, device()),
    "mlp": lambda suite: _mlps(suite, device()),
    "attention": lambda suite: _attentions(suite, device()),
}


def _dtypes(suite: Suite, where: str) -> list[str]:
    """The dtypes to measure: bf16 on a GPU; on the CPU fp32, and bf16 if the processor multiplies it natively."""
    if where == "cuda":
        return ["bf16"]
    if native_dtype(where) == torch.float32:
        suite.note("bf16: this processor does not multiply it natively")
        return ["fp32"]
    return ["fp32", "bf16"]


def _builds(
    suite: Suite, modules: Modules, inputs: tuple[Tensor, ...], where: str, dtype: torch.dtype
) -> dict[str, Callable[[], Call]]:
    """Forward and backward of each module as it is, and after these of each module under torch.compile.

    With --quick none is compiled on the CPU, where that takes minutes.
    """

    def build(make: Callable[[], nn.Module], compile: bool) -> Call:
        module = make().to(where).train()
        if compile:
            module.compile(dynamic=False)
        return forward_backward(module, inputs, module.parameters(), dtype)

    builds = {name: partial(build, make, False) for name, make in modules.items()}
    if where == "cuda" or not suite.quick:
        builds |= {name + COMPILED: partial(build, make, True) for name, make in modules.items()}
    return builds


def _blocks(suite: Suite, where: str) -> None:
    for width, heads in WIDTHS.items():
        for name in _dtypes(suite, where):
            dtype, batch = DTYPES[name], BATCH[where]
            x = torch.randn(batch, TOKENS, width, device=where).to(dtype).requires_grad_()
            modules: Modules = {
                OURS: partial(Transformer, width, 1, heads),
                TORCH: partial(Block, width, heads, 4 * width),
            }
            builds = _builds(suite, modules, (x,), where, dtype)
            flops = 3 * 2 * batch * TOKENS * (12 * width**2 + 2 * TOKENS * width)
            case = {"what of": "block", "width": width, "tokens": TOKENS, "batch": batch, "dtype": name}
            rows = measure(suite, case, builds, where, {"tflop_per_s": flops / 1e12})
            if where == "cpu":
                target = f"block, width {width}, {name}: speed against {TORCH}"
                suite.bar(target, faster(rows, OURS, TORCH), BLOCK_TARGET)


def _memory(suite: Suite, where: str) -> None:
    """Activations that a block keeps, and the peak of a training step on fake tensors."""
    if suite.over():
        suite.note("out of time: not measured: what a block keeps")
        return
    width, heads = min(WIDTHS.items())
    x = torch.randn(2, TOKENS, width, device=where).bfloat16().requires_grad_()
    modules = {OURS: Transformer(width, 1, heads), TORCH: Block(width, heads, 4 * width)}
    kept = {what: kept_widths(module.to(where), x, torch.bfloat16) for what, module in modules.items()}
    for what, widths in kept.items():
        suite.add({"what of": "block, bf16", "what": what, "device": where, "widths kept a token": widths})
    suite.bar(f"block: activations kept, against {TORCH}", kept[OURS] / kept[TORCH], KEPT_TARGET, at_most=True)

    rivals: dict[str, tuple[Callable[[VitConfig], nn.Module], bool]] = {
        OURS: (Vit, False),
        TORCH: (Tower, False),
        f"{TORCH}, CUDA's autocast": (Tower, True),
    }
    peaks: dict[str, int] = {}
    for what, (build, wide) in rivals.items():
        peaks[what] = fake_peak(build, BASE, FAKE_BATCH, wide)
        case = f"vit-b16, batch {FAKE_BATCH}, bf16, peak of a step"
        suite.add({"what of": case, "what": what, "device": "fake", "peak_gib": peaks[what] / 2**30})
    name = f"vit-b16, batch {FAKE_BATCH}, bf16: peak of a step against {TORCH}, both residual streams bf16"
    suite.bar(name, peaks[OURS] / peaks[TORCH], PEAK_TARGET, at_most=True)


def _sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _attention(suite: Suite, where: str, tokens: int) -> None:
    dtype = native_dtype(where)
    batch = BATCH[where]
    qkv = torch.randn(batch, tokens, 3, HEADS, HEAD_DIM, device=where).to(dtype).requires_grad_()

    def build(fn: Callable[..., Tensor], **options: Any) -> Call:
        return forward_backward(partial(fn, **options), (qkv,), (), torch.float32)

    builds = {f"{OURS} {name}": partial(build, attention, backend=name) for name in backends_here(where)}
    builds[SDPA] = partial(build, _sdpa)
    flops = 4 * batch * HEADS * tokens**2 * HEAD_DIM * 3.5  # the backward recomputes the scores
    case = {
        "what of": "attention",
        "width": HEADS * HEAD_DIM,
        "tokens": tokens,
        "batch": batch,
        "dtype": dtype_name(dtype),
    }
    rows = measure(suite, case, builds, where, {"tflop_per_s": flops / 1e12}, spend=3.0)
    if where == "cuda" and tokens == TOKENS:
        ours = f"{OURS} triton"
        other = fastest(rows, lambda what: what != ours)
        name = f"attention, {tokens} tokens: triton against the best other ({other})"
        suite.bar(name, faster(rows, ours, other), ATTENTION_TARGET)


class _LayerNormPart(nn.LayerNorm):
    """ops/transformer/layernorm.py with the addition of the residual; returns the normalized sum and the sum."""

    def __init__(self, width: int, backend: str | None):
        super().__init__(width)
        self.backend = backend

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return layernorm(x, self.weight, self.bias, self.eps, residual=residual, backend=self.backend)


class _TorchLayerNormPart(LayerNorm):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return super().forward(s), s


class _Added(nn.Module):
    """A layer norm from another library, after the addition."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        self.norm = make()

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return self.norm(s), s


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, fp8: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fp8 = fp8
        return product(x, weight, bias, fp8)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        return input_product(g, weight, ctx.fp8), weight_product(g, x, ctx.fp8), g.sum(dim=0), None


class _LinearPart(nn.Linear):
    """The three products of ops/transformer/linear.py, as block.py calls them."""

    fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype), self.fp8)


class _Float8Part(_LinearPart):
    fp8 = True


class _Mlp(nn.Sequential):
    """ops/transformer/mlp.py with the weights of its layers."""

    backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        up, _, down = self
        return mlp(x, up.weight, up.bias, down.weight, down.bias, backend=self.backend)


def _mlp(width: int, backend: str | None) -> nn.Module:
    module = _Mlp(*_torch_mlp(width))
    module.backend = backend
    return module


def _torch_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _part(
    suite: Suite, where: str, name: str, modules: Modules, residual: bool, rates: Callable[[Tensor], dict[str, float]]
) -> None:
    """Measures a part of a block at the largest width. residual: whether it takes a second input."""
    width, dtype = max(WIDTHS), native_dtype(where)
    rows = BATCH[where] * TOKENS
    inputs = [torch.randn(rows, width, device=where).to(dtype).requires_grad_() for _ in range(1 + residual)]
    case = {"what of": name, "width": width, "rows": rows, "dtype": dtype_name(dtype)}
    builds = _builds(suite, modules, tuple(inputs), where, dtype)
    measure(suite, case, builds, where, rates(inputs[0]), spend=3.0 if suite.quick else None)


def _ours(where: str, names: Sequence[str], build: Callable[[str | None], nn.Module]) -> Modules:
    """Our module with the default backend on the CPU, with each of the backends `names` on a GPU."""
    if where == "cpu":
        return {OURS: partial(build, None)}
    return {f"{OURS} {name}": partial(build, name) for name in names}


def _layernorm(suite: Suite, where: str) -> None:
    width = max(WIDTHS)
    # For layer norms "triton_gemm" is the same as "triton".
    names = [name for name in contract.backends_here(where) if name != contract.FUSED_GEMM]
    modules = _ours(where, names, partial(_LayerNormPart, width))
    modules[TORCH] = partial(_TorchLayerNormPart, width)
    if where == "cuda":
        try:
            from liger_kernel.transformers import LigerLayerNorm

            modules["liger_kernel"] = partial(_Added, partial(LigerLayerNorm, width))
        except ImportError as error:
            suite.note(f"liger_kernel: {error}")
    # Forward: reads x and residual, writes y and s. Backward: reads s, dy and ds, writes dx.
    moved = lambda x: {"gb_per_s": 8 * x.numel() * x.element_size() / 1e9}  # noqa: E731
    _part(suite, where, "residual and layernorm", modules, True, moved)


def _linear(suite: Suite, where: str) -> None:
    width = max(WIDTHS)
    modules: Modules = {OURS: partial(_LinearPart, width, 4 * width), TORCH: partial(nn.Linear, width, 4 * width)}
    if where == "cuda":
        modules[f"{OURS} fp8"] = partial(_Float8Part, width, 4 * width)
    _part(suite, where, "linear", modules, False, lambda x: {"tflop_per_s": 3 * 2 * x.numel() * 4 * width / 1e12})


def _mlps(suite: Suite, where: str) -> None:
    width = max(WIDTHS)
    modules = _ours(where, contract.backends_here(where), partial(_mlp, width))
    modules[TORCH] = partial(_torch_mlp, width)
    _part(suite, where, "mlp", modules, False, lambda x: {"tflop_per_s": 6 * 2 * x.numel() * 4 * width / 1e12})


def _towers(suite: Suite, where: str, name: str, config: VitConfig, most: float | None = None) -> None:
    dtype, batch = native_dtype(where), BATCH[where]
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, device=where)
    modules: Modules = {OURS: partial(Vit, config)}
    modules |= {peer: partial(build, config) for peer, build in installed_peers(suite.note).items()}
    builds = _builds(suite, modules, (pixels,), where, dtype)
    case = {"what of": "tower", "preset": name, "batch": batch, "dtype": dtype_name(dtype)}
    rates = {"images_per_s": batch, "tflop_per_s": batch * tower_flops(config) / 1e12}
    measure(suite, case, builds, where, rates, most=most)


def tower_flops(config: VitConfig) -> int:
    """FLOPs of an image's forward and backward. Of what is recomputed only attention's scores count, as in torch."""
    with FakeTensorMode():
        tower, pixels = Vit(config), torch.empty(1, 3, config.image_size, config.image_size)
        return count(lambda: tower(pixels).sum().backward())

"""python -m benchmarks.lease.smoke CASE: compares a few of our kernels on tiny shapes with plain torch in float64.

Writes a line with the largest error and the kernels that were launched, with the registers of Triton's. The exit status
is 1 if a value is wrong or a kernel that the case names was not launched. Each case runs in a process of its own
(phases.py), under compute-sanitizer if that is installed; test_lease.py checks that every kernel has a case.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import lines
from ..launches import launches, registers
from ..start import begin, rehearsing

# ROWS is an odd number of tiles, and large enough that 16-bit features are not multiplied in float32
# (multiplies_in_float32 in ops/pairs/policy.py).
ROWS, DIM = 520, 80
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1e-2}  # in relative norm
TEXTS = "frozen", "trained", "int8"


class Case(NamedTuple):
    """kernels: those that it must launch on compute capability 9.0. check: returns the largest error / tolerance."""

    kernels: tuple[str, ...]
    check: Callable[[], float]

    @property
    def built(self) -> bool:
        """Whether it needs the extension to be built."""
        return any(name.startswith("_C.") for name in self.kernels)


def largest_error(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> float:
    """The largest error of a tensor, in relative norm and divided by the tolerance; infinite for NaN."""
    largest = 0.0
    for left, right in zip(got, want, strict=True):
        left, right = left.detach().cpu().double(), right.detach().double()
        error = float((left - right).norm() / right.norm().clamp(min=1e-6)) / tolerance
        largest = max(largest, error if error == error else float("inf"))
    return largest


def on_gpu(tensor: Tensor) -> Tensor:
    """A copy on the GPU, which requires a gradient if `tensor` does."""
    return tensor.detach().to("cuda").requires_grad_(tensor.requires_grad)


def pairs(op: str, backend: str, dtype: torch.dtype, text_kind: str, **settings: Any) -> float:
    """Checks forward and backward of a pair loss, with kept and with recomputed scores; settings: tuned ones to set."""
    from lift_fast.ops import tuned
    from lift_fast.ops.pairs import contrastive, sigmoid
    from lift_fast.ops.rows.quantized import QuantizedRows

    module = {"contrastive": contrastive, "sigmoid": sigmoid}[op]
    image, text = (F.normalize(torch.randn(ROWS, DIM), dim=1).to(dtype) for _ in range(2))
    scalars = [torch.tensor(14.0), torch.tensor(-3.0)]
    codes, scales = (text.float() * 300).round().clamp(-127, 127).to(torch.int8), torch.full((ROWS,), 1 / 300)
    if text_kind == "int8":
        text = (codes * scales[:, None]).double()
    leaves = [image, *([text] if text_kind == "trained" else [])]
    wide = [leaf.double().requires_grad_() for leaf in (image, text)]
    exact = module.reference(*wide, *(scalar.double() for scalar in scalars))
    want = [exact, *torch.autograd.grad(exact, wide[: len(leaves)])]

    largest = 0.0
    for budget in (None, 0):
        inputs: list[Any] = [on_gpu(leaf.requires_grad_()) for leaf in leaves]
        if text_kind == "int8":
            inputs.append(QuantizedRows(codes.cuda(), scales.cuda(), "int8", DIM))
        elif text_kind == "frozen":
            inputs.append(text.cuda())
        with ExitStack() as stack:
            for setting, value in settings.items():
                stack.enter_context(tuned.using("pairs", setting, value))
            loss = getattr(module, op)(*inputs, *(scalar.cuda() for scalar in scalars), backend=backend, budget=budget)
            grads = torch.autograd.grad(loss, [one for one in inputs if isinstance(one, Tensor) and one.requires_grad])
        errors = largest_error([loss], want[:1], 1e-5), largest_error(grads, want[1:], TOLERANCE[dtype])
        largest = max(largest, *errors)
    return largest


def layernorm(backend: str) -> float:
    from lift_fast.ops.transformer import layernorm as op

    x, residual = (torch.randn(37, 200).bfloat16().requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(200).requires_grad_() for _ in range(2))
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, residual, weight, bias)]
    out = op.reference(wide[0], wide[2], wide[3], residual=wide[1])
    seed = torch.randn(out.shape)
    want = [out, *torch.autograd.grad(out, wide, seed.double())]
    inputs = [on_gpu(leaf) for leaf in (x, residual, weight, bias)]
    y, _ = op.layernorm(inputs[0], inputs[2], inputs[3], residual=inputs[1], backend=backend)
    return largest_error([y, *torch.autograd.grad(y, inputs, seed.to(y))], want, 2e-2)


def mlp(backend: str) -> float:
    from lift_fast.ops.transformer import mlp as op

    shapes = (130, 64), (200, 64), (200,), (64, 200), (64,)
    leaves = [(torch.randn(shape) / 4).bfloat16().requires_grad_() for shape in shapes]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = op.reference(*wide)
    seed = torch.randn(out.shape)
    want = [out, *torch.autograd.grad(out, wide, seed.double())]
    inputs = [on_gpu(leaf) for leaf in leaves]
    got = op.mlp(*inputs, backend=backend)
    return largest_error([got, *torch.autograd.grad(got, inputs, seed.to(got))], want, 3e-2)


def attention(backend: str) -> float:
    from lift_fast.ops.attention import op

    largest = 0.0
    for tokens, head_dim, causal in ((50, 64, False), (197, 64, False), (77, 64, True)):
        qkv = torch.randn(2, tokens, 3, 2, head_dim).bfloat16().requires_grad_()
        wide = qkv.detach().double().requires_grad_()
        out = op.reference(wide, causal=causal)
        seed = torch.randn(out.shape)
        want = [out, *torch.autograd.grad(out, [wide], seed.double())]
        leaf = on_gpu(qkv)
        got = op.attention(leaf, causal=causal, backend=backend)
        grads = torch.autograd.grad(got, [leaf], seed.to(got))
        largest = max(largest, largest_error([got, *grads], want, 2e-2))
    return largest


def dequant(backend: str) -> float:
    from lift_fast.ops.rows import dequant as op
    from lift_fast.ops.rows.codecs import CODECS

    largest = 0.0
    for name, codec in CODECS.items():
        table = torch.randn(50, 100)
        codes = torch.randint(0, 256, (50, codec.columns(100)), dtype=torch.uint8)
        codes = codes.view(codec.dtype) if codec.integer else table.to(codec.dtype)
        scales, rows = torch.rand(50) if codec.scaled else None, torch.randint(0, 50, (33,))
        options = {"codec": name, "dim": 100}
        for dtype in (torch.float32, torch.bfloat16):
            want = op.reference(codes, scales, rows, dtype, **options)
            inputs = [None if part is None else part.cuda() for part in (codes, scales, rows)]
            largest = max(largest, largest_error([op.dequant(*inputs, dtype, backend, **options)], [want], 1e-12))
    return largest


def _pairs_cases() -> Iterator[tuple[str, Case]]:
    triton = {
        "contrastive": {
            torch.bfloat16: ("scores_stats_kernel", "positives_kernel", "scores_grad_kernel"),
            torch.float32: ("stats_kernel", "positives_kernel", "grad_kernel"),
        },
        "sigmoid": {torch.bfloat16: ("scores_sigmoid_kernel",), torch.float32: ("sigmoid_kernel",)},
    }
    merges = {"contrastive": "pairs.merge_softmax_kernel", "sigmoid": "pairs.merge_sums_kernel"}
    cuda = {
        "contrastive": ("_C.contrastive_stats_cuda", "_C.own_pairs_cuda", "_C.contrastive_gradient_cuda"),
        "sigmoid": ("_C.sigmoid_cuda",),
    }
    for op in ("contrastive", "sigmoid"):
        for dtype in (torch.bfloat16, torch.float32):
            for text in TEXTS:
                name = f"{op} %s, {str(dtype).removeprefix('torch.')}, {text} text"
                kernels = *(f"{op}.{kernel}" for kernel in triton[op][dtype]), "pairs.terms_kernel", merges[op]
                yield name % "triton", Case(kernels, partial(pairs, op, "triton", dtype, text))
                kernels = *cuda[op], *(["_C.widen_cuda"] if text == "int8" else [])
                yield name % "cuda", Case(kernels, partial(pairs, op, "cuda", dtype, text))
    kernels = "persistent.scores_stats_kernel", "persistent.scores_grad_kernel"
    check = partial(pairs, "contrastive", "triton", torch.bfloat16, "trained", form="persistent")
    yield "contrastive triton, persistent programs, bfloat16, trained text", Case(kernels, check)


def _cases() -> Iterator[tuple[str, Case]]:
    norms = ("layernorm.layernorm_kernel", "layernorm.layernorm_backward_kernel", "layernorm.merge_kernel")
    acts = ("mlp.bias_act_kernel", "mlp.bias_act_backward_kernel")
    gemms = ("mlp.linear_act_kernel", "mlp.linear_act_backward_kernel")
    yield "layernorm triton", Case(norms, partial(layernorm, "triton"))
    yield "layernorm cuda", Case(("_C.layernorm_cuda", "_C.layernorm_backward_cuda"), partial(layernorm, "cuda"))
    yield "mlp triton", Case(acts, partial(mlp, "triton"))
    yield "mlp triton_gemm", Case(gemms, partial(mlp, "triton_gemm"))
    yield "mlp cuda", Case(("_C.bias_act_cuda", "_C.bias_act_backward_cuda"), partial(mlp, "cuda"))
    kernels = ("attention.forward_kernel", "attention.one_pass_kernel", "attention.two_pass_kernel")
    yield "attention triton", Case(kernels, partial(attention, "triton"))
    yield "dequant triton", Case(("dequant.dequant_kernel",), partial(dequant, "triton"))
    yield "dequant cuda", Case(("_C.dequant_cuda",), partial(dequant, "cuda"))
    yield from _pairs_cases()


CASES: dict[str, Case] = dict(_cases())


def main(name: str) -> int:
    from lift_fast.errors import BackendError

    case = CASES[name]
    torch.manual_seed(0)
    try:
        with launches() as launched:
            error = case.check()
    except BackendError as why:
        if not rehearsing():
            raise
        print(why)  # a rehearsal whose torch has no CUDA has no cuBLAS
        return 3
    unlaunched = sorted(set(case.kernels) - set(launched))
    if rehearsing():
        error = 0.0
    line = {"kernels": launched, "registers": registers(launched), "error_over_allowed": error}
    lines.write({"phase": "smoke", "case": name, **line})
    print(f"error / tolerance: {error:.3g}")
    if unlaunched:
        print(f"not launched: {', '.join(unlaunched)}; launched: {', '.join(launched)}")
    return int(error > 1 or (bool(unlaunched) and torch.cuda.get_device_capability() == (9, 0)))


if __name__ == "__main__":
    begin()
    sys.exit(main(sys.argv[1]))

"""The "triton" backend of layernorm and mlp and its kernels against float64, interpreted, compiled and on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from lift_fast.ops import tuned
from lift_fast.ops.transformer import eager, triton_gemm
from lift_fast.ops.transformer import triton as backend
from lift_fast.ops.transformer.contract import ACTIVATIONS, BiasAct, BiasActGrad, LayerNorm, LayerNormGrad

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
FLOOR = 5e-7  # for activations far below 0, where 1 + erf cancels and float16 is subnormal
STEP = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}  # in relative norm
SHAPES = [(1, 1), (3, 17), (50, 192), (197, 257), (3, 768), (50, 1152), (197, 1)]
PRODUCTS = [(1, 1, 1), (3, 17, 17), (50, 192, 384), (197, 257, 17), (3, 768, 192), (1, 1152, 257), (130, 64, 112)]
# Large shapes have one dtype each, because the interpreter is slow.
CASES = [(s, d) for at, s in enumerate(SHAPES) for d in DTYPES if s[0] * s[1] < 5000 or d is DTYPES[at % 3]]

SOAK = pytest.mark.soak


pytestmark = pytest.mark.usefixtures("poisoned")


class Outputs:
    """Allocates contiguous tensors of NaN, or with given contents, between NaN that must stay."""

    def __init__(self):
        self.outer = []

    def like(self, tensor, fill=float("nan")):
        outer = torch.full((tensor.numel() + 64,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        self.outer.append(outer)
        return outer[32:-32].view(tensor.shape).copy_(torch.as_tensor(fill, device=tensor.device))

    def check(self):
        for outer in self.outer:
            assert outer[:32].isnan().all() and outer[-32:].isnan().all()


def near(got, want, dtype, step=None, floor=0.0):
    assert got.shape == want.shape
    limit = (step or STEP[dtype]) * want.norm() + floor * want.numel() ** 0.5
    assert (got.double() - want).norm() <= limit, (got, want)


def tokens(rows, width, dtype=torch.float32, device="cpu", scale=1.0, mean=0.0):
    return ((torch.randn(rows, width) + mean) * scale).to(device, dtype)


def vector(n, device="cpu"):
    return torch.randn(n).to(device)


def normed(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[1:], weight, bias, eps)


def check_layernorm(rows, width, dtype, device="cpu", residual=True, alias=None, again=True, eps=1e-6, **values):
    """Forward and backward; alias: what dx is, "dy" or "d_stream"; without residual there is no d_stream either."""
    outputs = Outputs()
    x, dy = tokens(rows, width, dtype, device, **values), tokens(rows, width, dtype, device)
    r, d_stream = (tokens(rows, width, dtype, device) if residual else None for _ in range(2))
    weight, bias = vector(width, device), vector(width, device)
    y, mean, rstd = outputs.like(x), outputs.like(weight.new_empty(rows)), outputs.like(weight.new_empty(rows))
    stream = outputs.like(x) if residual else None
    backend.layernorm(LayerNorm(x, r, weight, bias, eps, y, stream, mean, rstd))
    if residual:
        assert torch.equal(stream, x + r)
    s = (stream if residual else x).double().requires_grad_()
    w, b = (v.double().requires_grad_() for v in (weight, bias))
    want = normed(s, w, b, eps)
    near(y, want, dtype)
    near(mean, s.mean(1), torch.float32)
    near(rstd, (s.var(1, correction=0) + eps).rsqrt(), torch.float32)

    wants = torch.autograd.grad(want, (s, w, b), dy.double())
    want_dx = wants[0] + d_stream.double() if residual else wants[0]
    dy, d_stream = outputs.like(dy, dy), outputs.like(d_stream, d_stream) if residual else None
    dx = {"dy": dy, "d_stream": d_stream, None: outputs.like(x)}[alias]
    y_again = outputs.like(x) if again else None
    d_weight, d_bias = backend.layernorm_backward(
        LayerNormGrad(dy, s.detach().to(dtype), mean, rstd, weight, bias, d_stream, dx, y_again)
    )
    near(dx, want_dx, dtype)
    assert d_weight.dtype == d_bias.dtype == torch.float32
    near(d_weight, wants[1], torch.float32)
    near(d_bias, wants[2], torch.float32)
    if again:
        assert torch.equal(y_again, y)
    outputs.check()


def check_bias_act(rows, width, dtype, activation, device="cpu", alias=False, again=True, scale=2.0):
    outputs = Outputs()
    h, da, bias = tokens(rows, width, dtype, device, scale), tokens(rows, width, dtype, device), vector(width, device)
    z = (h.double() + bias.double()).requires_grad_()
    want = eager.activate(z, activation)
    want_dh = torch.autograd.grad(want, z, da.double())[0]

    into = outputs.like(h, h)
    a = into if alias else outputs.like(h)
    backend.bias_act(BiasAct(into if alias else h, bias, activation, a))
    near(a, want, dtype, floor=FLOOR)

    h, da = outputs.like(h, h), outputs.like(da, da)
    dh, a_again = (da, h) if alias else (outputs.like(h), outputs.like(h) if again else None)
    d_bias = backend.bias_act_backward(BiasActGrad(da, h, bias, activation, dh, a_again))
    near(dh, want_dh, dtype, floor=FLOOR)
    near(d_bias, want_dh.sum(0), torch.float32, floor=FLOOR)
    assert d_bias.dtype == torch.float32
    if again or alias:
        assert torch.equal(a_again, a)
    outputs.check()


def check_linear(rows, width_in, width_out, dtype, activation, device="cpu", biased=True, scale=1.0):
    """Both products of a layer of width_in -> width_out -> width_in."""
    x, dm = tokens(rows, width_in, dtype, device), tokens(rows, width_in, dtype, device)
    weight = tokens(width_out, width_in, dtype, device, scale * width_in**-0.5)
    bias = vector(width_out, device) if biased else None
    h, a = triton_gemm.linear_act(x, weight, bias, activation)
    assert h.dtype == a.dtype == dtype
    near(h, x.double() @ weight.double().T, dtype)
    z = h.double() + (bias.double() if biased else 0)
    near(a, eager.activate(z, activation), dtype, floor=FLOOR)

    weight = tokens(width_in, width_out, dtype, device, scale)
    dh, a_again, d_bias = triton_gemm.linear_act_backward(dm, weight, h, bias, activation)
    z.requires_grad_()
    want = torch.autograd.grad(eager.activate(z, activation), z, dm.double() @ weight.double())[0]
    near(dh, want, dtype, floor=FLOOR)
    near(d_bias, want.sum(0), torch.float32, 1e-4, FLOOR)  # tensor cores do not round every sum to nearest
    assert dh.dtype == dtype and d_bias.dtype == torch.float32
    assert torch.equal(a_again, a)
    if biased:  # the same bits from the kernel of the activation alone
        by_itself = torch.empty_like(h)
        backend.bias_act(BiasAct(h, bias, activation, by_itself))
        assert torch.equal(by_itself, a)


def test_triton_in_its_interpreter(run_interpreted):
    run_interpreted(__file__)


def test_why_not_says_what_is_missing():
    why = backend.why_not()
    assert why is None or "triton" in why or "GPU" in why


@pytest.mark.interpret
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_layernorm(shape, dtype):
    check_layernorm(*shape, dtype, residual=shape != (3, 768), again=shape != (50, 192))


@pytest.mark.interpret
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("alias", ["dy", "d_stream"])
@pytest.mark.parametrize("dtype", HALF)
def test_dx_may_be_what_it_is_made_of(dtype, alias, residual):
    if residual or alias == "dy":
        check_layernorm(33, 100, dtype, residual=residual, alias=alias)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [{"scale": 1e3}, {"scale": 1e-3}, {"mean": 30.0}, {"mean": -30.0, "scale": 1e3}])
def test_layernorm_of_extreme_values(values, dtype):
    """A mean of 30 standard deviations: mean(x²) − mean² in float32 would be off by 1e-4."""
    check_layernorm(20, 200, dtype, **values)


@pytest.mark.interpret
def test_layernorm_of_constant_rows_is_the_bias():
    x, weight, bias = torch.full((5, 24), 3.0), torch.randn(24), torch.randn(24)
    y, stats = torch.full_like(x, torch.nan), torch.full((2, 5), torch.nan)
    backend.layernorm(LayerNorm(x, None, weight, bias, 1e-6, y, None, *stats))
    assert torch.equal(y, bias.expand(5, 24)) and (stats[0] == 3).all()
    near(stats[1], torch.full((5,), 1e3, dtype=torch.float64), torch.float32)


def setting(capability, name, **facts):
    """The value in a table."""
    facts = {"width": 768, "itemsize": 2, "dim": 768, "aligned": True} | facts
    return tuned.lookup("transformer", f"sm_{capability}", name, **facts)


def check_merge(device):
    from lift_fast.kernels import layernorm

    for shape in [(1, 1), (300, 50), (129, 2, 33)]:
        parts = torch.randn(shape).to(device)
        tile = layernorm.MergeTile(**setting(80, "merge"))
        near(layernorm.merge(parts, tile), parts.double().sum(0), torch.float32)


@pytest.mark.interpret
def test_parts_are_all_added():
    check_merge("cpu")


@pytest.mark.interpret
def test_a_nan_stays_in_its_row():
    x, weight, bias = torch.randn(9, 24), torch.ones(24), torch.zeros(24)
    x[4, 7] = torch.nan
    y, dx, stats = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(2, 9)
    backend.layernorm(LayerNorm(x, None, weight, bias, 1e-6, y, None, *stats))
    d_weight, _ = backend.layernorm_backward(LayerNormGrad(torch.ones_like(x), x, *stats, weight, bias, None, dx, None))
    for out in (y, dx):
        assert out[4].isnan().all() and out.isnan().sum() == 24
    assert d_weight.isnan().all()


@pytest.mark.interpret
@pytest.mark.parametrize(("shape", "dtype"), CASES)
@pytest.mark.filterwarnings("ignore:overflow")
def test_bias_act(shape, dtype):
    for activation in ACTIVATIONS if shape[0] < 50 else [ACTIVATIONS[shape[1] % 3]]:
        check_bias_act(*shape, dtype, activation, again=shape != (50, 192), alias=shape == (3, 768))


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow")  # in the interpreter's exp; the sigmoid is 0 then
def test_bias_act_of_extreme_values(dtype, activation):
    check_bias_act(10, 100, dtype, activation, scale=1e3)
    check_bias_act(10, 100, dtype, activation, scale=1e-3)


@pytest.mark.interpret
@pytest.mark.parametrize("at", range(len(PRODUCTS)))
@pytest.mark.filterwarnings("ignore:overflow")
def test_products_with_an_activation(at):
    large = max(PRODUCTS[at]) > 100
    for dtype in [HALF[at % 2]] if large else HALF:
        for activation in [ACTIVATIONS[at % 3]] if large else ACTIVATIONS:
            check_linear(*PRODUCTS[at], dtype, activation, biased=at != len(PRODUCTS) - 1)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.filterwarnings("ignore:overflow")
def test_products_of_extreme_values(dtype):
    for scale in (1e2, 1e-3):
        check_linear(20, 48, 80, dtype, "gelu", scale=scale)
    check_linear(20, 48, 80, torch.bfloat16, "gelu_tanh", scale=1e3)


@pytest.mark.interpret
def test_products_refuse_what_they_do_not_take():
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    with pytest.raises(ValueError, match="float32"):
        triton_gemm.linear_act(x, weight, bias, "gelu")
    with pytest.raises(ValueError, match="bfloat16, float16"):
        triton_gemm.linear_act(x.half(), weight.bfloat16(), bias, "gelu")
    with pytest.raises(ValueError, match="contiguous"):
        triton_gemm.linear_act(x.half(), torch.randn(6, 5).half().T, bias, "gelu")
    with pytest.raises(ValueError, match="float32"):
        triton_gemm.linear_act_backward(x, weight.T, torch.randn(4, 5), bias, "gelu")


@pytest.mark.interpret
def test_no_rows():
    x, stats, weight, bias = torch.empty(0, 6), torch.empty(2, 0), torch.randn(6), torch.randn(6)
    backend.layernorm(LayerNorm(x, None, weight, bias, 1e-6, x.clone(), None, *stats))
    backend.bias_act(BiasAct(x, bias, "gelu", x.clone()))
    sums = [
        *backend.layernorm_backward(LayerNormGrad(x, x, *stats, weight, bias, None, x.clone(), None)),
        backend.bias_act_backward(BiasActGrad(x, x, bias, "gelu", x.clone(), None)),
    ]
    h, _ = triton_gemm.linear_act(x.half(), torch.randn(6, 6).half(), bias, "gelu")
    dh, _, d_bias = triton_gemm.linear_act_backward(x.half(), torch.randn(6, 6).half(), h, bias, "gelu")
    assert h.shape == dh.shape == (0, 6)
    assert all(torch.equal(total, torch.zeros(6)) for total in (*sums, d_bias))


WIDTHS = {"Ti": 192, "S": 384, "B": 768, "L": 1024, "H": 1280, "SO400M": 1152}
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
REGISTERS = 65536  # per multiprocessor
SHARED = {
    80: 164 << 10,
    90: 228 << 10,
    100: 228 << 10,
}  # bytes per multiprocessor; a program takes 1 KB more than it uses


@pytest.fixture
def usage(triton_usage, monkeypatch):
    """usage(kernel, capability, sizes, dtype, warps, stages, absent, aligned, registers): `triton_usage`, and "ptx".

    sizes: the constants, and integers that Triton makes constants because they are 1; absent: pointers that are None;
    registers: per thread.
    """
    triton = pytest.importorskip("triton")
    compile = triton.compile

    def use(
        kernel, capability, sizes, dtype=torch.bfloat16, warps=4, stages=3, absent=(), aligned=True, registers=None
    ):
        operands = ("x", "y", "residual", "stream", "d_stream", "dx", "dy", "h", "a", "da", "dh", "dm")
        operands += ("weight",) if "DEPTH" in sizes else ()
        constexprs = {name: sizes.get(name) for name in kernel.arg_names if name in sizes or name in absent}
        signature = {}
        for name in kernel.arg_names:
            if name in constexprs:
                signature[name] = "constexpr"
            elif name in ("rows", "cols", "width", "dim", "tiles", "n"):
                signature[name] = "i32"
            else:
                signature[name] = "fp32" if name == "eps" else "*" + KINDS[dtype if name in operands else torch.float32]
        given = {kernel.arg_names[at] if isinstance(at, int) else at for at in kernel.do_not_specialize}
        even = [name for name, kind in signature.items() if kind[0] == "*" or kind == "i32" and name not in given]
        even = [name for name in even if name not in constexprs]
        compiled = []

        def with_options(source, target, options):
            compiled.append(
                compile(source, target=target, options=options | {"num_stages": stages, "maxnreg": registers})
            )
            return compiled[0]

        monkeypatch.setattr(triton, "compile", with_options)
        found = triton_usage(kernel, signature, constexprs, capability, even if aligned else [], warps)
        # Dynamic shared memory is a launch parameter, and not in the binary.
        shared = max(found["shared"], compiled[0].metadata.shared)
        return found | {"shared": shared, "ptx": compiled[0].asm["ptx"]}

    return use


def fits(found, capability, warps, programs=1):
    """Nothing spills, and `programs` run at once on a multiprocessor."""
    return (
        found["spills"] == 0
        and programs * found["registers"] * 32 * warps <= REGISTERS
        and programs * (found["shared"] + 1024) <= SHARED[capability]
    )


@pytest.mark.parametrize("absent", [(), *(pytest.param(names, marks=SOAK) for names in (("d_stream",), ("y",)))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SOAK)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_layernorm_compiles_for_gpus_that_are_not_here(capability, dtype, absent, usage):
    """The widths of ViTs, and the widest; kernels differ only by the padded width."""
    from lift_fast.kernels import layernorm

    tiles = {
        kernel: layernorm.RowTile(**setting(capability, kernel.fn.__name__.removesuffix("_kernel")))
        for kernel in (layernorm.layernorm_kernel, layernorm.layernorm_backward_kernel)
    }
    for kernel, tile in tiles.items():
        shapes = {layernorm.shape(width, tile) for width in (*WIDTHS.values(), 4096)}
        assert {shape[1] for shape in shapes} == {256, 512, 1024, 2048, 4096}
        names = ("residual", "stream") if absent and kernel is layernorm.layernorm_kernel else absent
        for rows, width, warps in shapes:
            sizes, options = {"ROWS": rows, "WIDTH": width}, {"absent": names, "registers": tile.registers}
            found = usage(kernel, capability, sizes, dtype, warps, **options)
            assert fits(found, capability, warps, programs=16 // warps), (width, found)
    tile = layernorm.MergeTile(**setting(capability, "merge"))
    found = usage(layernorm.merge_kernel, capability, {"TILES": tile.parts, "N": tile.columns}, warps=tile.warps)
    assert fits(found, capability, tile.warps, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SOAK)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_bias_act_compiles_for_gpus_that_are_not_here(capability, activation, dtype, usage):
    from lift_fast.kernels import mlp

    for kernel in (mlp.bias_act_kernel, mlp.bias_act_backward_kernel):
        tile = mlp.Tile(**setting(capability, kernel.fn.__name__.removesuffix("_kernel")))
        sizes = {"ACTIVATION": activation, "ROWS": tile.rows, "COLS": tile.cols}
        found = usage(kernel, capability, sizes, dtype, tile.warps, registers=tile.registers)
        assert fits(found, capability, tile.warps, programs=8), (kernel.fn.__name__, found)


def product_sizes(tile, activation):
    sizes = {"ACTIVATION": activation, "GROUP": tile.group, "ALIGNED": tile.aligned}
    return sizes | {"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth}


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        ("gelu", "even"),
        ("gelu_tanh", "even"),
        ("gelu", "odd"),
        *(pytest.param("quick_gelu", name, marks=SOAK) for name in ("even", "odd", "fp16")),
        *(pytest.param("gelu_tanh", name, marks=SOAK) for name in ("odd", "fp16")),
        pytest.param("gelu", "fp16", marks=SOAK),
    ],
)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_products_compile_for_gpus_that_are_not_here(capability, activation, name, usage):
    from lift_fast.kernels import mlp

    aligned = name != "odd"
    dtype = torch.float16 if name == "fp16" else torch.bfloat16
    for kernel in (mlp.linear_act_kernel, mlp.linear_act_backward_kernel):
        value = setting(capability, kernel.fn.__name__.removesuffix("_kernel"), aligned=aligned)
        tile = mlp.ProductTile(**value, aligned=aligned)
        options = {"aligned": aligned, "registers": tile.registers}
        found = usage(kernel, capability, product_sizes(tile, activation), dtype, tile.warps, tile.stages, **options)
        ptx = found.pop("ptx")
        assert fits(found, capability, tile.warps, programs=2), (kernel.fn.__name__, found)
        if capability == 90 and aligned:
            assert found["registers"] <= 128 and found["shared"] <= 113 << 10 and tile.warps == 8, found
        assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability] in ptx
        if aligned:  # operands are copied to shared memory 16 bytes at once, without registers
            assert "cp.async.cg.shared.global" in ptx and "cp.async.ca" not in ptx


def test_sizes_of_one_compile(usage):
    from lift_fast.kernels import layernorm, mlp

    one = dict.fromkeys(("width", "cols"), 1)
    for kernel in (layernorm.layernorm_kernel, layernorm.layernorm_backward_kernel):
        tile = layernorm.RowTile(**setting(90, kernel.fn.__name__.removesuffix("_kernel")))
        rows, width, warps = layernorm.shape(1, tile)
        for absent in ((), ("residual", "stream") if kernel is layernorm.layernorm_kernel else ("d_stream", "y")):
            usage(kernel, 90, one | {"ROWS": rows, "WIDTH": width}, warps=warps, aligned=False, absent=absent)
    tile = mlp.Tile(**setting(90, "bias_act"))
    sizes = one | {"ACTIVATION": "gelu", "ROWS": tile.rows, "COLS": tile.cols}
    for kernel in (mlp.bias_act_kernel, mlp.bias_act_backward_kernel):
        usage(kernel, 90, sizes, aligned=False, absent=("a",) if kernel is mlp.bias_act_backward_kernel else ())
    for kernel in (mlp.linear_act_kernel, mlp.linear_act_backward_kernel):
        tile = mlp.ProductTile(**setting(90, "linear_act", aligned=False), aligned=False)
        sizes = product_sizes(tile, "gelu")
        usage(kernel, 90, sizes, warps=tile.warps, stages=tile.stages, aligned=False, absent=("bias",))


def skip_without_triton():
    if backend.why_not():
        pytest.skip(backend.why_not())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *((1970, width) for width in WIDTHS.values()), (20001, 768), (77, 4096)])
def test_the_backend_on_a_gpu(shape, dtype):
    skip_without_triton()
    check_layernorm(*shape, dtype, "cuda")
    check_layernorm(*shape, dtype, "cuda", residual=False, alias="dy", again=False)
    check_layernorm(*shape, dtype, "cuda", alias="d_stream")
    for activation in ACTIVATIONS:
        check_bias_act(*shape, dtype, activation, "cuda")
        check_bias_act(*shape, dtype, activation, "cuda", alias=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_on_a_gpu(dtype):
    skip_without_triton()
    check_merge("cuda")
    for values in ({"scale": 1e3}, {"scale": 1e-3}, {"mean": 30.0}, {"mean": -30.0, "scale": 1e3}):
        check_layernorm(50, 768, dtype, "cuda", **values)
    for activation in ACTIVATIONS:
        check_bias_act(50, 768, dtype, activation, "cuda", scale=1e3)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [*PRODUCTS, (1970, 768, 3072), (788, 1152, 4304), (3940, 192, 768)])
def test_products_on_a_gpu(shape, dtype, activation):
    skip_without_triton()
    check_linear(*shape, dtype, activation, "cuda")
    check_linear(*shape, dtype, activation, "cuda", biased=False)


@pytest.mark.gpu
def test_the_same_bits_every_time_and_no_waiting():
    skip_without_triton()
    x, dy, h, da = (tokens(5000, width, torch.bfloat16, "cuda") for width in (768, 768, 3072, 3072))
    weight, bias, wide = vector(768, "cuda"), vector(768, "cuda"), vector(3072, "cuda")
    into, out = tokens(3072, 768, torch.bfloat16, "cuda"), tokens(768, 3072, torch.bfloat16, "cuda")

    def everything():
        y, mean, rstd = torch.empty_like(x), weight.new_empty(5000), weight.new_empty(5000)
        backend.layernorm(LayerNorm(x, None, weight, bias, 1e-6, y, None, mean, rstd))
        dx, dh = torch.empty_like(x), torch.empty_like(h)
        sums = backend.layernorm_backward(LayerNormGrad(dy, x, mean, rstd, weight, bias, None, dx, None))
        d_bias = backend.bias_act_backward(BiasActGrad(da, h, wide, "gelu", dh, None))
        product = triton_gemm.linear_act(x, into, wide, "gelu")
        return [y, dx, *sums, dh, d_bias, *product, *triton_gemm.linear_act_backward(dy, out, h, wide, "gelu")]

    first = everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

"""The "cuda" backend of layernorm and of bias and activation, against plain torch in float64.

Every test of values runs twice: on a GPU, and on the CPU, for which tests/support/cuda_on_cpu.h compiles the kernels as
they are written, to run thread by thread.
"""

import re

import pytest
import torch
from support.binaries import architectures, compiled_kernels
from support.cuda_emulator import emulate

from lift_fast.ops.transformer import cuda, eager
from lift_fast.ops.transformer.contract import ACTIVATIONS, BiasAct, BiasActGrad, LayerNorm, LayerNormGrad

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative norms of errors: of tokens, which are rounded once, and of float32 vectors.
STEP = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
VECTOR = 2e-6
# One, two, five and eight warps per row; rows that are not a multiple of 16 bytes; more columns than eight warps hold.
SHAPES = [(1, 1), (2, 3), (300, 17), (197, 192), (9, 257), (25, 768), (2, 1024), (9, 1152), (2, 3072), (2, 4304),
          (1, 8192), (2, 8200), (1, 8193)]  # fmt: skip
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def every_shape(test):
    for name, values in (("shape", SHAPES), ("dtype", DTYPES), ("device", DEVICES)):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    more = 'module.def("last_block", [] { return emulated::block_index.x; });'
    more += 'module.def("last_threads", [] { return emulated::block_size.x; });'
    return emulate(tmp_path_factory.mktemp("emulated"), ["layernorm", "mlp"], ["blocks"], more)


@pytest.fixture
def on(request, monkeypatch):
    """on(device): the device, with the backend patched to work there and its allocations filled with NaN."""

    def prepare(device: str) -> str:
        if device == "cpu":
            monkeypatch.setattr(cuda, "_C", request.getfixturevalue("emulated"))
            monkeypatch.setattr(cuda, "launch_on", lambda tensor: {"device": 0, "stream": 0})
            monkeypatch.setattr(cuda, "_multiprocessors", lambda tensor: 1)  # many rows per thread block
        elif cuda.why_not():
            pytest.skip(cuda.why_not())
        get = cuda._floats
        monkeypatch.setattr(cuda, "_floats", lambda *args: get(*args).fill_(float("nan")))
        return device

    return prepare


class Memory:
    """Tensors inside larger buffers of NaN, `shift` elements off a multiple of 16 bytes."""

    def __init__(self, device, shift=0):
        self.device, self.shift, self.buffers = device, shift, []

    def allocate(self, *shape, dtype=torch.float32):
        """A tensor of NaN."""
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 64,), float("nan"), dtype=dtype, device=self.device)
        inside = slice(32 + self.shift, 32 + self.shift + count)
        self.buffers.append((buffer, inside))
        return buffer[inside].view(shape)

    def put(self, tensor):
        return self.allocate(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def untouched(self):
        for buffer, inside in self.buffers:
            outside = buffer.cpu().clone()
            outside[inside] = float("nan")
            assert outside.isnan().all()


def close(found, expected, tolerance, floor=0.0):
    """floor: an absolute error that is allowed, where the expected values cancel."""
    found, expected = found.detach().cpu().double(), expected.double()
    error, size = (found - expected).norm(), expected.norm()
    assert error <= tolerance * size + floor + 1e-30, (float(error), float(size))


def tokens(rows, width, dtype, scale=1.0, shift=0.0):
    return (torch.randn(rows, width) * scale + shift).to(dtype)


def vector(width, around=0.0):
    return torch.randn(width) * 0.3 + around


def double(*tensors):
    return [None if tensor is None else tensor.detach().cpu().double() for tensor in tensors]


def layernorm(x, residual, weight, bias, eps=1e-5):
    """y, s, mean and rstd in float64, of a sum rounded to x's dtype."""
    s = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    y = torch.empty(s.shape, dtype=torch.float64)
    mean, rstd = torch.empty(2, len(s), dtype=torch.float64)
    eager.layernorm(LayerNorm(s.double(), None, weight.double(), bias.double(), eps, y, None, mean, rstd))
    return y, s, mean, rstd


def layernorm_backward(dy, s, mean, rstd, weight, bias, d_s):
    """dx, y, d_weight and d_bias in float64."""
    dx, y = torch.empty(2, *s.shape, dtype=torch.float64)
    given = double(dy, s, mean, rstd, weight, bias, d_s)
    d_weight, d_bias = eager.layernorm_backward(LayerNormGrad(*given, dx, y))
    return dx, y, d_weight, d_bias


@every_shape
def test_layernorm(device, dtype, shape, on):
    device = on(device)
    rows, width = shape
    for shift, with_residual in ((0, True), (0, False), (1, True)):
        memory = Memory(device, shift)
        x, residual = tokens(rows, width, dtype, 2.0, 0.5), tokens(rows, width, dtype) if with_residual else None
        weight, bias = vector(width, 1.0), vector(width)
        expected, s, mean, rstd = layernorm(x, residual, weight, bias)
        y, stream = (memory.allocate(rows, width, dtype=dtype) for _ in range(2))
        found_mean, found_rstd = memory.allocate(rows), memory.allocate(rows)
        given = [None if tensor is None else memory.put(tensor) for tensor in (x, residual, weight, bias)]
        cuda.layernorm(LayerNorm(*given, 1e-5, y, stream if with_residual else None, found_mean, found_rstd))
        close(y, expected, STEP[dtype])
        close(found_mean, mean, VECTOR, 1e-7 * float((1 / rstd).norm())), close(found_rstd, rstd, VECTOR)
        assert torch.equal(stream.cpu(), s) if with_residual else stream.isnan().all()
        assert torch.equal(given[0].cpu(), x)
        memory.untouched()


@every_shape
def test_layernorm_backward(device, dtype, shape, on):
    device = on(device)
    rows, width = shape
    # Shifted or not, and whether dx is a tensor of its own, dy, or d_s.
    for shift, with_y, alias in (
        (0, True, None),
        (0, False, "dy"),
        (0, True, "d_s"),
        (1, True, None),
        (3, True, "d_s"),
    ):
        memory = Memory(device, shift)
        dy, s = tokens(rows, width, dtype), tokens(rows, width, dtype, 2.0, 0.5)
        d_s = tokens(rows, width, dtype) if alias == "d_s" or shift else None
        weight, bias = vector(width, 1.0), vector(width)
        _, _, mean, rstd = layernorm(s, None, weight, bias)
        given = [dy, s, mean.float(), rstd.float(), weight, bias, d_s]
        expected, expected_y, *sums = layernorm_backward(*given)
        # With one or two columns, g cancels to its rounding error.
        floor = 2e-7 * float((rstd[:, None] * dy.double() * weight.double()).norm())
        there = [None if tensor is None else memory.put(tensor) for tensor in given]
        y, own = (memory.allocate(rows, width, dtype=dtype) for _ in range(2))
        if alias is None:
            once = cuda.layernorm_backward(LayerNormGrad(*there, own, None))
            before = own.clone()
            own.fill_(float("nan"))
        dx = {"dy": there[0], "d_s": there[6]}.get(alias, own)
        found = cuda.layernorm_backward(LayerNormGrad(*there, dx, y if with_y else None))
        close(dx, expected, STEP[dtype], floor)
        for vector_, expected_vector in zip(found, sums, strict=True):
            assert vector_.shape == (width,) and vector_.dtype == torch.float32
            close(vector_, expected_vector, VECTOR, 1e-7 * rows)
        if with_y:
            close(y, expected_y, STEP[dtype])
        else:
            assert y.isnan().all()
        if alias is None:  # the same bits at every run
            assert torch.equal(before, dx) and all(torch.equal(*pair) for pair in zip(once, found, strict=True))
        else:
            assert own.isnan().all()
        assert torch.equal(there[1].cpu(), s)
        memory.untouched()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 192, 257, 1152, 8200])
def test_layernorm_at_the_extremes(device, dtype, width, on):
    device = on(device)
    wide = dtype != torch.float16
    for scale, around in ((1e3, 0.0), (1e-3, 0.0), (1.0, 100.0), (1.0, -3e3), (1e4 if wide else 10.0, 2e4), (0.0, 5.5)):
        x = tokens(7, width, dtype, scale, around)
        weight, bias = vector(width, 1.0), vector(width)
        expected, s, mean, rstd = layernorm(x, None, weight, bias)
        y = torch.full_like(x, float("nan")).to(device)
        found = torch.full((2, 7), float("nan"), device=device)
        cuda.layernorm(LayerNorm(x.to(device), None, weight.to(device), bias.to(device), 1e-5, y, None, *found))
        close(y, expected, STEP[dtype]), close(found[1], rstd, VECTOR)
        close(found[0], mean, VECTOR, 1e-7 * float((1 / rstd).norm()))
    x[2, width // 2], x[4, 0] = float("nan"), float("inf")
    cuda.layernorm(LayerNorm(x.to(device), None, weight.to(device), bias.to(device), 1e-5, y, None, *found))
    assert y[2].isnan().all() and y[4].isnan().all() and found[:, [2]].isnan().all()
    others = [0, 1, 3, 5, 6]
    close(y[others], expected[others], STEP[dtype])


def run_bias_act(h, bias, activation):
    a = torch.empty(h.shape, dtype=torch.float64)
    eager.bias_act(BiasAct(h.double(), bias.double(), activation, a))
    return a


@every_shape
def test_bias_act(device, dtype, shape, on):
    device = on(device)
    rows, width = shape
    for activation in ACTIVATIONS:
        for shift in (0, 1):
            memory = Memory(device, shift)
            h, bias = tokens(rows, width, dtype, 2.0), vector(width)
            expected = run_bias_act(h, bias, activation)
            there, bias = memory.put(h), memory.put(bias)
            for a in (memory.allocate(rows, width, dtype=dtype), there):  # a may be h
                cuda.bias_act(BiasAct(there, bias, activation, a))
                close(a, expected, STEP[dtype])
            memory.untouched()


@every_shape
def test_bias_act_backward(device, dtype, shape, on):
    device = on(device)
    rows, width = shape
    for activation in ACTIVATIONS:
        kinds = ((0, True, False), (1, True, True), (0, True, True), (0, False, True))
        for shift, with_a, aliases in kinds if activation == "gelu" else kinds[:2]:
            memory = Memory(device, shift)
            da, h, bias = tokens(rows, width, dtype), tokens(rows, width, dtype, 2.0), vector(width)
            expected = torch.empty(rows, width, dtype=torch.float64)
            sums = eager.bias_act_backward(BiasActGrad(*double(da, h, bias), activation, expected, None))
            there = [memory.put(tensor) for tensor in (da, h, bias)]
            dh, a = there[:2] if aliases else [memory.allocate(rows, width, dtype=dtype) for _ in range(2)]
            found = cuda.bias_act_backward(BiasActGrad(*there, activation, dh, a if with_a else None))
            close(dh, expected, STEP[dtype])
            assert found.shape == (width,) and found.dtype == torch.float32
            close(found, sums, VECTOR, 1e-7 * rows)
            if with_a:
                close(a, run_bias_act(h, bias, activation), STEP[dtype])
            if not aliases:  # the same bits at every run
                again = torch.empty_like(dh)
                assert torch.equal(found, cuda.bias_act_backward(BiasActGrad(*there, activation, again, None)))
                assert torch.equal(again, dh) and torch.equal(there[0].cpu(), da)
            memory.untouched()


def exact(z, activation):
    """act(z) without the cancellation of 1 + erf and 1 + tanh."""
    if activation == "gelu":
        return 0.5 * z * torch.special.erfc(-z * eager.INV_SQRT_2)
    inner = eager.SQRT_2_OVER_PI * (z + eager.CUBE * z**3)
    return z * torch.sigmoid(2 * inner if activation == "gelu_tanh" else eager.QUICK * z)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(device, activation, on):
    """Elementwise, to a few units in the last place."""
    device = on(device)
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.randn(4000) * 1e3, torch.tensor([0.0, -0.0, 1e10, -1e10])])
    h, ones = z[None].to(device), torch.ones(1, len(z), device=device)
    zeros = torch.zeros(len(z), device=device)
    a, dh = torch.full_like(h, float("nan")), torch.full_like(h, float("nan"))
    cuda.bias_act(BiasAct(h, zeros, activation, a))
    expected = exact(z.double(), activation)
    assert ((a[0].cpu() - expected).abs() <= 2e-5 * expected.abs() + 1e-36).all()
    near = z.abs() < 4
    assert ((a[0].cpu() - expected).abs() <= 5e-7 * z.abs())[near].all()
    cuda.bias_act_backward(BiasActGrad(ones, h, zeros, activation, dh, None))
    expected = torch.empty(1, len(z), dtype=torch.float64)
    eager.bias_act_backward(BiasActGrad(*double(ones, h, zeros), activation, expected, None))
    assert ((dh.cpu() - expected).abs() <= 2e-6).all()
    for dtype in DTYPES:
        special = torch.tensor([[float("inf"), float("nan"), 3.0, float("nan")]], dtype=dtype, device=device)
        cuda.bias_act(BiasAct(special, torch.zeros(4, device=device), activation, special))
        assert special[0, 0] == float("inf") and special[0, 1::2].isnan().all() and special[0, 2] > 2.9


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device, on):
    device = on(device)
    for width in (16, 5):
        empty, weight = torch.empty(0, width, device=device), torch.ones(width, device=device)
        none = torch.empty(0, device=device)
        cuda.layernorm(LayerNorm(empty, None, weight, weight, 1e-5, empty, None, none, none))
        cuda.bias_act(BiasAct(empty, weight, "gelu", empty))
        found = cuda.layernorm_backward(LayerNormGrad(empty, empty, none, none, weight, weight, None, empty, None))
        for sums in (*found, cuda.bias_act_backward(BiasActGrad(empty, empty, weight, "gelu", empty, None))):
            assert (sums == 0).all() and sums.shape == (width,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows_are_moved_16_bytes_at_a_time(dtype, on, emulated):
    device = on("cpu")
    for shift in (0, 1):
        memory = Memory(device, shift)
        x, y = memory.put(tokens(4, 768, dtype)), memory.allocate(4, 768, dtype=dtype)
        weight, mean, rstd = memory.put(vector(768)), memory.allocate(4), memory.allocate(4)
        cuda.layernorm(LayerNorm(x, None, weight, weight, 1e-5, y, None, mean, rstd))
        assert emulated.last_threads() == (256 if shift else 32)  # of a row
        cuda.bias_act(BiasAct(x, weight, "gelu", y))
        assert emulated.last_block() + 1 == 768 // (32 if shift else 32 * 16 // dtype.itemsize)


@pytest.mark.parametrize("width", [1, 192, 768, 1152, 4304, 9000])
def test_parts_of_rows(width, emulated):
    for type_ in range(3):
        for parts in (emulated.layernorm_parts, emulated.bias_act_parts):
            assert parts(0, width, type_, 132) == 0
            for rows in (1, 5, 300):
                assert 1 <= parts(rows, width, type_, 132) <= rows
            assert parts(10**6, width, type_, 264) >= 1.9 * parts(10**6, width, type_, 132)
        # Enough to fill a GPU, and no more.
        assert 132 <= emulated.layernorm_parts(10**6, width, type_, 132) <= 4 * 132
    with pytest.raises(ValueError, match="type must be"):
        emulated.layernorm_parts(1, width, 3, 132)


def test_cuda_compiles_without_spills():
    """Read from the installed extension, which setup.py compiled for every GPU."""
    # kernel -> (most registers in float32 and in 16 bits, number of instances). A multiprocessor runs two thread blocks
    # of 128 threads of layernorm's backward in float32 and three in 16 bits, five of bias_act's backward and eight of
    # its forward. Instances: three dtypes; with and without 16-byte accesses; two kinds of activation.
    allowed = {
        ("layernorm", "layernorm"): (104, 64, 3),
        ("layernorm", "layernorm_plain"): (64, 64, 3),
        ("layernorm", "layernorm_backward"): (255, 168, 3),
        ("layernorm", "layernorm_backward_plain"): (64, 64, 3),
        ("layernorm", "add_parts"): (64, 64, 1),
        ("mlp", "bias_act"): (64, 64, 12),
        ("mlp", "bias_act_backward"): (96, 96, 12),
        ("mlp", "add_parts"): (64, 64, 1),
    }
    counts: dict[str, dict] = {arch: dict.fromkeys(allowed, 0) for arch in architectures()}
    pattern = r"Function \S*?_(layernorm|mlp)_cu_[0-9a-f]{8}\d\d(\w+?)_kernel(\S*)"
    for kernel in compiled_kernels(pattern):
        type_ = re.search(r"OutE([012])E", kernel.signature)
        kind = ("float", "bfloat16", "half")[int(type_[1]) if type_ else 0]
        of = " ".join(re.findall(r"Gelu|Logistic|(?<=Li)\d", kernel.signature))
        print(f"sm_{kernel.arch:3} {kernel.name:24} {kind:8} {of:10} {kernel.registers:3} registers")
        assert not kernel.spills, kernel
        assert kernel.registers <= allowed[kernel.source, kernel.name][kind != "float"], kernel
        counts[kernel.arch][kernel.source, kernel.name] += 1
    assert all(there == {name: n for name, (_, _, n) in allowed.items()} for there in counts.values()), counts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_in_a_cuda_graph(dtype, on):
    device = on("cuda")
    rows, width = 1970, 768
    x, residual, dy = (tokens(rows, width, dtype).to(device) for _ in range(3))
    weight, bias = vector(width, 1.0).to(device), vector(width).to(device)
    y, stream, dx, a, dh = (torch.empty_like(x) for _ in range(5))
    mean, rstd = torch.empty(2, rows, device=device)

    def step():
        cuda.layernorm(LayerNorm(x, residual, weight, bias, 1e-5, y, stream, mean, rstd))
        cuda.bias_act(BiasAct(y, bias, "gelu", a))
        d_bias = cuda.bias_act_backward(BiasActGrad(dy, y, bias, "gelu", dh, None))
        return [*cuda.layernorm_backward(LayerNormGrad(dh, stream, mean, rstd, weight, bias, dy, dx, None)), d_bias]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = step()
    for _ in range(2):
        for tensor in (x, residual, dy):
            tensor.copy_(torch.randn_like(tensor))
        for tensor in (y, stream, dx, a, dh, mean, rstd):
            tensor.fill_(float("nan"))
        graph.replay()
        replayed = [tensor.clone() for tensor in (y, stream, mean, rstd, a, dh, dx, *sums)]
        eager = [y, stream, mean, rstd, a, dh, dx, *step()]
        assert all(torch.equal(one, other) for one, other in zip(replayed, eager, strict=True))
        expected, *_ = layernorm(x.cpu(), residual.cpu(), weight.cpu(), bias.cpu())
        close(replayed[0], expected, STEP[dtype])


@pytest.mark.gpu
def test_more_elements_than_31_bits_count(on):
    device = on("cuda")
    width = 4096
    rows = 2**31 // width + 5
    if torch.cuda.mem_get_info()[0] < 8 * rows * width:
        pytest.skip("too little memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    last = tokens(3, width, torch.bfloat16)
    x[-3:] = last.to(device)
    weight, bias, zeros = vector(width, 1.0), vector(width), torch.zeros(width, device=device)
    expected, _, mean, rstd = layernorm(last, None, weight, bias)
    y, statistics = torch.empty_like(x), torch.empty(2, rows, device=device)
    cuda.layernorm(LayerNorm(x, None, weight.to(device), bias.to(device), 1e-5, y, None, *statistics))
    close(y[-3:], expected, STEP[torch.bfloat16]), close(statistics[0, -3:], mean, VECTOR)
    # Only the last rows' gradients are not 0.
    dy = y.zero_()
    dy[-3:] = 1
    expected, _, *sums = layernorm_backward(dy[-3:], last, mean, rstd, weight, bias, None)
    weight, bias = weight.to(device), bias.to(device)
    found = cuda.layernorm_backward(LayerNormGrad(dy, x, *statistics, weight, bias, None, dy, None))
    close(dy[-3:], expected, STEP[torch.bfloat16])
    for one, other in zip(found, sums, strict=True):
        close(one, other, VECTOR)
    assert not dy[:-3].any()
    dy[-3:] = 1
    d_bias = cuda.bias_act_backward(BiasActGrad(dy, x, zeros, "gelu", dy, x))
    expected = torch.empty(3, width, dtype=torch.float64)
    d_expected = eager.bias_act_backward(
        BiasActGrad(*double(torch.ones(3, width), last, zeros), "gelu", expected, None)
    )
    close(dy[-3:], expected, STEP[torch.bfloat16]), close(d_bias, d_expected, VECTOR)
    close(x[-3:], run_bias_act(last, zeros.cpu(), "gelu"), STEP[torch.bfloat16])

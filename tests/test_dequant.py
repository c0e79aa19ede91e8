import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lift_fast import _C
from lift_fast.errors import BackendError
from lift_fast.ops import dequant as module
from lift_fast.ops.dequant import dequant, reference

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 1, 7), (3, 31, 2), (7, 33, 9), (40, 384, 64), (17, 640, 33), (9, 4097, 5)]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def table(n, dim, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed + 1000 * n + dim)
    codes = torch.randint(-128, 128, (n, dim), generator=generator, dtype=torch.int16).to(torch.int8)
    scales = torch.randn(n, generator=generator).exp()
    return codes.to(device), scales.to(device)


def some_rows(n, m, seed=0, device="cpu"):
    return torch.randint(0, n, (m,), generator=torch.Generator().manual_seed(seed)).to(device)


def assert_same(out, expected):
    """Equal bits, any NaN being as good as another."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan)
    kind = BITS[out.dtype]
    assert torch.equal(out.contiguous().view(kind)[~nan], expected.contiguous().view(kind)[~nan])


def extreme_table(device="cpu"):
    """Every code against scales where rounding, overflow, subnormals, infinities and NaN happen."""
    tiny, huge = 2.0**-149, 3.4028234e38
    special = [
        0.0,
        -0.0,
        1.0,
        1 / 127,
        tiny,
        5e-42,
        1e-38,
        6e-8,
        2.98e-8,
        2**-14 / 127,
        65504 / 127,
        65520 / 127,
    ]
    special += [515.9, 516.2, 1e30, huge / 127, huge, float("inf"), float("-inf"), float("nan"), -3.5]
    around = (torch.randint(0, 2**32, (300,), generator=torch.Generator().manual_seed(3)) - 2**31).to(torch.int32)
    scales = torch.cat([torch.tensor(special), around.view(torch.float32)])
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).repeat(len(scales), 1)
    return codes.to(device), scales.to(device)


def raw(codes, scales, rows, out, threads=1, isa=""):
    """The C++ op itself, on a buffer of ours."""
    job = module._job(codes, scales, rows, out)
    _C.dequant_cpu(**job, threads=threads, isa=isa)
    return out


def poisoned(m, dim, dtype, margin=64):
    """A view [m, dim] into a buffer of garbage, and a check that nothing around it was touched."""
    garbage = torch.full((m * dim + 2 * margin,), float("nan"), dtype=dtype)
    garbage.view(BITS[dtype]).fill_(0x55AA & 0x7FFF)
    before = garbage.clone()
    view = garbage[margin : margin + m * dim].view(m, dim)

    def untouched():
        kind = BITS[dtype]
        a, b = garbage.view(kind), before.view(kind)
        return torch.equal(a[:margin], b[:margin]) and torch.equal(a[margin + m * dim :], b[margin + m * dim :])

    return view, untouched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "m"), SHAPES)
def test_the_reference_is_the_float64_product_rounded(n, dim, m, dtype):
    codes, scales = table(n, dim)
    exact = reference(codes, scales.double(), None, torch.float64)
    step = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    error = (reference(codes, scales, None, dtype).double() - exact).abs()
    # Rounded once to float32 and once to dtype; half a subnormal step below float16's normal range.
    assert (error <= exact.abs() * (step + 2.0**-24) + 2.0**-25).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "m"), SHAPES)
@pytest.mark.parametrize("backend", ["cpp", "torch", None])
def test_backends_give_the_references_bits(n, dim, m, dtype, backend):
    codes, scales = table(n, dim)
    rows = some_rows(n, m)
    assert_same(dequant(codes, scales, rows, dtype, backend), reference(codes, scales, rows, dtype))
    assert_same(dequant(codes, scales, None, dtype, backend), reference(codes, scales, None, dtype))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _C.isa_levels())
def test_every_instruction_set_gives_the_same_bits(isa, dtype, threads):
    # The last is large enough for threads and for stores around the cache, in every dtype.
    for n, dim, m in [*SHAPES, (100, 1024, 4100)]:
        codes, scales = table(n, dim)
        rows = some_rows(n, m)
        out, untouched = poisoned(m, dim, dtype)
        assert_same(raw(codes, scales, rows, out, threads, isa), reference(codes, scales, rows, dtype))
        assert untouched()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", _C.isa_levels())
def test_extreme_scales_and_codes(isa, dtype):
    codes, scales = extreme_table()
    out, untouched = poisoned(*codes.shape, dtype)
    assert_same(raw(codes, scales, None, out, 1, isa), reference(codes, scales, None, dtype))
    assert untouched()
    first = raw(codes, scales, None, torch.empty_like(out), 1, "scalar")
    assert torch.equal(out.view(BITS[dtype]), first.view(BITS[dtype]))  # NaNs too


@pytest.mark.parametrize("seed", range(60))
def test_any_shape(seed):
    pick = random.Random(seed)
    n, dim, m = pick.randint(1, 40), pick.randint(1, 200), pick.randint(0, 50)
    dtype, isa = pick.choice(DTYPES), pick.choice(_C.isa_levels())
    codes, scales = table(n, dim, seed)
    rows = some_rows(n, m, seed)
    out, untouched = poisoned(m, dim, dtype)
    assert_same(raw(codes, scales, rows, out, 2, isa), reference(codes, scales, rows, dtype))
    assert untouched()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_strides_of_any_kind(backend):
    codes, scales = table(30, 70)
    rows = some_rows(30, 24)[::2]
    wide = torch.stack([scales, -scales], 1)[:, 1]
    for view in (codes[:, 3:60], codes[::2], codes[:, ::3], codes.T[:30, :30]):
        n = len(view)
        for index in (None, rows % n):
            got = dequant(view, wide[:n], index, torch.bfloat16, backend)
            assert_same(got, reference(view, wide[:n], index, torch.bfloat16))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_nothing_asked_nothing_given(backend):
    codes, scales = table(4, 8)
    none = torch.empty(0, dtype=torch.int64)
    assert dequant(codes, scales, none, backend=backend).shape == (0, 8)
    assert dequant(codes[:0], scales[:0], None, backend=backend).shape == (0, 8)
    assert dequant(codes[:0], scales[:0], none, backend=backend).shape == (0, 8)
    assert dequant(codes[:, :0], scales, torch.tensor([1]), backend=backend).shape == (1, 0)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("row", [-1, 4, 2**40, -(2**63)])
def test_a_row_outside_is_an_index_error(row, backend):
    codes, scales = table(4, 8)
    rows = torch.tensor([0, 3, row])
    for view in (codes, codes[:, ::2], codes[:, :0]):
        with pytest.raises(IndexError, match=rf"rows\[2\] is {row}, outside a table of 4 rows"):
            dequant(view, scales, rows, backend=backend)
    with pytest.raises(IndexError, match="empty table"):
        dequant(codes[:0], scales[:0], rows[:1], backend=backend)


def test_what_does_not_fit_is_refused():
    codes, scales = table(4, 8)
    rows = torch.tensor([0])
    for arguments, words in [
        ((codes.float(), scales), "codes must be int8"),
        ((codes[0], scales), "codes must be int8"),
        ((codes, scales[:3]), r"scales must be float32 \[4\]"),
        ((codes, scales.double()), "scales must be float32"),
        ((codes, scales, rows.int()), "rows must be int64"),
        ((codes, scales, rows[None]), "rows must be int64"),
        ((codes, scales, rows, torch.float64), "dtype must be"),
        ((codes, scales, rows.to("meta")), "one device"),
    ]:
        with pytest.raises(ValueError, match=words):
            dequant(*arguments)


def test_a_backend_that_is_not_here_says_what_brings_it(monkeypatch):
    codes, scales = table(4, 8)
    with pytest.raises(BackendError, match="no backend 'cuda' on cpu; it has cpp, torch"):
        dequant(codes, scales, backend="cuda")
    monkeypatch.setattr(module, "_C", None)
    monkeypatch.setattr(module, "_chosen", {})
    with pytest.raises(BackendError, match="not built; run `pip install -e .`"):
        dequant(codes, scales, backend="cpp")
    assert_same(dequant(codes, scales), reference(codes, scales))
    with pytest.raises(BackendError, match="LIFT_FAST_CUDA=1"):
        module._choose("cuda", "cuda")


@pytest.mark.parametrize(
    ("archs", "served", "not_served"),
    [
        ("80;90a;100", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 0), (7, 5)]),
        ("80;90a", [(8, 6), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("90a", [(9, 0), (10, 0)], [(7, 0), (8, 0), (8, 9)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(7, 5), (8, 0)]),
        ("100;80", [(8, 0), (9, 0), (10, 0)], [(7, 5)]),
        ("120a;100f;90", [(9, 0), (10, 3), (12, 0)], [(8, 9)]),
    ],
)
def test_a_gpu_that_the_build_has_no_code_for_does_not_get_it(archs, served, not_served, monkeypatch):
    class Built:
        build_info = staticmethod(lambda: {"cuda": True, "archs": archs, "reason": ""})
        cuda_device_count = staticmethod(lambda: 1)

    monkeypatch.setattr(module, "_C", Built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for capability in served + not_served:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, here=capability: here)
        why_not = module._why_no_cuda()
        if capability in served:
            assert why_not is None
        else:
            major, minor = capability
            assert f"Some GPU has compute capability {major}.{minor}" in why_not
            assert f"compiled for {archs}; install again with" in why_not
            assert why_not.endswith(f'LIFT_FAST_CUDA_ARCHS="{major}{minor}"')
    monkeypatch.setattr(module, "_chosen", {})
    with pytest.raises(BackendError, match="compute capability"):
        module._choose("cuda", "cuda")
    monkeypatch.setattr(module, "_why_no_triton", lambda: None)
    assert module._choose("cuda", "") is not module._cuda


def test_compile_fake_and_opcheck_see_through_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    codes, scales = table(6, 8)
    rows = some_rows(6, 4)
    compiled = torch.compile(lambda c, s, r: dequant(c, s, r, torch.bfloat16) * 2, backend="aot_eager", fullgraph=True)
    assert_same(compiled(codes, scales, rows), reference(codes, scales, rows, torch.bfloat16) * 2)
    with FakeTensorMode() as mode:
        fake = dequant(mode.from_tensor(codes), mode.from_tensor(scales), mode.from_tensor(rows), torch.float16)
        assert fake.shape == (4, 8) and fake.dtype == torch.float16
    for index in (rows, None):
        torch.library.opcheck(torch.ops.lift_fast.dequant.default, (codes, scales, index, torch.bfloat16, ""))


def test_triton_in_its_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "m"), SHAPES)
def test_interpreted_kernel_gives_the_references_bits(n, dim, m, dtype):
    codes, scales = table(n, dim)
    rows = some_rows(n, m)
    assert_same(dequant(codes, scales, rows, dtype, "triton"), reference(codes, scales, rows, dtype))
    assert_same(dequant(codes, scales, None, dtype, "triton"), reference(codes, scales, None, dtype))
    view = codes[:, 1:-1]
    if view.numel():
        assert_same(dequant(view, scales, rows, dtype, "triton"), reference(view, scales, rows, dtype))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_kernel_writes_its_output_and_no_more(dtype):
    from lift_fast.kernels.dequant import dequant as launch

    codes, scales = table(7, 33)
    rows = some_rows(7, 5)
    out, untouched = poisoned(5, 33, dtype)
    launch(codes, scales, rows, out)
    assert_same(out, reference(codes, scales, rows, dtype))
    assert untouched()


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted_kernel_at_the_extremes(dtype):
    codes, scales = extreme_table()
    assert_same(dequant(codes, scales, None, dtype, "triton"), reference(codes, scales, None, dtype))


@pytest.mark.interpret
def test_interpreted_kernel_makes_a_row_outside_nan():
    codes, scales = table(7, 33)
    out = dequant(codes, scales, torch.tensor([0, 7, -1, 6]), backend="triton")
    assert out[1:3].isnan().all() and not out[[0, 3]].isnan().any()


TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_compiles_for_gpus_that_are_not_here(capability, aligned, dtype, triton_usage):
    pytest.importorskip("triton")
    from lift_fast.kernels.dequant import dequant_kernel, tile

    rows, cols = tile(4096)
    signature = {"codes": "*i8", "scales": "*fp32", "rows": "*i64", "out": TYPES[dtype]}
    signature |= dict.fromkeys(["n", "m", "dim", "codes_stride"], "i64")
    signature |= dict.fromkeys(["scales_stride", "HAS_ROWS", "ROWS", "COLS"], "constexpr")
    constexprs = {"scales_stride": 1, "HAS_ROWS": True, "ROWS": rows, "COLS": cols}
    even = ["codes", "scales", "rows", "out", "dim", "codes_stride"] if aligned else []
    usage = triton_usage(dequant_kernel, signature, constexprs, capability, even)
    assert usage["spills"] == 0, usage
    assert usage["registers"] <= 64, usage  # half of a multiprocessor's threads, enough to keep memory busy


def test_cuda_compiles_without_spills(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc here")
    archs = ["80", "90a", "100"]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    source = str(ROOT / "csrc" / "dequant.cu")
    done = subprocess.run(
        [nvcc, "-O3", "-std=c++17", "-DLIFT_FAST_CUDA=1", "--threads", "2", "-Xptxas", "-v", *flags]
        + ["-c", source, "-o", str(tmp_path / "dequant.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '\S+' for 'sm_(\w+)'", done.stderr)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    # Three dtypes, each with and without vectors.
    assert sorted(kernels) == sorted(archs * 6)
    assert len(spills) == len(registers) == 18
    assert set(spills) == {("0", "0", "0")}
    assert max(registers) <= 64  # 64 warps of 32 threads need 32; 64 leave 32 warps a multiprocessor


GPU_BACKENDS = ["cuda", "triton", "torch"]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "m"), [*SHAPES, (100, 1024, 5000)])
def test_gpu_backends_give_the_references_bits(n, dim, m, dtype, backend):
    if module._BACKENDS["cuda"][backend][1]():
        pytest.skip(f"{backend} is not here")
    codes, scales = table(n, dim)
    rows = some_rows(n, m)
    for view in (codes, codes[:, 1:] if dim > 1 else codes, codes[:, ::2]):
        # On the device with the strides they have here.
        there = codes.cuda()[:, codes.shape[1] - view.shape[1] :] if view.stride(1) == 1 else codes.cuda()[:, ::2]
        for index in (rows, None):
            out = dequant(there, scales.cuda(), None if index is None else index.cuda(), dtype, backend)
            assert_same(out.cpu(), reference(view, scales, index, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS[:2])
def test_gpu_extremes_and_rows_outside(backend):
    if module._BACKENDS["cuda"][backend][1]():
        pytest.skip(f"{backend} is not here")
    codes, scales = extreme_table()
    for dtype in DTYPES:
        out = dequant(codes.cuda(), scales.cuda(), None, dtype, backend).cpu()
        assert_same(out, reference(codes, scales, None, dtype))
    rows = torch.tensor([0, len(codes), -1, 2, 2**40]).cuda()
    out = dequant(codes.cuda(), scales.cuda(), rows, backend=backend)
    assert out[[1, 2, 4]].isnan().all() and not out[[0, 3]].isnan().any()

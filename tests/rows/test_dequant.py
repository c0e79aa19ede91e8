import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.cuda_emulator import emulate

from lift_fast.errors import BackendError
from lift_fast.ops import backends
from lift_fast.ops.rows import cpp, triton
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.contract import BACKENDS, RowGather
from lift_fast.ops.rows.dequant import dequant, reference

ROOT = Path(__file__).parents[2]
STORED = [name for name in CODECS if name != "int8r"]  # int8r is stored and widened as int8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows that are multiples of every kernel's unit, and rows that are not.
SHAPES = [(1, 1, 1), (5, 1, 7), (3, 31, 2), (7, 33, 9), (40, 384, 64), (17, 640, 33), (9, 4097, 5)]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.int8: torch.int8}
STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def table(n, dim, codec="int8", seed=0, device="cpu"):
    kind = CODECS[codec]
    generator = torch.Generator().manual_seed(seed + 1000 * n + dim)
    scales = torch.randn(n, generator=generator).exp().to(device) if kind.scaled else None
    if kind.scaled:
        codes = torch.randint(0, 256, (n, kind.columns(dim)), generator=generator).to(torch.uint8)
        if codec == "fp8":
            codes[codes & 0x7F == 0x7F] = 0
        codes = codes.view(kind.dtype)
    else:
        codes = (torch.randn(n, dim, generator=generator) * torch.randn(n, 1, generator=generator).exp()).to(kind.dtype)
    return codes.to(device), scales


def some_rows(n, m, seed=0, device="cpu"):
    return torch.randint(0, n, (m,), generator=torch.Generator().manual_seed(seed)).to(device)


def outs(codec):
    """Every (dtype, normalize) that a codec can be widened to."""
    integers = [(torch.int8, False)] if CODECS[codec].integer else []
    return [*((dtype, normalize) for dtype in DTYPES for normalize in (False, True)), *integers]


def assert_same(out, expected):
    """Equal bits, except that all NaNs are equal."""
    assert out.dtype == expected.dtype and out.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan)
    kind = BITS[out.dtype]
    assert torch.equal(out.contiguous().view(kind)[~nan], expected.contiguous().view(kind)[~nan])


def assert_right(out, codes, scales, rows=None, codec="int8", normalize=False):
    """The reference's bits; within 1e-6 and one rounding where lengths are sums in any order."""
    dim = out.shape[1]
    if not normalize or CODECS[codec].integer:
        wanted = reference(codes, scales, rows, out.dtype, codec=codec, dim=dim, normalize=normalize)
        return assert_same(out, wanted)
    exact = reference(codes, scales, rows, torch.float64, codec=codec, dim=dim, normalize=True)
    assert torch.equal(out.isnan(), exact.isnan())
    error = (out.double() - exact).abs().nan_to_num(0)
    assert (error <= exact.abs().nan_to_num(0) * (1e-6 + STEP[out.dtype]) + 2.0**-25).all()


def extreme_table(codec="int8", device="cpu"):
    """Every byte with scales that cause rounding, overflow, subnormals, infinities and NaN; floats of any magnitude."""
    around = (torch.randint(0, 2**32, (320,), generator=torch.Generator().manual_seed(3)) - 2**31).to(torch.int32)
    around = around.view(torch.float32)
    kind = CODECS[codec]
    if not kind.scaled:
        around = around.view(20, 16)
        around[12:] *= 2.0**-126
        around[14:] *= 2.0**-100  # down to rows of subnormals alone
        around[18:] *= 2.0**-40
        return around.to(kind.dtype).to(device), None
    tiny, huge = 2.0**-149, 3.4028234e38
    special = [0.0, -0.0, 1.0, 1 / 127, tiny, 5e-42, 1e-38, 6e-8, 2.98e-8, 2**-14 / 127, 65504 / 127, 65520 / 127]
    special += [515.9, 516.2, 1e30, huge / 127, huge, float("inf"), float("-inf"), float("nan"), -3.5]
    scales = torch.cat([torch.tensor(special), around[:60]])
    every = torch.arange(0, 256, 15 if kind.packed else 1)  # for packed codes, every level at every place in a byte
    codes = every.to(torch.uint8).view(kind.dtype).repeat(len(scales), 1)
    return codes.to(device), scales.to(device)


def dim_of(codes, codec):
    return codes.shape[1] * (8 // CODECS[codec].bits if CODECS[codec].packed else 1)


def poisoned(m, dim, dtype, margin=64):
    """A view [m, dim] into a buffer of garbage, and a check that nothing around it was written."""
    garbage = torch.empty(m * dim + 2 * margin, dtype=dtype)
    garbage.view(BITS[dtype]).fill_(0x55AA & (0x7F if dtype == torch.int8 else 0x7FFF))
    before = garbage.clone()
    view = garbage[margin : margin + m * dim].view(m, dim)

    def untouched():
        kind = BITS[dtype]
        a, b = garbage.view(kind), before.view(kind)
        return torch.equal(a[:margin], b[:margin]) and torch.equal(a[margin + m * dim :], b[margin + m * dim :])

    return view, untouched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_the_reference_is_the_float64_product_rounded(codec, dtype):
    for n, dim, _ in SHAPES:
        codes, scales = table(n, dim, codec)
        exact = reference(codes, scales, None, torch.float64, codec=codec, dim=dim)
        error = (reference(codes, scales, None, dtype, codec=codec, dim=dim).double() - exact).abs()
        # Rounded once to float32 and once to dtype; half a subnormal step below float16's normal range.
        assert (error <= exact.abs() * (STEP[dtype] + 2.0**-24) + 2.0**-25).all()


@pytest.mark.parametrize("codec", ["int4r", "int2r"])
def test_packed_codes_are_their_levels_from_the_lowest_bits_on(codec):
    kind = CODECS[codec]
    codes, scales = table(3, 21, codec)
    for row, levels in zip(codes.tolist(), dequant(codes, None, None, torch.int8, codec=codec, dim=21), strict=True):
        bits = sum(byte << 8 * k for k, byte in enumerate(row))
        wanted = [kind.levels[bits >> k * kind.bits & 2**kind.bits - 1] for k in range(21)]
        assert levels.tolist() == wanted


@pytest.mark.parametrize("codec", CODECS)
def test_normalize_divides_by_the_length(codec):
    codes, scales = table(9, 384, codec)
    if not CODECS[codec].packed:
        codes.view(torch.int8)[4] = 0
    out = dequant(codes, scales, None, codec=codec, dim=384, normalize=True).double()
    wide = reference(codes, scales, None, torch.float64, codec=codec, dim=384)
    lengths = wide.norm(dim=1, keepdim=True)
    assert CODECS[codec].packed or (out[4] == 0).all()
    torch.testing.assert_close(out, wide / lengths.clamp_min(1e-300), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("codec", CODECS)
def test_backends_give_the_references_bits(codec, backend):
    for n, dim, m in SHAPES:
        codes, scales = table(n, dim, codec)
        for dtype, normalize in outs(codec):
            for rows in (some_rows(n, m), None):
                out = dequant(codes, scales, rows, dtype, backend, codec=codec, dim=dim, normalize=normalize)
                assert out.dtype == dtype
                assert_right(out, codes, scales, rows, codec, normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("codec", CODECS)
def test_extreme_scales_and_codes(codec, normalize):
    codes, scales = extreme_table(codec)
    dim = dim_of(codes, codec)
    for dtype in DTYPES:
        out = dequant(codes, scales, None, dtype, "cpp", codec=codec, dim=dim, normalize=normalize)
        assert_right(out, codes, scales, None, codec, normalize)


@pytest.mark.parametrize("seed", range(40))
def test_any_shape(seed):
    pick = random.Random(seed)
    n, dim, m = pick.randint(1, 40), pick.randint(1, 200), pick.randint(0, 50)
    codec = pick.choice(list(CODECS))
    dtype, normalize = pick.choice(outs(codec))
    codes, scales = table(n, dim, codec, seed)
    rows = some_rows(n, m, seed)
    out, untouched = poisoned(m, dim, dtype)
    if m:
        cpp.widen(RowGather(codes, scales, rows, out, CODECS[codec], normalize))
    assert_right(out, codes, scales, rows, codec, normalize)
    assert untouched()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("codec", CODECS)
def test_strides_of_any_kind(codec, backend):
    codes, scales = table(30, 70 * 8 // CODECS[codec].bits if CODECS[codec].packed else 70, codec)
    rows = some_rows(30, 24)[::2]
    wide = None if scales is None else torch.stack([scales, -scales], 1)[:, 1]
    for view in (codes[:, 3:60], codes[::2], codes[:, ::3], codes.T[:30, :30]):
        n, dim = len(view), dim_of(view, codec)
        some = None if wide is None else wide[:n]
        for index in (None, rows % n):
            got = dequant(view, some, index, torch.bfloat16, backend, codec=codec, dim=dim)
            assert_right(got, view, some, index, codec)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("codec", CODECS)
def test_nothing_asked_nothing_given(codec, backend):
    codes, scales = table(4, 8, codec)
    no_scales = None if scales is None else scales[:0]
    none = torch.empty(0, dtype=torch.int64)
    options = {"backend": backend, "codec": codec, "dim": 8}
    assert dequant(codes, scales, none, **options).shape == (0, 8)
    assert dequant(codes[:0], no_scales, None, **options).shape == (0, 8)
    assert dequant(codes[:0], no_scales, none, normalize=True, **options).shape == (0, 8)
    assert dequant(codes[:, :0], scales, torch.tensor([1]), **{**options, "dim": 0}).shape == (1, 0)


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
    packed, scales = table(4, 9, "int4r")
    with pytest.raises(IndexError, match=rf"rows\[2\] is {row}"):
        dequant(packed, scales, rows, backend=backend, codec="int4r", dim=9, normalize=True)


def test_what_does_not_fit_is_refused():
    codes, scales = table(4, 8)
    packed, floats = table(4, 8, "int2r")[0], table(4, 8, "f32")[0]
    rows = torch.tensor([0])
    for arguments, options, words in [
        ((codes.float(), scales), {}, "codes must be int8"),
        ((codes[0], scales), {}, "codes must be int8"),
        ((codes, scales[:3]), {}, r"scales must be float32 \[4\]"),
        ((codes, scales.double()), {}, "scales must be float32"),
        ((codes, None), {}, "scales must be float32 .* not None"),
        ((codes, scales, rows.int()), {}, "rows must be int64"),
        ((codes, scales, rows[None]), {}, "rows must be int64"),
        ((codes, scales, rows, torch.float64), {}, "dtype must be float32, bfloat16 or float16, or int8"),
        ((codes, scales, rows.to("meta")), {}, "one device"),
        ((codes, scales), {"codec": "int3"}, "codec 'int3' is unknown; this version knows f32, "),
        ((codes, scales), {"dim": 7}, r"codes must be int8 \[n, 7\]"),
        ((packed, scales), {"codec": "int2r"}, "dim must be given"),
        ((packed, scales), {"codec": "int2r", "dim": 9}, r"codes must be uint8 \[n, 3\]"),
        ((floats, scales), {"codec": "f32"}, "codec f32 has no scales"),
        ((floats, None, None, torch.int8), {"codec": "f32"}, "float16 for codec f32, not torch.int8"),
        ((codes, scales, None, torch.int8), {"normalize": True}, "int8 holds integers"),
    ]:
        with pytest.raises(ValueError, match=words):
            dequant(*arguments, **options)


def test_a_backend_that_is_not_here_says_what_brings_it(monkeypatch):
    codes, scales = table(4, 8)
    with pytest.raises(BackendError, match="no dequant backend 'cuda' for cpu; there are: cpp, torch"):
        dequant(codes, scales, backend="cuda")
    monkeypatch.setattr(backends, "_C", None)
    monkeypatch.setattr(BACKENDS, "loaded", {})
    with pytest.raises(BackendError, match="not built; run `pip install -e .`"):
        dequant(codes, scales, backend="cpp")
    assert_same(dequant(codes, scales), reference(codes, scales))
    with pytest.raises(BackendError, match="LIFT_FAST_CUDA=1"):
        BACKENDS.choose("dequant", "cuda", None, "cuda", BACKENDS.offered("cuda"))


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

    monkeypatch.setattr(backends, "_C", Built)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    for capability in served + not_served:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, here=capability: here)
        why_not = backends.why_no_cuda()
        if capability in served:
            assert why_not is None
        else:
            major, minor = capability
            assert f"Some GPU has compute capability {major}.{minor}" in why_not
            assert f"compiled for {archs}; install again with" in why_not
            assert why_not.endswith(f'LIFT_FAST_CUDA_ARCHS="{major}{minor}"')
    monkeypatch.setattr(BACKENDS, "loaded", {})
    with pytest.raises(BackendError, match="compute capability"):
        BACKENDS.choose("dequant", "cuda", None, "cuda", BACKENDS.offered("cuda"))
    assert BACKENDS.choose("dequant", "cuda", None, None, BACKENDS.offered("cuda"))[0] != "cuda"


def test_compile_fake_and_opcheck_see_through_it():
    from torch._subclasses.fake_tensor import FakeTensorMode

    codes, scales = table(6, 21, "int4r")
    rows, options = some_rows(6, 4), {"codec": "int4r", "dim": 21, "normalize": True}

    def twice(c, s, r):
        return dequant(c, s, r, torch.bfloat16, **options) * 2

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert_same(compiled(codes, scales, rows), reference(codes, scales, rows, torch.bfloat16, **options) * 2)
    with FakeTensorMode() as mode:
        fake = dequant(mode.from_tensor(codes), None, mode.from_tensor(rows), torch.int8, codec="int4r", dim=21)
        assert fake.shape == (4, 21) and fake.dtype == torch.int8
    for some, index, normalize in ((scales, rows, False), (None, None, True)):
        arguments = (codes, some, index, torch.bfloat16, "", "int4r", 21, normalize)
        torch.library.opcheck(torch.ops.lift_fast.dequant.default, arguments)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """emulated(codes, scales, rows, out, codec, normalize): the CUDA kernels, compiled for the CPU as they are."""
    built = emulate(tmp_path_factory.mktemp("emulated"), ["dequant"], [])

    def launch_on_cpu(codes, scales, rows, out, codec, normalize=False):
        built.dequant_cuda(**RowGather(codes, scales, rows, out, CODECS[codec], normalize).fields(), device=0, stream=0)

    return launch_on_cpu


# Multiples of a kernel's unit, one and several batches of them, for one warp and for four; and other sizes.
EMULATED = [(1, 1, 1), (7, 33, 9), (5, 384, 7), (3, 4096, 2), (2, 9216, 2), (3, 1028, 2)]


@pytest.mark.parametrize("codec", STORED)
def test_cuda_kernels_on_the_cpu_give_the_references_bits(codec, emulated):
    for n, dim, m in EMULATED:
        codes, scales = table(n, dim, codec)
        rows = some_rows(n, m)
        for dtype, normalize in outs(codec):
            out, untouched = poisoned(m, dim, dtype)
            emulated(codes, scales, rows, out, codec, normalize)
            assert_right(out, codes, scales, rows, codec, normalize)
            assert untouched()


@pytest.mark.parametrize("codec", STORED)
def test_cuda_kernels_on_the_cpu_take_strides_extremes_and_rows_outside(codec, emulated):
    codes, scales = table(9, 256 + 64, codec)
    view = codes[::2, codes.shape[1] // 5 :]  # rows with gaps, not starting at the buffer's start
    some = None if scales is None else scales[::2]
    for dtype, normalize in outs(codec):
        out, untouched = poisoned(5, 256, dtype)
        emulated(view, some, None, out, codec, normalize)
        assert_right(out, view, some, None, codec, normalize)
        emulated(view, some, torch.tensor([0, 5, -1, 2**40, -(2**63)]), out, codec, normalize)
        assert (out[1:] == 0).all() if dtype == torch.int8 else out[1:].isnan().all()
        assert_right(out[:1], view, some, torch.tensor([0]), codec, normalize)
        assert untouched()
    codes, scales = extreme_table(codec)
    for normalize in (False, True):
        out = torch.empty(len(codes), dim_of(codes, codec))
        emulated(codes, scales, None, out, codec, normalize)
        assert_right(out, codes, scales, None, codec, normalize)


def test_triton_in_its_interpreter(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.interpret
@pytest.mark.parametrize("codec", STORED)
def test_interpreted_kernel_gives_the_references_bits(codec):
    for n, dim, m in [(1, 1, 1), (7, 33, 9), (5, 384, 4), (2, 4105, 2)]:
        codes, scales = table(n, dim, codec)
        for dtype, normalize in outs(codec)[: 2 if dim > 4096 else None]:
            rows = None if dtype == torch.bfloat16 else some_rows(n, m)
            out = dequant(codes, scales, rows, dtype, "triton", codec=codec, dim=dim, normalize=normalize)
            assert_right(out, codes, scales, rows, codec, normalize)
    view = codes[:, 1:-1]
    out = dequant(view, scales, rows, torch.bfloat16, "triton", codec=codec, dim=dim_of(view, codec))
    assert_right(out, view, scales, rows, codec)


@pytest.mark.interpret
@pytest.mark.parametrize("codec", STORED)
def test_interpreted_kernel_writes_its_output_and_no_more(codec):
    codes, scales = table(7, 33, codec)
    rows = some_rows(7, 5)
    for dtype, normalize in outs(codec):
        out, untouched = poisoned(5, 33, dtype)
        triton.widen(RowGather(codes, scales, rows, out, CODECS[codec], normalize))
        assert_right(out, codes, scales, rows, codec, normalize)
        assert untouched()


@pytest.mark.interpret
@pytest.mark.parametrize("codec", STORED)
def test_interpreted_kernel_at_the_extremes_and_outside(codec):
    codes, scales = extreme_table(codec)
    dim = dim_of(codes, codec)
    for dtype in DTYPES:
        out = dequant(codes, scales, None, dtype, "triton", codec=codec, dim=dim)
        assert_right(out, codes, scales, None, codec)
    out = dequant(codes, scales, None, backend="triton", codec=codec, dim=dim, normalize=True)
    assert_right(out, codes, scales, None, codec, True)
    codes, scales = table(7, 33, codec)
    rows = torch.tensor([0, 7, -1, 6])
    for dtype, normalize in outs(codec):
        out = dequant(codes, scales, rows, dtype, "triton", codec=codec, dim=33, normalize=normalize)
        assert (out[1:3] == 0).all() if dtype == torch.int8 else out[1:3].isnan().all()
        assert not out[[0, 3]].isnan().any()


POINTERS = {"f32": "*fp32", "bf16": "*i16", "int8": "*i8", "fp8": "*u8", "int4r": "*u8", "int2r": "*u8"}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}


@pytest.mark.parametrize(
    ("capability", "codec"),
    [*((90, codec) for codec in STORED), *((sm, of) for sm in (80, 100) for of in ("f32", "int4r"))],
)
def test_triton_compiles_for_gpus_that_are_not_here(capability, codec, triton_usage):
    pytest.importorskip("triton")
    from lift_fast.kernels.dequant import dequant_kernel, packing, tile, warps

    kind = CODECS[codec]
    cases = [(torch.float32, True, True)]  # takes the most registers
    if capability == 90:
        cases += [(torch.bfloat16, False, False), (torch.int8 if kind.packed else torch.bfloat16, False, True)]
    for dtype, normalize, aligned in cases:
        rows, cols = tile(4096, normalize)
        constexprs = {"scales_stride": 1, "HAS_ROWS": True, "HAS_SCALES": kind.scaled and not normalize}
        constexprs |= {"NORMALIZE": normalize, "UNIT": 16 if aligned else 1, "ROWS": rows, "COLS": cols}
        constexprs |= packing(kind.levels)
        types = {"codes": POINTERS[codec], "scales": "*fp32", "rows": "*i64", "out": TYPES[dtype]}
        signature = {name: types.get(name, "i64") for name in dequant_kernel.arg_names}
        signature |= dict.fromkeys(constexprs, "constexpr")
        even = ["codes", "out"] if aligned else []
        usage = triton_usage(dequant_kernel, signature, constexprs, capability, even, warps(rows, cols))
        print(f"sm_{capability} {codec} {dtype} {normalize=} {aligned=}", usage)
        assert usage["spills"] == 0, usage
        assert usage["registers"] <= 64, usage  # half of a multiprocessor's threads, enough to keep memory busy


def test_cuda_compiles_without_spills(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("this machine has no nvcc")
    archs = ["80", "90a", "100"]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    done = subprocess.run(
        [
            nvcc,
            "-O3",
            "-std=c++17",
            "-DLIFT_FAST_CUDA=1",
            "--threads",
            "2",
            "-Xptxas",
            "-v",
            f"-I{ROOT / 'csrc'}",
            *flags,
        ]
        + ["-fatbin", str(ROOT / "csrc" / "rows" / "dequant.cu"), "-o", str(tmp_path / "dequant.fatbin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Compiling entry function '\S*?(dequant|elements)_kernel(\S*)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)$",
        done.stderr,
        re.S | re.M,
    )
    names = {str(CODECS[name].number): name for name in STORED}
    for name, of, arch, stack, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        which = re.search(r"CodecE(\d)ELi(\d)ELb(\d)", of)
        what = f"{names[which[1]]} to {which[2]} bytes normalize {which[3]}" if which else "any"
        print(f"sm_{arch:3} {name:8} {what:30} registers {registers:3}, shared memory {shared[1] if shared else 0}")
        assert (stack, stores, loads) == ("0", "0", "0"), (name, of, arch)
        # 64 warps per multiprocessor need at most 32 registers per thread; 40 allow 48, 72 (a row in registers) 28.
        assert int(registers) <= (72 if which and which[3] == "1" else 40), (name, of, arch)
    # Six codecs to 4 and 2 bytes, with and without normalize; three to 1 byte; one kernel for any strides.
    assert sorted(arch for _, _, arch, *_ in found) == sorted(archs * (6 * 4 + 3 + 1))


GPU_BACKENDS = ["cuda", "triton", "torch"]


def skip_without(backend):
    if isinstance(why_not := BACKENDS.load(backend), str):
        pytest.skip(why_not)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("codec", STORED)
def test_gpu_backends_give_the_references_bits(codec, backend):
    skip_without(backend)
    for n, dim, m in [*SHAPES, (100, 1024, 5000), (5, 9216, 3)]:
        codes, scales = table(n, dim, codec)
        there, scales_there = codes.cuda(), None if scales is None else scales.cuda()
        for dtype, normalize in outs(codec):
            for index in (some_rows(n, m), None):
                rows = None if index is None else index.cuda()
                out = dequant(there, scales_there, rows, dtype, backend, codec=codec, dim=dim, normalize=normalize)
                assert_right(out.cpu(), codes, scales, index, codec, normalize)
        for at in (slice(1, None), slice(None, None, 2)):
            if codes.shape[1] > 1:
                view, part = codes[:, at], there[:, at]
                out = dequant(part, scales_there, rows, backend=backend, codec=codec, dim=dim_of(part, codec))
                assert_right(out.cpu(), view, scales, None, codec)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("codec", STORED)
def test_gpu_reads_a_table_in_pinned_host_memory(codec, backend):
    skip_without(backend)
    for n, dim, m in [(7, 33, 9), (40, 384, 64), (300, 4096, 100), (5, 9216, 3)]:
        codes, scales = table(n, dim, codec)
        rows = some_rows(n, m)
        pinned = codes.view(torch.uint8).pin_memory().view(codes.dtype)
        for place in ("pin_memory", "cuda"):
            some = None if scales is None else getattr(scales, place)()
            for dtype, normalize in outs(codec):
                out = dequant(pinned, some, rows.cuda(), dtype, backend, codec=codec, dim=dim, normalize=normalize)
                assert out.is_cuda
                assert_right(out.cpu(), codes, scales, rows, codec, normalize)


@pytest.mark.gpu
def test_host_memory_that_is_not_pinned_is_refused():
    codes, scales = table(4, 8)
    rows = torch.tensor([0]).cuda()
    with pytest.raises(ValueError, match="codes must be on cuda:0, as rows are, or in pinned host memory"):
        dequant(codes, scales, rows)
    with pytest.raises(ValueError, match="one device"):
        dequant(codes.cuda(), scales.pin_memory())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS[:2])
@pytest.mark.parametrize("codec", STORED)
def test_gpu_extremes_and_rows_outside(codec, backend):
    skip_without(backend)
    codes, scales = extreme_table(codec)
    there, scales_there = codes.cuda(), None if scales is None else scales.cuda()
    dim = dim_of(codes, codec)
    for dtype, normalize in outs(codec):
        options = {"codec": codec, "dim": dim, "normalize": normalize}
        out = dequant(there, scales_there, None, dtype, backend, **options).cpu()
        assert_right(out, codes, scales, None, codec, normalize)
        rows = torch.tensor([2, len(codes), -1, 2, 2**40]).cuda()
        out = dequant(there, scales_there, rows, dtype, backend, **options).cpu()
        assert (out[[1, 2, 4]] == 0).all() if dtype == torch.int8 else out[[1, 2, 4]].isnan().all()
        assert_right(out[[0, 3]], codes, scales, torch.tensor([2, 2]), codec, normalize)

"""The "triton" backend of attention and its kernels against the dense definition in float64."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from lift_fast.ops import tuned
from lift_fast.ops.attention import triton as backend
from lift_fast.ops.attention.contract import AttentionGrad
from lift_fast.ops.attention.op import reference

STEP = {torch.bfloat16: 5e-3, torch.float16: 7e-4}  # in relative norm
# batch, tokens, heads, head_dim
SHAPES = [
    (1, 1, 1, 64),
    (2, 2, 3, 16),
    (2, 49, 3, 72),
    (1, 50, 1, 128),
    (1, 64, 3, 96),
    (2, 65, 1, 80),
    (1, 128, 1, 128),
    (2, 140, 1, 64),
    (1, 196, 1, 64),
    (2, 197, 3, 64),
    (1, 256, 1, 64),
    (1, 255, 1, 24),
]
CASES = [(causal, dtype) for causal in (False, True) for dtype in STEP]


pytestmark = pytest.mark.usefixtures("poisoned")


def near(got, want, step, floor=0.0):
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= step * want.norm() + floor, (got, want)


def dense(qkv, d_out, scale, causal):
    """out, lse, d_qkv in float64."""
    wide = qkv.double().requires_grad_()
    out = reference(wide, scale=scale, causal=causal)
    out.backward(d_out.double())
    q, k, _ = wide.detach().permute(2, 0, 3, 1, 4)
    s = scale * q @ k.mT
    if causal:
        s = s.masked_fill(torch.ones_like(s[0, 0]).triu(1).bool(), -torch.inf)
    return out.detach(), s.logsumexp(-1), wide.grad


def inputs(shape, dtype, device="cpu", size=1.0):
    batch, tokens, heads, head_dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, head_dim)
    qkv[:, :, :2] *= size
    return qkv.to(device, dtype), torch.randn(shape).to(device, dtype)


def check(qkv, d_out, scale, causal, step):
    assert backend.refuses(qkv.shape[1], qkv.shape[4], qkv.dtype) is None
    before = qkv.clone(), d_out.clone()
    out, lse = backend.forward(qkv, scale, causal)
    d_qkv, again = backend.backward(AttentionGrad(d_out, qkv, None, lse, scale, causal, True))
    assert all(torch.equal(*pair) for pair in zip(before, (qkv, d_out), strict=True))
    want_out, want_lse, want = dense(qkv, d_out, scale, causal)
    assert out.dtype == d_qkv.dtype == qkv.dtype and out.is_contiguous() and d_qkv.is_contiguous()
    near(out, want_out, step)
    near(again, want_out, step)
    assert lse.dtype == torch.float32
    near(lse, want_lse, 1e-5, 1e-5 * want_lse.numel() ** 0.5)
    # Where scores have no effect, as with one token, dq and dk are rounding errors around zero.
    floor = 4 * step * qkv.float().std().item() * scale if qkv.shape[1] == 1 else 0.0
    for part in range(3):
        near(d_qkv[:, :, part], want[:, :, part], step, floor * d_out.double().norm() * (part < 2))
    return out, lse, d_qkv, again


def test_the_interpreted_tests(run_interpreted):
    run_interpreted(__file__)


@pytest.mark.interpret
@pytest.mark.parametrize("causal, dtype", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition(shape, causal, dtype):
    check(*inputs(shape, dtype), shape[-1] ** -0.5, causal, STEP[dtype])


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(1, 49, 2, 64), (2, 130, 1, 64), (1, 33, 1, 72)])
def test_the_form_for_mma(shape, monkeypatch):
    monkeypatch.setattr(backend, "table", lambda device: "sm_80")
    check(*inputs(shape, torch.bfloat16), shape[-1] ** -0.5, True, STEP[torch.bfloat16])


@pytest.mark.interpret
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("shape", [(1, 20, 1, 64), (1, 70, 1, 48), (1, 113, 1, 128), (1, 250, 1, 64)])
def test_either_form_takes_any_shape(shape, passes):
    """Each tile of the tables has one form of the backward; a sweep tries both."""
    value = {"rows": 64, "warps": 4, "stages": 2, "most": 64, "passes": passes, "tall": True}
    with tuned.using("attention", "backward", value):
        for causal in (False, True):
            check(*inputs(shape, torch.bfloat16), shape[-1] ** -0.5, causal, STEP[torch.bfloat16])


def test_pieces_add_up():
    attention = pytest.importorskip("lift_fast.kernels.attention")
    for least, most in ((16, 128), (64, 64), (16, 16), (128, 128)):
        for tokens in range(1, 257):
            sizes = attention.pieces_of(tokens, least, most)
            assert 0 <= sum(sizes) - tokens < least and all(n & (n - 1) == 0 and n <= most for n in sizes)
            assert sum(sizes[:-1]) < tokens  # only the last one is cut
    assert attention.pieces_of(197, 16, 128) == (128, 64, 16)


@pytest.mark.interpret
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", STEP)
def test_scores_of_a_thousand(dtype, causal):
    """Some rows have one dominant key; in others all scores are far below zero: exp(−lse) of a masked key overflows."""
    qkv, d_out = inputs((1, 70, 2, 64), dtype, size=11.0)
    qkv[:, ::3, 0], qkv[:, :, 1] = qkv[:, ::3, 0].abs(), qkv[:, :, 1].abs()
    qkv[:, 1::3, 0] = -qkv[:, 1::3, 0].abs()
    scores = 0.125 * torch.einsum("bihd,bjhd->bhij", *qkv[:, :, :2].double().unbind(2))
    assert scores.max() > 500 and scores[:, :, 1::3].max() < -200 and scores.abs().max() > 900
    check(qkv, d_out, 0.125, causal, STEP[dtype])


@pytest.mark.interpret
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale):
    qkv, d_out = inputs((1, 40, 1, 32), torch.bfloat16)
    out, lse = backend.forward(qkv, scale, False)
    d_qkv, _ = backend.backward(AttentionGrad(d_out, qkv, None, lse, scale, False, False))
    want_out, want_lse, want = dense(qkv, d_out, scale, False)
    near(out, want_out, STEP[torch.bfloat16])
    near(lse, want_lse, 1e-6)
    near(d_qkv, want, STEP[torch.bfloat16])


@pytest.mark.interpret
def test_out_is_the_same_again_and_can_be_left_out():
    qkv, d_out = inputs((2, 100, 2, 64), torch.bfloat16)
    out, lse, d_qkv, again = check(qkv, d_out, 0.125, False, STEP[torch.bfloat16])
    # P is rounded before its product: after division by the sum in one, before it in the other.
    near(again, out.double(), 4e-3)
    alone, none = backend.backward(AttentionGrad(d_out, qkv, None, lse, 0.125, False, False))
    assert none is None and torch.equal(alone, d_qkv)


@pytest.mark.interpret
def test_a_head_does_not_see_another():
    qkv, d_out = inputs((2, 20, 2, 64), torch.bfloat16)
    out, lse = backend.forward(qkv, 0.125, False)
    d_qkv, _ = backend.backward(AttentionGrad(d_out, qkv, None, lse, 0.125, False, False))
    qkv[1, :, :, 1], d_out[1, :, 1] = torch.nan, torch.nan
    nan_out, nan_lse = backend.forward(qkv, 0.125, False)
    nan_d, _ = backend.backward(AttentionGrad(d_out, qkv, None, nan_lse, 0.125, False, False))
    assert nan_out[1, :, 1].isnan().all() and nan_d[1, :, :, 1].isnan().all()
    others = torch.tensor([[True, True], [True, False]])
    for got, want in ((nan_out, out), (nan_d, d_qkv)):
        bare = [x.movedim(-2, 1)[others] for x in (got, want)]
        assert bare[0].isfinite().all() and torch.equal(*bare)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(0, 4, 2, 64), (2, 0, 2, 64), (2, 4, 0, 64)])
def test_nothing_to_do(shape):
    qkv, d_out = inputs(shape, torch.bfloat16)
    out, lse = backend.forward(qkv, 0.125, False)
    d_qkv, again = backend.backward(AttentionGrad(d_out, qkv, None, lse, 0.125, False, True))
    assert out.shape == again.shape == shape and d_qkv.shape == qkv.shape
    assert lse.shape == (shape[0], shape[2], shape[1])


@pytest.mark.interpret
def test_what_it_refuses(monkeypatch):
    refuses = backend.refuses
    assert "float32" in refuses(197, 64, torch.float32)
    for tokens, head_dim in [(257, 64), (129, 72), (16, 129), (16, 0)]:
        assert f"{tokens} tokens with head_dim {head_dim}" in refuses(tokens, head_dim, torch.bfloat16)
    for tokens, head_dim in [(256, 64), (256, 16), (128, 128), (1, 1)]:
        assert refuses(tokens, head_dim, torch.float16) is None
    monkeypatch.setattr(backend, "table", lambda device: "sm_80")
    assert refuses(256, 64, torch.bfloat16) is None and refuses(64, 128, torch.bfloat16) is None
    assert "sm_80" in refuses(128, 128, torch.bfloat16) and "sm_80" in refuses(256, 48, torch.bfloat16)


LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory; 8.6 and 8.9 share 8.0's tiles
TRITON = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def tile_of(which, tokens, head_dim, capability, causal=False):
    """The tile in a table; None if it has none."""
    from lift_fast.kernels import attention

    device = f"sm_{capability}"
    value = tuned.lookup("attention", device, which, tokens=tokens, head_dim=head_dim, causal=causal)
    return value and attention.Tile(**value)


@pytest.fixture
def usage(triton_usage, monkeypatch, tmp_path):
    """usage(which, tokens, head_dim, capability, causal, want_out, dtype): `triton_usage`, and "asm" and "sass"."""
    triton = pytest.importorskip("triton")
    from lift_fast.kernels import attention
    from triton.backends import nvidia

    compile, compiled = triton.compile, []

    def use(which, tokens, head_dim, capability, causal=False, want_out=True, dtype=torch.bfloat16):
        tile, dim = tile_of(which, tokens, head_dim, capability, causal), attention.padded(head_dim)
        constexprs = {"HEAD_DIM": head_dim, "DIM": dim, "ROWS": tile.rows, "CAUSAL": causal}
        kernel = attention.forward_kernel
        if which == "backward":
            kernel = attention.two_pass_kernel if tile.passes == 2 else attention.one_pass_kernel
            constexprs |= {} if want_out else {"out": None}
        if kernel is attention.one_pass_kernel:
            constexprs |= {"KEYS": attention.padded(tokens), "TALL": tile.tall}
        else:
            constexprs["SIZES"] = attention.pieces_of(tokens, tile.least, tile.most)
        kinds = dict.fromkeys(("heads", "d_heads", "tokens", "d_tokens"), "i32")
        kinds |= {"scale": "fp32", "lse": "*fp32", "delta": "*fp32"}
        signature = {
            name: "constexpr" if name in constexprs else kinds.get(name, TRITON[dtype]) for name in kernel.arg_names
        }

        def with_stages(source, target, options):
            compiled.append(compile(source, target=target, options=options | {"num_stages": tile.stages}))
            return compiled[-1]

        monkeypatch.setattr(triton, "compile", with_stages)
        pointers = [name for name, kind in signature.items() if kind[0] == "*"]
        found = triton_usage(kernel, signature, constexprs, capability, pointers, tile.warps)
        metadata = compiled[-1].metadata
        found |= {"shared": metadata.shared, "tensor": metadata.tmem_size, "asm": compiled[-1].asm}
        nvdisasm = Path(nvidia.__file__).parent / "bin" / "nvdisasm"
        binary = tmp_path / f"kernel-{capability}.cubin"
        found["sass"] = subprocess.run([nvdisasm, "-c", binary], capture_output=True, text=True, check=True).stdout
        return found

    return use


def sound(found, which, tokens, head_dim, capability, causal=False):
    """No spills, within the hardware's limits, all products on tensor cores; on Hopper two programs, or one pass."""
    tile = tile_of(which, tokens, head_dim, capability, causal)
    ptx, sass = found.pop("asm")["ptx"], found.pop("sass")
    assert found["spills"] == 0 and found["registers"] > 16, found
    assert found["shared"] <= LIMIT[capability] and found["tensor"] <= 512, found
    if capability == 90 and (which == "forward" or tile.passes == 2):
        assert 2 * found["registers"] * 32 * tile.warps <= 65536 and found["shared"] <= 113 << 10, found
    counts = {name: ptx.count(name) for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma.")}
    wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma."}[capability]
    assert counts.pop(wanted) and not any(counts.values()), counts
    if capability == 90:  # ptxas waits after each wgmma if it finds other code between them, and only warns
        waits = len(re.findall(r"WARPGROUP\.DEPBAR", sass))
        assert waits <= dots(tile, which, tokens), (waits, sass.count("HGMMA"))


def dots(tile, which, tokens):
    """The number of products in a kernel's code, each of which may be waited for once."""
    from lift_fast.kernels import attention

    pieces = len(attention.pieces_of(tokens, tile.least, tile.most))
    return 2 * pieces if which == "forward" else 9 * pieces if tile.passes == 2 else 5


# (tokens, head_dim): one of each padding, and those of ViTs
CORNERS = [(64, 64), (128, 64), (197, 64), (256, 64), (64, 128), (128, 128)]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_gpus_that_are_not_here(capability, usage):
    for tokens, head_dim in CORNERS:
        for which in ("forward", "backward"):
            if tile_of(which, tokens, head_dim, capability):
                sound(usage(which, tokens, head_dim, capability), which, tokens, head_dim, capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_its_largest_forms_compile_causal_and_without_out(capability, usage):
    for tokens in (197, 256):
        sound(usage("forward", tokens, 64, capability, causal=True), "forward", tokens, 64, capability, True)
        found = usage("backward", tokens, 64, capability, causal=True, dtype=torch.float16)
        sound(found, "backward", tokens, 64, capability, True)
        sound(usage("backward", tokens, 64, capability, want_out=False), "backward", tokens, 64, capability)


@pytest.mark.soak
@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_all_of_it_compiles_for_gpus_that_are_not_here(capability, causal, dtype, usage):
    """Every number of pieces, and a head_dim that does not fill its padding."""
    cases = [(tokens, 64) for tokens in range(16, 257, 16)]
    cases += [(tokens, head_dim) for tokens in (64, 128, 256) for head_dim in (40, 80, 128)]
    for tokens, head_dim in cases:
        if tile_of("backward", tokens, head_dim, capability, causal):
            case = tokens, head_dim, capability, causal
            sound(usage("forward", *case, dtype=dtype), "forward", *case)
            for want_out in (False, True):
                sound(usage("backward", *case, want_out, dtype), "backward", *case)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_every_product_is_a_wgmma_on_hopper(which, usage):
    """Counts instructions in the kernel's code, each 64 rows by a depth of 16."""
    found = usage(which, 197, 64, 90)
    scores, sums = 3 * 64 // 16, 208 // 16
    assert found["asm"]["ptx"].count("wgmma.mma_async") == {
        "forward": scores + sums, "backward": 4 * scores + 5 * sums
    }[which]  # fmt: skip


@pytest.fixture
def on_gpu():
    if backend.why_not():
        pytest.skip(backend.why_not())


def served(shape, dtype=torch.bfloat16):
    if reason := backend.refuses(shape[1], shape[3], dtype):
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("causal, dtype", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_on_a_gpu(shape, causal, dtype, on_gpu):
    served(shape)
    check(*inputs(shape, dtype, "cuda"), shape[-1] ** -0.5, causal, STEP[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", STEP)
def test_scores_of_a_thousand_on_a_gpu(dtype, on_gpu):
    check(*inputs((2, 197, 3, 64), dtype, "cuda", size=16.0), 0.125, False, STEP[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_a_vit_on_a_gpu(causal, on_gpu):
    """Against torch in float32, with the same bits at every run."""
    qkv, d_out = inputs((256, 197, 12, 64), torch.bfloat16, "cuda")
    results = []
    for _ in range(2):
        out, lse = backend.forward(qkv, 0.125, causal)
        results.append((out, lse, *backend.backward(AttentionGrad(d_out, qkv, None, lse, 0.125, causal, True))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    wide = qkv.float().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        q, k, v = wide.permute(2, 0, 3, 1, 4)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.125).transpose(1, 2)
    want.backward(d_out.float())
    out, _, d_qkv, again = results[0]
    for got, right in ((out, want.detach()), (again, want.detach()), (d_qkv, wide.grad)):
        near(got, right.double(), STEP[torch.bfloat16])


@pytest.mark.gpu
def test_the_host_does_not_wait_for_a_gpu(on_gpu):
    qkv, d_out = inputs((2, 50, 3, 64), torch.bfloat16, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, lse = backend.forward(qkv, 0.125, False)
        backend.backward(AttentionGrad(d_out, qkv, None, lse, 0.125, False, True))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_more_than_two_billion_elements_on_a_gpu(on_gpu):
    shape = (4000, 256, 12, 64)
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("it takes 20 GB")
    qkv = torch.zeros(*shape[:2], 3, *shape[2:], dtype=torch.bfloat16, device="cuda")
    some, d_some = inputs((1, *shape[1:]), torch.bfloat16, "cuda")
    d_out = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    qkv[-1:], d_out[-1:] = some, d_some
    assert qkv.numel() > 2**31
    out, lse = backend.forward(qkv, 0.125, False)
    d_qkv, _ = backend.backward(AttentionGrad(d_out, qkv, None, lse, 0.125, False, False))
    want_out, _, want = dense(some, d_some, 0.125, False)
    near(out[-1:], want_out, STEP[torch.bfloat16])
    near(d_qkv[-1:], want, STEP[torch.bfloat16])

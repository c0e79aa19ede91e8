"""Attention by libraries: torch's own runs on the CPU; stand-ins check the arguments of the others; a GPU runs all."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lift_fast.ops.attention import contract, eager, library, op
from lift_fast.ops.attention.contract import AttentionGrad

LIBRARIES = ("flash_attn_2", "flash_attn_3", "flash_attn_4", "xformers")
HALF = (torch.bfloat16, torch.float16)


def backend(name: str):
    return importlib.import_module(f"lift_fast.ops.attention.{name}")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double().cpu() - want.cpu()).norm() / want.norm().cpu().clamp(min=1e-30)).item()


def case(tokens: int, head_dim: int, dtype, batch=2, heads=3, device="cpu", scale=1.0):
    """qkv and d_out."""
    qkv = (scale * torch.randn(batch, tokens, 3, heads, head_dim)).to(device, dtype)
    return qkv, torch.randn(batch, tokens, heads, head_dim).to(device, dtype)


def definition(qkv, d_out, scale, causal):
    """out, lse and d_qkv in float64."""
    wide = qkv.double().requires_grad_()
    out = op.reference(wide, scale=scale, causal=causal)
    (d_qkv,) = torch.autograd.grad(out, wide, d_out.double())
    return out.detach(), eager.forward(qkv.double(), scale, causal)[1], d_qkv


def check(module, qkv, d_out, scale, causal, tolerance):
    """Checks output, log-sum-exp and gradients against the definition, and their form against the contract."""
    out, lse = module.forward(qkv, scale, causal)
    want_out, want_lse, want = definition(qkv, d_out, scale, causal)
    assert out.shape == d_out.shape and out.is_contiguous() and out.dtype == qkv.dtype
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    assert lse.shape == want_lse.shape and lse.is_contiguous() and lse.dtype == wide
    assert error(out, want_out) < tolerance
    assert error(lse, want_lse) < min(tolerance, 1e-3)
    d_qkv, again = module.backward(AttentionGrad(d_out, qkv, out, lse, scale, causal, want_out=False))
    assert again is None
    assert d_qkv.shape == qkv.shape and d_qkv.is_contiguous() and d_qkv.dtype == qkv.dtype
    for part in range(3):
        assert error(d_qkv[:, :, part], want[:, :, part]) < tolerance
    assert module.backward(AttentionGrad(d_out, qkv, out, lse, scale, causal, want_out=True))[1] is out


TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("tokens, head_dim", [(2, 8), (49, 64), (77, 72), (197, 80), (50, 5)])
def test_torchs_attention_on_the_cpu(tokens, head_dim, dtype, tolerance, causal):
    qkv, d_out = case(tokens, head_dim, dtype)
    check(backend("flash_cpu"), qkv, d_out, 0.7 * head_dim**-0.5, causal, tolerance)


def test_torchs_attention_on_the_cpu_at_extremes():
    module = backend("flash_cpu")
    qkv, d_out = case(33, 16, torch.float32, scale=30.0)  # scores in the thousands
    out, lse = module.forward(qkv, 0.25, False)
    want_out, want_lse, _ = definition(qkv, d_out, 0.25, False)
    assert error(out, want_out) < 1e-4 and error(lse, want_lse) < 1e-6  # exp of scores with 7 digits
    assert module.backward(AttentionGrad(d_out, qkv, out, lse, 0.25, False, False))[0].isfinite().all()
    qkv, d_out = case(1, 8, torch.float32, batch=1, heads=1)
    out, lse = module.forward(qkv, 1.0, False)
    torch.testing.assert_close(out, qkv[:, :, 2])
    torch.testing.assert_close(
        module.backward(AttentionGrad(d_out, qkv, out, lse, 1.0, False, False))[0][:, :, 2], d_out
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_a_library_is_differentiable(monkeypatch, causal):
    """Through the autograd function and the custom ops, which keep `out` for the library."""
    monkeypatch.setitem(contract.BACKENDS.by_device, "cpu", ("flash_cpu", "torch"))
    assert contract.keeps_out("flash_cpu") and "flash_cpu" in contract.backends_here("cpu")
    qkv, d_out = case(21, 16, torch.float32)
    grads = []
    for name in ("flash_cpu", "torch"):
        leaf = qkv.clone().requires_grad_()
        op.attention(leaf, causal=causal, backend=name).backward(d_out)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


class Recorded(TorchDispatchMode):
    """Records the ops that run, except those that only make views."""

    def __init__(self):
        super().__init__()
        self.names, self.views = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in ("select", "slice", "transpose", "view", "unsqueeze", "detach", "permute", "alias"):
            self.names.append(name)
            self.views += [[t for t in args if isinstance(t, torch.Tensor)]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_what_torchs_kernels_for_gpus_are_given(name, causal):
    """Signatures, by torch's own shape functions; inputs are views, and one copy packs the gradients."""
    module = backend(name)
    qkv = torch.empty(2, 49, 3, 5, 72, dtype=torch.bfloat16, device="meta")
    with Recorded() as ran:
        out, lse = module.forward(qkv, 0.1, causal)
    assert ran.names == [f"_scaled_dot_product_{name}_attention"]
    for part, view in enumerate(ran.views[0]):
        assert view.shape == (2, 5, 49, 72) and view.stride() == (49 * 3 * 5 * 72, 72, 3 * 5 * 72, 1)
        assert view.storage_offset() == part * 5 * 72
    assert out.shape == (2, 49, 5, 72) and out.is_contiguous() and out.dtype == torch.bfloat16
    assert lse.shape == (2, 5, 49) and lse.is_contiguous() and lse.dtype == torch.float32
    with Recorded() as ran:
        d_qkv, again = module.backward(AttentionGrad(torch.empty_like(out), qkv, out, lse, 0.1, causal, True))
    assert d_qkv.shape == qkv.shape and d_qkv.is_contiguous() and again is out
    kernel = f"_scaled_dot_product_{name}_attention_backward"
    copies = [n for n in ran.names if n not in (kernel, "new_empty", "empty_like")]
    assert kernel in ran.names and copies in (["stack"], ["cat"])


class Library:
    """A stand-in for a library's kernels, on CPU tensors; records its arguments."""

    def __init__(self, qkv: torch.Tensor):
        self.qkv, self.calls = qkv, []

    def forward(self, q, k, v, scale, causal, **options):
        for part, view in enumerate((q, k, v)):
            mine = self.qkv[:, :, part]
            assert view.data_ptr() == mine.data_ptr() and view.stride() == mine.stride() and view.shape == mine.shape
        self.calls.append(options)
        return eager.forward(torch.stack((q, k, v), dim=2), scale, causal)

    def backward(self, d_out, q, k, v, out, lse, scale, causal, gradients=None, **options):
        assert q.data_ptr() == self.qkv.data_ptr() and out.is_contiguous() and d_out.is_contiguous()
        qkv = torch.stack((q, k, v), dim=2)
        assert torch.equal(lse, eager.forward(qkv, scale, causal)[1])
        d_qkv, _ = eager.backward(AttentionGrad(d_out, qkv, None, lse, scale, causal, False))
        self.calls.append(options)
        if gradients is None:
            return tuple(d.contiguous() for d in d_qkv.unbind(2))
        for given, d in zip(gradients, d_qkv.unbind(2), strict=True):
            assert given.stride() == q.stride() and given.untyped_storage().nbytes() == qkv.nbytes
            given.copy_(d)
        self.written = gradients[0].data_ptr()


def flash_attn_2(kernels: Library):
    """As flash_attn.flash_attn_interface of 2.7 and 2.8 (without its registration as a custom op)."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        out, lse = kernels.forward(q, k, v, softmax_scale, causal)
        assert return_softmax is False
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
        kernels.backward(
            dout, q, k, v, out, softmax_lse, softmax_scale, causal, (dq, dk, dv), deterministic=deterministic
        )
        return torch.empty(0)

    return {"flash_attn.flash_attn_interface": locals()}


def flash_attn_3(kernels: Library):
    """As hopper/flash_attn_interface.py of 2026, with fewer of the arguments that are left at their default."""

    def _flash_attn_forward(
        q, k, v, k_new=None, qv=None, out_=None, softmax_scale=None, causal=False, window_size_left=-1,
        window_size_right=-1, attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        out, lse = kernels.forward(q, k, v, softmax_scale, causal)
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, max_seqlen_q=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
        deterministic=False, sm_margin=0,
    ):  # fmt: skip
        kernels.backward(
            dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, (dq, dk, dv), deterministic=deterministic
        )
        return torch.empty(0)

    return {"flash_attn_3.flash_attn_interface": locals()}


def flash_attn_4(kernels: Library):
    """As flash_attn.cute.interface of 4.0.0b36, with fewer of the arguments that are left at their default."""

    def _flash_attn_fwd(q, k, v, qv=None, softmax_scale=None, causal=False, softcap=None, return_lse=False, out=None):
        assert return_lse
        return *kernels.forward(q, k, v, softmax_scale, causal), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, deterministic=False, dq=None, dk=None,
        dv=None,
    ):  # fmt: skip
        kernels.backward(dout, q, k, v, out, lse, softmax_scale, causal, (dq, dk, dv), deterministic=deterministic)
        return dq, dk, dv

    return {"flash_attn.cute.interface": locals()}


def xformers(kernels: Library):
    """As xformers.ops.fmha of 0.0.35, whose CUTLASS operator pads the log-sum-exp to a multiple of 32."""

    class LowerTriangularMask:
        pass

    def causal(attn_bias):
        assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
        return attn_bias is not None

    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        out, lse = kernels.forward(query, key, value, scale, causal(attn_bias))
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        return kernels.backward(grad, query, key, value, output, lse, scale, causal(attn_bias))

    ALL_BW_OPS = [SimpleNamespace(is_available=lambda: True)]
    return {"xformers.ops.fmha": locals()}


STAND_INS = {f.__name__: f for f in (flash_attn_2, flash_attn_3, flash_attn_4, xformers)}


@pytest.fixture
def installed(monkeypatch):
    """installed({module: its contents}): makes these modules importable, and torch report a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for module in ("flash_attn", "flash_attn_interface", "flash_attn_3", "xformers"):
        monkeypatch.setitem(sys.modules, module, None)  # makes its import fail

    def install(modules: dict[str, dict]) -> None:
        library._find.cache_clear()
        for name, contents in modules.items():
            steps = name.split(".")
            for end in range(1, len(steps) + 1):
                monkeypatch.setitem(sys.modules, ".".join(steps[:end]), SimpleNamespace(__path__=[], __spec__=None))
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))

    yield install
    library._find.cache_clear()


@pytest.fixture
def deterministic():
    """New tensors hold NaN until they are written, and algorithms are deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", LIBRARIES)
def test_what_libraries_are_given(name, dtype, causal, installed, deterministic):
    """Views of qkv, scale and mask; and views of the result, where a library writes gradients."""
    module = backend(name)
    qkv, d_out = case(37, 24, dtype)
    kernels = Library(qkv)
    installed(STAND_INS[name](kernels))
    assert module.why_not() is None and module.KEEPS_OUT
    check(module, qkv, d_out, 0.3, causal, 1e-2)
    d_qkv, _ = module.backward(AttentionGrad(d_out, qkv, *module.forward(qkv, 0.3, causal), 0.3, causal, False))
    if name != "xformers":
        assert kernels.written == d_qkv.data_ptr()
        assert kernels.calls[1] == {"deterministic": True}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_not_here(name, installed):
    installed({})
    reason = backend(name).why_not()
    assert "cannot be imported" in reason and backend(name)._library.package in reason
    assert "pip install" in reason or "github.com" in reason


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_with_other_functions(name, installed, monkeypatch):
    """Too old or too new: why_not names the missing function and how to install the library."""
    monkeypatch.setattr(library.metadata, "version", lambda package: "1.2.3")
    for change in ("gone", "renamed", "more"):
        ((module, contents),) = STAND_INS[name](Library(torch.empty(0))).items()
        function = backend(name)._library.calls[-1][0]
        if change == "gone":
            del contents[function]
        else:
            contents[function] = (lambda q, other: None) if change == "renamed" else (lambda needed, **others: None)
        installed({module: contents})
        reason = backend(name).why_not()
        assert f"{backend(name)._library.package} 1.2.3: {function}: " in reason
        assert backend(name)._library.install in reason


def test_a_function_wrapped_as_a_custom_op_is_looked_into(installed):
    @torch.library.custom_op("lift_fast_test::_flash_attn_forward", mutates_args=())
    def forward(q: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        return q.clone()

    ((module, contents),) = flash_attn_3(Library(torch.empty(0))).items()
    installed({module: {**contents, "_flash_attn_forward": forward}})
    assert "_flash_attn_forward: got an unexpected keyword argument 'k'" in backend("flash_attn_3").why_not()


def test_a_library_that_breaks_when_imported(installed, monkeypatch):
    def broken(name):
        raise OSError("undefined symbol")

    installed({})
    monkeypatch.setattr(library.importlib, "import_module", broken)
    missing = library.Library("p", ("m",), "get it", ())
    assert missing.why_not() == "p cannot be imported (m: undefined symbol); get it"


def test_xformers_without_kernels(installed):
    ((module, contents),) = xformers(Library(torch.empty(0))).items()
    installed({module: {**contents, "ALL_BW_OPS": [SimpleNamespace(is_available=lambda: False)]}})
    assert "no kernels" in backend("xformers").why_not()


@pytest.mark.parametrize(
    "name, serve",
    [
        ("flash", {(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)}),
        ("cudnn", {(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)}),
        ("flash_attn_2", {(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)}),
        ("flash_attn_3", {(9, 0)}),
        ("flash_attn_4", {(9, 0), (10, 0), (12, 0)}),
        ("xformers", {(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)}),
    ],
)
def test_gpus_that_serve(name, serve, installed, monkeypatch):
    if name in STAND_INS:
        installed(STAND_INS[name](Library(torch.empty(0))))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for capability in ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        reason = backend(name).why_not()
        assert (reason is None) == (capability in serve)
        assert reason is None or f"not {capability[0]}.{capability[1]}" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend(name).why_not() == "it needs a CUDA GPU"


@pytest.mark.parametrize("name", ["flash", "cudnn", *LIBRARIES])
def test_what_they_refuse(name):
    refuses = backend(name).refuses
    for head_dim in (64, 72, 80, 96, 128):
        for dtype in HALF:
            assert refuses(197, head_dim, dtype) is None
    assert "float32" in refuses(197, 64, torch.float32) and "float64" in refuses(197, 64, torch.float64)
    assert "60" in refuses(197, 60, torch.bfloat16) and "512" in refuses(197, 512, torch.bfloat16)
    assert (refuses(1, 64, torch.bfloat16) is not None) == (name == "cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("tokens", [49, 197, 257, 577])
@pytest.mark.parametrize("name", ["flash", "cudnn", *LIBRARIES])
def test_on_a_gpu(name, tokens, head_dim, causal):
    found = contract.load(name)
    if isinstance(found, str):
        pytest.skip(found)
    qkv, d_out = case(tokens, head_dim, torch.bfloat16, device="cuda")
    check(found, qkv, d_out, head_dim**-0.5, causal, 1e-2)

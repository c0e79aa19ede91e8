"""benchmarks/rehearsal.py: code for an H100 runs without a GPU, except its kernels, and fails where an H100 would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a machine with a GPU has nothing to rehearse", allow_module_level=True)


def run(*arguments, **environment):
    """Runs Python with these arguments; returns its exit status and its output."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.returncode, done.stdout + done.stderr


OPS = """
import torch
from benchmarks import rehearsal
rehearsal.install()
from lift_fast.ops.attention import attention
from lift_fast.ops.pairs.contrastive import contrastive
from lift_fast.ops.pairs.cuda import why_not
from lift_fast.ops.transformer.layernorm import layernorm

torch.manual_seed(0)
for backend in ("triton", *(["cuda"] if why_not() is None else [])):
    image, text = (torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    loss = contrastive(image, text, torch.tensor(14.3, device="cuda"), normalize=True, backend=backend)
    loss.backward()
    assert loss.device == image.grad.device == torch.device("cuda:0") and image.grad.shape == image.shape
    assert layernorm(torch.randn(50, 768).cuda(), *torch.ones(2, 768, device="cuda"), backend=backend).is_cuda
qkv = torch.randn(2, 50, 3, 3, 64, device="cuda", dtype=torch.float16, requires_grad=True)
attention(qkv, backend="triton").sum().backward()
assert qkv.grad.is_cuda
"""


def test_ops_compile_and_launch(tmp_path):
    script, counts = tmp_path / "ops.py", tmp_path / "counts.jsonl"
    script.write_text(OPS)
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "REHEARSAL_COUNTS": str(counts)}
    status, output = run(str(script), **environment)
    assert status == 0, output
    rows = {row["kernel"]: row for row in map(json.loads, counts.read_text().splitlines())}
    triton = [row for row in rows.values() if row["compiles"]]
    assert len(triton) >= 6 and all(row["launches"] and row["cpu_s"] > 0 for row in triton), rows
    assert any("layernorm" in name for name in rows)
    # The second time all kernels come from Triton's cache: none is compiled, and all are launched.
    counts.unlink()
    assert run(str(script), **environment)[0] == 0
    again = {row["kernel"]: row for row in map(json.loads, counts.read_text().splitlines())}
    assert again.keys() == rows.keys() and not any(row["compiles"] for row in again.values())


WRONG = """
import torch
import triton
import triton.language as tl
from benchmarks import rehearsal
rehearsal.install()
from lift_fast.ops.pairs import cuda as cuda_pairs
from lift_fast.ops.pairs.contrastive import contrastive

@triton.jit
def copy(x, y, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)

@triton.jit
def does_not_compile(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), tl.arange(0, 2 * N))

@triton.jit
def too_much_shared_memory(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at)))

x, host = torch.randn(64, device="cuda"), torch.randn(64)
large = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
copy[(1,)](x, x, 64, N=64)

def captured():
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()

def without_syncs(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")

cases = {
    "a missing argument": lambda: copy[(1,)](x, x, N=64),
    "an unknown argument": lambda: copy[(1,)](x, x, 64, N=64, size=3),
    "a grid too large": lambda: copy[(1, 70000)](x, x, 64, N=64),
    "host memory": lambda: copy[(1,)](host, x, 64, N=64),
    "no compile": lambda: does_not_compile[(1,)](x, N=64),
    "shared memory": lambda: too_much_shared_memory[(1,)](large, large.float(), N=256, num_warps=16),
    "two devices": lambda: x + host,
    "numpy": lambda: x.numpy(),
    "item": lambda: without_syncs(lambda: x[0].item()),
    "nonzero": lambda: without_syncs(x.nonzero),
    "from the host": lambda: without_syncs(host.cuda),
    "in a capture": captured,
    "memory": lambda: [torch.empty(50 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)],
    "another device": lambda: torch.empty(3, device="cuda:1"),
}
if cuda_pairs.why_not() is None:
    launch_on = cuda_pairs.launch_on
    def misnamed():
        cuda_pairs.launch_on = lambda t: {"device": 0, "queue": 0}
        try:
            contrastive(x[None].clone(), x[None].clone(), 1.0, backend="cuda")
        finally:
            cuda_pairs.launch_on = launch_on
    cases["pybind11"] = misnamed
for name, case in cases.items():
    try:
        case()
        print(f"case {name}: nothing")
    except Exception as error:
        print(f"case {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
without_syncs(lambda: host.to("cuda", non_blocking=True))
"""


def test_what_a_gpu_would_refuse_is_refused(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    status, output = run(str(script), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert status == 0, output
    found = dict(line[5:].split(": ", 1) for line in output.splitlines() if line.startswith("case "))
    wanted = {
        "a missing argument": "TypeError",
        "an unknown argument": "KeyError",
        "a grid too large": "RuntimeError: Triton Error [CUDA]: invalid argument",
        "host memory": "ValueError: Pointer argument",
        "no compile": "CompilationError",
        "shared memory": ("OutOfResources", "PTXASError"),
        "two devices": "RuntimeError: Expected all tensors to be on the same device",
        "numpy": "TypeError",
        "item": "RuntimeError: called a synchronizing",
        "nonzero": "RuntimeError: called a synchronizing",
        "from the host": "RuntimeError: called a synchronizing",
        "in a capture": "RuntimeError: CUDA error: operation not permitted",
        "memory": "OutOfMemoryError",
        "another device": "RuntimeError: CUDA error: invalid device",
        "pybind11": "TypeError",
    }
    assert found.keys() <= wanted.keys(), output
    assert len(found) >= len(wanted) - 1, output  # "pybind11" needs an extension with CUDA
    for name, error in found.items():
        assert error.startswith(wanted[name]), (name, error)


TESTS = """
import unittest.mock

import pytest
import torch

pytestmark = pytest.mark.gpu


def test_right():
    assert torch.ones(3).cuda().sum() == 3


def test_wrong_value():
    assert torch.ones(3).cuda().sum() == 4
    torch.testing.assert_close(torch.ones(3).cuda().cpu(), torch.zeros(3))
    assert torch.cuda.get_device_capability() == (9, 0)


def test_wrong_value_then_a_wrong_argument():
    assert torch.ones(3).cuda().sum() == 4
    torch.ones(3).cuda().sum(axes=0)


def test_an_assertion_that_is_not_the_test_s():
    unittest.mock.Mock().assert_called()


def test_large_without_memory():
    x = torch.randn(1 << 17, 1 << 17, dtype=torch.bfloat16, device="cuda")
    assert x.data_ptr() and (2 * x[:, :8]).shape == (1 << 17, 8) and x.stride() == (1 << 17, 1)


def test_too_large():
    torch.zeros(1 << 31, device="cuda").cpu()
"""


def test_the_plugin_tells_values_from_errors(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    options = ["-q", "-rA", "-p", "benchmarks.rehearsal", "-p", "no:cacheprovider", "-m", "gpu"]
    status, output = run("-m", "pytest", *options, str(tmp_path))
    assert status == 1 and "2 failed, 2 passed, 1 skipped, 1 rehearsed" in output, output
    assert "FAILED" in output and "then_a_wrong_argument" in output and "too large to rehearse" in output
    assert "0 compiles, 0.0 CPU s" in output


def test_a_module_runs_as_if_there_were_a_gpu(tmp_path):
    (tmp_path / "module.py").write_text("import sys, torch\nprint(torch.cuda.get_device_name(), *sys.argv[1:])\n")
    status, output = run("-m", "benchmarks.rehearsal", "module", "--on", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert status == 0 and "rehearsal (no GPU) --on" in output, output

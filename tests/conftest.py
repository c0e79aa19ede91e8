"""Shared by all tests: skips tests that need a GPU without one, and tests Triton kernels without a GPU in two ways.

Interpreted: Triton chooses between its compiler and its CPU interpreter when it is imported. Tests marked `interpret`
therefore run in a process that `run_interpreted` starts with TRITON_INTERPRET=1, and are deselected in all others.
Compiled: `triton_usage` compiles a kernel for any GPU and reads the resource usage from the binary.
"""

import os
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from lift_fast import progress

pytest_plugins = ["support.tally"]  # the fixture that counts attacks, and the table of `make campaign`

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    pytest_plugins.append("support.interpreter")  # makes it faster


def pytest_runtest_setup(item):
    # The seed depends neither on the tests that ran before nor on the file's folder.
    name = f"tests/{item.path.name}::{item.nodeid.partition('::')[2]}"
    torch.manual_seed(zlib.crc32(name.encode()))
    progress.configure()  # a command with --quiet sets it for the process
    # So does one with --threads, and sums depend on it.
    marker = item.get_closest_marker("threads")
    torch.set_num_threads(marker.args[0] if marker else min(2, os.cpu_count() or 1))
    # Jobs in a shell's background ignore SIGINT, and so does this process once a test has interrupted a command in it;
    # the commands that later tests start and interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU is available"))
    unwanted = [item for item in items if bool(item.get_closest_marker("interpret")) != INTERPRETING]
    if unwanted:
        config.hook.pytest_deselected(items=unwanted)
        items[:] = [item for item in items if item not in unwanted]


@pytest.fixture
def poisoned():
    """Fills the results of torch.empty with NaN, so that a read of memory that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run_interpreted():
    """run_interpreted(file): runs the file's `interpret` tests in Triton's interpreter; fails if one of them fails."""

    def run(file: str) -> None:
        triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
        if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
            pytest.skip(f"Triton 3.6's interpreter fails under NumPy 2.4 and later; this is {numpy.__version__}")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # pytest exits with 5 if it ran no test.
        assert done.returncode == 0, done.stdout[-4000:]

    return run


@pytest.fixture
def triton_usage(tmp_path, monkeypatch):
    """triton_usage(kernel, signature, constexprs, capability, aligned, warps) -> {"registers", "shared", "spills"}.

    signature: argument name -> Triton type ("*i8", "i64", "constexpr"). capability: 80, 90, 100. aligned: the arguments
    that are divisible by 16, which Triton detects at a launch. "shared" and "spills" are in bytes; "spills" is the
    local memory of a thread, which ptxas counts as stack.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    def usage(kernel, signature: dict, constexprs: dict, capability: int, aligned=(), warps=4) -> dict[str, int]:
        triton = pytest.importorskip("triton")
        from triton.backends import nvidia
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        attrs = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        binary = tmp_path / f"kernel-{capability}.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run(
            [str(cuobjdump), "-res-usage", str(binary)], capture_output=True, text=True, check=True
        ).stdout
        found = {name: int(value) for name, value in re.findall(r"(REG|SHARED|STACK|LOCAL):(\d+)", text)}
        spills = found["STACK"] + found["LOCAL"]
        return {"registers": found["REG"], "shared": found["SHARED"], "spills": spills}

    return usage

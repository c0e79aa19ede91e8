"""Rehearses a run on an H100 with a machine that has no GPU: all code runs, except that kernels compute nothing.

    python -m benchmarks.rehearsal MODULE ...        runs python -m MODULE ... as if there were an H100
    python -m pytest -p benchmarks.rehearsal -m gpu  runs the tests marked gpu in the same way

It finds mistakes that would waste time on a GPU: files that do not import, arguments that a launcher does not accept,
operations on tensors of two devices, host syncs where they are forbidden, kernels that Triton does not compile for
sm_90 or that need more shared memory than there is, grids that are too large, and hundreds of compiles. It does not
find wrong values: a kernel leaves its outputs unchanged.

How it works: pretended.py gives torch.cuda a simulated device. Triton gets a driver that compiles for sm_90 and
launches nothing. The functions of lift_fast._C that launch are called, check their arguments, and then fail because
there is no driver. The pytest plugin evaluates every `assert` of a test without ending the test: if one fails, the test
is "rehearsed" instead of passed. Any other exception is a failure.

Not covered: torch.compile for the device (functions run uncompiled), CUDA graphs (captured calls run, and a replay does
nothing), what cuBLAS, cuDNN and other binary libraries refuse, and the GPU memory of small tensors.
"""

import ast
import functools
import importlib.abc
import importlib.machinery
import json
import os
import resource
import runpy
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import pretended
from .pretended import CAPABILITY, GPU, MULTIPROCESSORS, SHARED, Pretended, TooLarge

ROOT = Path(__file__).resolve().parent.parent
# Environment variable: a file to which the process appends a JSON line per kernel when it ends.
COUNTS = "REHEARSAL_COUNTS"


# Triton -------------------------------------------------------------------------------------------------------------

compiles: "Counter[str]" = Counter()
launches: "Counter[str]" = Counter()  # of Triton's kernels and the functions of _C
cpu_seconds: "defaultdict[str, float]" = defaultdict(float)
launchers: set = set()  # signatures; for each, a GPU machine compiles a C file with gcc


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return (1, 1, 32, 0, 1024)

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED, "multiprocessor_count": MULTIPROCESSORS, "max_num_regs": 65536, "warpSize": 32,
            "sm_clock_rate": 1_980_000, "mem_clock_rate": 2_619_000, "mem_bus_width": 5120,
        }  # fmt: skip


class _Launcher:
    """Checks a launch as CUDA and Triton's launcher do, and counts it."""

    def __init__(self, src: Any, metadata: Any):
        self.name = src.fn.__name__
        self.types = [kind for kind in src.signature.values()]
        launchers.add(tuple(src.signature.items()))

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        if not (0 <= x < 2**31 and 0 <= y < 65536 and 0 <= z < 65536):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {x} × {y} × {z} for {self.name}")
        for kind, value in zip(self.types, rest[-len(self.types) :], strict=True):
            on_host = kind.startswith("*") and isinstance(value, Tensor) and not isinstance(value, Pretended)
            if on_host and not value.is_pinned():
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        launches[self.name] += 1


class _Driver:
    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return torch.cuda.current_stream().cuda_stream

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return CAPABILITY

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_empty_cache_for_benchmark(self) -> Tensor:
        return torch.empty(64 << 20, dtype=torch.int32, device=GPU)

    def clear_cache(self, cache: Tensor) -> None:
        cache.zero_()

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def _install_triton() -> None:
    try:
        import triton
        import triton.compiler
        from triton.runtime.driver import driver
    except ImportError:
        return
    driver.set_active(_Driver())
    compile, compiled = triton.compiler.compile, []
    triton.knobs.compilation.listener = lambda cache_hit=False, **_: compiled.append(not cache_hit)

    def cpu_time() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def counted(src: Any, target: Any = None, options: Any = None, **kwargs: Any) -> Any:
        compiled.clear()
        start = cpu_time()
        result = compile(src, target=target, options=options, **kwargs)
        if compiled != [False]:  # [False]: it came from Triton's cache on disk
            compiles[src.fn.__name__] += 1
            cpu_seconds[src.fn.__name__] += cpu_time() - start
        return result

    triton.compiler.compile = counted


# lift_fast._C -------------------------------------------------------------------------------------------------------


def _install_extension() -> None:
    """Wraps the functions of _C that launch, which are those with a stream argument.

    A wrapped function is called, so that it and pybind11 check the arguments, and its missing driver is ignored.
    """
    try:
        from lift_fast import _C
    except ImportError:
        return
    extension: Any = _C
    if not extension.build_info()["cuda"] or extension.cuda_device_count():
        return
    extension.cuda_device_count = lambda: 1
    for name in dir(extension):
        function = getattr(extension, name)
        if callable(function) and "stream:" in (function.__doc__ or ""):
            setattr(extension, name, _launching(name, function))


def _launching(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def launch(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except RuntimeError as error:
            if "CUDA driver" not in str(error) and "no CUDA-capable device" not in str(error):
                raise
        launches[name] += 1

    return launch


# ---------------------------------------------------------------------------------------------------------------------

_installed = False


def install() -> None:
    """Gives this process a simulated H100 that computes nothing. Raises RuntimeError if there is a real GPU."""
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: there is nothing to rehearse")
    _installed = True
    pretended.install()
    _install_triton()
    _install_extension()
    if to := os.environ.get(COUNTS):
        import atexit

        atexit.register(write_counts, Path(to))


def write_counts(to: Path) -> None:
    """Appends a JSON line per kernel with its compiles, their CPU seconds, and its launches."""
    with to.open("a") as file:
        for name in sorted(compiles | launches):
            row = {"kernel": name, "compiles": compiles[name], "cpu_s": cpu_seconds[name], "launches": launches[name]}
            file.write(json.dumps(row | {"process": os.getpid(), "launchers": len(launchers)}) + "\n")


# Pytest plugin ------------------------------------------------------------------------------------------------------

_failed_asserts = [0]  # of the current test


def _raised_in_test(error: AssertionError) -> bool:
    """Whether it comes from an `assert` of a test or from torch.testing, which may fail because values are wrong."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename) if frame else ROOT
    return _is_test_file(file) or Path(torch.testing.__file__).parent in file.parents


def _is_test_file(file: Path) -> bool:
    return ROOT / "tests" in file.parents or file.name.startswith("test_")


def _count_failed_assert(error: AssertionError) -> None:
    """Lets a test continue after a failed `assert` of its own; raises the error if it comes from other code."""
    if not _raised_in_test(error):
        raise error
    _failed_asserts[0] += 1


class _ContinuesAfterAsserts(ast.NodeTransformer):
    """Wraps each `assert` in a `try` that hands its error to _count_failed_assert."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        (wrapped,) = ast.parse("try: pass\nexcept AssertionError as _error: _count_failed_assert(_error)").body
        wrapped.body = [node]
        return ast.fix_missing_locations(ast.copy_location(wrapped, node))


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a file of tests that continue after a failed assert."""

    def get_code(self, fullname: str) -> Any:
        tree = _ContinuesAfterAsserts().visit(ast.parse(self.get_data(self.path)))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: Any) -> None:
        module._count_failed_assert = _count_failed_assert
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds tests, and the modules in tests/ that they share, for _Loader."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec and spec.origin and spec.origin.endswith(".py") and _is_test_file(Path(spec.origin)):
            spec.loader = _Loader(fullname, spec.origin)
            return spec
        return None


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput") and "TRITON_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="rehearsal-")  # empty, as on a new machine
        os.environ["TRITON_CACHE_DIR"] = cache.name
        config.add_cleanup(cache.cleanup)
        config.add_cleanup(lambda: os.environ.pop("TRITON_CACHE_DIR"))
    install()
    sys.meta_path.insert(0, _Finder())
    original = torch.testing.assert_close

    @functools.wraps(original)
    def assert_close(*args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except AssertionError:
            _failed_asserts[0] += 1

    torch.testing.assert_close = assert_close


_counted = [0, 0.0]  # compiles and CPU seconds of the tests that have ended


def pytest_runtest_setup(item: Any) -> None:
    _failed_asserts[0] = 0


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    report = (yield).get_result()
    if call.when == "teardown":
        now = [sum(compiles.values()), sum(cpu_seconds.values())]
        report.compiled = [after - before for after, before in zip(now, _counted, strict=True)]
        _counted[:] = now
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, TooLarge):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"too large to rehearse: {error}")
        return
    wrong_values = isinstance(error, AssertionError) and _raised_in_test(error)
    if wrong_values or (call.when == "call" and report.passed and _failed_asserts[0]):
        report.outcome, report.wasxfail, report.rehearsed = "skipped", "rehearsed: no values are computed", True


def pytest_report_teststatus(report: Any) -> Any:
    return ("rehearsed", "r", "REHEARSED") if hasattr(report, "rehearsed") else None


def pytest_sessionfinish(session: Any) -> None:
    if to := os.environ.pop(COUNTS, None) if hasattr(session.config, "workerinput") else None:
        write_counts(Path(to))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    files: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for report in (one for reports in terminalreporter.stats.values() for one in reports if hasattr(one, "nodeid")):
        entry = files[report.nodeid.partition("::")[0]]
        entry[2] += getattr(report, "duration", 0.0)
        for i, more in enumerate(getattr(report, "compiled", ())):
            entry[i] += more
    terminalreporter.section("rehearsal: Triton's compiler, by file")
    for file, (count, cpu, wall) in sorted(files.items(), key=lambda item: -item[1][1]):
        terminalreporter.line(f"{file}: {count:.0f} compiles, {cpu:.1f} CPU s; {wall:.1f} s of tests")
    count, cpu = (sum(entry[i] for entry in files.values()) for i in (0, 1))
    terminalreporter.line(f"all: {count:.0f} compiles, {cpu:.1f} CPU s")


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python -m benchmarks.rehearsal MODULE [ARGUMENT ...]")
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # Under the name by which others import it, so that there is one set of counts and one class Pretended.
    from benchmarks import rehearsal

    rehearsal.main()

"""A rehearsal: what is to run on an H100 runs on a machine without a GPU, but for the kernels, which compute nothing.

    python -m benchmarks.rehearsal MODULE ...        python -m MODULE ..., as if there were an H100
    python -m pytest -p benchmarks.rehearsal -m gpu  the tests marked gpu, likewise

It finds what the first minutes on a GPU would be lost on: files that do not import, arguments that a launcher does not
take, tensors of two devices in one operation, a host that waits where it must not, kernels that Triton does not compile
for sm_90 or that want more shared memory than there is, grids too large, and hundreds of compiles. It finds no wrong
value: what a kernel should have written stays as it was.

How: pretended.py gives torch.cuda a device. Triton has a driver that compiles for sm_90 and launches nothing. Those
functions of lift_fast._C that would launch are called for real and fail for want of a driver, once their arguments have
passed. In tests under the plugin every `assert` is evaluated, and none ends a test: one that does not hold makes it
"rehearsed" instead of passed. Any other exception is a failure.

Not rehearsed: torch.compile for the device (functions run as they are), CUDA graphs (captured calls run, and a replay
does nothing), what cuBLAS, cuDNN and other libraries' binaries refuse, and the GPU memory of what is small.
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
COUNTS = "REHEARSAL_COUNTS"  # the environment's name for a file that gets a JSON line a kernel when the process ends


# Triton -------------------------------------------------------------------------------------------------------------

compiles: "Counter[str]" = Counter()
launches: "Counter[str]" = Counter()  # of Triton's kernels, and of the functions of _C
cpu_seconds: "defaultdict[str, float]" = defaultdict(float)
launchers: set = set()  # each is a C file that gcc compiles on a GPU machine


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
    """Checks what CUDA and Triton's own launcher check."""

    def __init__(self, src: Any, metadata: Any):
        self.name = src.fn.__name__
        self.types = [kind for kind in src.signature.values()]
        launchers.add(tuple(src.signature.items()))

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        if not (0 <= x < 2**31 and 0 <= y < 65536 and 0 <= z < 65536):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: a grid of {x} × {y} × {z} for {self.name}")
        for kind, value in zip(self.types, rest[-len(self.types) :], strict=True):
            host = kind.startswith("*") and isinstance(value, Tensor) and not isinstance(value, Pretended)
            if host and not value.is_pinned():
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
    compile, fresh = triton.compiler.compile, []
    triton.knobs.compilation.listener = lambda cache_hit=False, **_: fresh.append(not cache_hit)

    def spent() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def counted(src: Any, target: Any = None, options: Any = None, **kwargs: Any) -> Any:
        fresh.clear()
        began = spent()
        result = compile(src, target=target, options=options, **kwargs)
        if fresh != [False]:  # from Triton's cache on disk
            compiles[src.fn.__name__] += 1
            cpu_seconds[src.fn.__name__] += spent() - began
        return result

    triton.compiler.compile = counted


# lift_fast._C -------------------------------------------------------------------------------------------------------


def _install_extension() -> None:
    """What has a stream launches: called for real, it refuses what pybind11 or it itself refuses, and has no driver."""
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
    """From here on this process has an H100 that computes nothing. Raises RuntimeError where there is a real GPU."""
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("there is a GPU here: nothing to rehearse")
    _installed = True
    pretended.install()
    _install_triton()
    _install_extension()
    if to := os.environ.get(COUNTS):
        import atexit

        atexit.register(write_counts, Path(to))


def write_counts(to: Path) -> None:
    """Appends a JSON line a kernel: its compiles, the CPU seconds they took, and its launches."""
    with to.open("a") as file:
        for name in sorted(compiles | launches):
            row = {"kernel": name, "compiles": compiles[name], "cpu_s": cpu_seconds[name], "launches": launches[name]}
            file.write(json.dumps(row | {"process": os.getpid(), "launchers": len(launchers)}) + "\n")


# As a plugin of pytest ----------------------------------------------------------------------------------------------

_untrue = [0]


def _of_values(error: AssertionError) -> bool:
    """Whether a test raised it, or torch.testing: what an operation of ours asserts has to hold."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    file = Path(frame.tb_frame.f_code.co_filename) if frame else ROOT
    return _of_tests(file) or Path(torch.testing.__file__).parent in file.parents


def _of_tests(file: Path) -> bool:
    return ROOT / "tests" in file.parents or file.name.startswith("test_")


def _note(error: AssertionError) -> None:
    """What a test's `assert` does here: it is evaluated, and the test goes on."""
    if not _of_values(error):
        raise error
    _untrue[0] += 1


class _Goes(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        (goes_on,) = ast.parse("try: pass\nexcept AssertionError as _error: _note(_error)").body
        goes_on.body = [node]
        return ast.fix_missing_locations(ast.copy_location(goes_on, node))


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        return compile(_Goes().visit(ast.parse(self.get_data(self.path))), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: Any) -> None:
        module._note = _note
        super().exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Tests, and what they share: what does not hold there ends no test."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec and spec.origin and spec.origin.endswith(".py") and _of_tests(Path(spec.origin)):
            spec.loader = _Loader(fullname, spec.origin)
            return spec
        return None


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput") and "TRITON_CACHE_DIR" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="rehearsal-")  # an empty one: a new machine compiles all
        os.environ["TRITON_CACHE_DIR"] = cache.name
        config.add_cleanup(cache.cleanup)
        config.add_cleanup(lambda: os.environ.pop("TRITON_CACHE_DIR"))
    install()
    sys.meta_path.insert(0, _Finder())
    closely = torch.testing.assert_close

    @functools.wraps(closely)
    def assert_close(*args: Any, **kwargs: Any) -> None:
        try:
            closely(*args, **kwargs)
        except AssertionError:
            _untrue[0] += 1

    torch.testing.assert_close = assert_close


_before = [0, 0.0]


def pytest_runtest_setup(item: Any) -> None:
    _untrue[0] = 0


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    report = (yield).get_result()
    if call.when == "teardown":
        now = [sum(compiles.values()), sum(cpu_seconds.values())]
        report.compiled = [after - before for after, before in zip(now, _before, strict=True)]
        _before[:] = now
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, TooLarge):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"too large to rehearse: {error}")
        return
    untrue = isinstance(error, AssertionError) and _of_values(error)
    if untrue or (call.when == "call" and report.passed and _untrue[0]):
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
        sys.exit("python -m benchmarks.rehearsal MODULE [ARGUMENT ...]")
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # As the module that others import: one set of counts, one Pretended.
    from benchmarks import rehearsal

    rehearsal.main()

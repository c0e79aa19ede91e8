"""CUDA kernels and their bindings as a module that runs on the CPU, thread by thread as they are written: the sources
of csrc/ compiled with cuda_on_cpu.h in place of CUDA's headers, each launch made a call."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
LAUNCH = re.compile(r"(\w+(?:<[\w, ]+>)?)<<<(.+?)>>>\((.*?)\);", re.S)


def emulate(
    folder: Path,
    kernels: list[str],
    headers: list[str],
    bind: str,
    more: str = "",
    edit=lambda text: text,
    called: str = "emulated",
):
    """kernels, headers: of csrc/, without .cu and .cuh; bind: the folder of the binding; more: statements
    in the module's making, which may name what cublas_on_cpu.h has; edit: what is done to the sources' text; called:
    how the module's name begins."""
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    (folder / "build_info.h").write_text("#define LIFT_FAST_CUDA 1\n")
    for name in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).write_text(f'#include "{ROOT / "tests" / "support" / "cuda_on_cpu.h"}"\n')
    for name in [*(f"{kernel}.cu" for kernel in kernels), *(f"{header}.cuh" for header in headers)]:
        text = LAUNCH.sub(r"emulated::launch(\2, [&] { \1(\3); });", next(CSRC.rglob(name)).read_text())
        (folder / re.sub(r"\.cu$", ".cpp", name)).write_text(edit(text))
    binding = (CSRC / bind / "bind_cuda.cpp").read_text()
    (folder / "bind_cuda.cpp").write_text(binding)
    (bound,) = re.findall(r"void (bind_\w+)\(py::module_", binding)
    module_name = f"{called}_{bound}"  # pybind11 knows modules by name: two of one name would be one
    included = "pybind11/pybind11.h", ROOT / "tests" / "support" / "cublas_on_cpu.h"
    includes_of_module = "\n".join(f'#include "{path}"' for path in included)
    (folder / "module.cpp").write_text(
        f"{includes_of_module}\nvoid {bound}(pybind11::module_&);\n"
        f"PYBIND11_MODULE({module_name}, module) {{ {bound}(module); {more} }}\n"
    )
    library = folder / f"{module_name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [folder, CSRC, CSRC / bind, sysconfig.get_path("include"), pybind11.get_include()]
    done = subprocess.run(
        [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-DLIFT_FAST_CUDA=1"]
        + [f"-I{path}" for path in includes]
        + [str(folder / f"{name}.cpp") for name in [*kernels, "bind_cuda", "module"]]
        + ["-o", str(library)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    spec = importlib.util.spec_from_file_location(module_name, library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

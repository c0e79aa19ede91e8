"""Compiles CUDA kernels and their bindings into a module that runs on the CPU, thread by thread.

The sources of csrc/ are compiled with cuda_on_cpu.h in place of CUDA's headers, and each launch is replaced by a call.
"""

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
    more: str = "",
    edit=lambda text: text,
    called: str = "emulated",
):
    """Compiles kernels and the bindings of their families in `folder`, and returns the module.

    kernels, headers: names of the files in csrc/ that launch kernels, without .cu and .cuh. more: C++ statements for
    the module's initialisation, which may use cublas_on_cpu.h. edit: applied to each source's text. called: first part
    of the module's name.
    """
    pybind11 = pytest.importorskip("pybind11")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is available")
    (folder / "build_info.h").write_text("#define LIFT_FAST_CUDA 1\n")
    for name in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"):
        (folder / name).write_text(f'#include "{ROOT / "tests" / "support" / "cuda_on_cpu.h"}"\n')
    sources = [next(CSRC.rglob(name)) for name in [*(f"{k}.cu" for k in kernels), *(f"{h}.cuh" for h in headers)]]
    for source in sources:
        text = LAUNCH.sub(r"emulated::launch(\2, [&] { \1(\3); });", source.read_text())
        (folder / re.sub(r"\.cu$", ".cpp", source.name)).write_text(edit(text))
    families = sorted({source.parent.name for source in sources})
    bindings = [CSRC / family / "bind_cuda.cpp" for family in families]
    bound = [re.findall(r"void (bind_\w+)\(py::module_", binding.read_text())[0] for binding in bindings]
    module_name = "_".join([called, *families])  # distinct: pybind11 identifies modules by name
    included = "pybind11/pybind11.h", ROOT / "tests" / "support" / "cublas_on_cpu.h"
    includes_of_module = "\n".join(f'#include "{path}"' for path in included)
    declared = "\n".join(f"void {name}(pybind11::module_&);" for name in bound)
    calls = " ".join(f"{name}(module);" for name in bound)
    (folder / "module.cpp").write_text(
        f"{includes_of_module}\n{declared}\nPYBIND11_MODULE({module_name}, module) {{ {calls} {more} }}\n"
    )
    library = folder / f"{module_name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    own = [CSRC / family for family in families]
    includes = [folder, CSRC, *own, sysconfig.get_path("include"), pybind11.get_include()]
    done = subprocess.run(
        [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-DLIFT_FAST_CUDA=1"]
        + [f"-I{path}" for path in includes]
        + [str(folder / f"{name}.cpp") for name in [*kernels, "module"]]
        + [str(binding) for binding in bindings]
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

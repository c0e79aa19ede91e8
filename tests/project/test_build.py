"""The build as users run it: with and without a CUDA toolkit, as a wheel, as an editable install, and by make."""

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lift_fast

ROOT = Path(__file__).parents[2]
WHERE = """
import json, lift_fast, lift_fast.kernels, lift_fast._C as c
print(json.dumps([lift_fast.__file__, lift_fast.kernels.__file__, c.__file__, c.build_info()]))
"""
# Replaces csrc/ in tests of the build: a binding that returns what setup.py wrote to build_info.h, and two kernels.
SMALL = {
    "bindings.cpp": """
#include <pybind11/pybind11.h>
#include "build_info.h"
void launch();
PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    pybind11::dict info;
    info["cuda"] = static_cast<bool>(LIFT_FAST_CUDA);
    info["archs"] = LIFT_FAST_CUDA_ARCHS;
    info["reason"] = LIFT_FAST_CUDA_REASON;
    return info;
  });
#if LIFT_FAST_CUDA
  module.def("launch", &launch);
#endif
}
""",
    "one.cu": "__global__ void one(float* x) { *x = 1; }\nvoid launch() { one<<<1, 1>>>(nullptr); }\n",
    "two.cu": "__global__ void two(float* x) { *x = 2; }\nvoid launch_two() { two<<<1, 1>>>(nullptr); }\n",
}


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that a build reads, so that the tree under test stays unchanged."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "LICENSE-CLIP"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in ("csrc", "kernels", "lift_fast", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture
def small_tree(tree):
    """`tree` with SMALL as its csrc/, which compiles in seconds."""
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    for name, text in SMALL.items():
        (tree / "csrc" / name).write_text(text)
    return tree


def build(tree, hook, before="", **env):
    """Calls a PEP 517 hook as pip does, with tree/out as its output, and returns the finished process.

    before: Python code that runs before the hook.
    """
    code = f"{before}\nimport setuptools.build_meta as b, os; os.makedirs('out', exist_ok=True); b.{hook}('out')"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LIFT_FAST", "CUDA_"))}
    return subprocess.run([sys.executable, "-c", code], cwd=tree, env={**clean, **env}, capture_output=True, text=True)


def unpacked(tree):
    (wheel,) = (tree / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree / "site")
    return tree / "site"


def imported(site, cwd):
    """[lift_fast, lift_fast.kernels, lift_fast._C, build_info] as a fresh interpreter sees them."""
    import json

    code = f"import site; site.addsitedir({str(site)!r}){WHERE}"
    # -S: without the site-packages of this environment, where lift_fast is installed already.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def said(process):
    """The lines that the build printed about CUDA."""
    return [line for line in process.stderr.splitlines() if line.startswith("lift-fast:")]


def toolkit(folder, script):
    """A CUDA_HOME whose nvcc is a shell script."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return str(folder)


def test_a_wheel_without_cuda(tree, tmp_path):
    compiler = tmp_path / "compiler"  # the code is compiled, but not optimized: the engine that is tested elsewhere is
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    process = build(tree, "build_wheel", LIFT_FAST_CUDA="0", CC=str(compiler), CXX=str(compiler))
    assert process.returncode == 0, process.stderr[-2000:]
    assert said(process) == [
        "lift-fast: lift_fast._C is built without CUDA, for the CPU only (LIFT_FAST_CUDA=0 asked for none)"
    ]
    site = unpacked(tree)
    assert {"page.html.j2", "style.css"} <= {file.name for file in (site / "lift_fast/measure/report").iterdir()}
    assert (site / "lift_fast/text/clip_merges.txt.gz").is_file()
    names = {file.name for file in (site / "lift_fast/eval/imagenet").iterdir()}
    assert names == {"authors-templates.txt", "authors.txt", "classes.txt", "templates.txt"}
    [about] = site.glob("lift_fast-*.dist-info")
    assert {file.name for file in (about / "licenses").iterdir()} == {"LICENSE", "LICENSE-CLIP"}
    # No top-level kernels, tests or benchmarks.
    assert {path.name for path in site.iterdir()} == {"lift_fast", f"lift_fast-{lift_fast.__version__}.dist-info"}
    *files, info = imported(site, tmp_path)
    assert all(Path(file).is_relative_to(site) for file in files)
    assert info == {"cuda": False, "archs": "", "reason": "LIFT_FAST_CUDA=0 asked for none"}


def test_an_editable_install_when_the_toolkit_is_broken(small_tree, tmp_path):
    home = toolkit(tmp_path / "cuda", "echo 'nvcc fatal   : no licence today'; exit 1")
    process = build(small_tree, "build_editable", CUDA_HOME=home)
    assert process.returncode == 0, process.stderr[-2000:]
    reason = "nvcc failed: nvcc fatal   : no licence today"
    assert said(process) == [f"lift-fast: lift_fast._C is built without CUDA, for the CPU only ({reason})"]
    site = unpacked(small_tree)
    for cwd in (tmp_path, small_tree):  # from anywhere, and from the root of the tree
        package, kernels, extension, info = imported(site, cwd)
        assert Path(package).samefile(small_tree / "lift_fast" / "__init__.py")
        assert Path(kernels).samefile(small_tree / "kernels" / "__init__.py")
        assert Path(extension).parent.samefile(small_tree / "lift_fast")
        assert info["cuda"] is False and info["reason"] == reason


@pytest.mark.parametrize("case", ["no toolkit", "broken", "bad archs"])
def test_cuda_that_was_demanded_and_cannot_be_is_one_clear_line(tree, tmp_path, case):
    home = str(tmp_path / "cuda")
    env, words = {}, f"no nvcc in {home}"
    if case == "broken":
        toolkit(tmp_path / "cuda", "echo 'x.cu(3): error: not today'; echo more; exit 2")
        words = "nvcc failed: x.cu(3): error: not today"
    if case == "bad archs":
        toolkit(tmp_path / "cuda", "exit 0")
        env, words = {"LIFT_FAST_CUDA_ARCHS": "sm_80"}, "LIFT_FAST_CUDA_ARCHS='sm_80' is not a list such as"
    process = build(tree, "build_wheel", LIFT_FAST_CUDA="1", CUDA_HOME=home, **env)
    assert process.returncode != 0
    errors = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: LIFT_FAST_CUDA=1, and the CUDA part cannot be built: {words}")
    assert "Traceback" not in process.stderr
    assert not list((tree / "out").glob("*.whl"))


def check_cuda(extension, archs, newest):
    """Checks that an extension has machine code for archs and PTX for the newest, and needs no CUDA library to load."""
    needed = subprocess.run(["ldd", extension], capture_output=True, text=True).stdout
    assert "libcudart" not in needed and "libcuda.so" not in needed
    # torch loads its libcudart with global symbols: ours must neither export nor import symbols of those names.
    symbols = subprocess.run(["nm", "-D", extension], capture_output=True, text=True).stdout
    assert not [line for line in symbols.splitlines() if line.split()[-1].startswith("cuda")]
    # Newer GPUs compile this PTX, but could not use PTX of 90a.
    nvidia = pytest.importorskip("triton.backends.nvidia")  # its wheel has a cuobjdump, which some toolkits lack
    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    for what, wanted in (("-lelf", set(archs)), ("-lptx", {newest})):
        done = subprocess.run([cuobjdump, what, extension], capture_output=True, text=True, check=True)
        assert set(re.findall(r"\.sm_(\w+)\.", done.stdout)) == wanted


def skip_without_nvcc():
    if not (shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")):
        pytest.skip("no nvcc here")


def test_cuda_builds_and_imports_without_a_driver(small_tree, tmp_path):
    skip_without_nvcc()
    process = build(small_tree, "build_wheel", LIFT_FAST_CUDA="1", LIFT_FAST_CUDA_ARCHS="80;90a")
    assert process.returncode == 0, process.stderr[-2000:]
    *_, extension, info = imported(unpacked(small_tree), tmp_path)
    assert info["cuda"] is True and info["archs"] == "80;90a"
    check_cuda(extension, ["80", "90a"], "90")


def test_the_build_that_is_installed_has_cuda_where_nvcc_is():
    """The installed extension has all of csrc/; the one built by the test above has two kernels."""
    skip_without_nvcc()
    from lift_fast import _C

    info = _C.build_info()
    assert not info["reason"].startswith("nvcc failed"), info["reason"]
    if not info["cuda"]:
        pytest.skip(info["reason"])
    archs = info["archs"].split(";")
    check_cuda(_C.__file__, archs, archs[-1].rstrip("af"))


def test_a_kernel_that_does_not_compile_is_named(small_tree):
    skip_without_nvcc()
    (small_tree / "csrc" / "two.cu").write_text("__global__ void two() { not today; }\n")
    process = build(small_tree, "build_wheel", LIFT_FAST_CUDA="1", LIFT_FAST_CUDA_ARCHS="80")
    assert process.returncode != 0 and "Traceback" not in process.stderr
    assert "cannot be built: nvcc failed: csrc/two.cu(1): error: " in process.stderr


def test_missing_python_headers_are_one_clear_line(tree):
    before = "import sysconfig; real = sysconfig.get_path\n"
    before += "sysconfig.get_path = lambda name, *a, **k: '/nowhere' if name == 'include' else real(name, *a, **k)"
    process = build(tree, "build_wheel", before, LIFT_FAST_CUDA="0")
    assert process.returncode != 0
    errors = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    package = f"python3.{sys.version_info.minor}-dev"
    words = f"error: no Python.h in /nowhere, which compiling lift_fast._C needs; it comes with {package}"
    assert len(errors) == 1 and errors[0].startswith(words)
    assert "Traceback" not in process.stderr


def make_venv(folder, pythons):
    """Runs `make .venv/bin/python` in a new folder; the Pythons on PATH are shell scripts, from name -> script."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    for name in ("python3.12", "python3.11", "python3.10", "python3.13", "python3.14", "python3"):
        python = folder / "bin" / name
        python.parent.mkdir(exist_ok=True)
        python.write_text(f"#!/bin/sh\n{pythons.get(name, 'exit 127')}\n")
        python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", folder)
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    for name in ("PYTHON", "MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL"):
        env.pop(name, None)
    return subprocess.run(["make", ".venv/bin/python"], cwd=folder, env=env, capture_output=True, text=True)


# Stand-ins for Pythons that run `-m venv .venv`. BREAKS is Debian's without python3-venv, which leaves a broken folder.
MAKES = 'case "$1" in -m) mkdir -p .venv/bin; touch .venv/bin/python; echo "$0";; esac'
BREAKS = 'case "$1" in -m) mkdir -p .venv/bin; touch .venv/bin/python; exit 1;; esac'


def test_make_takes_the_first_python_that_runs(tmp_path):
    # python3.12 exists but does not run, like pyenv's shim for a version that is not selected.
    process = make_venv(tmp_path, {"python3.11": MAKES, "python3.10": MAKES, "python3": MAKES})
    assert process.returncode == 0, process.stderr
    assert "bin/python3.11" in process.stdout


@pytest.mark.parametrize("python", ["python3.13", "python3.14", "python3"])
def test_make_takes_a_newer_python_without_ado(tmp_path, python):
    process = make_venv(tmp_path, {python: MAKES})
    assert process.returncode == 0, process.stderr
    assert f"bin/{python}" in process.stdout


def test_make_without_any_python_says_so(tmp_path):
    process = make_venv(tmp_path, {})
    assert process.returncode != 0 and "no python3 here" in process.stdout


def test_make_leaves_no_broken_venv(tmp_path):
    process = make_venv(tmp_path, {"python3": BREAKS})
    assert process.returncode != 0 and not (tmp_path / ".venv").exists()


def test_bars_have_three_forms(capsys):
    from benchmarks.harness import Suite

    suite = Suite("bars", quick=True)
    suite.bar("least", 3, 2)
    suite.bar("near", 0.1441, 0.146, tolerance=0.002)
    suite.bar("far", 0.15, 0.146, tolerance=0.002)
    suite.bar("most", 61, 60, at_most=True)
    assert [bar["ok"] for bar in suite.bars] == [True, True, False, False]
    assert all(bar.keys() >= {"name", "value", "bar", "ok"} for bar in suite.bars)
    suite.print()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "ok   near: 0.1441 (target 0.146 +- 0.002)"
    assert lines[3] == "MISS most: 61 (at most 60)"


def test_a_report_that_lacks_figures_is_bars_missed(tmp_path, monkeypatch):
    from benchmarks import bench_demo
    from benchmarks.harness import Suite

    monkeypatch.setattr(bench_demo, "REPORT", tmp_path / "report.json")
    (tmp_path / "report.json").write_text('{"lift": {"loss": [4, 1, 1, 1, 1, 1], "new": 1}}')
    suite = Suite("demo", quick=True)
    bench_demo.run(suite)
    assert len(suite.bars) == 6 and not any(bar["ok"] for bar in suite.bars)


def test_the_version_has_one_place():
    from importlib.metadata import version

    assert version("lift-fast") == lift_fast.__version__


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, lift_fast, lift_fast._C; print(sorted({'torch', 'numpy', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_nobody_takes_our_kernels_for_hugging_faces():
    code = "from transformers.utils import is_kernels_available as here; print(here())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    from importlib.metadata import packages_distributions

    assert done.stdout.strip() == str("kernels" in packages_distributions()), done.stderr

"""Builds lift_fast._C: always C++, and CUDA if a toolkit is found. torch is not needed.

LIFT_FAST_CUDA=auto|0|1        auto (default): with CUDA if nvcc is found and works, else without. 0: without CUDA.
                               1: with CUDA, or the build fails.
LIFT_FAST_CUDA_ARCHS="80;90a"  default "80;90a;100" without those that the toolkit does not know. The build has machine
                               code for each, and PTX for the last one without its suffix a or f (here compute_90):
                               newer GPUs compile such PTX, but cannot use PTX of an architecture with a suffix.
CUDA_HOME                      the toolkit's folder; default: that of the nvcc on PATH, else /usr/local/cuda.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

DEFAULT_ARCHS = "80;90a;100"
CSRC = Path("csrc")
CUDA_SOURCES = [str(path) for path in sorted(CSRC.rglob("*.cu"))]
# The number of cores that this process may use; as many compilers run at once.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NoCuda(Exception):
    """Raised with the reason why this build has no CUDA, in one line."""


def find_nvcc() -> str:
    """Returns the path of nvcc. Raises NoCuda if there is no toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
        where = f"in {home}"
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        where = "on PATH or in /usr/local/cuda"
    if not nvcc:
        raise NoCuda(f"no nvcc {where}")
    return nvcc


def run(command: list[str]) -> str:
    """Returns the output of a command. Raises NoCuda with its first error line if it fails."""
    pipe = subprocess.PIPE
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"error|fatal|unsupported", line, re.I)]
        raise NoCuda(f"nvcc failed: {(errors or lines or [f'exit status {done.returncode}'])[0][:200]}")
    return done.stdout


def archs_for(nvcc: str) -> list[str]:
    """The architectures to compile for. Raises NoCuda if they are not valid, or if nvcc knows none of the default."""
    requested = os.environ.get("LIFT_FAST_CUDA_ARCHS")
    archs = [arch for arch in re.split(r"[;,\s]+", requested or DEFAULT_ARCHS) if arch]
    if requested:
        wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
        if wrong or not archs:
            raise NoCuda(f"LIFT_FAST_CUDA_ARCHS={requested!r} is not a list such as {DEFAULT_ARCHS!r}")
        return archs
    known = run([nvcc, "--list-gpu-code"]).split()
    archs = [arch for arch in archs if f"sm_{arch.rstrip('af')}" in known]
    if not archs:
        raise NoCuda(f"{nvcc} compiles for none of {DEFAULT_ARCHS}; set LIFT_FAST_CUDA_ARCHS")
    return archs


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags for machine code for each architecture and PTX for the last."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = archs[-1].rstrip("af")
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def check_python_headers() -> None:
    """Raises CompileError if Python's headers are missing: one line instead of a page of compiler errors."""
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        raise CompileError(
            f"no Python.h in {folder}, which compiling lift_fast._C needs; it comes with {python}-dev (Debian, Ubuntu)"
            " or python3-devel (Fedora)"
        )


def static_runtime(nvcc: str) -> str:
    """The folder of libcudart_static.a in the toolkit whose path nvcc prints. Raises NoCuda if it is not there."""
    top = re.search(r"TOP=(.*)", run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]))
    root = Path(top.group(1).strip() if top else Path(nvcc).resolve().parents[1])
    for library in [root / "lib64", root / "lib", *root.glob("targets/*/lib")]:
        if (library / "libcudart_static.a").is_file():
            return str(library.resolve())
    raise NoCuda(f"no libcudart_static.a in {root.resolve()}")


class Build(build_ext):
    """One extension: C++ by the host compiler, CUDA objects by nvcc, the static CUDA runtime linked in."""

    def build_extension(self, ext):
        self.force = True  # files of an earlier build may be for other settings
        check_python_headers()
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("LIFT_FAST_CUDA", "auto")
        archs: list[str] = []
        try:
            if mode not in ("auto", "0", "1"):
                raise CompileError(f"LIFT_FAST_CUDA={mode!r} must be auto, 0 or 1")
            if mode == "0":
                raise NoCuda("LIFT_FAST_CUDA=0 asked for none")
            archs = self.add_cuda(ext, temp)
            reason = f"built by {run([find_nvcc(), '--version']).splitlines()[-1]}"
        except NoCuda as error:
            reason = str(error)
            if mode == "1":
                raise CompileError(f"LIFT_FAST_CUDA=1, and the CUDA part cannot be built: {reason}") from None
        with_cuda = f"with CUDA for {';'.join(archs)}" if archs else "without CUDA, for the CPU only"
        print(f"lift-fast: lift_fast._C is built {with_cuda} ({reason})", file=sys.stderr, flush=True)
        literal = reason.replace("\\", "\\\\").replace('"', '\\"')
        (temp / "build_info.h").write_text(
            f"#define LIFT_FAST_CUDA {int(bool(archs))}\n"
            f'#define LIFT_FAST_CUDA_ARCHS "{";".join(archs)}"\n'
            f'#define LIFT_FAST_CUDA_REASON "{literal}"\n'
        )
        ext.include_dirs.append(str(temp))
        with ParallelCompile(default=CORES):
            super().build_extension(ext)

    def add_cuda(self, ext, temp: Path) -> list[str]:
        """Compiles every .cu file and adds the objects to the link; returns the architectures. Raises NoCuda."""
        nvcc = find_nvcc()
        archs = archs_for(nvcc)
        library = static_runtime(nvcc)
        flags = ["-O3", "-std=c++17", "--threads", str(CORES), "-DLIFT_FAST_CUDA=1", "-Xcompiler", "-fPIC", f"-I{CSRC}"]
        objects = [str(temp / f"{source.replace(os.sep, '-')}.o") for source in CUDA_SOURCES]
        commands = [
            [nvcc, *flags, *gencode(archs), "-c", source, "-o", target]
            for source, target in zip(CUDA_SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(run, commands))  # raises the first command's error, and starts no more commands
        ext.extra_objects += objects
        # exclude-libs: torch loads its own libcudart with global symbols, which ours must not be mixed with.
        ext.extra_link_args += [f"-L{library}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        ext.extra_link_args += ["-Wl,--exclude-libs,ALL"]
        return archs


# Not build/, because files of an earlier build there, such as a module since removed, would be installed as well.
scratch = tempfile.TemporaryDirectory(prefix="lift-fast-build-")

setup(
    options={"build": {"build_base": scratch.name}},
    packages=[*find_packages(include=["lift_fast", "lift_fast.*"]), "lift_fast.kernels"],
    # kernels/ is a top-level folder of the tree but is installed as a sub-package: an installed package `kernels` would
    # be mistaken for Hugging Face's.
    package_dir={"lift_fast.kernels": "kernels"},
    package_data={
        "lift_fast": ["py.typed", "*.pyi"],
        "lift_fast.eval": ["imagenet/*.txt"],
        "lift_fast.gallery": ["page/*"],
        "lift_fast.measure.report": ["*.j2", "*.css"],
        "lift_fast.ops.tuned": ["*.json"],
        "lift_fast.text": ["*.gz"],
    },
    ext_modules=[
        Pybind11Extension(
            "lift_fast._C",
            [str(path) for path in sorted(CSRC.rglob("*.cpp"))],
            include_dirs=[str(CSRC)],
            depends=[str(path) for path in sorted(CSRC.rglob("*.*"))],
            extra_compile_args=["-O3", "-g0", "-pthread"],
            extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": Build},
)

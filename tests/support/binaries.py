"""Reads the machine code of the CUDA kernels in the installed extension."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lift_fast import _C


class CompiledKernel(NamedTuple):
    """A kernel compiled for one architecture. signature: the rest of its mangled name. Memory is in bytes."""

    arch: str
    source: str
    name: str
    signature: str
    registers: int
    stack: int
    shared: int
    local: int

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local)


def architectures() -> list[str]:
    """The architectures that the extension was compiled for, without "sm_". Skips the test if it has no CUDA."""
    if not _C.build_info()["cuda"]:
        pytest.skip(_C.build_info()["reason"])
    return _C.build_info()["archs"].split(";")


def compiled_kernels(pattern: str) -> Iterator[CompiledKernel]:
    """Yields the kernels whose mangled names match.

    pattern: a regular expression of the name before the colon, with the groups source, name and signature.
    """
    nvidia = pytest.importorskip("triton.backends.nvidia")  # its wheel has a cuobjdump
    cuobjdump = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run([cuobjdump, "-res-usage", _C.__file__], capture_output=True, text=True, check=True)
    for code in done.stdout.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = sm_(\w+)", code)[1]
        usage = r":\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
        for source, name, signature, *numbers in re.findall(pattern + usage, code):
            yield CompiledKernel(arch, source, name, signature, *map(int, numbers))

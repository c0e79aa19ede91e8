"""Records which kernels a call launches, with the registers, spills and shared memory of each."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .start import rehearsing


@contextmanager
def launches() -> Iterator[dict[str, dict[str, int]]]:
    """Yields a dict that fills with each launch inside: name -> {"registers", "spills", "shared" (bytes)}.

    A name is "module.kernel" for Triton, and "_C.function" for CUDA, whose figures are not known. A rehearsal knows
    only "shared".
    """
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield {}
        return
    found: dict[str, dict[str, int]] = {}
    run = JITFunction.run

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options)
        shared = getattr(getattr(kernel, "metadata", None), "shared", None)
        figures = {"registers": getattr(kernel, "n_regs", None), "spills": getattr(kernel, "n_spills", None)}
        figures = {"shared": shared} if rehearsing() else {**figures, "shared": shared}
        figures = {name: value for name, value in figures.items() if value is not None}
        found[f"{self.fn.__module__.rsplit('.')[-1]}.{self.fn.__name__}"] = figures
        return kernel

    JITFunction.run = recorded
    originals = _record_extension(found)
    try:
        yield found
    finally:
        JITFunction.run = run
        for module, name, function in originals:
            setattr(module, name, function)


def _record_extension(found: dict[str, dict[str, int]]) -> list[tuple[Any, str, Any]]:
    """Makes the functions of _C that launch add their names to `found`; returns what to restore afterwards."""
    try:
        from lift_fast import _C
    except ImportError:
        return []
    originals = []
    for name in [name for name in dir(_C) if name.endswith("_cuda")]:
        function = getattr(_C, name)

        def recorded(*args: Any, name: str = name, function: Any = function, **options: Any) -> Any:
            found[f"_C.{name}"] = {}
            return function(*args, **options)

        setattr(_C, name, recorded)
        originals.append((_C, name, function))
    return originals


def registers(found: Mapping[str, Mapping[str, int]]) -> int | None:
    """The largest number of registers per thread among the kernels; None if it is not known."""
    return max((figures.get("registers", 0) for figures in found.values()), default=0) or None

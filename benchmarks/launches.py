"""Which kernels a call launches, and what each takes of a multiprocessor."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .start import rehearsing


@contextmanager
def launches() -> Iterator[dict[str, dict[str, int]]]:
    """What is launched inside: "module.kernel" of ours in Triton, "_C.entry" -> registers, spills, shared memory."""
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield {}
        return
    found: dict[str, dict[str, int]] = {}
    run = JITFunction.run

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options)
        shared = getattr(getattr(kernel, "metadata", None), "shared", None)
        figures = {"registers": getattr(kernel, "n_regs", None), "spills": getattr(kernel, "n_spills", None)}
        figures = {"shared": shared} if rehearsing() else {**figures, "shared": shared}
        figures = {name: value for name, value in figures.items() if value is not None}
        found[f"{self.fn.__module__.rsplit('.')[-1]}.{self.fn.__name__}"] = figures
        return kernel

    JITFunction.run = noted
    entries = _entries(found)
    try:
        yield found
    finally:
        JITFunction.run = run
        for module, name, entry in entries:
            setattr(module, name, entry)


def _entries(found: dict[str, dict[str, int]]) -> list[tuple[Any, str, Any]]:
    try:
        from lift_fast import _C
    except ImportError:
        return []
    kept = []
    for name in [name for name in dir(_C) if name.endswith("_cuda")]:
        entry = getattr(_C, name)

        def noted(*args: Any, name: str = name, entry: Any = entry, **options: Any) -> Any:
            found[f"_C.{name}"] = {}
            return entry(*args, **options)

        setattr(_C, name, noted)
        kept.append((_C, name, entry))
    return kept


def registers(found: Mapping[str, Mapping[str, int]]) -> int | None:
    """The most that a thread of any has; None where that is not known."""
    return max((figures.get("registers", 0) for figures in found.values()), default=0) or None

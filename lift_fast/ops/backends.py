"""What the ops of every family share: the compiled extension, whether backends are available, and their registry.

A backend is a module of its family's package. It is imported when it is first needed, so that a missing library or
extension is an error only if that backend is requested by name.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from ..errors import BackendError
from . import tuned

try:
    from .. import _C
except ImportError:  # a source tree whose extension has not been compiled
    _C = None  # type: ignore[assignment]

B = TypeVar("B")  # the Protocol that a family's backend modules follow; it has why_not() -> str | None
NOT_BUILT = "lift_fast._C is not built; run `pip install -e .` in the source tree"
# The numbers of element types: `Element` in csrc/common/element.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
HALF = (torch.bfloat16, torch.float16)  # what tensor cores multiply in 16 bits
LEAST_CAPABILITY = (8, 0)  # of a GPU, for the Triton kernels


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0, a null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def launch_on(tensor: Tensor) -> dict[str, Any]:
    """A tensor's GPU and torch's current stream there, as keyword arguments of _C's CUDA functions."""
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}


def spares_dynamo(op: Any) -> Any:
    """A decorator of torch.library.custom_op: until something is compiled, calls do not import torch._dynamo, which
    takes a second.

    custom_op imports it in the first call, to keep the op's Python code from being compiled, and remembers what it made
    as the attribute __dynamo_disable of the function. With another torch this may have no effect.
    """
    for kernel in getattr(op, "_backend_fns", {}).values():
        if (run := getattr(kernel, "__wrapped__", None)) is not None:
            run.__dynamo_disable = _disabled_later(run)
    return op


def _disabled_later(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
        if disable is None:
            return run(*args, **kwargs)
        run.__dynamo_disable = disable(run, wrapping=False)  # type: ignore[attr-defined]
        return run.__dynamo_disable(*args, **kwargs)  # type: ignore[attr-defined]

    return call


def why_no_cpp() -> str | None:
    """Why the C++ backends are not available; None if they are."""
    return None if _C else NOT_BUILT


def why_no_cuda() -> str | None:
    """Why the CUDA backends are not available; None if they are."""
    if _C is None or not _C.build_info()["cuda"]:
        why = _C.build_info()["reason"] if _C else "lift_fast._C is not built"
        return f"{why}; install again with LIFT_FAST_CUDA=1 and a CUDA toolkit"
    if not _C.cuda_device_count():
        return "its CUDA runtime finds no GPU, or the driver is older than the runtime"
    archs = _C.build_info()["archs"]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not serves(archs.split(";"), (major, minor)):
            found = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
            wanted = f'LIFT_FAST_CUDA=1 LIFT_FAST_CUDA_ARCHS="{major}{minor}"'
            return f"{found}, and lift_fast._C is compiled for {archs}; install again with {wanted}"
    return None


def serves(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether an extension compiled for archs, as setup.py does it, has code for a GPU of this (major, minor).

    Machine code runs on its own major version from its minor version on; that of "90a" on 9.0 only. PTX is included
    for the last architecture, without its a or f, and runs on every later GPU.
    """
    for arch in archs:
        least = divmod(int(arch.rstrip("af")), 10)
        if capability == least or (not arch.endswith("a") and capability[0] == least[0] and capability > least):
            return True
    return capability >= divmod(int(archs[-1].rstrip("af")), 10)


def why_no_triton() -> str | None:
    """Why the Triton backends are not available, on a GPU or in Triton's interpreter; None if they are."""
    try:
        import triton
    except ImportError:
        return "triton is not installed; a CUDA build of torch installs it, or `pip install triton`"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "this machine has no CUDA GPU, and TRITON_INTERPRET=1 is not set"
    found = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if found < LEAST_CAPABILITY:
        least, capability = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, found))
        return f"its kernels need compute capability {least}, and this machine has a GPU of {capability}"
    return None


class Backends(Generic[B]):
    """The backends of one family of ops.

    family: the package of this one in which backend NAME is the module NAME; "torch" is the module eager. by_device:
    device type -> names; other devices have "torch" only. The order in which they are tried is in the tables of
    `tuned`.
    """

    def __init__(self, family: str, by_device: dict[str, tuple[str, ...]]):
        self.family, self.by_device = family, by_device
        self.loaded: dict[str, B | str] = {}

    def load(self, name: str) -> B | str:
        """The backend's module, or why it is not available."""
        if name not in self.loaded:
            try:
                module = importlib.import_module(f".{self.family}.{'eager' if name == 'torch' else name}", __package__)
                self.loaded[name] = module.why_not() or cast(B, module)
            except ImportError as error:
                self.loaded[name] = str(error)
        return self.loaded[name]

    def offered(self, device: str) -> tuple[str, ...]:
        """The names for this device type, available or not; with TRITON_INTERPRET=1 the CPU has Triton's too."""
        names = self.by_device.get(device, ("torch",))
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
            names += tuple(name for name in self.by_device.get("cuda", ()) if name.startswith("triton"))
        return names

    def here(self, device: str = "cpu") -> list[str]:
        """The names of the backends for this device type that are available."""
        return [name for name in self.offered(device) if not isinstance(self.load(name), str)]

    def order(self, device: str, family: str, **facts: int | str | bool) -> list[str]:
        """The names for this device type in the order of a family's table; names that it does not list come last."""
        offered = self.offered(device)
        if device not in self.by_device:
            return list(offered)
        listed: list[str] = []
        for when, names in _orders(device, family):
            if all([tuned.holds(facts[name], rule) for name, rule in when]):
                listed = names
                break
        return [name for name in listed if name in offered] + [name for name in offered if name not in listed]

    def choose(
        self,
        op: str,
        device: str,
        dtype: torch.dtype | None,
        backend: str | None,
        names: Sequence[str],
        order: Callable[[], Sequence[str]] | None = None,
        refuses: Callable[[B], str | None] | None = None,
    ) -> tuple[str, B]:
        """(name, module) of the requested backend, else of the first in order that is available and takes the call.

        op, device, dtype: for messages. names: the backends that may be requested. order: returns them in the order in
        which they are tried if none is requested; None: as they are. refuses: why a module does not take the call, None
        if it does. Raises BackendError.
        """
        if backend and backend not in names:
            call = _named(device, dtype)
            raise BackendError(f"no {op} backend {backend!r} for {call}; there are: {', '.join(names)}")
        for name in [backend] if backend else order() if order else names:
            found = self.load(name)
            if isinstance(found, str):
                reason: str | None = found
            else:
                reason = refuses(found) if refuses else None
                if reason is None:
                    return name, found
        raise BackendError(f"the {op} backend {name!r} is not available for {_named(device, dtype)}: {reason}")


def _named(device: str, dtype: torch.dtype | None) -> str:
    return device if dtype is None else f"{str(dtype).removeprefix('torch.')} on {device}"


def _orders(device: str, family: str) -> list[tuned.Rule]:
    """The rules of this device type's table for the order of backends: (when, names)."""
    # A fake tensor may be on "cuda" on a machine without a GPU.
    present = torch.device(device if torch.cuda.is_available() else "cpu")
    return tuned.rules(family, "cpu" if device == "cpu" else tuned.gpu(family, present), "backend")


# torch.compile, to which facts may be symbolic, would trace into file reads. This is what
# torch.compiler.assume_constant_result sets; calling that imports torch._dynamo, which takes a second.
_orders._dynamo_marked_constant = True  # type: ignore[attr-defined]

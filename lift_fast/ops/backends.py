"""What the ops of every family share: the compiled extension, which backends work here and why not, and their registry.

A backend is a module of its family's package, loaded when it is first asked for, on whichever machine has it.
"""

import importlib
import os
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from . import tuned

try:
    from .. import _C
except ImportError:  # a source tree that nobody built
    _C = None  # type: ignore[assignment]

B = TypeVar("B")  # the Protocol that the modules follow; it has why_not() -> str | None
NOT_BUILT = "lift_fast._C is not built; run `pip install -e .` in the source tree"
# The numbers of element types in csrc/ (`Element` and `Out`).
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
LEAST_CAPABILITY = (8, 0)  # of a GPU, for the Triton kernels


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory begins; 0, a null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def launch_on(tensor: Tensor) -> dict[str, Any]:
    """The GPU that holds a tensor and torch's current stream there, as the CUDA functions of _C take them."""
    return {"device": tensor.device.index, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}


def why_no_cpp() -> str | None:
    """Why the C++ backends cannot be used here; None if they can."""
    return None if _C else NOT_BUILT


def why_no_cuda() -> str | None:
    """Why the CUDA backends cannot be used here; None if they can."""
    if _C is None or not _C.build_info()["cuda"]:
        why = _C.build_info()["reason"] if _C else "lift_fast._C is not built"
        return f"{why}; install again with LIFT_FAST_CUDA=1 and a CUDA toolkit"
    if not _C.cuda_device_count():
        return "its CUDA runtime finds no GPU, or the driver is older than it"
    archs = _C.build_info()["archs"]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not serves(archs.split(";"), (major, minor)):
            here = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}"
            wanted = f'LIFT_FAST_CUDA=1 LIFT_FAST_CUDA_ARCHS="{major}{minor}"'
            return f"{here}, and lift_fast._C is compiled for {archs}; install again with {wanted}"
    return None


def serves(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether a build for archs, made as setup.py makes it, has code for a GPU of this (major, minor).

    Machine code serves its own major from its minor on; of "90a" only 9.0. The PTX of the last, without its
    a or f, serves everything from there on.
    """
    for arch in archs:
        least = divmod(int(arch.rstrip("af")), 10)
        if capability == least or (not arch.endswith("a") and capability[0] == least[0] and capability > least):
            return True
    return capability >= divmod(int(archs[-1].rstrip("af")), 10)


def why_no_triton() -> str | None:
    """Why the Triton backends cannot be used here, on a GPU or in Triton's interpreter; None if they can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed; a CUDA build of torch brings it, or `pip install triton`"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA GPU here, and TRITON_INTERPRET=1 is not set"
    found = min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if found < LEAST_CAPABILITY:
        least, here = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, found))
        return f"its kernels need compute capability {least}, and there is a GPU of {here} here"
    return None


class Backends(Generic[B]):
    """The backends of one kind of op.

    family: the package of this one where backend NAME is the module NAME, "torch" the module eager. by_device: device
    type -> names; any other device has "torch". Which of them comes first is for the tables of `tuned` to say.
    """

    def __init__(self, family: str, by_device: dict[str, tuple[str, ...]]):
        self.family, self.by_device = family, by_device
        self.loaded: dict[str, B | str] = {}

    def load(self, name: str) -> B | str:
        """The backend, or why it is not here."""
        if name not in self.loaded:
            try:
                module = importlib.import_module(f".{self.family}.{'eager' if name == 'torch' else name}", __package__)
                self.loaded[name] = module.why_not() or cast(B, module)
            except ImportError as error:
                self.loaded[name] = str(error)
        return self.loaded[name]

    def offered(self, device: str) -> tuple[str, ...]:
        """The names for a device of this type, here or not; Triton's also on a CPU that interprets it."""
        names = self.by_device.get(device, ("torch",))
        return (*names, "triton") if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" else names

    def here(self, device: str = "cpu") -> list[str]:
        """The names of those that work on a device of this type here."""
        return [name for name in self.offered(device) if not isinstance(self.load(name), str)]

    def order(self, device: str, family: str, **facts: int | str | bool) -> list[str]:
        """The names for a device of this type as a family's table orders them; those that it leaves out come last."""
        offered = self.offered(device)
        if device not in self.by_device:
            return list(offered)
        listed: list[str] = []
        for when, names in _orders(device, family):
            if all([tuned.holds(facts[name], rule) for name, rule in when]):
                listed = names
                break
        return [name for name in listed if name in offered] + [name for name in offered if name not in listed]


@torch.compiler.assume_constant_result  # torch.compile, which may not know the facts yet, would look into files
def _orders(device: str, family: str) -> list[tuned.Rule]:
    """What the table of a device of this type says of backends: when, and in which order."""
    here = torch.device(device if torch.cuda.is_available() else "cpu")  # fake tensors are on GPUs that are not
    return tuned.rules(family, "cpu" if device == "cpu" else tuned.gpu(family, here), "backend")

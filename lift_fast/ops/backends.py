"""Backends by name: one module a backend, loaded when it is first asked for, on whichever machine has it."""

import importlib
import os
from typing import Generic, TypeVar, cast

import torch

from . import tuned

B = TypeVar("B")  # the Protocol that the modules follow; it has why_not() -> str | None


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

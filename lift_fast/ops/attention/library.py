"""What the backends of attention that call a library share. See attention.py for the contract.

They give the library views of the packed qkv and call its kernels' functions by keyword, below autograd. Where it
writes into tensors that it is given, the gradients go straight into d_qkv; else one copy packs them. All keep `out`.
"""

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Library:
    package: str  # its name on PyPI, or in its metadata
    modules: tuple[str, ...]  # the first that can be imported
    brought_by: str  # a command
    calls: tuple[tuple[str, str], ...]  # its functions and the keywords they are called with here

    def why_not(self) -> str | None:
        found = _find(self)
        return found if isinstance(found, str) else None

    @property
    def module(self) -> Any:
        return _find(self)


@cache
def _find(library: Library) -> Any:
    """The module, or why it does not serve."""
    reasons = []
    for name in library.modules:
        try:
            module = importlib.import_module(name)
            break
        except Exception as error:  # a library built for another torch raises what it likes
            reasons.append(f"{name}: {error}")
    else:
        return f"{library.package} cannot be imported ({'; '.join(reasons)}); {library.brought_by}"
    for function, keywords in library.calls:
        try:
            called = getattr(module, function)
            called = getattr(called, "_init_fn", called)  # what torch.library.custom_op wrapped
            inspect.signature(called).bind(**dict.fromkeys(keywords.split()))
        except (AttributeError, TypeError, ValueError) as error:
            return f"{library.package} {_version(library.package)}: {function}: {error}; {library.brought_by}"
    return module


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(no version)"


def no_gpu(least: tuple[int, int], most: int = 99) -> str | None:
    """Why this machine's GPU does not serve: compute capability `least`, major `most` at most."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "it needs a CUDA GPU"
    found = torch.cuda.get_device_capability()
    if least <= found < (most + 1, 0):
        return None
    limit = f" to {most}.x" if most < 99 else " or later"
    return f"it needs a GPU of compute capability {least[0]}.{least[1]}{limit}, not {found[0]}.{found[1]}"


def not_taken(head_dim: int, dtype: torch.dtype, most: int) -> str | None:
    """Why kernels for half precision and a head_dim up to `most` do not take these."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > most:
        return f"it takes a head_dim that is a multiple of 8 up to {most}, not {head_dim}"
    return None


def parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, or of their gradients: [batch, tokens, heads, head_dim]."""
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


def named(names: str, qkv: Tensor) -> dict[str, Tensor]:
    """The same under the names of a library's keywords."""
    return dict(zip(names.split(), parts(qkv), strict=True))


def by_head(x: Tensor) -> Tensor:
    """The same memory as [batch, heads, tokens, head_dim], and back."""
    return x.transpose(1, 2)

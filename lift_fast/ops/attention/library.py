"""What the backends of attention that call a library share. See contract.py.

They pass the library views of the packed qkv and call its kernels' functions by keyword, below autograd. Where a
library writes gradients into given tensors, these are views of d_qkv; otherwise one copy packs the gradients. All keep
`out`.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..backends import HALF
from .contract import AttentionGrad


@dataclass(frozen=True)
class Library:
    package: str  # its name on PyPI, or in its metadata
    modules: tuple[str, ...]  # the first that can be imported is used
    install: str  # how to install it, for messages
    calls: tuple[tuple[str, str], ...]  # its functions and the keywords that they are called with

    def why_not(self) -> str | None:
        """Why it cannot be used; None if it can."""
        found = _find(self)
        return found if isinstance(found, str) else None

    @property
    def module(self) -> Any:
        return _find(self)


@cache
def _find(library: Library) -> Any:
    """The module, or why it cannot be used."""
    reasons = []
    for name in library.modules:
        try:
            module = importlib.import_module(name)
            break
        except Exception as error:  # a library built for another torch may raise anything
            reasons.append(f"{name}: {error}")
    else:
        return f"{library.package} cannot be imported ({'; '.join(reasons)}); {library.install}"
    for function, keywords in library.calls:
        try:
            called = getattr(module, function)
            called = getattr(called, "_init_fn", called)  # the function that torch.library.custom_op wrapped
            inspect.signature(called).bind(**dict.fromkeys(keywords.split()))
        except (AttributeError, TypeError, ValueError) as error:
            return f"{library.package} {_version(library.package)}: {function}: {error}; {library.install}"
    return module


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(no version)"


def no_gpu(least: tuple[int, int], most: int = 99) -> str | None:
    """Why this machine's GPU is not supported: it needs compute capability `least` to `most`.x. None if it is."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "it needs a CUDA GPU"
    found = torch.cuda.get_device_capability()
    if least <= found < (most + 1, 0):
        return None
    limit = f" to {most}.x" if most < 99 else " or later"
    return f"it needs a GPU of compute capability {least[0]}.{least[1]}{limit}, not {found[0]}.{found[1]}"


def not_taken(head_dim: int, dtype: torch.dtype, most: int) -> str | None:
    """Why kernels for half precision and a head_dim up to `most` do not take these; None if they do."""
    if dtype not in HALF:
        return f"it takes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > most:
        return f"it takes a head_dim that is a multiple of 8 up to {most}, not {head_dim}"
    return None


def parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, or of their gradients: [batch, tokens, heads, head_dim]."""
    return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]


def named(names: str, qkv: Tensor) -> dict[str, Tensor]:
    """The views of `parts` as a library's keyword arguments of these names."""
    return dict(zip(names.split(), parts(qkv), strict=True))


def by_head(x: Tensor) -> Tensor:
    """A view with heads and tokens swapped: [batch, heads, tokens, head_dim] of [batch, tokens, heads, head_dim]."""
    return x.transpose(1, 2)


def flash_forward(
    kernel: Callable[..., Any], qkv: Tensor, scale: float, causal: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """out and lse by the forward function of a FlashAttention package."""
    out, lse, *_ = kernel(**named("q k v", qkv), softmax_scale=scale, causal=causal, **options)
    return out, lse


def flash_backward(kernel: Callable[..., Any], call: AttentionGrad, **options: Any) -> tuple[Tensor, Tensor | None]:
    """d_qkv by the backward function of a FlashAttention package, which writes into views of it; and out if wanted."""
    d_qkv = torch.empty_like(call.qkv)
    kernel(
        dout=call.d_out,
        **named("q k v", call.qkv),
        out=call.out,
        **named("dq dk dv", d_qkv),
        softmax_scale=call.scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **options,
    )
    return d_qkv, call.out if call.want_out else None

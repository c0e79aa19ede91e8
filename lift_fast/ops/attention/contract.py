"""What a backend of attention is given and does, and the registry of these backends."""

from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends import Backends


class AttentionGrad(NamedTuple):
    """The arguments of a backward. d_out, out: [batch, tokens, heads, head_dim]; qkv and lse as `forward` has them.

    out is None for backends whose KEEPS_OUT is False. want_out: whether the caller needs out too.
    """

    d_out: Tensor
    qkv: Tensor
    out: Tensor | None
    lse: Tensor
    scale: float
    causal: bool
    want_out: bool


class Backend(Protocol):
    """What a backend's module must have. qkv and d_out are contiguous; the host never waits for a GPU."""

    KEEPS_OUT: bool  # whether its backward needs `out`

    def why_not(self) -> str | None:
        """Why it is not available; None if it is."""

    def refuses(self, tokens: int, head_dim: int, dtype: torch.dtype) -> str | None:
        """Why it does not take these sizes or this dtype; None if it does."""

    def forward(self, qkv: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """out [batch, tokens, heads, head_dim], contiguous, and lse float32 [batch, heads, tokens] = log Σ exp(S).

        qkv: [batch, tokens, 3, heads, head_dim]. For float64 lse is float64.
        """

    def backward(self, call: AttentionGrad) -> tuple[Tensor, Tensor | None]:
        """d_qkv, of qkv's shape, and out if it is wanted: computed again, or the one that was kept."""


BACKENDS: Backends[Backend] = Backends(
    "attention",
    {
        "cpu": ("cpp", "flash_cpu", "torch"),
        "cuda": ("triton", "flash_attn_3", "cudnn", "flash", "flash_attn_2", "flash_attn_4", "xformers", "torch"),
    },
)
load, backends_here = BACKENDS.load, BACKENDS.here


def preferred(device: str, tokens: int, head_dim: int, dtype: torch.dtype) -> list[str]:
    """The names of the backends for these sizes and this dtype, in the order of the table."""
    name = str(dtype).removeprefix("torch.")
    return BACKENDS.order(device, "attention", tokens=tokens, head_dim=head_dim, dtype=name)


def choose(
    device: str, tokens: int, head_dim: int, dtype: torch.dtype, backend: str | None = None
) -> tuple[str, Backend]:
    """The requested backend, else the table's first that is available and takes this. Raises BackendError."""
    order = partial(preferred, device, tokens, head_dim, dtype)
    refuses = lambda module: module.refuses(tokens, head_dim, dtype)  # noqa: E731
    return BACKENDS.choose("attention", device, dtype, backend, BACKENDS.offered(device), order, refuses)


def keeps_out(backend: str) -> bool:
    """Whether the backward of an available backend needs the forward's output."""
    found = load(backend)
    return not isinstance(found, str) and found.KEEPS_OUT

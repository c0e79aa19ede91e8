"""What the parts of a transformer block share: what a backend does between the matrix products, and the registry.

    layernorm    s = x + residual,  y = (s − mean) · rstd · weight + bias          ops/transformer/layernorm.py
    bias_act     a = act(h + bias)                                                 ops/transformer/mlp.py

Every row is a token: tensors of tokens are [rows, width], contiguous, in float32, bfloat16 or float16; weights, biases
and statistics are float32. Everything is computed in float32. Only "torch" takes float64, for all tensors alike. The
backends of attention follow another contract: ops/attention/contract.py.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backends import Backends, address

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "quick_gelu")


class LayerNorm(NamedTuple):
    """s = x + residual rounded to x's dtype, and y, mean and rstd of that s. Without residual s is x, stream None.

    x, residual, y, stream (s): [rows, width], of one dtype; weight, bias: [width]; mean, rstd: [rows]. The variance is
    that of the deviations from the mean (no E[x²] − mean²).
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    eps: float
    y: Tensor
    stream: Tensor | None
    mean: Tensor
    rstd: Tensor


class LayerNormGrad(NamedTuple):
    """dx = d_stream + the gradient of s through y; y, unless None, is computed again.

    dy, stream (s), d_stream, dx, y: [rows, width]; dx may be dy itself, or d_stream. d_weight = Σ_rows dy · x̂ and
    d_bias = Σ_rows dy, both [width], come from the same pass over stream and dy.
    """

    dy: Tensor
    stream: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor
    d_stream: Tensor | None
    dx: Tensor
    y: Tensor | None


class BiasAct(NamedTuple):
    """a = act(h + bias). h, a: [rows, width]; bias: [width]; a may be h itself."""

    h: Tensor
    bias: Tensor
    activation: Activation
    a: Tensor


class BiasActGrad(NamedTuple):
    """dh = da · act'(h + bias); a, unless None, is act(h + bias) again.

    da, h, dh, a: [rows, width]; dh may be da itself, a may be h itself. d_bias = Σ_rows dh [width] sums dh before it is
    rounded.
    """

    da: Tensor
    h: Tensor
    bias: Tensor
    activation: Activation
    dh: Tensor
    a: Tensor | None


class Backend(Protocol):
    """What a backend's module must have. Each method overwrites the outputs among its call's fields.

    The host never waits for a GPU. Returned sums over rows are new tensors, with the same bits at every run.
    """

    def why_not(self) -> str | None:
        """Why it is not available; None if it is."""

    def layernorm(self, call: LayerNorm) -> None:
        """Fills y, stream, mean and rstd."""

    def layernorm_backward(self, call: LayerNormGrad) -> tuple[Tensor, Tensor]:
        """Fills dx and y; returns d_weight and d_bias."""

    def bias_act(self, call: BiasAct) -> None:
        """Fills a."""

    def bias_act_backward(self, call: BiasActGrad) -> Tensor:
        """Fills dh and a; returns d_bias."""


def tensor_addresses(call: LayerNorm | LayerNormGrad | BiasAct | BiasActGrad) -> dict[str, Any]:
    """The addresses of a call's tensors by field name, 0 for None: keyword arguments of _C's functions."""
    fields: dict[str, Any] = call._asdict()
    return {name: address(field) for name, field in fields.items() if field is None or isinstance(field, Tensor)}


# For mlp: Triton's, with the activation in the epilogue of the matrix products instead of in a pass of its own.
FUSED_GEMM = "triton_gemm"
BACKENDS: Backends[Backend] = Backends(
    "transformer", {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch", FUSED_GEMM)}
)
load, backends_here = BACKENDS.load, BACKENDS.here


def preferred(device: str, dtype: torch.dtype) -> list[str]:
    """The names of the backends for tokens of this dtype, in the order of the table."""
    if dtype == torch.float64:
        return ["torch"]
    return BACKENDS.order(device, "transformer", dtype=str(dtype).removeprefix("torch."))


def choose(device: str, dtype: torch.dtype, backend: str | None = None) -> Backend:
    """The requested backend, else the table's first available one, for tokens of this dtype. Raises BackendError."""
    names = BACKENDS.offered(device) if dtype != torch.float64 else ("torch",)
    return BACKENDS.choose("transformer", device, dtype, backend, names, partial(preferred, device, dtype))[1]

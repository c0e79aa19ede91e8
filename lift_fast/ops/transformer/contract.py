"""What the parts of a transformer block share: what a backend does between the matrix products, and which one does.

    layernorm    s = x + residual,  y = (s − mean) · rstd · weight + bias          ops/transformer/layernorm.py
    bias_act     a = act(h + bias)                                                 ops/transformer/mlp.py

Rows are tokens: every tensor is [rows, width], contiguous, in float32, bfloat16 or float16; weights, biases and
statistics are float32. In between everything is computed in float32. Only "torch" takes float64 (all of it then).
Attention has backends of its own, with another contract: ops/attention/op.py.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from ...errors import BackendError
from ..backends import Backends

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "quick_gelu")


class Backend(Protocol):
    """What a module must have. Outputs are the caller's, whatever they hold; nothing makes the host wait for a GPU."""

    def why_not(self) -> str | None:
        """Why it cannot be used here; None if it can."""

    def layernorm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        y: Tensor,
        stream: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
    ) -> None:
        """s = x + residual rounded to x's dtype, and y, mean, rstd of that s. Without residual s is x, stream None.

        x, residual, y, stream: [rows, width], of one dtype; weight, bias: [width]; mean, rstd: [rows]. The variance is
        that of the deviations from the mean (no E[x²] − mean²).
        """

    def layernorm_backward(
        self,
        dy: Tensor,
        stream: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        d_stream: Tensor | None,
        dx: Tensor,
        y: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """dx = the gradient of s by way of y, plus d_stream; y, if asked for, is written again.

        dy, stream, d_stream, dx, y: [rows, width]; dx may be dy itself, or d_stream. Returns d_weight = Σ_rows dy · x̂
        and d_bias = Σ_rows dy, [width], new, from the same pass over stream and dy; the same bits at every run.
        """

    def bias_act(self, h: Tensor, bias: Tensor, activation: Activation, a: Tensor) -> None:
        """a = act(h + bias). h, a: [rows, width]; bias [width]; a may be h itself."""

    def bias_act_backward(
        self, da: Tensor, h: Tensor, bias: Tensor, activation: Activation, dh: Tensor, a: Tensor | None
    ) -> Tensor:
        """dh = da · act'(h + bias); a, if asked for, is act(h + bias) again. Returns d_bias = Σ_rows dh [width], new.

        da, h, dh, a: [rows, width]; dh may be da itself, a may be h itself. d_bias sums dh before it is rounded.
        """


BACKENDS: Backends[Backend] = Backends("transformer", {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")})
load, backends_here = BACKENDS.load, BACKENDS.here
# For mlp: Triton's, with the activation in the epilogue of the matrix products instead of a pass of its own.
FUSED_GEMM = "triton_gemm"


def preferred(device: str, dtype: torch.dtype) -> list[str]:
    """Backends for tokens of this dtype, the table's first one first."""
    if dtype == torch.float64:
        return ["torch"]
    return BACKENDS.order(device, "transformer", dtype=str(dtype).removeprefix("torch."))


def choose(device: str, dtype: torch.dtype, backend: str | None = None) -> Backend:
    """The named backend, or the table's first that is here, for tokens of this dtype. Raises BackendError."""
    names = BACKENDS.offered(device) if dtype != torch.float64 else ("torch",)
    backend = "triton" if backend == FUSED_GEMM else backend
    if backend and backend not in names:
        kind = f"{str(dtype).removeprefix('torch.')} on {device}"
        raise BackendError(f"layernorm and mlp have no backend {backend!r} for {kind}; they have {', '.join(names)}")
    order = [backend] if backend else preferred(device, dtype)
    for name in order:
        found = load(name)
        if not isinstance(found, str):
            return found
    raise BackendError(f"the backend {backend!r} of layernorm and mlp is not here: {found}")

"""The three matrix products of a linear layer, in the dtype of its rows or in float8.

output  x Wᵀ + b        gradient of x  g W        gradient of W  gᵀ x
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import float8


def product(x: Tensor, weight: Tensor, bias: Tensor | None, fp8: bool) -> Tensor:
    """x [rows, in] · weight [out, in]ᵀ + bias [out]: [rows, out]. fp8: multiplies in float8 (see float8.py)."""
    return float8.product(x, weight, bias) if fp8 else F.linear(x, weight, bias)


def input_product(g: Tensor, weight: Tensor, fp8: bool) -> Tensor:
    """g [rows, out] · weight [out, in]: the gradient of x."""
    return float8.input_product(g, weight) if fp8 else g @ weight


def weight_product(g: Tensor, x: Tensor, fp8: bool) -> Tensor:
    """g [rows, out]ᵀ · x [rows, in]: the gradient of the weight."""
    return float8.weight_product(g, x) if fp8 else g.T @ x


def multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype in which tokens x are multiplied: autocast's if it is enabled, else their own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype

"""The three matrix products of a linear layer, in the dtype of its rows or in 8 bits.

forward  x Wᵀ + b        to its input  g W        to its weight  gᵀ x
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import float8


def product(x: Tensor, weight: Tensor, bias: Tensor | None, fp8: bool) -> Tensor:
    """x [rows, in] · weight [out, in]ᵀ + bias [out]: [rows, out]. fp8: multiply in float8 (see float8.py)."""
    return float8.product(x, weight, bias) if fp8 else F.linear(x, weight, bias)


def input_product(g: Tensor, weight: Tensor, fp8: bool) -> Tensor:
    """g [rows, out] · weight [out, in]: the gradient that x gets."""
    return float8.input_product(g, weight) if fp8 else g @ weight


def weight_product(g: Tensor, x: Tensor, fp8: bool) -> Tensor:
    """g [rows, out]ᵀ · x [rows, in]: the gradient that the weight gets."""
    return float8.weight_product(g, x) if fp8 else g.T @ x


def multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype that tokens x are multiplied in: autocast's where it is on, else their own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype

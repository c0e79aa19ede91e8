"""Weights in files: safetensors files read whole, and weights that no model can compute with."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..files import open_regular

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes of weights that are read
LONGEST_NAME = 500  # characters
_SHOWN = 300  # characters of another library's message
_LONGEST_HEADER = 1 << 24  # bytes: of 100 000 tensors


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped from it.

    Raises OSError when it cannot be opened or is no regular file, ValueError when it is not a whole safetensors file or
    there is no memory to map it.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes, and at most {_LONGEST_HEADER} are read")
    try:
        state = load_file(path)
    except Exception as error:  # SafetensorError, torch's RuntimeError, and others for dtypes that this torch lacks
        raise ValueError(str(error).partition("\n")[0][:_SHOWN] or type(error).__name__) from error
    if any(len(name) > LONGEST_NAME for name in state):
        raise ValueError(f"a tensor's name has more than {LONGEST_NAME} characters")
    return state


def unusable(state: Mapping[str, Tensor]) -> str:
    """What of these weights is none that a model computes with, in words: the first tensor that is not of a dtype in
    FLOATS, not dense and in memory, or holds NaN or infinity. "" where all are usable."""
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device.type}"
            return f"{name} is of another kind ({kind}) than plain floating-point numbers"
        # A sum is fast, and not finite where one number is not; where it has overflowed, each number is looked at.
        if not tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
            if not tensor.isfinite().all():
                return f"{name} holds NaN or infinity"
    return ""

"""The tensors that a checkpoint holds, by name: the same names on any number of ranks, in DDP, FSDP2 or neither."""

from typing import Any

import torch
from torch import Tensor

from ..nn import Clip, Lift
from .ema import Ema


def tensors_of(model: Lift | Clip, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Any]:
    """{"model": {name: tensor}, "optimizer": {"step", "exp_avg", "exp_avg_sq": {name: tensor}}, "ema": {name: tensor}}:
    those that training uses, so that loading into them restores it. An AdamW that has made no step gets a state of
    zeros."""
    tensors: dict[str, Any] = {"model": model.state_dict(), "optimizer": _moments(model, optimizer)}
    return tensors if ema is None else tensors | {"ema": ema.state()}


def _moments(model: Lift | Clip, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    moments: dict[str, dict[str, Tensor]] = {"step": {}, "exp_avg": {}, "exp_avg_sq": {}}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) not in trained:
            continue
        state = optimizer.state[parameter]
        if not state:  # as AdamW makes it in its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for kind, tensors in moments.items():
            tensors[name] = state[kind]
    return moments

"""AdamW with the learning rate and the decay of each parameter, and the parameters that a run does not train."""

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn import Clip, Lift
from .config import TrainConfig

# The parts of a tower that come before its first block.
_EMBEDDINGS = {"patch_embed", "token_embedding", "class_embedding", "positional_embedding", "ln_pre"}


def lock(model: Lift | Clip, config: TrainConfig) -> None:
    """With config.lock "tower": freezes the image tower except its last config.unlocked_blocks blocks, and its last
    layernorm unless one of them is trained. LiT (arXiv 2111.07991) freezes all of it.

    Raises ConfigError when the tower has fewer blocks.
    """
    if config.lock == "none":
        return
    blocks = model.visual.transformer.blocks
    if config.unlocked_blocks > len(blocks):
        raise ConfigError(
            f"--unlocked-blocks {config.unlocked_blocks}: the image tower of {config.preset} has {len(blocks)} blocks"
        )
    model.visual.requires_grad_(False)
    if config.unlocked_blocks:
        for part in (*blocks[-config.unlocked_blocks :], model.visual.ln_post):
            part.requires_grad_(True)


def make_optimizer(model: Lift | Clip, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW of the parameters that require a gradient. As in open_clip, gains, biases and the logit scale are not
    decayed.

    A group has the parameters of one weight decay and one "lr_scale", its factor on the learning rate: as in BEiT
    (arXiv 2106.08254), config.layer_decay to the power of the number of layers above, in each tower. A tower of L
    blocks has L + 2 layers: the embeddings, the blocks, and all that follows, heads and projections included. The logit
    scale has a group of its own, because under FSDP2 it alone is no DTensor, and AdamW does not mix them in one call.

    With config.graph each group's learning rate is a tensor on the device, because a captured step reads it from there.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.dim() >= 2 else 0.0
            scale = config.layer_decay ** _layers_above(model, name)
            groups.setdefault((scale, decay, parameter is model.logit_scale), []).append(parameter)
    device = model.logit_scale.device
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": decay,
                "lr_scale": scale,
                "lr": torch.tensor(config.lr * scale, device=device) if config.graph else config.lr * scale,
            }
            for (scale, decay, _), parameters in groups.items()
        ],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
        capturable=config.graph,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets each group's learning rate to lr times its lr_scale, or 1 if it has none, without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group.get("lr_scale", 1.0))
        else:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def _layers_above(model: Lift | Clip, name: str) -> int:
    """The number of layers above a parameter in its tower; 0 for those that are in no tower."""
    tower, _, rest = name.partition(".")
    if tower not in ("visual", "text"):
        return 0
    blocks = len(getattr(model, tower).transformer.blocks)
    part, *inner = rest.split(".")
    if part in _EMBEDDINGS:
        return blocks + 1
    return blocks - int(inner[1]) if part == "transformer" else 0

"""An exponential moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .parallel import is_sharded


class Ema:
    """An exponential moving average of a model's trained parameters, on their devices and in their dtypes.

    average ← decay · average + (1 - decay) · parameter at every `update`. As in timm's ModelEmaV2 the average starts as
    a copy of the parameters and is not corrected for that: after t updates their share is decay**t. The logit scale is
    averaged too; a mean of clamped values is within their bounds. Lift and Clip have no buffers.

    Make it after FSDP2 has sharded the model and before the first forward: each rank then averages its shards.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages towards the parameters, without waiting for the device; call it after each step, also one
        that has changed no weights."""
        torch._foreach_lerp_(_local(self._averages), _local(self._parameters), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The averages themselves, by the names of the parameters; to go on with others, copy these into them."""
        return dict(self._averages)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the model has the averages as its weights, and `state` has the weights; no `update` is allowed.

        The values are exchanged, so that captured graphs and compiled code see them. Under FSDP2 no module may be left
        unsharded by a forward before or within it: shard with reshard_after_forward=True, also the root.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(_local(self._averages), _local(self._parameters), strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory."""
    return [t.to_local() if is_sharded(t) else t for t in tensors.values()]  # type: ignore[attr-defined]

"""The ops as modules, with the signatures people already use, and large batches in small pieces.

The functions are here too: `from lift_fast.losses import contrastive, sigmoid, cosine`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ops.pairs.contrastive import contrastive
from .ops.pairs.cosine import cosine
from .ops.pairs.sigmoid import sigmoid
from .ops.rows.quantized import QuantizedRows

__all__ = ["ClipLoss", "CosineLoss", "SigLipLoss", "cached_step", "contrastive", "cosine", "sigmoid"]

Group = dist.ProcessGroup | str | None
Batch = TypeVar("Batch")


class ClipLoss(nn.Module):
    """open_clip's ClipLoss: symmetric InfoNCE, the same values and gradients for all of its options.

    With world_size > 1 each rank passes its own rows; the group is torch.distributed's default where none is
    given. The rest is ours: normalize, budget and backend are those of `ops.contrastive.contrastive`. cache_labels
    is accepted; there are no labels to cache.

    Raises ValueError for use_horovod, and in the forward when the group does not have this rank and world size.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        normalize: bool = False,
        group: Group = None,
        budget: int | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("Horovod is not supported; start the processes with torchrun and leave use_horovod out")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size, self.group = rank, world_size, group
        self.normalize, self.budget, self.backend = normalize, budget, backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | QuantizedRows,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """image_features [rows, dim]; text_features: theirs, trained or not, as QuantizedRows, or with a group
        those of all ranks. logit_scale: the scale itself, not its log. Returns a scalar or {"contrastive_loss": it}.
        """
        loss = contrastive(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            normalize=self.normalize,
            group=_group(self.group, self.rank, self.world_size),
            local_loss=self.local_loss,
            gather_with_grad=self.gather_with_grad,
            budget=self.budget,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """open_clip's SigLipLoss: the sigmoid loss, the same values and gradients for all of its options.

    dist_impl and chunk_size say how open_clip exchanges texts and cuts logits. They change no value, and here
    `ops.policy` decides; they are checked and otherwise unused, as is cache_labels. The rest as for `ClipLoss`.

    Raises ValueError for an unknown dist_impl.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        normalize: bool = False,
        group: Group = None,
        budget: int | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        if dist_impl not in (None, "", "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"no dist_impl {dist_impl!r}; there are: bidir, shift, reduce, gather")
        self.rank, self.world_size, self.group = rank, world_size, group
        self.normalize, self.budget, self.backend = normalize, budget, backend

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | QuantizedRows,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """As for `ClipLoss`."""
        loss = sigmoid(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            normalize=self.normalize,
            group=_group(self.group, self.rank, self.world_size),
            budget=self.budget,
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class CosineLoss(nn.Module):
    """−cos of the pairs, no negatives; see `ops.cosine`. Takes and ignores a scale, so that it drops in."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | QuantizedRows,
        logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        loss = cosine(image_features, text_features)
        return {"contrastive_loss": loss} if output_dict else loss


def _group(group: Group, rank: int, world_size: int) -> Group:
    """The group that open_clip's rank and world_size speak of. Raises ValueError when it is another."""
    if world_size == 1:
        return group
    if group is None:
        if not dist.is_initialized():
            raise ValueError(f"world_size is {world_size}, and torch.distributed has no process group yet")
        group = dist.group.WORLD
    elif isinstance(group, str):
        return group
    here = dist.get_rank(group), dist.get_world_size(group)
    if here != (rank, world_size):
        raise ValueError(f"rank {rank} of {world_size} was said, and the process group has rank {here[0]} of {here[1]}")
    return group


def cached_step(
    encode: Callable[[Batch], Any],
    batches: Sequence[Batch],
    loss: Callable[..., Tensor],
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Tensor:
    """Forward and backward of one large batch in micro-batches: the gradients are those of the whole, exactly.

    A contrastive loss is no sum over samples, so gradients of micro-batches do not add up to its own. Here
    (GradCache, arXiv 2101.06983, on one tower) every micro-batch is encoded without a graph, the loss is taken
    once over all features, and every micro-batch is encoded again and given its features' gradient. That costs one
    more forward of the tower, and the memory of one micro-batch.

        loss = cached_step(
            model.encode_image,
            pixels.split(256),
            lambda image: contrastive(image, text, model.logit_scale.exp(), normalize=True),
        )
        optimizer.step()

    encode: micro-batch -> features [rows, dim], or a tuple of them and further tensors that do not depend on the
        micro-batch, such as the model's logit_scale.exp(). A DistributedDataParallel model must return what it
        wants a gradient for, and waits with its exchange for the last micro-batch.
    batches: the micro-batches, in the order of the texts; of any sizes.
    loss: (features of all, *further tensors) -> scalar. Whatever else it uses gets its gradient too: trained texts,
        a group of processes.
    backward: what is done with the loss instead of `loss.backward()`: `lambda loss: scaler.scale(loss).backward()`.

    Gradients are added to `.grad`. Under autocast call it inside the context. Random numbers (dropout) are the same
    in both passes; batch normalisation sees micro-batches, twice. Returns the loss, detached.
    Raises ValueError without a micro-batch, or when the loss does not depend on the features.
    """
    if not batches:
        raise ValueError("cached_step needs at least one micro-batch")
    states: list[list[Tensor]] = []
    features: list[Tensor] = []
    further: list[Tensor] = []
    for batch in batches:
        states.append(_random_state())
        with torch.no_grad():
            image, *others = _as_tuple(encode(batch))
        features.append(image)
        further = further or [other.detach().requires_grad_() for other in others]
    torch.clear_autocast_cache()  # its copies of the weights were made without a graph

    leaf = torch.cat(features).requires_grad_()
    sizes = [len(part) for part in features]
    del features, image
    value = loss(leaf, *further)
    backward(value)

    if leaf.grad is None:
        raise ValueError("the loss does not depend on the features it was given")
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        for i, (batch, state, d_image) in enumerate(zip(batches, states, leaf.grad.split(sizes), strict=True)):
            last = i == len(sizes) - 1
            _set_random_state(state)
            with nullcontext() if last else getattr(encode, "no_sync", nullcontext)():
                image, *others = _as_tuple(encode(batch))
                outputs, gradients = [image], [d_image]
                for output, leaf_of in zip(others, further, strict=True):
                    if last and leaf_of.grad is not None:
                        outputs.append(output)
                        gradients.append(leaf_of.grad)
                torch.autograd.backward(outputs, gradients)
    return value.detach()


def _as_tuple(encoded: Any) -> tuple[Tensor, ...]:
    return (encoded,) if isinstance(encoded, Tensor) else tuple(encoded)


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])

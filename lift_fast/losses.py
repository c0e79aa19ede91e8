"""The pair losses as modules with open_clip's signatures, and `cached_step` for large batches.

The functions can be imported from here too: `from lift_fast.losses import contrastive, sigmoid, cosine`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ops.pairs import exchange
from .ops.pairs.contrastive import contrastive
from .ops.pairs.cosine import cosine
from .ops.pairs.sigmoid import sigmoid
from .ops.rows.quantized import QuantizedRows

__all__ = ["ClipLoss", "CosineLoss", "SigLipLoss", "cached_step", "contrastive", "cosine", "sigmoid"]

if TYPE_CHECKING:  # a torch that is built without distributed has no ProcessGroup
    Group = dist.ProcessGroup | str | None
Batch = TypeVar("Batch")


class _PairLoss(nn.Module):
    """The arguments and the forward that ClipLoss and SigLipLoss share."""

    def __init__(
        self, rank: int, world_size: int, normalize: bool, group: "Group", budget: int | None, backend: str | None
    ):
        super().__init__()
        self.rank, self.world_size, self.group = rank, world_size, group
        self.normalize, self.budget, self.backend = normalize, budget, backend

    def _op(self, *arguments: Any, **options: Any) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | QuantizedRows,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """Returns the loss, a scalar of float32 or float64, or {"contrastive_loss": loss} with output_dict.

        image_features: [rows, dim]. text_features: [rows, dim], trained or fixed, or QuantizedRows; with a group
        either this rank's texts or those of all ranks, [world_size * rows, dim]. logit_scale: the scale itself, not
        its logarithm.
        """
        loss = self._op(
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


class ClipLoss(_PairLoss):
    """open_clip's ClipLoss (symmetric InfoNCE), with the same values and gradients for each of its options.

    With world_size > 1 every rank passes its own rows; group defaults to torch.distributed's default group. The
    keyword-only arguments are not open_clip's: normalize, budget and backend are those of
    `ops.pairs.contrastive.contrastive`. cache_labels is accepted and ignored: no label tensor is built.

    Raises ValueError for use_horovod, and in forward for a group whose rank and size are not rank and world_size.
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
        group: "Group" = None,
        budget: int | None = None,
        backend: str | None = None,
    ):
        super().__init__(rank, world_size, normalize, group, budget, backend)
        if use_horovod:
            raise ValueError("Horovod is not supported; start the processes with torchrun and leave use_horovod out")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad

    def _op(self, *arguments: Any, **options: Any) -> Tensor:
        return contrastive(*arguments, local_loss=self.local_loss, gather_with_grad=self.gather_with_grad, **options)


class SigLipLoss(_PairLoss):
    """open_clip's SigLipLoss (the sigmoid loss), with the same values and gradients for each of its options.

    In open_clip dist_impl and chunk_size choose how texts are exchanged and how the logits are split. Neither changes
    the loss; here `ops.pairs.policy` decides both, so dist_impl is validated and otherwise ignored, and so are
    chunk_size and cache_labels. The other arguments are those of `ClipLoss`.

    Raises ValueError for an unknown dist_impl, and in forward as `ClipLoss` does.
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
        group: "Group" = None,
        budget: int | None = None,
        backend: str | None = None,
    ):
        super().__init__(rank, world_size, normalize, group, budget, backend)
        if dist_impl not in (None, "", "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"no dist_impl {dist_impl!r}; there are: bidir, shift, reduce, gather")

    def _op(self, *arguments: Any, **options: Any) -> Tensor:
        return sigmoid(*arguments, **options)


class CosineLoss(nn.Module):
    """The mean of -cosine over the positives, without negatives; see `ops.pairs.cosine`."""

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor | QuantizedRows,
        logit_scale: Tensor | float | None = None,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Any:
        """Returns as `ClipLoss` does. logit_scale and logit_bias are ignored, so that it can replace a ClipLoss."""
        loss = cosine(image_features, text_features)
        return {"contrastive_loss": loss} if output_dict else loss


def _group(group: "Group", rank: int, world_size: int) -> "Group":
    """The process group to use for open_clip's rank and world_size. Raises ValueError when they are not the group's."""
    if world_size == 1:
        return group
    exchange.check_available()
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                f"world_size is {world_size}, and torch.distributed has no process group yet; call init_process_group"
            )
        group = dist.group.WORLD
    elif isinstance(group, str):
        return group
    found = dist.get_rank(group), dist.get_world_size(group)
    if found != (rank, world_size):
        raise ValueError(
            f"rank {rank} of {world_size} was passed, and the process group has rank {found[0]} of {found[1]}"
        )
    return group


def cached_step(
    encode: Callable[[Batch], Any],
    batches: Sequence[Batch],
    loss: Callable[..., Tensor],
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Tensor:
    """Forward and backward of one large batch in micro-batches, with exactly the gradients of the whole batch.

    A contrastive loss is not a sum over samples, so the gradients of micro-batches do not add up to the gradient of
    the batch. GradCache (arXiv 2101.06983) encodes every micro-batch without a graph, computes the loss once over all
    features, then encodes every micro-batch again and back-propagates the gradient of its features. This costs one more
    forward of the tower, and the memory of one micro-batch.

        loss = cached_step(
            model.encode_image,
            pixels.split(256),
            lambda image: contrastive(image, text, model.logit_scale.exp(), normalize=True),
        )
        optimizer.step()

    encode: micro-batch -> features [rows, dim], or a tuple of the features and further tensors that do not depend on
        the micro-batch, such as the model's logit_scale.exp(). A DistributedDataParallel model must return everything
        that needs a gradient; its gradients are reduced once, with the last micro-batch. To take trained texts through
        their tower with the images, return the features of both side by side, [rows, 2 * dim].
    batches: the micro-batches, of any sizes, in the order of the texts.
    loss: (features of all micro-batches, *further tensors) -> scalar. Other tensors that it uses, such as trained
        texts, get their gradients too; it may use a process group.
    backward: called with the loss in place of `loss.backward()`, such as `lambda loss: scaler.scale(loss).backward()`.

    Gradients are added to `.grad`. Under autocast call it inside the context. Both encodings of a micro-batch draw the
    same random numbers (dropout); batch normalisation sees every micro-batch twice. Returns the loss, detached.
    Raises ValueError when there is no micro-batch, or when the loss does not depend on the features.
    """
    if not batches:
        raise ValueError("cached_step needs at least one micro-batch")
    states: list[list[Tensor]] = []
    features: list[Tensor] = []
    further: list[Tensor] = []
    for batch in batches:
        states.append(_random_state())
        with torch.no_grad():
            image, *rest = _as_tuple(encode(batch))
        features.append(image)
        further = further or [tensor.detach().requires_grad_() for tensor in rest]
    torch.clear_autocast_cache()  # its casts of the weights were made without a graph

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
                image, *rest = _as_tuple(encode(batch))
                outputs, gradients = [image], [d_image]
                for output, detached in zip(rest, further, strict=True):
                    if last and detached.grad is not None:
                        outputs.append(output)
                        gradients.append(detached.grad)
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

"""One training step as one call: forward, loss, backward, clipping, optimizer. The host never waits for the device."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import CosineLoss, cached_step
from ..nn import Clip, Lift
from ..ops.rows.quantized import QuantizedRows
from ..ranks import Rank
from .optimizer import set_lr
from .parallel import Towers, clip_gradients, is_sharded, mean_over_ranks, mixed_updates

Text = Tensor | QuantizedRows
WARM_UP = 3  # steps before a graph is captured, in which cuBLAS, Triton and the allocator initialise


class Step:
    """step(pixels, text, lr) -> float32 [3] on the device: the loss, the gradient's norm before clipping, the scale
    exp(logit_scale) after the step. No part of it synchronises the host with the device.

    pixels: uint8 [batch, H, W, 3], or floats [batch, 3, H, W] that are normalised already. text: cached rows for Lift,
    tokens int64 [batch, context] for Clip. Both are on the model's device. lr: the learning rate of this step. kept:
    int64 [batch, n], the patches that each image keeps, or None for all. limit: a loss above it is a spike. A step
    whose loss is a spike, or whose loss or gradient is not finite, changes no weights.

    loss_of(image, text, scale) -> scalar: the loss of features [batch, dim], not normalised. towers: the model as this
    rank trains it (parallel.spread); None: its Towers. precision: dtype of autocast, or None for no autocast.
    clip_grad: largest norm of the gradient. micro_batch: number of images that go through the towers at a time, with
    the gradients of the whole batch (losses.cached_step); None: all of them.

    graphed: after WARM_UP eager steps the step is captured as a CUDA graph, which then serves every batch of the same
    shapes and dtypes; others run eagerly. The optimizer must be capturable and its lr a tensor on the device.
    """

    def __init__(
        self,
        model: Lift | Clip,
        loss_of: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        towers: nn.Module | None = None,
        rank: Rank | None = None,
        precision: torch.dtype | None = None,
        clip_grad: float = 1.0,
        micro_batch: int | None = None,
        graphed: bool = False,
    ):
        self.model, self.loss_of, self.optimizer = model, loss_of, optimizer
        self.towers, self.rank = towers or Towers(model), rank or Rank()
        self.precision, self.clip_grad = precision, clip_grad
        self.micro_batch, self.graphed = micro_batch, graphed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sharded = any(map(is_sharded, self.parameters))
        device = model.logit_scale.device
        self.limit = torch.full((), torch.inf, device=device)  # there, because a captured step reads it
        self.eager_steps = 0
        self.graph: Any = None

    def __call__(
        self, pixels: Tensor, text: Text, lr: float, kept: Tensor | None = None, limit: float = torch.inf
    ) -> Tensor:
        set_lr(self.optimizer, lr)
        self.limit.fill_(limit)
        if not self.graphed:
            return self._run(pixels, text, kept)
        if self.graph is not None and _shapes(pixels, text, kept) == self.shapes:
            for captured, new in zip(_tensors(*self.inputs), _tensors(pixels, text, kept), strict=True):
                captured.copy_(new, non_blocking=True)
            self.graph.replay()
            return self.stats.clone()
        if self.graph is not None or self.eager_steps < WARM_UP:
            return self._on_side_stream(pixels, text, kept)
        return self._capture(pixels, text, kept)

    def _run(self, pixels: Tensor, text: Text, kept: Tensor | None) -> Tensor:
        """The step itself; this is what a graph captures."""
        loss = self._backward(pixels, text, kept).float()
        if isinstance(self.loss_of, CosineLoss):  # each rank's is of its own samples
            loss = mean_over_ranks(loss, self.rank)
        norm = clip_gradients(self.parameters, self.clip_grad).float()
        # Fused optimizers change nothing where found_inf is 1, as they do for torch.amp.GradScaler.
        accepted = loss.isfinite() & norm.isfinite() & (loss <= self.limit)
        self.optimizer.found_inf = 1 - accepted.float()  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        with mixed_updates(self.sharded):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_logit_scale()
        return torch.stack([loss, norm, self.model.logit_scale.detach().exp().float()])

    def _backward(self, pixels: Tensor, text: Text, kept: Tensor | None) -> Tensor:
        """Forward and backward of the batch; the loss, detached."""
        tokens = text if isinstance(text, Tensor) else None

        def loss_of(features: Tensor, scale: Tensor) -> Tensor:
            image, other = features.chunk(2, dim=1) if isinstance(self.model, Clip) else (features, text)
            return self.loss_of(image, other, scale)

        kind = pixels.device.type
        with torch.autocast(kind, dtype=self.precision or torch.bfloat16, enabled=self.precision is not None):
            if self.micro_batch is None:
                loss = loss_of(*self.towers(pixels, kept, tokens))
            else:
                pieces = [_pieces(part, self.micro_batch, len(pixels)) for part in (pixels, kept, tokens)]
                return cached_step(_Encode(self.towers), list(zip(*pieces, strict=True)), loss_of)
        loss.backward()
        return loss.detach()

    def _on_side_stream(self, pixels: Tensor, text: Text, kept: Tensor | None) -> Tensor:
        """An eager step on a side stream: what torch requires of the steps before a capture."""
        self.eager_steps += 1
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            stats = self._run(pixels, text, kept)
        main.wait_stream(side)
        return stats

    def _capture(self, pixels: Tensor, text: Text, kept: Tensor | None) -> Tensor:
        """Captures the step on copies of its inputs, which later batches overwrite, and runs it."""
        self.shapes = _shapes(pixels, text, kept)
        copy = text.clone() if isinstance(text, Tensor) else text[torch.arange(len(text), device=pixels.device)]
        self.inputs = pixels.clone(), copy, None if kept is None else kept.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.stats = self._run(*self.inputs)
        self.graph.replay()  # capturing only records
        return self.stats.clone()


class _Encode:
    """Towers as cached_step's `encode` of (pixels, kept, tokens)."""

    def __init__(self, towers: nn.Module):
        self.towers = towers

    def __call__(self, piece: tuple[Tensor, Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
        return self.towers(*piece)

    def no_sync(self) -> AbstractContextManager:
        """DDP's: gradients are reduced with the last micro-batch. FSDP2 reduces each one's, to keep them sharded."""
        return getattr(self.towers, "no_sync", nullcontext)()


def _pieces(part: Tensor | None, size: int, rows: int) -> Sequence[Tensor | None]:
    return [None] * -(-rows // size) if part is None else part.split(size)


def _tensors(pixels: Tensor, text: Text, kept: Tensor | None) -> list[Tensor]:
    rows = [text] if isinstance(text, Tensor) else [text.codes, *([] if text.scales is None else [text.scales])]
    return [pixels, *rows, *([] if kept is None else [kept])]


def _shapes(pixels: Tensor, text: Text, kept: Tensor | None) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in _tensors(pixels, text, kept)]

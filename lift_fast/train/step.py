"""One training step as one call: forward, loss, backward, clipping, optimizer. The host never waits for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.pixels import normalise
from ..nn import Clip, Lift
from ..ops.rows.quantized import QuantizedRows

Text = Tensor | QuantizedRows
WARM_UP = 3  # steps before a graph is captured, in which cuBLAS, Triton and the allocator initialise


class Step:
    """step(pixels, text, lr) -> float32 [3] on the device: the loss, the gradient's norm before clipping, the scale
    exp(logit_scale) after the step. No part of it synchronises the host with the device.

    pixels: uint8 [batch, H, W, 3], or floats [batch, 3, H, W] that are normalised already. text: cached rows for Lift,
    tokens int64 [batch, context] for Clip. Both are on the model's device. lr: the learning rate of this step.

    loss_of(image, text, scale) -> scalar: the loss of features [batch, dim], not normalised. precision: dtype of
    autocast, or None for no autocast. clip_grad: largest norm of the gradient. compiled: the image tower goes through
    torch.compile(fullgraph=True).

    graphed: after WARM_UP eager steps the step is captured as a CUDA graph, which then serves every batch of the same
    shapes and dtypes; others run eagerly. The optimizer must be capturable and its lr a tensor on the device.
    """

    def __init__(
        self,
        model: Lift | Clip,
        loss_of: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        precision: torch.dtype | None = None,
        clip_grad: float = 1.0,
        compiled: bool = False,
        graphed: bool = False,
    ):
        self.model, self.loss_of, self.optimizer = model, loss_of, optimizer
        self.precision, self.clip_grad, self.graphed = precision, clip_grad, graphed
        self.encode: Callable[[Tensor], Tensor] = model.encode_image
        if compiled:
            self.encode = torch.compile(model.encode_image, fullgraph=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.eager_steps = 0
        self.graph: Any = None

    def __call__(self, pixels: Tensor, text: Text, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if not self.graphed:
            return self._run(pixels, text)
        if self.graph is not None and _shapes(pixels, text) == self.shapes:
            for captured, new in zip(_tensors(self.pixels, self.text), _tensors(pixels, text), strict=True):
                captured.copy_(new, non_blocking=True)
            self.graph.replay()
            return self.stats.clone()
        if self.graph is not None or self.eager_steps < WARM_UP:
            return self._on_side_stream(pixels, text)
        return self._capture(pixels, text)

    def _run(self, pixels: Tensor, text: Text) -> Tensor:
        """The step itself; this is what a graph captures."""
        kind = pixels.device.type
        with torch.autocast(kind, dtype=self.precision or torch.bfloat16, enabled=self.precision is not None):
            image = self.encode(normalise(pixels) if pixels.dtype == torch.uint8 else pixels)
            scale = self.model.logit_scale.exp()
            other = self.model.encode_text(text) if isinstance(self.model, Clip) else text  # type: ignore[arg-type]
            loss = self.loss_of(image, other, scale)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.clamp_logit_scale()
        return torch.stack([loss.detach().float(), norm.float(), self.model.logit_scale.detach().exp().float()])

    def _on_side_stream(self, pixels: Tensor, text: Text) -> Tensor:
        """An eager step on a side stream: what torch requires of the steps before a capture."""
        self.eager_steps += 1
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            stats = self._run(pixels, text)
        main.wait_stream(side)
        return stats

    def _capture(self, pixels: Tensor, text: Text) -> Tensor:
        """Captures the step on copies of its inputs, which later batches overwrite, and runs it."""
        self.shapes = _shapes(pixels, text)
        self.pixels = pixels.clone()
        self.text = text.clone() if isinstance(text, Tensor) else text[torch.arange(len(text), device=pixels.device)]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.stats = self._run(self.pixels, self.text)
        self.graph.replay()  # capturing only records
        return self.stats.clone()


def _tensors(pixels: Tensor, text: Text) -> list[Tensor]:
    if isinstance(text, Tensor):
        return [pixels, text]
    return [pixels, text.codes, *([] if text.scales is None else [text.scales])]


def _shapes(pixels: Tensor, text: Text) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in _tensors(pixels, text)]

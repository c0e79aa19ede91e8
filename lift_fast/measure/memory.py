"""Peak memory of a training step, from fake tensors: exact for torch's tensors, at any batch, in a second.

Counted: parameters, gradients, AdamW's two moments, the batch (float32 pixels; cached rows or tokens), every
activation that autograd keeps, and temporary tensors. Not counted: scratch inside one op (the loss keeps scores as
its budget allows, ops/pairs/policy.py), the allocator's rounding and fragmentation, and the CUDA context.

The fake tensors are on the CPU. On a GPU they have the same sizes: autocast makes the towers' residual stream
bfloat16 on both, and ops/block.py decides what is kept on both. Attention is the CPU backend, which like the Triton
backend does not keep its output; the backends of other libraries keep it, one width a token more.
"""

import weakref
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..nn import Clip, Lift, Preset
from ..ops.block import Checkpointing
from ..ops.pairs.contrastive import contrastive
from ..ops.rows.quantized import QuantizedRows

Kind = Literal["lift", "clip"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages while it is active: `now`, and the most at any time as `peak`.

    A storage counts once, however many views it has, from the op that returns it until it is garbage-collected.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._alive:
            return
        size = storage.nbytes()
        self._alive[id(storage)] = weakref.finalize(storage, self._drop, id(storage), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def peak_training_memory(
    kind: Kind,
    preset: Preset,
    batch_size: int,
    *,
    text_dim: int | None = None,
    checkpointing: Checkpointing = "none",
    precision: Literal["bf16", "fp32"] = "bf16",
) -> int:
    """Bytes at the peak of a step after the first: forward, symmetric InfoNCE, backward, AdamW.

    `preset` sets CLIP's caption length (`preset.with_context(n)`); LIFT's text is `batch_size` int8 rows of
    `text_dim` (the preset's where None), whatever the captions' length.
    Raises ConfigError for an unknown kind or precision, and for a batch below 1.
    """
    if kind not in ("lift", "clip"):
        raise ConfigError(f"no model {kind!r}; there are: lift, clip")
    if batch_size < 1:
        raise ConfigError(f"a batch needs at least one sample, not {batch_size}")
    if precision not in ("bf16", "fp32"):
        raise ConfigError(f"no precision {precision!r}; there are: bf16, fp32")
    live = LiveBytes()
    with FakeTensorMode(), live:
        model = Lift(preset, text_dim) if kind == "lift" else Clip(preset)
        model.set_checkpointing(checkpointing)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # one op a step, no temporaries
        # AdamW allocates its moments in its first step, which needs no forward here.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        live.peak = live.now
        _step(model, optimizer, preset, batch_size, precision)
    return live.peak


def _step(
    model: Lift | Clip, optimizer: torch.optim.Optimizer, preset: Preset, batch_size: int, precision: str
) -> None:
    pixels = torch.empty(batch_size, 3, preset.vit.image_size, preset.vit.image_size)
    text: Tensor | QuantizedRows
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        if isinstance(model, Lift):
            dim = model.head.fc_2.out_features
            codes, scales = torch.empty(batch_size, dim, dtype=torch.int8), torch.empty(batch_size)
            text = QuantizedRows(codes, scales, codec="int8", dim=dim)
            image = model.encode_image(pixels)
        else:
            tokens = torch.empty(batch_size, preset.text.context, dtype=torch.long)
            image = model.encode_image(pixels)
            text = model.encode_text(tokens)
        loss = contrastive(image, text, model.logit_scale.exp(), normalize=True)
    loss.backward()
    optimizer.step()

"""FLOPs of the towers, counted exactly and without running them.

torch's FlopCounterMode over fake tensors: every matmul, convolution and attention the model dispatches, with
a multiply-accumulate as two FLOPs; elementwise work, norms and look-ups count nothing. Attention counts as
torch counts it on GPUs: dense, also where the mask is causal, and its backward with the recomputed scores
(2.5 × forward).

What a report calls `flops_per_sample` is `training=True` here: forward and backward of one sample's towers,
head or projections included. The loss is left out, because what it costs a sample grows with the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..nn import Clip, Lift, Preset
from ..ops.block import Checkpointing


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


# FlopCounterMode knows the CUDA attention ops but not the CPU one: it would count attention as nothing here.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample, by tower. The head counts as image, CLIP's projections with their towers."""

    image: int
    text: int

    @property
    def total(self) -> int:
        return self.image + self.text


def count(fn: Callable[[], object]) -> int:
    """FLOPs that `fn` dispatches, on real or fake tensors, on any device."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        fn()
    return counter.get_total_flops()


def lift_flops(
    preset: Preset, text_dim: int | None = None, *, training: bool = False, checkpointing: Checkpointing = "none"
) -> Flops:
    """LIFT's FLOPs a sample: forward, or with `training` forward + backward. Its text costs none.

    `checkpointing` adds what backward recomputes; it changes nothing without `training`.
    """
    return Flops(_lift_image(preset.with_context(1), text_dim or preset.text_dim, training, checkpointing), 0)


def clip_flops(preset: Preset, *, training: bool = False, checkpointing: Checkpointing = "none") -> Flops:
    """CLIP's FLOPs a sample at `preset.text.context` tokens: forward, with `training` forward + backward."""
    image = _clip_image(preset.with_context(1), training, checkpointing)
    return Flops(image, _clip_text(preset, training, checkpointing))


def saved(lift: Flops, clip: Flops) -> float:
    """The fraction of CLIP's FLOPs that LIFT does without."""
    return 1 - lift.total / clip.total


# Image sides are counted at context 1, which they do not depend on, so that a sweep over contexts counts one.


@cache
def _lift_image(preset: Preset, text_dim: int, training: bool, checkpointing: Checkpointing) -> int:
    with FakeTensorMode():
        model = Lift(preset, text_dim)
        model.set_checkpointing(checkpointing)
        return _count_encoder(model.encode_image, _pixels(preset), training)


@cache
def _clip_image(preset: Preset, training: bool, checkpointing: Checkpointing) -> int:
    with FakeTensorMode():
        model = Clip(preset)
        model.set_checkpointing(checkpointing)
        return _count_encoder(model.encode_image, _pixels(preset), training)


@cache
def _clip_text(preset: Preset, training: bool, checkpointing: Checkpointing) -> int:
    with FakeTensorMode():
        model = Clip(preset)
        model.set_checkpointing(checkpointing)
        tokens = torch.zeros(1, preset.text.context, dtype=torch.long)
        return _count_encoder(model.encode_text, tokens, training)


def _pixels(preset: Preset) -> Tensor:
    return torch.empty(1, 3, preset.vit.image_size, preset.vit.image_size)


def _count_encoder(encode: Callable[[Tensor], Tensor], inputs: Tensor, training: bool) -> int:
    def run() -> None:
        if training:
            encode(inputs).sum().backward()
        else:
            with torch.no_grad():
                encode(inputs)

    return count(run)

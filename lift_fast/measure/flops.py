"""FLOPs of the towers, counted exactly and without running them.

torch's FlopCounterMode over fake tensors: every matmul, convolution and attention that the model dispatches, with
a multiply-accumulate as two FLOPs; elementwise ops, norms and look-ups count as zero. Attention counts as torch
counts it on GPUs: dense even where the mask is causal, and its backward with the recomputed scores (2.5 × forward).

A report's `flops_per_sample` is `training=True` here: forward and backward of one sample's towers, with head or
projections. The loss is left out, because its cost a sample grows with the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

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


# FlopCounterMode knows the CUDA attention ops but not the CPU one, whose attention it would count as zero.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one sample. LIFT's head counts as image, each of CLIP's projections with its tower."""

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
    """LIFT's FLOPs a sample: forward, or with `training` forward and backward. Text costs none.

    text_dim: the preset's where None. `checkpointing` adds what backward recomputes; it has no effect without
    `training`.
    """
    text_dim = text_dim or preset.text_dim
    return Flops(_tower_flops("LIFT's image", preset.with_context(1), text_dim, training, checkpointing), 0)


def clip_flops(preset: Preset, *, training: bool = False, checkpointing: Checkpointing = "none") -> Flops:
    """CLIP's FLOPs a sample at `preset.text.context` tokens, otherwise as lift_flops."""
    # The image tower does not depend on the context: a sweep over contexts counts it once.
    image = _tower_flops("CLIP's image", preset.with_context(1), None, training, checkpointing)
    return Flops(image, _tower_flops("CLIP's text", preset, None, training, checkpointing))


def saved(lift: Flops, clip: Flops) -> float:
    """The fraction of CLIP's FLOPs that LIFT saves."""
    return 1 - lift.total / clip.total


@cache
def _tower_flops(
    tower: Literal["LIFT's image", "CLIP's image", "CLIP's text"],
    preset: Preset,
    text_dim: int | None,
    training: bool,
    checkpointing: Checkpointing,
) -> int:
    """FLOPs of one tower with its head or projection, for one sample."""
    with FakeTensorMode():
        model = Lift(preset, text_dim) if tower == "LIFT's image" else Clip(preset)
        model.set_checkpointing(checkpointing)
        encode: Callable[[Tensor], Tensor] = model.encode_image
        inputs = torch.empty(1, 3, preset.vit.image_size, preset.vit.image_size)
        if isinstance(model, Clip) and tower == "CLIP's text":
            encode, inputs = model.encode_text, torch.zeros(1, preset.text.context, dtype=torch.long)

        def run() -> None:
            if training:
                encode(inputs).sum().backward()
            else:
                with torch.no_grad():
                    encode(inputs)

        return count(run)

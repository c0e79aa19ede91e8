"""Attention within each image: `from lift_fast.ops.attention import attention`."""

from .op import attention, reference

__all__ = ["attention", "reference"]

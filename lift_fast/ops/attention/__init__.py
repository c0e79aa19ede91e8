"""Attention within each image: `from lift_fast.ops.attention import attention`."""

from .op import attention

__all__ = ["attention"]

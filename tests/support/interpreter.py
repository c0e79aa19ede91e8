"""Makes Triton's CPU interpreter reduce along an axis, with a function of ours, by whole slices.

By itself it calls the function for each element, which takes most of the time of a kernel that does so.
"""

import numpy as np
import triton
from triton import language as tl
from triton.runtime.interpreter import ReduceOps

by_elements = ReduceOps.generic_reduce


def by_slices(self, input):
    """As `by_elements`: the elements along the axis are combined one after the other, in the same order."""
    if self.axis is None:
        return by_elements(self, input)
    data = [each.handle.data for each in input]
    length, rest = data[0].shape[self.axis], np.delete(data[0].shape, self.axis).tolist()
    dtypes = [each.dtype for each in input]

    def at(i):
        return [self.to_tensor(each.take(i, self.axis)[()], dtype) for each, dtype in zip(data, dtypes, strict=True)]

    sums = at(0)
    for i in range(1, length):
        combined = self.combine_fn.fn(*sums, *at(i))
        combined = combined if isinstance(combined, tuple) else (combined,)
        parts = [each.handle.data.reshape(rest)[()] for each in combined]
        sums = [self.to_tensor(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)]
    found = [each.handle.data.reshape(rest) for each in sums]
    if self.keep_dims:
        found = [np.expand_dims(each, self.axis) for each in found]
    return [self.to_tensor(each[()], dtype) for each, dtype in zip(found, dtypes, strict=True)]


ReduceOps.generic_reduce = by_slices


@triton.jit
def _combine(a, b, c, d):
    """The order of the elements matters."""
    return a - 0.5 * c, b * 0.5 + d


@triton.jit
def reduced(x, out, sums, AXIS: tl.constexpr, KEEP: tl.constexpr):
    """Adds two reductions of x [4, 8] to it, for a test of `by_slices`."""
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    value = tl.load(x + at)
    first, second = tl.reduce((value, value * value), AXIS, _combine, keep_dims=KEEP)
    if not KEEP:
        first, second = tl.expand_dims(first, AXIS), tl.expand_dims(second, AXIS)
    tl.store(out + at, value + first)
    tl.store(sums + at, value + second)

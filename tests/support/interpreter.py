"""Makes Triton's CPU interpreter faster, which spends most of its time in three places:

- a reduction with a function of ours calls the function for each element; here for whole slices
- products of 16-bit tiles do not use BLAS, because NumPy has none for them; here they are converted first
- each call of a function within a kernel replaces the members of triton.language, even where that is done
"""

import numpy as np
import triton
from triton import language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps

by_elements, slow_dot = ReduceOps.generic_reduce, InterpreterBuilder.create_dot
slow_call = InterpretedFunction.__call__


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


def dot(self, a, b, d, *precision):
    """The product of two tiles added to a third, of whose type the sums are."""
    if a.data.dtype != np.float16 or b.data.dtype != np.float16:
        return slow_dot(self, a, b, d, *precision)
    kind = d.data.dtype
    return type(d)(np.matmul(a.data.astype(kind), b.data.astype(kind)) + d.data, d.dtype.scalar)


def call(self, *args, **kwargs):
    """Calls a function within a kernel."""
    languages = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.dot) for language in languages):  # not replaced
        return slow_call(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


ReduceOps.generic_reduce = by_slices
InterpreterBuilder.create_dot = dot
InterpretedFunction.__call__ = call


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

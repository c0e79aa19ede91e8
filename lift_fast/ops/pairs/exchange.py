"""What ranks tell each other about texts. Images and their gradients never leave their rank.

A rank scores its own images against all texts, so what belongs to an image is complete where it is; what belongs
to a text is spread over the ranks. Texts that are fixed and small are gathered once; the (m, l, w) of the columns
are merged in one exchange of a few numbers a text. `Columns` is one process, `Gathered` the above, `Ring` the same
for texts that no rank can hold all of.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import policy


class Columns:
    """The columns of the score matrix: all texts, in one process."""

    turns = 1
    first = 0  # the column of this rank's first text
    world = 1
    only_own = True  # whether the columns that `merge` returns are those of this rank's texts

    def __init__(self, t: Tensor, q: Tensor | None):
        self.t, self.q = t, q
        self.count = len(t)  # columns altogether

    @property
    def width(self) -> int:
        """Columns of a turn."""
        return len(self.t)

    def visit(self, *carried: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None, tuple[Tensor, ...]]]:
        """Each turn's (first column, t, q, the rows of `carried` that belong to it, to be updated in place)."""
        yield 0, self.t, self.q, carried

    def merge(self, col: Tensor) -> Tensor:
        """(m, l, w) over all ranks, from this rank's."""
        return col

    def own(self, values: Tensor) -> Tensor:
        """Of values [..., width], those of this rank's texts."""
        return values

    def everyone(self, values: Tensor) -> Tensor:
        """Of values [rows] of this rank's texts, those of the columns that `merge` returns."""
        return values

    def home(self, d_text: Tensor) -> Tensor:
        """The gradient of this rank's texts, from what visits have collected."""
        return d_text

    def mean(self, values: Tensor) -> Tensor:
        return values


class Gathered(Columns):
    """All texts on every rank."""

    only_own = False

    def __init__(self, t: Tensor, q: Tensor | None, rows: int, group: dist.ProcessGroup):
        self.group, self.rows, self.world = group, rows, group.size()
        self.first = rows * group.rank()
        if len(t) == rows:
            t, q = gather(t, group), None if q is None else gather(q, group)
        super().__init__(t, q)

    def merge(self, col: Tensor) -> Tensor:
        m = col[0].clone()
        dist.all_reduce(m, dist.ReduceOp.MAX, group=self.group)
        # Where every score is −inf nothing is lost, and NaN comes through l.
        sums = col[1:] * (col[0] - m.masked_fill(m == -torch.inf, 0)).exp()
        dist.all_reduce(sums, group=self.group)
        return torch.cat([m[None], sums])

    def own(self, values: Tensor) -> Tensor:
        return values[..., self.first : self.first + self.rows]

    def everyone(self, values: Tensor) -> Tensor:
        return gather(values, self.group)

    def home(self, d_text: Tensor) -> Tensor:
        if dist.get_backend(self.group) == "nccl":
            out = d_text.new_empty(self.rows, *d_text.shape[1:])
            _call("reduce_scatter_single", "reduce_scatter_tensor")(out, d_text, group=self.group)
            return out
        parts = torch.empty_like(d_text)  # gloo has no reduce-scatter of its own; this moves as many bytes
        dist.all_to_all_single(parts, d_text, group=self.group)
        return parts.view(self.world, self.rows, *d_text.shape[1:]).sum(dim=0)

    def mean(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values / self.world


class Ring(Columns):
    """Each rank's texts in turn; what is known of them travels along and ends at their owner."""

    def __init__(self, t: Tensor, q: Tensor | None, group: dist.ProcessGroup):
        super().__init__(t.contiguous(), q)
        self.group, self.world, self.rank = group, group.size(), group.rank()
        self.turns, self.count, self.first = self.world, self.world * len(t), self.rank * len(t)

    def visit(self, *carried: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None, tuple[Tensor, ...]]]:
        texts = (self.t,) if self.q is None else (self.t, self.q)
        at = carried
        for turn in range(self.world):
            last = turn == self.world - 1
            coming, wait = self._pass_on(() if last else texts)  # the next texts arrive under the work on these
            owner = (self.rank - turn) % self.world
            yield owner * len(self.t), texts[0], texts[1] if len(texts) > 1 else None, at
            wait()
            texts = coming
            at, wait = self._pass_on(at)
            wait()
        for mine, returned in zip(carried, at, strict=True):
            mine.copy_(returned)

    def _pass_on(self, tensors: tuple[Tensor, ...]):
        """Sends tensors to the next rank; what the previous one sends, once the returned function has waited."""
        after, before = (dist.get_global_rank(self.group, (self.rank + step) % self.world) for step in (1, -1))
        received = tuple(torch.empty_like(tensor) for tensor in tensors)
        ops = []
        for ours, theirs in zip(tensors, received, strict=True):
            ops.append(dist.P2POp(dist.isend, _bytes(ours), after, self.group))
            ops.append(dist.P2POp(dist.irecv, _bytes(theirs), before, self.group))
        work = dist.batch_isend_irecv(ops) if ops else []
        return received, lambda: [one.wait() for one in work]

    def mean(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values / self.world


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


def columns(
    t: Tensor, q: Tensor | None, rows: int, trained: bool, group: str | None, settings: tuple[bool, ...] = ()
) -> Columns:
    """The columns for `rows` images and these texts: this rank's own, or those of all ranks.

    Raises ValueError, on every rank, where ranks differ in rows, in dtype, in whether texts are trained, or in
    `settings`, since they would wait for each other for ever. On a GPU the host would have to wait to find out:
    there it is found with TORCH_DISTRIBUTED_DEBUG set.
    """
    if group is None:
        return Columns(t, q)
    process_group = resolve(group)
    world = process_group.size()
    said = [(rows, *t.shape, DTYPES.index(t.dtype), q is not None, trained, *settings)]
    if t.device.type == "cpu" or dist.get_debug_level() != dist.DebugLevel.OFF:
        said = gather(torch.tensor([[int(x) for x in said[0]]], device=t.device), process_group).tolist()
    if len({tuple(one) for one in said}) > 1:
        shapes = [tuple(one[:3]) for one in said]
        what = f"(images, texts, dim) {shapes}" if len(set(shapes)) > 1 else "dtypes, options or gradients"
        raise ValueError(f"every rank must have as many rows as the others, and the same kind; not {what}")
    if not rows:
        raise ValueError("a loss of no rows on any rank")
    if len(t) not in (rows, world * rows):
        raise ValueError(f"{world} ranks of {rows} images need {rows} or {world * rows} texts on each, not {len(t)}")
    if world == 1:
        return Columns(t, q)
    if len(t) == world * rows and trained:
        raise ValueError("texts of all ranks cannot be given a gradient; give each rank its own, they are gathered")
    if len(t) == rows and policy.travels(world * rows, t.shape[1], t.element_size(), trained):
        return Ring(t, q, process_group)
    return Gathered(t, q, rows, process_group)


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x of every rank, one after the other."""
    out = x.new_empty(group.size() * len(x), *x.shape[1:])
    _call("all_gather_single", "all_gather_into_tensor")(_bytes(out), _bytes(x.contiguous()), group=group)
    return out


def _call(name: str, formerly: str) -> Callable[..., Any]:
    """A collective that newer versions of torch have renamed."""
    return getattr(dist, name, None) or getattr(dist, formerly)


def resolve(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def named(group: dist.ProcessGroup | str | None) -> str | None:
    """What an op is told of a group."""
    return group if group is None or isinstance(group, str) else group.group_name


def _bytes(x: Tensor) -> Tensor:
    """The same memory as bytes: what any communication library can send."""
    return x.reshape(-1).view(torch.uint8)

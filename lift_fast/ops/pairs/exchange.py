"""Cross-rank communication for the pair losses: of texts and what belongs to them; images never leave their rank.

A rank scores its own images against all texts, so an image's statistics and gradient are complete on its rank, while a
text's are spread over the ranks. `Columns` is the case of one process. `Gathered` all-gathers the texts and merges the
columns' (m, l, w) by all-reduces of a few numbers per text. `Ring` passes texts around where no rank can hold them all.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import policy


class Columns:
    """The columns of the score matrix: all texts, in one process."""

    turns = 1  # visits it takes to see all columns
    first = 0  # the column of this rank's first text
    world = 1
    local_only = True  # whether the columns that `merge` returns are those of this rank's texts

    def __init__(self, t: Tensor, q: Tensor | None):
        self.t, self.q = t, q
        self.count = len(t)  # columns of all turns together

    @property
    def width(self) -> int:
        """Columns per turn."""
        return len(self.t)

    def visit(self, *carried: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None, tuple[Tensor, ...]]]:
        """Yields (first column, t, q, carried) of each turn.

        carried: tensors with a value per column of a turn, which the caller updates in place. They stay with their
        columns from turn to turn, and after the last one hold what all ranks have added to this rank's.
        """
        yield 0, self.t, self.q, carried

    def merge(self, col: Tensor) -> Tensor:
        """(m, l, w) of the columns over all ranks, from this rank's."""
        return col

    def local(self, values: Tensor) -> Tensor:
        """The part of values [..., width] that belongs to this rank's texts."""
        return values

    def all_gather(self, values: Tensor) -> Tensor:
        """Values of the columns that `merge` returns, from the values [rows] of this rank's texts."""
        return values

    def reduce_scatter(self, d_text: Tensor) -> Tensor:
        """The gradient of this rank's texts, from what all visits have added to d_text."""
        return d_text

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values over the ranks."""
        return values


class Gathered(Columns):
    """All texts on every rank."""

    local_only = False

    def __init__(self, t: Tensor, q: Tensor | None, rows: int, group: "dist.ProcessGroup"):
        self.group, self.rows, self.world = group, rows, group.size()
        self.first = rows * group.rank()
        if len(t) == rows:
            t, q = gather(t, group), None if q is None else gather(q, group)
        super().__init__(t, q)

    def merge(self, col: Tensor) -> Tensor:
        m = col[0].clone()
        dist.all_reduce(m, dist.ReduceOp.MAX, group=self.group)
        # If all scores are −inf, the sums are 0 and any finite m will do. NaN propagates through l.
        sums = col[1:] * (col[0] - m.masked_fill(m == -torch.inf, 0)).exp()
        dist.all_reduce(sums, group=self.group)
        return torch.cat([m[None], sums])

    def local(self, values: Tensor) -> Tensor:
        return values[..., self.first : self.first + self.rows]

    def all_gather(self, values: Tensor) -> Tensor:
        return gather(values, self.group)

    def reduce_scatter(self, d_text: Tensor) -> Tensor:
        if dist.get_backend(self.group) == "nccl":
            out = d_text.new_empty(self.rows, *d_text.shape[1:])
            _collective("reduce_scatter_single", "reduce_scatter_tensor")(out, d_text, group=self.group)
            return out
        parts = torch.empty_like(d_text)  # gloo has no native reduce-scatter; an all-to-all sends as many bytes
        dist.all_to_all_single(parts, d_text, group=self.group)
        return parts.view(self.world, self.rows, *d_text.shape[1:]).sum(dim=0)

    def mean(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values / self.world


class Ring(Columns):
    """The texts of one rank after the other; their statistics and gradients travel with them and end at their owner."""

    def __init__(self, t: Tensor, q: Tensor | None, group: "dist.ProcessGroup"):
        super().__init__(t.contiguous(), q)
        self.group, self.world, self.rank = group, group.size(), group.rank()
        self.turns, self.count, self.first = self.world, self.world * len(t), self.rank * len(t)

    def visit(self, *carried: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None, tuple[Tensor, ...]]]:
        texts: tuple[Tensor, ...] = (self.t,) if self.q is None else (self.t, self.q)
        current = carried
        for turn in range(self.world):
            last = turn == self.world - 1
            following, wait = self._shift(() if last else texts)  # the next texts arrive while these are computed on
            owner = (self.rank - turn) % self.world
            yield owner * len(self.t), texts[0], texts[1] if len(texts) > 1 else None, current
            wait()
            texts = following
            current, wait = self._shift(current)
            wait()
        for mine, returned in zip(carried, current, strict=True):
            mine.copy_(returned)

    def _shift(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Callable[[], object]]:
        """Sends tensors to the next rank; returns those of the previous rank, once the returned function has waited."""
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

    Raises ValueError, on every rank, if ranks differ in rows, in dtype, in whether texts are trained, or in
    `settings`, since they would wait for each other forever. On a GPU this check needs a host sync and is made only
    if TORCH_DISTRIBUTED_DEBUG is set.
    """
    if group is None:
        return Columns(t, q)
    process_group = resolve(group)
    world = process_group.size()
    ranks = [(rows, *t.shape, DTYPES.index(t.dtype), q is not None, trained, *settings)]
    if t.device.type == "cpu" or dist.get_debug_level() != dist.DebugLevel.OFF:
        ranks = gather(torch.tensor([[int(x) for x in ranks[0]]], device=t.device), process_group).tolist()
    if len({tuple(rank) for rank in ranks}) > 1:
        shapes = [tuple(rank[:3]) for rank in ranks]
        differing = f"(images, texts, dim) {shapes}" if len(set(shapes)) > 1 else "dtypes, options or gradients"
        raise ValueError(f"all ranks must have the same number of rows, of the same kind; they differ in {differing}")
    if not rows:
        raise ValueError("no rank has any rows to compute a loss of")
    if len(t) not in (rows, world * rows):
        raise ValueError(f"{world} ranks of {rows} images need {rows} or {world * rows} texts on each, not {len(t)}")
    if world == 1:
        return Columns(t, q)
    if len(t) == world * rows and trained:
        raise ValueError("texts of all ranks cannot have a gradient; pass each rank its own texts, they are gathered")
    if len(t) == rows and policy.uses_ring(world * rows, t.shape[1], t.element_size(), trained):
        return Ring(t, q, process_group)
    return Gathered(t, q, rows, process_group)


def gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """x of all ranks, concatenated in the order of the ranks."""
    out = x.new_empty(group.size() * len(x), *x.shape[1:])
    _collective("all_gather_single", "all_gather_into_tensor")(_bytes(out), _bytes(x.contiguous()), group=group)
    return out


def _collective(name: str, former_name: str) -> Callable[..., Any]:
    """A function of torch.distributed that newer versions of torch have renamed."""
    return getattr(dist, name, None) or getattr(dist, former_name)


def check_available() -> None:
    """Raises ValueError for a torch that is built without distributed, as some for edge devices and macOS are."""
    if not dist.is_available():
        raise ValueError("this torch is built without torch.distributed, which ranks and groups need; use one process")


def resolve(name: str) -> "dist.ProcessGroup":
    """The process group of this name. Raises ValueError for a torch without distributed."""
    check_available()
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def group_name(group: "dist.ProcessGroup | str | None") -> str | None:
    """Group name to pass to a custom op."""
    return group if group is None or isinstance(group, str) else group.group_name


def _bytes(x: Tensor) -> Tensor:
    """The same memory as bytes, which any communication library can send."""
    return x.reshape(-1).view(torch.uint8)

"""How the pair losses divide their score matrix: rows per chunk, rows whose scores are kept, gathered texts or a ring.

Keeping a score costs 4 bytes of memory and moves 8; recomputing it takes 2 · dim FLOPs. All sizes come from the tables
of `tuned`, family "pairs".
"""

from collections.abc import Callable
from dataclasses import dataclass

from .. import tuned


@dataclass(frozen=True)
class Plan:
    chunks: list[tuple[int, int]]  # row ranges [start, stop); none crosses `kept`
    kept: int  # the scores of rows 0..kept-1 are kept for the second pass


def plan(
    rows: int,
    cols: int,
    dim: int,
    itemsize: int,
    backend: str,
    budget: int | None,
    keep: bool,
    device: str = "cpu",
    free: Callable[[], int] | None = None,
) -> Plan:
    """The chunks of a [rows, cols] score matrix of features with this dim and itemsize.

    budget: bytes for kept scores; None: the table's choice. keep: whether a second pass will read them.
    device: whose table is used. free: returns a GPU's free bytes; called only if the table depends on them.
    Raises ValueError for a negative budget.
    """
    if budget is not None and budget < 0:
        raise ValueError(f"budget must be bytes, 0 or more, not {budget}")
    facts: dict[str, int | str] = {"backend": backend, "dim": dim, "itemsize": itemsize}
    if budget is None:
        available = _default_budget(rows, cols, itemsize, device, facts, free) if keep else 0
    else:
        available = budget
    kept = min(rows, available // (4 * cols)) if keep else 0
    chunk = tuned.lookup("pairs", device, "chunk", lean=budget is not None, **facts)
    step = rows
    if chunk is not None:
        row = 4 * (cols if chunk["of"] == "scores" else dim)
        multiple = chunk["multiple"]
        step = max(chunk["least"], chunk["bytes"] // row // multiple * multiple)
    cuts = [*range(0, kept, step), *range(kept, rows, step), rows]
    return Plan(list(zip(cuts, cuts[1:], strict=False)), kept)


def _default_budget(
    rows: int, cols: int, itemsize: int, device: str, facts: dict[str, int | str], free: Callable[[], int] | None
) -> int:
    """Bytes for kept scores if the caller has set no budget."""
    rule = tuned.lookup("pairs", device, "keep", **facts)
    scores = 4 * rows * cols
    if rule is None or scores <= rule.get("always", 0):
        return 0 if rule is None else scores
    if "share_of_free" in rule:
        return min(scores, int(rule["share_of_free"] * free())) if free else 0
    return int(rule["share_of_narrow"] * rows * cols * itemsize)


def multiplies_in_float32(rows: int, cols: int, dim: int) -> bool:
    """Whether 16-bit features are multiplied in float32, which costs little time for small products.

    Where a gradient is a sum of few terms, their rounding to 16 bits would not average out.
    """
    return rows * cols * dim < tuned.lookup("pairs", "cpu", "widen_below")


def uses_ring(cols: int, dim: int, itemsize: int, trained: bool) -> bool:
    """Whether the texts of all ranks pass around a ring instead of being all-gathered.

    A ring holds two ranks' texts at a time and sends them twice. The size compared with the table's limit is that of
    all texts and, if they are trained, of their float32 gradients.
    """
    return cols * dim * (itemsize + 4 * trained) > tuned.lookup("pairs", "cpu", "gather")

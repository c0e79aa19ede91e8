"""How the pair losses cut their score matrix: rows a chunk, rows whose scores are kept, and how texts travel.

Keeping a score costs 4 bytes of memory and moves 8; recomputing it takes 2 · dim FLOPs. All sizes come from the tables
of `tuned`, family "pairs".
"""

from collections.abc import Callable
from dataclasses import dataclass

from .. import tuned


@dataclass(frozen=True)
class Plan:
    chunks: list[tuple[int, int]]  # the rows, from and to; none lies across `kept`
    kept: int  # the scores of the rows before this one are kept


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

    budget: bytes for kept scores; None: the table's choice. keep: whether a second pass will ask for them.
    device: the table's. free: tells the bytes that are free on a GPU; asked only where the table wants to know.
    """
    if budget is not None and budget < 0:
        raise ValueError(f"budget must be bytes, 0 or more, not {budget}")
    facts: dict[str, int | str] = {"backend": backend, "dim": dim, "itemsize": itemsize}
    if budget is None:
        room = _kept_bytes(rows, cols, itemsize, device, facts, free) if keep else 0
    else:
        room = budget
    kept = min(rows, room // (4 * cols)) if keep else 0
    chunk = tuned.lookup("pairs", device, "chunk", lean=budget is not None, **facts)
    step = rows
    if chunk is not None:
        row = 4 * (cols if chunk["of"] == "scores" else dim)
        multiple = chunk["multiple"]
        step = max(chunk["least"], chunk["bytes"] // row // multiple * multiple)
    cuts = [*range(0, kept, step), *range(kept, rows, step), rows]
    return Plan(list(zip(cuts, cuts[1:], strict=False)), kept)


def _kept_bytes(
    rows: int, cols: int, itemsize: int, device: str, facts: dict[str, int | str], free: Callable[[], int] | None
) -> int:
    """Bytes that kept scores may take where nobody has said."""
    rule = tuned.lookup("pairs", device, "keep", **facts)
    scores = 4 * rows * cols
    if rule is None or scores <= rule.get("always", 0):
        return 0 if rule is None else scores
    if "share_of_free" in rule:
        return min(scores, int(rule["share_of_free"] * free())) if free else 0
    return int(rule["share_of_narrow"] * rows * cols * itemsize)


def widens(rows: int, cols: int, dim: int) -> bool:
    """Whether narrow features are multiplied in float32.

    It takes no time where there is little to multiply, and in a sum of few gradients their rounding does not average
    out.
    """
    return rows * cols * dim < tuned.lookup("pairs", "cpu", "widen_below")


def travels(cols: int, dim: int, itemsize: int, trained: bool) -> bool:
    """Whether texts of all ranks go round a ring, which holds two ranks' at a time and sends them twice.

    Others, with their float32 gradients where they have some, are gathered.
    """
    return cols * dim * (itemsize + 4 * trained) > tuned.lookup("pairs", "cpu", "gather")

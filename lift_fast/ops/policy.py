"""How the pair losses cut their score matrix: rows a chunk, rows whose scores are kept, and how texts travel.

Keeping a score costs 4 bytes and saves 2 · dim FLOPs, recomputing it. A chunk is what a backend holds at once: on
a GPU it should stay in the L2 cache, on a CPU it bounds the plain backend's temporaries.
"""

from dataclasses import dataclass

MIB = 1 << 20
KEEP_ALL = 256 * MIB  # scores that need no more are all kept

# (backend, bytes a feature) -> the largest dim at which recomputing costs no more than keeping. Measured on 2 cores of
# Zen 4, B = 8 192, forward and backward, ms kept / recomputed: float32, dim 16: 111 / 111, 32: 118 / 124, 128: 231 /
# 290; bfloat16, dim 32: 109 / 92, 64: 107 / 107, 128: 144 / 178. On a GPU it is not measured yet.
RECOMPUTE_UP_TO = {("cpp", 4): 16, ("cpp", 2): 64}

# backend -> (bytes of float32 scores a chunk, least rows, rows are a multiple of); None: it needs no scratch
CHUNK: dict[str, tuple[int, int, int] | None] = {
    "cpp": None,
    "torch": (16 * MIB, 16, 1),  # times the four temporaries that it makes of them
    "cuda": (32 * MIB, 128, 128),
    "triton": (32 * MIB, 128, 128),
}

# A GPU adds a trained text's gradient to what is there chunk by chunk, 8 bytes an element: fewer, larger chunks.
CHUNK_TRAINED = 256 * MIB

# bfloat16 and float16 features are multiplied in float32 where there is less to multiply (rows · cols · dim): it
# takes no time, and in a sum of few gradients their rounding does not average out.
WIDE_BELOW = 1 << 24

# Texts that fill no more than this, with their float32 gradients where they have some, are gathered; others travel
# round a ring, which holds two ranks' texts at a time and sends them twice.
GATHER = 1 << 30


@dataclass(frozen=True)
class Plan:
    chunks: list[tuple[int, int]]  # the rows, from and to; none lies across `kept`
    kept: int  # the scores of the rows before this one are kept


def plan(
    rows: int, cols: int, dim: int, itemsize: int, backend: str, budget: int | None, keep: bool, trained: bool = False
) -> Plan:
    """The chunks of a [rows, cols] score matrix of features with this dim and itemsize.

    budget: bytes for kept scores; None: none where that costs nothing, else all that need no more than KEEP_ALL,
    else three quarters of what the scores would take in the features' dtype. keep: whether a second pass will ask
    for them. trained: whether the texts are.
    """
    scores = 4 * rows * cols
    if budget is not None and budget < 0:
        raise ValueError(f"budget must be bytes, 0 or more, not {budget}")
    if budget is None and dim <= RECOMPUTE_UP_TO.get((backend, itemsize), 0):
        budget = 0
    elif budget is None:
        budget = scores if scores <= KEEP_ALL else rows * cols * itemsize * 3 // 4
    kept = min(rows, budget // (4 * cols)) if keep else 0
    step = rows
    if (limits := CHUNK[backend]) is not None:
        size, least, multiple = limits
        size = CHUNK_TRAINED if trained and backend != "torch" else size
        step = max(least, size // (4 * cols) // multiple * multiple)
    cuts = [*range(0, kept, step), *range(kept, rows, step), rows]
    return Plan(list(zip(cuts, cuts[1:], strict=False)), kept)


def widens(rows: int, cols: int, dim: int) -> bool:
    """Whether narrow features are multiplied in float32."""
    return rows * cols * dim < WIDE_BELOW


def travels(cols: int, dim: int, itemsize: int, trained: bool) -> bool:
    """Whether texts of all ranks go round a ring, rather than being gathered."""
    return cols * dim * (itemsize + 4 * trained) > GATHER

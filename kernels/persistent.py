"""The contrastive loss's kernels that form their scores (contrastive.py), with persistent programs.

The formulas, parts and gradients are contrastive.py's, tile by tile and in the same order of tiles (pairs.py). What
differs is which program computes which tile, and how data moves: by tensor descriptors (TMA), a box of memory per
instruction.

    programs: as many as run at once; each takes the tiles program, program + programs, program + 2 · programs, ...
        for k in steps of DEPTH:        the two loops are one to the compiler (`flatten`): the next tile's first
            p += x[i, k : +DEPTH] @ t[j, k : +DEPTH].T                 features load during the epilogue of this one
        for each quarter of the columns: parts (tile_stats), or the gradient, through shared memory, to out

Rows, columns and features beyond the end are zeros; the epilogue replaces their scores, as it does those of the
repeated last row in contrastive.py. Columns come in order: a thread holds pairs of them, and the wide accesses are
those that copy the gradient from shared memory.

A tile's FLOPs, bytes and bound (tensor cores) are those of contrastive.py. Saved are the wait for a tile's first
features (an estimate: 1 of 7 µs at a dim of 768), addresses, and the masks of the loop.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .contrastive import INTEGERS, OPTIONS, tile_gradient, tile_stats
from .interpreter import dot
from .pairs import Terms, TileConfig, tile_at, tiles

REGISTERS = 65536  # of a multiprocessor
INTERPRETED = 3  # programs on a CPU, so that each has several tiles


def describes(features: Tensor) -> bool:
    """Whether tensor descriptors accept this operand: 2-byte elements, aligned rows that do not overlap."""
    start, distance, dim = features.data_ptr(), features.stride(0), features.shape[1]
    return features.element_size() == 2 and start % 16 == 0 and distance % 8 == 0 and 0 < dim <= distance


@triton.jit
def products(x, t, row, col, dim, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    """x[row : +ROWS] @ t[col : +COLS].T in float32; x and t are tensor descriptors."""
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, dim, DEPTH):
        sums = dot(x.load([row, k]), tl.trans(t.load([col, k])), sums)
    return sums


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["positive"])
def scores_stats_kernel(
    x,  # descriptor of [rows, dim], boxes of [ROWS, DEPTH]
    t,  # descriptor of [cols, dim], boxes of [COLS, DEPTH]
    row_terms,  # [4, tall]
    col_terms,  # [3, wide]
    positive,  # [rows]
    row_parts,  # [column tiles, 3, parts_stride]
    col_parts,  # [row tiles, 3, wide]
    first, rows, cols, dim, tall, wide, parts_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(rows - first, ROWS) * tl.cdiv(cols, COLS)
    for number in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
        row_tile, col_tile = tile_at(number, rows - first, cols, ROWS, COLS, 8)
        p = products(x, t, first + row_tile * ROWS, col_tile * COLS, dim, ROWS, COLS, DEPTH)
        tile_stats(
            p, row_terms, col_terms, positive, row_parts, col_parts, row_tile, col_tile, first, rows, 0, cols,
            tall, wide, parts_stride, offset, ROWS, COLS, 4,
        )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["factor", "positive_g"])
def scores_grad_kernel(
    x,  # descriptor of [rows, dim], boxes of [ROWS, DEPTH]
    t,  # descriptor of [cols, dim], boxes of [COLS, DEPTH]
    row_terms,  # [4, tall]
    col_terms,  # [3, wide]
    factor,  # []
    positive_g,  # [rows]
    out,  # descriptor of [rows - first, cols] padded to tiles, boxes of [ROWS, COLS // 4]
    first, rows, cols, dim, tall, wide, offset, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(rows - first, ROWS) * tl.cdiv(cols, COLS)
    for number in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
        row_tile, col_tile = tile_at(number, rows - first, cols, ROWS, COLS, 8)
        p = products(x, t, first + row_tile * ROWS, col_tile * COLS, dim, ROWS, COLS, DEPTH)
        tile_gradient(
            p, row_terms, col_terms, factor, positive_g, out, out.dtype, row_tile, col_tile, first, rows, 0, cols,
            tall, wide, None, offset, ROWS, COLS, 4,
        )  # fmt: skip


def scores_stats(
    x: Tensor, t: Tensor, terms: Terms, positive: Tensor, keep: None, row_parts: Tensor, col_parts: Tensor,
    rows: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """contrastive.scores_stats for x and t of one dtype that `describes` accepts; products are never stored."""
    first, stop = rows
    scores_stats_kernel[_grid(x, stop - first, len(t), config)](
        _descriptor(x, config.rows, config.depth), _descriptor(t, config.cols, config.depth), terms.rows, terms.cols,
        positive, row_parts, col_parts, first, stop, len(t), x.shape[1], terms.rows.stride(0), terms.cols.stride(0),
        row_parts.stride(1), offset, **config.fused(), **OPTIONS,
    )  # fmt: skip


def scores_grad(
    x: Tensor, t: Tensor, terms: Terms, positive_g: Tensor, out: Tensor, rows: tuple[int, int], offset: int,
    config: TileConfig,
) -> None:  # fmt: skip
    """contrastive.scores_grad for x and t of one dtype that `describes` accepts, as it does out."""
    first, stop = rows
    scores_grad_kernel[_grid(x, stop - first, len(t), config)](
        _descriptor(x, config.rows, config.depth), _descriptor(t, config.cols, config.depth), terms.rows, terms.cols,
        terms.factor, positive_g, _descriptor(out, config.rows, config.cols // 4), first, stop, len(t), x.shape[1],
        terms.rows.stride(0), terms.cols.stride(0), offset, **config.fused(), **OPTIONS,
    )  # fmt: skip


def _descriptor(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """A tensor descriptor with boxes of rows × cols."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, cols])


def _grid(x: Tensor, rows: int, cols: int, config: TileConfig) -> tuple[int]:
    """As many programs as run at once, by their registers, but no more than tiles."""
    per_multiprocessor = REGISTERS // (32 * config.warps * (config.registers or 256))
    return (min(tiles(rows, cols, config), max(1, per_multiprocessor) * _multiprocessors(x.device)),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return INTERPRETED if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count

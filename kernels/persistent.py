"""The contrastive loss's kernels that form their scores (contrastive.py), with programs that stay.

The formulas, parts and gradients are contrastive.py's, tile by tile and in the same order of tiles (pairs.py). What
differs is who works on which tile, and how data moves: by tensor descriptors (TMA), a box of memory an instruction.

    programs: as many as run at once; each takes the tiles program, program + programs, program + 2 · programs, ...
        for k in steps of DEPTH:        the two loops are one to the compiler (`flatten`): the loads of the next
            p += x[i, k : +DEPTH] @ t[j, k : +DEPTH].T            tile are under way during the epilogue of this one
        a quarter of the columns at a time: parts (stats_of_tile), or the gradient, by way of shared memory, to out

Rows, columns and features beyond the end are zeros, whose scores the epilogue replaces as it does those of the
repeated last row of the other form. Columns come in order: a thread holds pairs of them, and it is the copy of the
gradient from shared memory that is wide.

A tile's FLOPs, bytes and bound (tensor cores) are those of the other form. Saved are the wait for a tile's first
features (an estimate: 1 of 7 µs at a dim of 768), addresses, and the masks of the loop.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .contrastive import INTEGERS, OPTIONS, gradient_of_tile, stats_of_tile
from .interpreter import dot
from .pairs import Terms, TileConfig, tile_at

REGISTERS = 65536  # of a multiprocessor
INTERPRETED = 3  # programs on a CPU, each with several tiles


def describes(features: Tensor) -> bool:
    """Whether tensor descriptors can: rows of two-byte elements that start on 16 bytes, one after the other."""
    start, distance, dim = features.data_ptr(), features.stride(0), features.shape[1]
    return features.element_size() == 2 and start % 16 == 0 and distance % 8 == 0 and 0 < dim <= distance


@triton.jit
def boxes(x, t, row, col, dim, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    """The products of the ROWS from row on with the COLS from col on, in float32."""
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for k in range(0, dim, DEPTH):
        sums = dot(x.load([row, k]), tl.trans(t.load([col, k])), sums)
    return sums


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["positive"])
def scores_stats_kernel(
    x, t, row_terms, col_terms, positive, row_parts, col_parts, first, rows, cols, dim, tall, wide, parts_stride, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows - first, ROWS) * tl.cdiv(cols, COLS)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row_tile, col_tile = tile_at(number, rows - first, cols, ROWS, COLS, 8)
        p = boxes(x, t, first + row_tile * ROWS, col_tile * COLS, dim, ROWS, COLS, DEPTH)
        stats_of_tile(
            p, row_terms, col_terms, positive, row_parts, col_parts, row_tile, col_tile, first, rows, cols,
            tall, wide, parts_stride, offset, ROWS, COLS,
        )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=["factor", "positive_g"])
def scores_grad_kernel(
    x, t, row_terms, col_terms, factor, positive_g, out, first, rows, cols, dim, tall, wide, offset,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows - first, ROWS) * tl.cdiv(cols, COLS)
    for number in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row_tile, col_tile = tile_at(number, rows - first, cols, ROWS, COLS, 8)
        p = boxes(x, t, first + row_tile * ROWS, col_tile * COLS, dim, ROWS, COLS, DEPTH)
        gradient_of_tile(
            p, row_terms, col_terms, factor, positive_g, out, out.dtype, row_tile, col_tile, first, rows, cols,
            tall, wide, None, offset, ROWS, COLS,
        )  # fmt: skip


def scores_stats(
    x: Tensor, t: Tensor, terms: Terms, positive: Tensor, keep: None, row_parts: Tensor, col_parts: Tensor,
    rows: tuple[int, int], offset: int, config: TileConfig,
) -> None:  # fmt: skip
    """contrastive.scores_stats of x and t of one dtype that `describes` takes; the scores stay nowhere."""
    first, stop = rows
    scores_stats_kernel[_programs(x, stop - first, len(t), config)](
        _described(x, config.rows, config.depth), _described(t, config.cols, config.depth), terms.rows, terms.cols, positive,
        row_parts, col_parts, first, stop, len(t), x.shape[1], terms.rows.stride(0), terms.cols.stride(0),
        row_parts.stride(1), offset, ROWS=config.rows, COLS=config.cols, DEPTH=config.depth,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers, **OPTIONS,
    )  # fmt: skip


def scores_grad(
    x: Tensor, t: Tensor, terms: Terms, positive_g: Tensor, out: Tensor, rows: tuple[int, int], offset: int, config: TileConfig
) -> None:  # fmt: skip
    """contrastive.scores_grad of x and t of one dtype that `describes` takes, as it does out."""
    first, stop = rows
    scores_grad_kernel[_programs(x, stop - first, len(t), config)](
        _described(x, config.rows, config.depth), _described(t, config.cols, config.depth), terms.rows, terms.cols,
        terms.factor, positive_g, _described(out, config.rows, config.cols // 4), first, stop, len(t), x.shape[1],
        terms.rows.stride(0), terms.cols.stride(0), offset, ROWS=config.rows, COLS=config.cols, DEPTH=config.depth,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers, **OPTIONS,
    )  # fmt: skip


def _described(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Boxes of rows × cols."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], [rows, cols])


def _programs(x: Tensor, rows: int, cols: int, config: TileConfig) -> tuple[int]:
    at_once = REGISTERS // (32 * config.warps * (config.registers or 256))
    return (min(-(-rows // config.rows) * -(-cols // config.cols), max(1, at_once) * _multiprocessors(x.device)),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return INTERPRETED if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count

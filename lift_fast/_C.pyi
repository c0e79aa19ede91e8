# csrc/common/bindings.cpp and csrc/*/bind*.cpp. Pointers and streams are integers; the headers that those files include
# have the shapes.
from typing import Any

import numpy as np

def build_info() -> dict[str, Any]: ...
def isa_levels() -> list[str]: ...
def dequant_cpu(
    codes: int, scales: int, rows: int, out: int, n: int, m: int, dim: int, codes_stride: int,
    scales_stride: int, codec: int, type: int, normalize: bool, threads: int, isa: str = "",
) -> None: ...  # fmt: skip

class Table:
    def __init__(self, codec: int, dim: int, starts: np.ndarray) -> None: ...
    def map(self, shard: int, codes: int, scales: int) -> None: ...
    def unmapped(self, rows: int, m: int) -> list[int]: ...
    def gather(
        self, rows: int, m: int, out: int, out_scales: int, type: int, normalize: bool, threads: int, isa: str = ""
    ) -> None: ...
    def advise(self, rows: int, m: int) -> None: ...
    def touched(self) -> list[int]: ...

class Mapping:
    def __init__(self, file: int, bytes: int) -> None: ...
    @property
    def lost(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def lost_mappings() -> int: ...
def handle_bus_errors() -> None: ...
def key_hashes(keys: list[str], out: int) -> None: ...

class KeyTable:
    def __init__(self, starts: np.ndarray) -> None: ...
    def map(self, shard: int, keys: int) -> None: ...
    def build(self) -> None: ...
    def find(self, hashes: int, m: int, out: int) -> None: ...
    @property
    def bytes(self) -> int: ...

def dequant_cuda(
    codes: int, scales: int, rows: int, out: int, n: int, m: int, dim: int, codes_stride: int,
    scales_stride: int, codec: int, type: int, normalize: bool, device: int, stream: int,
) -> None: ...  # fmt: skip

class Rows:
    def __init__(self, data: int, type: int, count: int, stride: int, scales: int) -> None: ...

class Pairs:
    def __init__(self, x: Rows, t: Rows, dim: int, scale: float, bias: float, offset: int) -> None: ...

class Gradient:
    def __init__(
        self, of_text: bool, factor: float, out: int, out_type: int, kept: int, kept_stride: int
    ) -> None: ...  # fmt: skip

class Scratch:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def release_scratch() -> None: ...
def pairs_isa_levels() -> list[str]: ...
def pairs_stats(
    pairs: Pairs, row: int, row_stride: int, col: int, col_stride: int, own: int, keep: int, keep_stride: int,
    threads: int, isa: str = "",
) -> None: ...  # fmt: skip
def pairs_softmax_gradient(
    pairs: Pairs, gradient: Gradient, row_max: int, row_sum: int, col_max: int, col_sum: int, row_weight: float,
    col_weight: float, own: int, threads: int, isa: str = "",
) -> None: ...  # fmt: skip
def pairs_sigmoid(
    pairs: Pairs, gradient: Gradient, alpha: float, loss: int, d_scale: int, d_bias: int, keep: int,
    keep_stride: int, threads: int, isa: str = "",
) -> None: ...  # fmt: skip

class Attention:
    def __init__(
        self, qkv: int, type: int, batch: int, tokens: int, heads: int, dim: int, scale: float, causal: bool
    ) -> None: ...  # fmt: skip

def attention_forward(attention: Attention, out: int, lse: int, threads: int, isa: str = "") -> None: ...
def attention_backward(
    attention: Attention, d_out: int, lse: int, d_qkv: int, out: int, threads: int, isa: str = "",
) -> None: ...  # fmt: skip
def blocks_isa_levels() -> list[str]: ...
def layernorm_cpu(
    x: int, residual: int, weight: int, bias: int, eps: float, y: int, stream: int, mean: int, rstd: int,
    rows: int, width: int, type: int, threads: int, isa: str = "",
) -> None: ...  # fmt: skip
def layernorm_backward_cpu(
    dy: int, stream: int, mean: int, rstd: int, weight: int, bias: int, d_stream: int, dx: int, y: int,
    d_weight: int, d_bias: int, rows: int, width: int, type: int, threads: int, isa: str = "",
) -> None: ...  # fmt: skip
def bias_act_cpu(
    h: int, bias: int, a: int, rows: int, width: int, activation: int, type: int, threads: int, isa: str = "",
) -> None: ...  # fmt: skip
def bias_act_backward_cpu(
    da: int, h: int, bias: int, dh: int, a: int, d_bias: int, rows: int, width: int, activation: int, type: int,
    threads: int, isa: str = "",
) -> None: ...  # fmt: skip
def cuda_device_count() -> int: ...
def contrastive_stats_scratch(rows: int, cols: int, block_rows: int, block_cols: int) -> int: ...
def sigmoid_scratch(rows: int, cols: int, block_rows: int, block_cols: int) -> int: ...
def contrastive_stats_cuda(
    x: int, x_stride: int, t: int, t_stride: int, rows: int, cols: int, dim: int, type: int, a: int, q: int,
    scale: int, bias: int, offset: int, block_rows: int, block_cols: int, products: int, products_stride: int,
    kept: bool, gemm: int, handle: int, row: int, row_stride: int, col: int, col_stride: int, own: int, scratch: int,
    device: int, stream: int,
) -> None: ...  # fmt: skip
def contrastive_gradient_cuda(
    x: int, x_stride: int, t: int, t_stride: int, rows: int, cols: int, dim: int, type: int, a: int, q: int,
    scale: int, bias: int, offset: int, block_rows: int, block_cols: int, products: int, products_stride: int,
    kept: bool, gemm: int, handle: int, row: int, row_stride: int, col: int, col_stride: int, row_weight: float,
    col_weight: float, own_g: int, g: int, g_stride: int, left: int, right: int, factor: float,
    scaled: bool, image: int, image_stride: int, image_type: int, text: int, text_stride: int, device: int,
    stream: int,
) -> None: ...  # fmt: skip
def sigmoid_cuda(
    x: int, x_stride: int, t: int, t_stride: int, rows: int, cols: int, dim: int, type: int, a: int, q: int,
    scale: int, bias: int, offset: int, block_rows: int, block_cols: int, products: int, products_stride: int,
    kept: bool, gemm: int, handle: int, alpha: float, loss: int, d_scale: int, d_bias: int, scratch: int, g: int,
    g_stride: int, left: int, right: int, factor: float, scaled: bool, image: int, image_stride: int, image_type: int,
    text: int, text_stride: int, device: int, stream: int,
) -> None: ...  # fmt: skip
def own_pairs_cuda(
    row: int, row_stride: int, col: int, col_stride: int, own: int, n: int, scale: int, bias: int, weight: float,
    out: int, device: int, stream: int,
) -> None: ...  # fmt: skip
def widen_cuda(
    codes: int, stride: int, rows: int, dim: int, out: int, type: int, device: int, stream: int,
) -> None: ...  # fmt: skip
def layernorm_parts(rows: int, width: int, type: int, multiprocessors: int) -> int: ...
def bias_act_parts(rows: int, width: int, type: int, multiprocessors: int) -> int: ...
def layernorm_cuda(
    x: int, residual: int, weight: int, bias: int, eps: float, y: int, s: int, mean: int, rstd: int, rows: int,
    width: int, type: int, device: int, stream: int,
) -> None: ...  # fmt: skip
def layernorm_backward_cuda(
    dy: int, s: int, mean: int, rstd: int, weight: int, bias: int, d_s: int, dx: int, y: int, d_weight: int,
    d_bias: int, scratch: int, parts: int, rows: int, width: int, type: int, device: int, stream: int,
) -> None: ...  # fmt: skip
def bias_act_cuda(
    h: int, bias: int, a: int, rows: int, width: int, multiprocessors: int, activation: int, type: int, device: int,
    stream: int,
) -> None: ...  # fmt: skip
def bias_act_backward_cuda(
    da: int, h: int, bias: int, dh: int, a: int, d_bias: int, scratch: int, parts: int, rows: int, width: int,
    activation: int, type: int, device: int, stream: int,
) -> None: ...  # fmt: skip

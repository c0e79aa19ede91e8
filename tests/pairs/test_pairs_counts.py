"""Counts what the "cuda" backend of the pair losses does at full size: products, and the bytes of features they read.

The real driver (score_tiles.cu) runs, with kernels that do nothing and a cublasGemmEx that records its arguments.
"""

import ctypes

import pytest
import torch
from support.cuda_emulator import emulate

from lift_fast.ops import tuned
from lift_fast.ops.pairs import contract as pairs
from lift_fast.ops.pairs import contrastive as contrastive_op
from lift_fast.ops.pairs import cuda as cuda_pairs
from lift_fast.ops.pairs.contrastive import contrastive
from lift_fast.ops.pairs.sigmoid import sigmoid

GEMM = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int] * 5, *[ctypes.c_void_p] * 2, *[ctypes.c_int] * 2, ctypes.c_void_p,
    *[ctypes.c_int] * 2, *[ctypes.c_void_p] * 2, *[ctypes.c_int] * 4,
)  # fmt: skip
FREE = 80 * 10**9


class Counter:
    """Records (rows, columns, summed dimension) of every product, in row-major terms."""

    def __init__(self):
        self.products: list[tuple[int, int, int]] = []
        self.function = GEMM(self._gemm)  # kept alive here

    def _gemm(self, handle, trans_a, trans_b, m, n, k, *rest):
        self.products.append((n, m, k))
        return 0

    @property
    def address(self):
        return ctypes.cast(self.function, ctypes.c_void_p).value

    def matrices(self, rows, dim):
        """All products together, in units of rows x rows x dim."""
        return sum(n * m * k for n, m, k in self.products) / (rows * rows * dim)


@pytest.fixture(scope="module")
def without_kernels(tmp_path_factory):
    return emulate(
        tmp_path_factory.mktemp("without_kernels"),
        ["contrastive", "positives", "sigmoid", "score_tiles", "dequant"],
        ["pairs"],
        edit=lambda text: text.replace("emulated::launch(", "emulated::skip("),
        called="counted",
    )


@pytest.fixture
def counter(monkeypatch, without_kernels):
    """A pretended H100 with 80 GB of free memory."""
    counter = Counter()
    monkeypatch.setattr(cuda_pairs, "_C", without_kernels)
    monkeypatch.setattr(cuda_pairs, "launch_on", lambda tensor: {"device": 0, "stream": 0})
    monkeypatch.setattr(cuda_pairs, "_gemm", lambda x: (counter.address, 0))
    monkeypatch.setattr(contrastive_op, "free_memory", lambda device: FREE)
    monkeypatch.setitem(pairs.BACKENDS.loaded, "cuda", cuda_pairs)
    monkeypatch.setitem(pairs.BACKENDS.by_device, "cpu", ("cuda",))
    monkeypatch.setattr(tuned, "gpu", lambda family, device: "sm_90")
    return counter


def run(op, rows, dim, trained=False, **options):
    """Without kernels nothing touches the features, so that torch.empty costs no memory."""
    image, text = (torch.empty(rows, dim, dtype=torch.bfloat16) for _ in range(2))
    op(image.requires_grad_(), text.requires_grad_(trained), 14.3, backend="cuda", **options)


@pytest.mark.parametrize("rows", [16384, 65536])
@pytest.mark.parametrize("dim", [768, 4096])
def test_products_of_fixed_text(rows, dim, counter):
    """One for the scores and one for the gradient; one more if scores are recomputed, as the table says for 768."""
    run(contrastive, rows, dim)
    assert counter.matrices(rows, dim) == pytest.approx(2 if dim == 4096 else 3)
    counter.products.clear()
    run(contrastive, rows, dim, budget=0)
    assert counter.matrices(rows, dim) == pytest.approx(3)
    counter.products.clear()
    run(sigmoid, rows, dim)
    assert counter.matrices(rows, dim) == pytest.approx(2)


def test_trained_text_adds_one_product(counter):
    run(contrastive, 16384, 512, trained=True)
    assert counter.matrices(16384, 512) == pytest.approx(4)
    counter.products.clear()
    run(sigmoid, 16384, 512, trained=True)
    assert counter.matrices(16384, 512) == pytest.approx(3)


@pytest.mark.parametrize("rows", [16384, 65536, 50000])
@pytest.mark.parametrize("dim", [768, 4096])
def test_features_are_read_once_a_block(rows, dim, counter):
    """Forming the scores reads both sides of every block; strips of 128 rows would read 11 times as much."""
    high, wide = tuned.lookup("pairs", "sm_90", "block", dim=dim)
    run(contrastive, rows, dim)
    passes = 1 if dim == 4096 else 2  # kept, or recomputed
    forming = [(m, n) for m, n, k in counter.products if k == dim]
    assert sum(m * n for m, n in forming) == passes * rows * rows
    assert sum(m + n for m, n in forming) <= 1.3 * passes * rows * rows * (1 / high + 1 / wide)
    gradients = [(m, k) for m, _, k in counter.products if k != dim]
    assert sum(m for m, _ in gradients) == rows and all(k == rows for _, k in gradients)
    # The texts are read once more for each band of G, of half a GiB.
    assert len(gradients) <= 1 + 1.3 * rows * rows * 2 / (512 << 20)


def test_a_failure_of_cublas_is_told(counter, monkeypatch):
    broken = GEMM(lambda *arguments: 13)
    monkeypatch.setattr(cuda_pairs, "_gemm", lambda x: (ctypes.cast(broken, ctypes.c_void_p).value, 0))
    with pytest.raises(RuntimeError, match="cuBLAS failed to execute"):
        run(contrastive, 64, 512)

"""QuantizedRows of every codec: widening, slicing, and operands for matrix products."""

import pytest
import torch

from lift_fast.cache import Rotation, encode
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.dequant import reference
from lift_fast.ops.rows.quantized import QuantizedRows


@pytest.fixture(params=CODECS)
def rows(request):
    rotation = Rotation(6) if CODECS[request.param].rotated else None
    return encode(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), request.param, rotation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widen_is_the_op(rows, dtype):
    index = torch.tensor([8, 0, 0])
    kind = {"codec": rows.codec, "dim": 6}
    assert torch.equal(rows.widen(dtype), reference(rows.codes, rows.scales, None, dtype, **kind))
    assert torch.equal(rows.widen(dtype, index), reference(rows.codes, rows.scales, index, dtype, **kind))
    long = rows.widen(torch.float32, index, normalize=True).norm(dim=1)
    torch.testing.assert_close(long, torch.ones(3))


def test_widen_to_float64_is_the_float32_product(rows):
    wide = rows.widen(torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide, rows.widen().double())


def test_slices_and_concatenation(rows):
    assert len(rows) == 9
    joined = QuantizedRows.cat([rows[:4], rows[4:4], rows[4:]])
    assert torch.equal(joined.widen(), rows.widen()) and joined.codes.shape == rows.codes.shape
    some = rows[torch.tensor([5, 1])]
    assert torch.equal(some.widen(), rows.widen()[[5, 1]])
    assert rows[2:5].codes.data_ptr() == rows.codes[2:5].data_ptr()
    assert torch.equal(rows.to("cpu").widen(), rows.widen())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_the_vectors(rows, dtype):
    factor, scales = rows.factors(dtype)
    assert factor.shape == (9, 6) and (scales is not None) == (factor.dtype == torch.int8)
    assert CODECS[rows.codec].integer == (factor.dtype == torch.int8)
    wide = factor.float() if scales is None else factor.float() * scales[:, None]
    tolerance = 0 if rows.codec != "fp8" or dtype == torch.float32 else 2**-8
    torch.testing.assert_close(wide, rows.widen(), atol=0, rtol=tolerance)


def test_what_does_not_fit_is_refused():
    rows = encode(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), "int8")
    codes, scales = rows.codes, rows.scales
    for arguments, words in [
        ((codes, scales, "int5", 6), "codec 'int5' is unknown"),
        ((codes, scales, "int4r", 6), r"codes must be uint8 \[rows, 3\]"),
        ((codes, None, "int8", 6), r"scales must be float32 \[9\], not none"),
        ((codes.float(), scales, "f32", 6), "codec f32 has no scales"),
        ((codes.float(), scales, "int8", 6), "codes must be int8"),
        ((codes, scales, "int8", 7), r"codes must be int8 \[rows, 7\]"),
        ((codes, scales[1:], "int8", 6), r"scales must be float32 \[9\]"),
        ((codes, scales.double(), "int8", 6), "scales must be float32"),
    ]:
        with pytest.raises(ValueError, match=words):
            QuantizedRows(*arguments)
    with pytest.raises(ValueError, match="nothing to concatenate"):
        QuantizedRows.cat([])
    with pytest.raises(ValueError, match="differ in codec or dim"):
        QuantizedRows.cat([rows, encode(torch.ones(1, 5), "int8")])

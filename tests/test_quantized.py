import pytest
import torch

from lift_fast.cache import encode_int8
from lift_fast.ops.dequant import reference
from lift_fast.quantized import QuantizedRows


@pytest.fixture
def rows():
    return encode_int8(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widen_is_the_op(rows, dtype):
    index = torch.tensor([8, 0, 0])
    assert torch.equal(rows.widen(dtype), reference(rows.codes, rows.scales, None, dtype))
    assert torch.equal(rows.widen(dtype, index), reference(rows.codes, rows.scales, index, dtype))


def test_widen_to_float64_is_the_float32_product(rows):
    wide = rows.widen(torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide, rows.widen().double())


def test_slices_and_concatenation(rows):
    assert len(rows) == 9
    joined = QuantizedRows.cat([rows[:4], rows[4:4], rows[4:]])
    assert torch.equal(joined.codes, rows.codes) and torch.equal(joined.scales, rows.scales)
    some = rows[torch.tensor([5, 1])]
    assert torch.equal(some.widen(), rows.widen()[[5, 1]])
    assert rows[2:5].codes.data_ptr() == rows.codes[2:5].data_ptr()
    assert torch.equal(rows.to("cpu").widen(), rows.widen())


def test_what_does_not_fit_is_refused(rows):
    codes, scales = rows.codes, rows.scales
    for arguments, words in [
        ((codes, scales, "int4r", 6), "codec 'int4r' is unknown"),
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
        QuantizedRows.cat([rows, encode_int8(torch.ones(1, 5))])

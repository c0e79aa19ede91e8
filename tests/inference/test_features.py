"""inference/feature_files.py: each format read back by the library that others read it with."""

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.forked import forked
from support.tiny_models import tiny_model
from support.tiny_sets import keys_of, make_set

from lift_fast import files as whole
from lift_fast.errors import BackendError, ConfigError, DataError
from lift_fast.inference import feature_files
from lift_fast.inference import store as storing
from lift_fast.inference.feature_files import embed_images
from lift_fast.inference.features import open_images


@pytest.fixture
def model():
    return tiny_model()


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """Features and keys of a file, as a user reads them."""
    if path.suffix == ".npy":
        return np.load(path), path.with_suffix(".keys.txt").read_text().splitlines()
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        text, ends = tensors["keys"].numpy().tobytes(), tensors["key_ends"].tolist()
        keys = [text[begin:end].decode() for begin, end in zip([0, *ends], ends, strict=False)]
        return tensors["features"].numpy(), keys
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    kind = table.schema.field("feature").type
    assert kind.list_size == 7
    return np.array(table["feature"].to_pylist(), kind.value_type.to_pandas_dtype()), table["key"].to_pylist()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_formats(tmp_path, model, suffix, dtype):
    data = make_set(tmp_path / "data", 11, broken=(0, 5))
    store = embed_images(model, data, tmp_path / f"x{suffix}", dtype, batch_size=2)
    features, keys = read(tmp_path / f"x{suffix}")
    good = [i for i in range(11) if i not in (0, 5)]
    assert keys == [keys_of(data)[i] for i in good] and [bad.sample for bad in store.bad] == [0, 5]
    expected = torch.cat([model.encode_image(data.image_bytes(i)) for i in good]).numpy()
    assert features.dtype == dtype and features.shape == (9, 7)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6 if dtype == "float32" else 5e-4)
    names = {"data", f"x{suffix}"} | ({"x.keys.txt"} if suffix == ".npy" else set())
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_killed_run_goes_on(tmp_path, model, monkeypatch):
    data, out = make_set(tmp_path / "data", 12), tmp_path / "x.npy"
    write = storing._write

    def killed(path, content, remedy):
        write(path, content, remedy)
        if path.name == "00001.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(storing, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        embed_images(model, data, out)
    assert not out.exists()
    monkeypatch.setattr(storing, "_write", write)
    model.module.seen = 0
    embed_images(model, data, out)
    assert model.module.seen == 4 and not (tmp_path / "x.npy.partial").exists()
    features, keys = read(out)
    assert keys == keys_of(data)
    embed_images(tiny_model(), data, tmp_path / "other.npy")
    assert np.array_equal(features, np.load(tmp_path / "other.npy"))


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_a_disk_that_is_full_leaves_no_file(tmp_path, model, monkeypatch, suffix):
    data, out = make_set(tmp_path / "data", 6), tmp_path / f"x{suffix}"

    flush = whole._flush

    def full(part):
        if ".partial" not in part.name:
            raise OSError(28, "No space left on device")
        flush(part)

    with monkeypatch.context() as patch:
        patch.setattr(whole, "_flush", full)
        with pytest.raises(ConfigError, match="No space left.*name another --out"):
            embed_images(model, data, out)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (suffix, ".part", ".txt")]
    model.module.seen = 0
    embed_images(model, data, out)
    assert model.module.seen == 0 and len(read(out)[1]) == 6


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_another_process_that_writes_the_same_file_meanwhile(tmp_path, model, monkeypatch, suffix, same):
    """The same features are the same file, and both have succeeded; others are not replaced."""
    data, out = make_set(tmp_path / "data", 6), tmp_path / f"x{suffix}"

    def meanwhile(*args, **options):
        store = build(*args, **options)
        if not out.exists():
            with monkeypatch.context() as patch:
                patch.setattr(feature_files, "build", build)
                forked(lambda: len(embed_images(model if same else tiny_model(1), data, out)))
            assert (tmp_path / f"x{suffix}.partial").exists()  # this one uses it still
        return store

    build = feature_files.build
    monkeypatch.setattr(feature_files, "build", meanwhile)
    if same:
        assert len(embed_images(model, data, out)) == 6 and not (tmp_path / f"x{suffix}.partial").exists()
    else:
        with pytest.raises(DataError, match="exists already; remove it or name another --out"):
            embed_images(model, data, out)
    monkeypatch.undo()
    embed_images(model if same else tiny_model(1), data, tmp_path / f"y{suffix}")
    assert out.read_bytes() == (tmp_path / f"y{suffix}").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_settings_are_checked_before_anything_is_computed(tmp_path, model, monkeypatch):
    data = make_set(tmp_path / "data", 3)
    for out, dtype, reason in (("x.bin", "float32", "must end in"), ("x.npy", "float64", "dtype must be float32 or")):
        with pytest.raises(ConfigError, match=reason):
            embed_images(model, data, tmp_path / out, dtype)
    for name in ("x.npy", "y.keys.txt"):
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match="exists already; remove it"):
            embed_images(model, data, tmp_path / f"{name[0]}.npy")
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match=r"pip install 'lift-fast\[parquet\]'"):
        embed_images(model, data, tmp_path / "x.parquet")
    assert model.module.seen == 0


def test_no_image_decodes(tmp_path, model):
    with pytest.raises(DataError, match=r"no image decodes \(2 not a picture\)"):
        embed_images(model, make_set(tmp_path / "data", 2, broken=(0, 1)), tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


def test_keys_of_any_text(tmp_path, model):
    """A line of a text file cannot hold a line break; the other formats can."""
    from test_store import images

    folder = images(tmp_path / "data", "a.png", "b\nc.png", "käse.png")
    with pytest.raises(ConfigError, match=r"the key 'b\\nc' holds a line break"):
        embed_images(model, open_images(folder), tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists() and not (tmp_path / "x.keys.txt").exists()
    for suffix in (".safetensors", ".parquet"):
        embed_images(model, open_images(folder), tmp_path / f"x{suffix}")
        assert read(tmp_path / f"x{suffix}")[1] == ["a", "b\nc", "käse"]
    (folder / "b\nc.png").unlink()
    embed_images(model, open_images(folder), tmp_path / "x.npy")
    assert read(tmp_path / "x.npy")[1] == ["a", "käse"]

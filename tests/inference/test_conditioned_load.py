"""lift_fast.load of runs whose text is conditioned: every form applies it, and only texts need its file."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import complete  # noqa: F401
from support.conditioned_sets import ConeEncoder, conditioned, embedded, fitted, formula, make_encoder
from support.ranks import SMALL
from support.tiny_sets import make_set

import lift_fast
from lift_fast import run_folder
from lift_fast.cache import Cache, Conditioning, Rotation
from lift_fast.cache.conditioning import CONDITIONING
from lift_fast.cli.main import main
from lift_fast.errors import CacheError, CacheMismatch, ConfigError, DataError
from lift_fast.inference.sources import find
from lift_fast.nn import PRESETS
from lift_fast.text.encoder import Encoder
from lift_fast.train.config import TrainConfig
from lift_fast.train.loop import train

CAPTIONS = [f"caption {i}" for i in range(19)]
TEXTS = ["a red ball", *CAPTIONS, "two dogs on a beach"]
CODECS = ("f32", "int8", "int8r")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The preset "small", and an encoder that takes no time."""
    monkeypatch.setitem(PRESETS, "small", SMALL)
    monkeypatch.setattr(run_folder, "Encoder", make_encoder)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """For each of CODECS a conditioned cache and a run; and a run of CLIP. Finished ones, with weights on the way."""
    root = tmp_path_factory.mktemp("runs")
    make_set(root / "data", len(CAPTIONS), per_shard=7)
    plain = embedded(root / "data", root / "plain")
    conditioning = fitted(plain, power=0.75, dim=13)
    settings = {"preset": "small", "steps": 5, "batch_size": 6, "warmup": 1, "precision": "fp32", "context": 12}
    settings |= {"save_every": 2, "save_weights": True, "data": (root / "data",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small", SMALL)
        for codec in CODECS:
            cache = conditioned(plain, root / "cache" / codec, conditioning, codec)
            train(TrainConfig("lift", out=root / codec, cache=(cache,), **settings), progress=False)
        train(TrainConfig("clip", out=root / "clip", **settings), progress=False)
    return root


def unfinished(run: Path, to: Path) -> Path:
    """A copy of a run as it was before its last step, with checkpoints of steps 2 and 4."""
    shutil.copytree(run, to)
    for name in ("run.json", "model.safetensors"):
        (to / name).unlink()
    return to


def opened(source, **options):
    return lift_fast.load(source, device="cpu", **options)


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)


def sources_of(run: Path, begun: Path) -> list[Path]:
    weights = run / "weights" / "step-00000002"
    return [
        run,
        run / "model.safetensors",
        weights,
        weights / "model.safetensors",
        run / "checkpoints" / "step-00000004",
        begun,
        begun / "checkpoints" / "step-00000002",
    ]


@pytest.mark.parametrize("codec", CODECS)
def test_every_form_of_a_run_conditions_its_texts(root, tmp_path, codec):
    """A text is encoded as the cache's row of the same caption, to the codec's error, without the cache."""
    cache = Cache(root / "cache" / codec)
    everywhere = torch.arange(len(CAPTIONS))
    stored, scales = cache.widen(everywhere), cache.rows(everywhere).scales
    wanted = formula(cache.conditioning, TEXTS)
    if codec == "int8r":
        wanted = Rotation(13).apply(wanted)
    moved = shutil.copytree(root / codec, tmp_path / "moved")
    for source in sources_of(moved, unfinished(root / codec, tmp_path / "begun")):
        model = opened(source)
        found = model.encode_text(TEXTS)
        assert found.dtype == torch.float32 and found.shape == (len(TEXTS), 13)
        assert (found - wanted).abs().max() < 3e-6, source
        bound = 3e-6 if scales is None else 0.501 * scales[:, None] + 1e-6
        assert ((found[1:-1] - stored).abs() <= bound).all(), source
        assert model.conditioning.as_dict() == model.description["conditioning"] == cache.manifest.conditioning
        assert model.similarity(model.encode_image(image()), found).shape == (1, len(TEXTS))
        assert find(str(source)).conditioning.as_dict() == cache.manifest.conditioning


def test_an_encoder_in_another_place_keeps_the_conditioning(root):
    given = opened(root / "int8r", encoder="tiny in a folder")
    assert given.description["encoder"]["name"] == "tiny in a folder"
    assert torch.equal(given.encode_text(TEXTS), opened(root / "int8r").encode_text(TEXTS))
    with pytest.raises(CacheMismatch, match="short gives vectors of dim 19, the conditioning of this run is for 24"):
        opened(root / "f32", encoder="short").encode_text(TEXTS)


def test_models_without_one(root, tmp_path):
    clip = opened(root / "clip")
    assert clip.conditioning is None and find(str(root / "clip")).conditioning is None
    run = run_folder.read_description(root / "f32")
    del run["conditioning"]
    plain = tmp_path / "plain"
    plain.mkdir()
    wide = run | {"text_dim": 24}
    run_folder.save(plain, run_folder.build(wide), wide)
    model = opened(plain)
    assert model.conditioning is None
    assert sorted(path.name for path in plain.iterdir()) == ["model.safetensors", "run.json"]
    assert torch.equal(model.encode_text(TEXTS), ConeEncoder().encode(TEXTS))


def test_the_file_is_read_where_it_was_when_the_model_was_loaded(root, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    model = opened("f32")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(model.encode_text(TEXTS), opened(root / "f32").encode_text(TEXTS))


@pytest.mark.parametrize("damage", ["gone", "cut", "of another"])
@pytest.mark.parametrize("finished", [True, False])
def test_images_do_without_the_file_and_texts_say_what_is_wrong(root, tmp_path, damage, finished):
    folder = unfinished(root / "f32", tmp_path / "run")
    if finished:
        for name in ("run.json", "model.safetensors"):
            shutil.copy(root / "f32" / name, folder)
    features = opened(folder).encode_image(image())
    file = folder / CONDITIONING
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.write_bytes(fitted(Cache(root / "plain"), dim=13).to_bytes())
    model = opened(folder)
    assert torch.equal(model.encode_image(image()), features)
    said = "cannot be read" if damage == "gone" else "is damaged or another cache's: its checksum is wrong"
    for ask in (lambda: model.encode_text("a dog"), lambda: model.zero_shot(["a", "b"]), lambda: model.conditioning):
        with pytest.raises(CacheError, match=f"{file} {said}.*copy it from a cache or run with the same conditioning"):
            ask()
    shutil.copy(root / "cache" / "int8" / CONDITIONING, file)  # what the message says
    assert torch.equal(model.encode_text(TEXTS), opened(root / "f32").encode_text(TEXTS))


@pytest.mark.parametrize("entry", [3, "x", [], {}, {"power": 0.5, "source_dim": 24, "sha256": "short"}])
def test_a_damaged_entry_is_refused(root, tmp_path, entry):
    folder = shutil.copytree(root / "f32", tmp_path / "run")
    run = json.loads((folder / "run.json").read_text()) | {"conditioning": entry}
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="conditioning") as caught:
        opened(folder)
    assert len(str(caught.value)) < 600


def test_a_started_json_of_before_has_no_entry(root, tmp_path):
    """An unfinished run without it has no conditioning; its head has the encoder's dim."""
    folder = tmp_path / "run"
    settings = {"preset": "small", "steps": 3, "batch_size": 6, "warmup": 1, "precision": "fp32", "save_every": 2}
    config = TrainConfig("lift", out=folder, data=(root / "data",), cache=(root / "plain",), **settings)
    train(config, progress=False)
    for name in ("run.json", "model.safetensors"):
        (folder / name).unlink()
    started = json.loads((folder / "started.json").read_text())
    assert "conditioning" not in started["fingerprints"]["caches"][0]
    model = opened(folder)
    assert model.conditioning is None and model.description["conditioning"] is None
    assert (model.encode_text(CAPTIONS) - Cache(root / "plain").widen(torch.arange(len(CAPTIONS)))).abs().max() == 0


def test_from_captions_to_use_with_a_real_encoder(tmp_path, monkeypatch, capfd):
    """The commands one after the other; without the caches, a text is encoded as the cache has it, and found."""
    monkeypatch.setattr(run_folder, "Encoder", Encoder)
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "data", 70, per_shard=30)
    main([*"embed --data data --out cache --codec f32 --condition 0.5 --condition-dim 16".split()])
    settings = "--preset tiny --steps 4 --batch-size 16 --warmup 1 --precision fp32 --eval-every 4"
    main([*f"train --model lift --data data --cache cache --out run --eval-data data {settings}".split()])
    rows = Cache("cache").widen(torch.arange(70))
    shutil.rmtree("cache")
    model = opened("run")
    found = model.encode_text([f"caption {i}" for i in range(70)])
    assert model.conditioning.source_dim == 384 and found.shape == (70, 16)
    assert (found - rows).abs().max() < 2e-6
    main([*"eval --run run --data data --json eval.json".split()])
    scores = json.loads(Path("eval.json").read_text())["retrieval"]["data"]
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["evaluation"]["data"]
    assert (scores["t2i"]["r1"], scores["i2t"]["r1"]) == (last["t2i_r1"], last["i2t_r1"])
    assert "data: R@1/5/10" in capfd.readouterr().out


def test_a_folder_that_has_the_file_alone_is_no_model(root, tmp_path):
    shutil.copy(root / "f32" / CONDITIONING, tmp_path)
    with pytest.raises(DataError, match="no model at"):
        opened(tmp_path)
    assert Conditioning.load(tmp_path).dim == 13

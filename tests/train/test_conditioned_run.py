"""Runs that are trained on conditioned caches: they carry the conditioning, and apply it to every text themselves."""

import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import complete  # noqa: F401
from support.conditioned_sets import conditioned, embedded, fitted, formula, make_encoder
from support.evaluated import evaluated
from support.ranks import SMALL, in_group, on_ranks, trained
from support.tiny_sets import png

from lift_fast import files, run_folder
from lift_fast.cache import Cache, Conditioning, Rotation
from lift_fast.cache.conditioning import CONDITIONING
from lift_fast.cli.main import main
from lift_fast.data.open import open_sets
from lift_fast.data.shards import ShardWriter
from lift_fast.errors import CacheError, CacheMismatch, ConfigError, Stopped, TrainingError
from lift_fast.nn import PRESETS
from lift_fast.text.cached import CachedText
from lift_fast.train import folder
from lift_fast.train.config import TrainConfig
from lift_fast.train.identity import fingerprints
from lift_fast.train.loop import train

CPU = torch.device("cpu")
SETTINGS = {"preset": "small", "steps": 5, "batch_size": 6, "warmup": 1, "precision": "fp32", "lr": 0.02}


def captions_of(name: str, count: int) -> list[str]:
    """Different ones in every set."""
    return [f"{name} {i} of {random.Random(f'{name} {i}').random()}" for i in range(count)]


def write_set(folder: Path, name: str, count: int) -> Path:
    rng = random.Random(name)
    with ShardWriter(folder, 6) as writer:
        for i, caption in enumerate(captions_of(name, count)):
            writer.write(f"{name}-{i:03d}", png(rng), caption, {})
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The preset "small", and an encoder that takes no time."""
    monkeypatch.setitem(PRESETS, "small", SMALL)
    monkeypatch.setattr(run_folder, "Encoder", make_encoder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Data sets a, b and held; their plain caches; those of a and b conditioned alike in several codecs; and in f32
    with other powers, axes and samples."""
    root = tmp_path_factory.mktemp("sets")
    plain = {}
    for name, count in (("a", 17), ("b", 14), ("held", 25)):
        plain[name] = embedded(write_set(root / name, name, count), root / "plain" / name)
    both = plain["a"], plain["b"]
    kinds = {
        "f32": (fitted(*both), "f32"),
        "int8": (fitted(*both), "int8"),
        "int8r": (fitted(*both), "int8r"),
        "int4r": (fitted(*both), "int4r"),
        "other power": (fitted(*both, power=0.25), "f32"),
        "other axes": (fitted(*both, dim=9), "f32"),
        "other captions": (fitted(*both, rows=13), "f32"),
    }
    for kind, (conditioning, codec) in kinds.items():
        for name in ("a", "b"):
            conditioned(plain[name], root / kind / name, conditioning, codec)
    return root


def config_of(sets: Path, out: Path, kind: str = "f32", **changes) -> TrainConfig:
    caches = (sets / kind / "a", sets / kind / "b")
    return TrainConfig("lift", **{"data": (sets / "a", sets / "b"), "out": out, "cache": caches} | SETTINGS | changes)


def quiet(config: TrainConfig, **options) -> dict:
    return train(config, progress=False, **options)


def queries(folder: Path, captions: list[str]) -> torch.Tensor:
    """What the run's own folder makes of texts."""
    run = run_folder.read_description(folder)
    return run_folder.frozen_encoder(run, CPU, conditioning=run_folder.conditioning_of(folder, run))(captions)


# ---- queries


@pytest.mark.parametrize("codec", ["f32", "int8", "int8r", "int4r"])
def test_a_query_is_the_row_of_the_same_caption(sets, tmp_path, codec):
    """To the codec's error, which is half a step of each number; and to rounding the definition, in float64."""
    out = tmp_path / "out"
    run = quiet(config_of(sets, out, codec))
    captions = captions_of("a", 17)
    found = queries(out, captions)
    assert found.dtype == torch.float32 and found.shape == (17, run["text_dim"]) == (17, 11)
    assert (found.double().norm(dim=1) - 1).abs().max() < 1e-6
    conditioning = Conditioning.load(out)
    wanted = formula(conditioning, captions)
    if run["rotation"] is not None:
        wanted = Rotation.from_dict(run["rotation"], 11).apply(wanted)
    assert (found - wanted).abs().max() < 2e-6
    cache = Cache(sets / codec / "a")
    rows = cache.rows(torch.arange(17))
    stored = cache.widen(torch.arange(17))
    if codec == "f32":
        assert (stored - found).abs().max() < 2e-6
    elif codec.startswith("int8"):
        assert ((stored - found).abs() <= 0.501 * rows.scales[:, None] + 1e-6).all()
    else:
        assert torch.nn.functional.cosine_similarity(stored, found).min() > 0.98
    assert run["conditioning"] == cache.manifest.conditioning == conditioning.as_dict()
    assert run_folder.read_description(out)["conditioning"] == run["conditioning"]


@pytest.mark.parametrize("count", [0, 1, 300])
def test_any_number_of_queries(sets, tmp_path, count):
    quiet(config_of(sets, tmp_path / "out", steps=1))
    texts = [f"text {i}" for i in range(count)]
    found = queries(tmp_path / "out", texts)
    assert found.shape == (count, 11)
    if count:
        assert (found - formula(Conditioning.load(tmp_path / "out"), texts)).abs().max() < 2e-6


def test_texts_of_another_dim_are_refused(sets, tmp_path):
    out = tmp_path / "out"
    run = quiet(config_of(sets, out))
    conditioning = run_folder.conditioning_of(out, run)
    short = run | {"encoder": run["encoder"] | {"name": "short"}}
    with pytest.raises(CacheMismatch, match=r"short gives vectors of dim 19, the conditioning of this run is for 24$"):
        run_folder.frozen_encoder(short, CPU, conditioning=conditioning)
    with pytest.raises(CacheMismatch, match="conditioning of this run gives vectors of dim 11, its head 12$"):
        run_folder.frozen_encoder(run | {"text_dim": 12}, CPU, conditioning=conditioning)
    with pytest.raises(CacheError, match="keeps 11 axes, not 12"):
        run_folder.conditioning_of(out, run | {"text_dim": 12})


def test_a_conditioning_that_a_run_does_not_name_is_refused(sets, tmp_path):
    """Left out, superfluous or another one: all would give vectors without an error."""
    out, model = tmp_path / "out", run_folder.build
    run = quiet(config_of(sets, out))
    conditioning = run_folder.conditioning_of(out, run)
    others = [None, Cache(sets / "other captions" / "a").conditioning]
    for described, given in [(run, others[0]), (run, others[1]), (run | {"conditioning": None}, conditioning)]:
        with pytest.raises(ValueError, match="not the conditioning that the run names"):
            run_folder.frozen_encoder(described, CPU, conditioning=given)
        (tmp_path / "saved").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="not the conditioning that the run names"):
            run_folder.save(tmp_path / "saved", model(described), described, given)
    assert not any((tmp_path / "saved").iterdir())


# ---- evaluation


def test_the_scores_while_training_are_those_of_eval_without_the_caches(sets, tmp_path, capfd):
    """Of the weights on the way, and at the end."""
    root = shutil.copytree(sets, tmp_path / "sets")
    held = root / "held"
    config = config_of(root, tmp_path / "out", "int8r", eval_data={"held": held}, eval_every=2, save_every=2)
    texts = []
    quiet(
        replace(config, save_weights=True),
        opened=lambda training: texts.append((training.held_out.texts["held"], config.out.exists())),
    )
    [(seen, existed)] = texts
    assert not existed  # the texts were encoded before there was a folder
    for kind in ("plain", "int8r"):
        shutil.rmtree(root / kind)
    conditioning = Conditioning.load(config.out)
    wanted = Rotation(11).apply(formula(conditioning, captions_of("held", 25)))
    assert (seen(captions_of("held", 25)) - wanted).abs().max() < 2e-6

    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    for step in (2, 4):
        weights = config.out / "weights" / f"step-{step:08d}"
        assert Conditioning.load(weights).as_dict() == conditioning.as_dict()
        scores = evaluated(weights, {"held": held})["retrieval"]["held"]
        while_training = lines[step - 1]["evaluation"]["held"]
        assert scores["n"] == while_training["n"] == 25
        assert (scores["t2i"]["r1"], scores["i2t"]["r1"]) == (while_training["t2i_r1"], while_training["i2t_r1"])
    final = evaluated(config.out, {"held": held})
    assert final["retrieval"]["held"]["n"] == 25
    main(["eval", "--run", str(config.out / "weights" / "step-00000004"), "--data", "held", str(held)])
    assert "held: R@1/5/10" in capfd.readouterr().out


def test_a_run_finds_the_images_that_it_was_trained_on(sets, tmp_path):
    """With texts in the wrong space the scores would be those of chance, 4 % each."""
    config = config_of(sets, tmp_path / "out", steps=150, lr=0.003, data=(sets / "a",), cache=(sets / "f32" / "a",))
    quiet(replace(config, batch_size=17, min_crop_area=1.0))
    scores = evaluated(config.out, {"a": sets / "a"})["retrieval"]["a"]
    assert scores["t2i"]["r1"] > 0.7 and scores["i2t"]["r1"] > 0.7


# ---- caches that do not go together


def test_caches_that_are_conditioned_otherwise_are_refused_with_the_way_out(sets, tmp_path):
    data = open_sets((sets / "a", sets / "b"))

    def refused(first: str, second: str) -> str:
        folders = sets / first / "a", sets / second / "b"
        with pytest.raises(CacheMismatch) as caught:
            CachedText([Cache(path) for path in folders], data)
        assert str(caught.value).startswith(f"{folders[1]} and {folders[0]} differ in conditioning (")
        with pytest.raises(CacheMismatch):
            quiet(config_of(sets, tmp_path / "out", cache=folders))
        assert not (tmp_path / "out").exists()
        return str(caught.value).partition(" differ in conditioning ")[2].replace(f"{sets}", "S")

    assert refused("f32", "plain") == (
        "(none; power 0.5, 11 axes); make them alike: lift-fast cache condition S/plain/b OUT --like S/f32/a"
    )
    assert refused("plain", "f32") == (
        "(power 0.5, 11 axes; none); make them alike: lift-fast cache condition S/plain/a OUT --like S/f32/b"
    )
    again = (
        "condition the cache that {b} was made from: lift-fast cache condition CACHE OUT --like S/f32/a; or embed "
        "again: lift-fast embed --data DATA --out OUT --condition S/f32/a"
    )
    for kind, found in (
        ("other power", "power 0.25, 11 axes; power 0.5, 11 axes"),
        ("other axes", "power 0.5, 9 axes; power 0.5, 11 axes"),
        ("other captions", "both power 0.5, 11 axes, fitted to other captions"),
    ):
        assert refused("f32", kind) == f"({found}); " + again.format(b=f"'S/{kind}/b'")
    alike = conditioned(Cache(sets / "plain/b"), tmp_path / "b", Cache(sets / "f32/a").conditioning)
    text = CachedText([Cache(sets / "f32/a"), Cache(alike)], data)
    assert text.conditioning.as_dict() == Cache(alike).manifest.conditioning and text.dim == 11
    assert CachedText([Cache(sets / "plain" / name) for name in "ab"], data).conditioning is None


def test_a_cache_without_its_conditioning_is_refused_before_the_start(sets, tmp_path):
    for name, damage in {"gone": Path.unlink, "cut": lambda path: path.write_bytes(path.read_bytes()[:-1])}.items():
        cache = shutil.copytree(sets / "f32" / "a", tmp_path / name)
        damage(cache / CONDITIONING)
        with pytest.raises(CacheError, match="cannot be read" if name == "gone" else "its checksum is wrong"):
            quiet(config_of(sets, tmp_path / "out", cache=(cache,), data=(sets / "a",)))
        assert not (tmp_path / "out").exists()


# ---- going on


def stop_after(step: int):
    """For `opened`: the run is asked to stop in this step, counted from 0."""

    def opened(training):
        kept = training.kept

        def interrupted(now: int):
            if now == step:
                signal.raise_signal(signal.SIGTERM)
            return kept(now)

        training.kept = interrupted

    return opened


@pytest.mark.parametrize("codec", ["f32", "int8r"])
def test_a_stopped_run_goes_on_to_the_same_bits(sets, tmp_path, codec):
    config = config_of(sets, tmp_path / "a", codec)
    whole = quiet(config)
    stopped = replace(config, out=tmp_path / "b")
    with pytest.raises(Stopped):
        quiet(stopped, opened=stop_after(2))
    assert (stopped.out / CONDITIONING).read_bytes() == (sets / codec / "b" / CONDITIONING).read_bytes()
    run = quiet(stopped)
    assert run["loss"] == whole["loss"] and run["conditioning"] == whole["conditioning"]
    ours, theirs = (load_file(out / "model.safetensors") for out in (stopped.out, config.out))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (stopped.out / CONDITIONING).read_bytes() == (config.out / CONDITIONING).read_bytes()
    assert quiet(stopped) == json.loads((stopped.out / "run.json").read_text())  # complete


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ("f32", "other power", "another cache (1 of 2): conditioning power 0.5, now power 0.25"),
        ("f32", "other captions", "another cache (1 of 2): a conditioning that was fitted to other captions"),
        ("f32", "other axes", "another cache (1 of 2): dim 11, now 9"),
        ("f32", "plain", "another cache (1 of 2): conditioning power 0.5, now not given"),
        ("plain", "f32", "another cache (1 of 2): conditioning not given, now power 0.5"),
        ("f32", "int8", "another cache (1 of 2): codec f32, now int8"),
    ],
)
def test_a_run_does_not_go_on_with_another_conditioning(sets, tmp_path, then, now, said):
    config = config_of(sets, tmp_path / "out", then)
    with pytest.raises(Stopped):
        quiet(config, opened=stop_after(1))
    with pytest.raises(ConfigError) as caught:
        quiet(config_of(sets, tmp_path / "out", now))
    assert said in str(caught.value) and "sha256" not in str(caught.value)
    quiet(config)


def test_runs_of_before_have_no_such_entry(sets, tmp_path):
    """Without it in started.json they go on, and without it in run.json they are evaluated."""
    plain = [Cache(sets / "plain" / name) for name in "ab"]
    assert "conditioning" not in str(fingerprints(open_sets((sets / "a", sets / "b")), plain))
    config = config_of(sets, tmp_path / "out", "plain")
    quiet(config)
    assert not (config.out / CONDITIONING).exists()
    before = evaluated(config.out, {"held": sets / "held"})
    run = run_folder.read_description(config.out)
    assert run.pop("conditioning") is None
    (config.out / "run.json").write_text(json.dumps(run))
    assert evaluated(config.out, {"held": sets / "held"}) == before
    assert run_folder.conditioning_of(config.out, run) is None


# ---- the file


def test_the_file_is_there_before_the_run_has_begun(sets, tmp_path, monkeypatch):
    renamed, rename = [], files.os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: renamed.append(Path(b).name) or rename(a, b))
    quiet(config_of(sets, tmp_path / "out"))
    assert renamed[:2] == [CONDITIONING, "started.json"]
    assert renamed[-3:] == [CONDITIONING, "model.safetensors", "run.json"]


@pytest.mark.parametrize(
    "left", [(CONDITIONING,), (f"{CONDITIONING}.part", "started.json.part"), (CONDITIONING, ".lock")]
)
def test_what_a_process_killed_before_the_start_leaves_is_new(sets, tmp_path, left):
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_bytes(b"half")
    assert folder.read_started(out, resume=False) is None
    quiet(config_of(sets, out))
    assert Conditioning.load(out).as_dict() == run_folder.read_description(out)["conditioning"]


def test_a_full_disk_leaves_no_run(sets, tmp_path, monkeypatch):
    config = config_of(sets, tmp_path / "out")
    monkeypatch.setattr("lift_fast.train.setup.free_bytes", lambda path: 0)
    with pytest.raises(TrainingError, match="its disk has 0.0 MB free"):
        quiet(config)
    assert not config.out.exists()


@pytest.mark.parametrize("damage", ["gone", "cut", "changed", "of another"])
def test_evaluation_without_the_file_is_an_error_at_once(sets, tmp_path, damage):
    config = config_of(sets, tmp_path / "out")
    quiet(config)
    file = config.out / CONDITIONING
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    else:
        shutil.copy(sets / "other captions" / "a" / CONDITIONING, file)
    with pytest.raises(CacheError, match=f"{CONDITIONING} (cannot be read|is damaged or another cache's)"):
        evaluated(config.out, {"held": tmp_path / "there is none"})
    run_folder.load(config.out)


@pytest.mark.parametrize(
    "entry", [3, [], {}, {"power": 0.5}, {"power": 2.0, "source_dim": 24, "sha256": "0" * 64}, {"power": "x"}]
)
def test_a_damaged_entry_is_refused(sets, tmp_path, entry):
    config = config_of(sets, tmp_path / "out", steps=1)
    quiet(config)
    run = run_folder.read_description(config.out) | {"conditioning": entry}
    (config.out / "run.json").write_text(json.dumps(run))
    with pytest.raises(ConfigError, match="conditioning"):
        run_folder.load(config.out)


# ---- weights to start from


def test_weights_of_a_run_that_was_conditioned_otherwise(sets, tmp_path):
    """All where the sizes are the same, else the tower alone."""
    first = config_of(sets, tmp_path / "first")
    quiet(first)
    said = []

    def begun(kind: str) -> dict:
        config = config_of(sets, tmp_path / kind, kind, init_from=first.out)
        run = quiet(config, opened=lambda training: said.append(training.loaded))
        assert Conditioning.load(config.out).as_dict() == run["conditioning"]
        return run

    assert begun("other power")["text_dim"] == 11 and begun("other axes")["text_dim"] == 9
    assert begun("f32")["text_dim"] == 11
    everything = f"Weights: all of the LIFT run {first.out}, for the text of tiny, conditioned with power 0.5"
    assert said[0] == said[2] == everything
    assert said[1].endswith("; the rest has other sizes, and starts afresh")


# ---- ranks


def train_on_ranks(rank, config):
    run_folder.Encoder = make_encoder
    return trained(config)


def test_two_ranks(sets, tmp_path):
    """One writes the file, both compute the same, and as one process does."""
    config = config_of(sets, tmp_path / "two", eval_data={"held": sets / "held"}, eval_every=2, save_every=2)
    config = replace(config, save_weights=True)
    results = on_ranks(2, in_group, train_on_ranks, config)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    alone = quiet(replace(config, out=tmp_path / "one"))
    for run in results:
        assert run["ranks"] == 2 and run["conditioning"] == alone["conditioning"]
        assert run["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    weights = config.out / "weights" / "step-00000002"
    for out in (config.out, weights):
        assert (out / CONDITIONING).read_bytes() == (sets / "f32" / "a" / CONDITIONING).read_bytes()
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    scores = evaluated(weights, {"held": sets / "held"})["retrieval"]["held"]
    assert scores["t2i"]["r1"] == lines[1]["evaluation"]["held"]["t2i_r1"]

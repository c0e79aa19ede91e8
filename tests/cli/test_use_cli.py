"""lift-fast search, classify and embed-images from end to end, on an untrained run and small sets."""

import json
import random
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support.hostile import encoded
from support.tiny_sets import make_set, png

import lift_fast
from lift_fast import run_folder
from lift_fast.cli.main import main, parse
from lift_fast.errors import ConfigError
from lift_fast.nn import Clip, preset


def run(command: str) -> None:
    main(shlex.split(command))


def error_of(capfd, command: str, status: int = 2) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == status
    return capfd.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an untrained CLIP run, tars of which two images are bad, and a folder of images."""
    root = tmp_path_factory.mktemp("use")
    torch.manual_seed(3)
    (root / "run").mkdir()
    run_folder.save(
        root / "run", Clip(preset("tiny").with_context(12)), {"model": "clip", "preset": "tiny", "context": 12}
    )
    make_set(root / "data", 10, broken=(2, 7))
    rng = random.Random(1)
    (root / "images/below").mkdir(parents=True)
    for name in ("one.png", "below/two.png", "three.png"):
        (root / "images" / name).write_bytes(png(rng))
    return root


def test_search(folder, tmp_path, capfd):
    run(f"search {folder}/run 'a red car' --data {folder}/data --top 3 --json {tmp_path}/s.json")
    out, err = capfd.readouterr()
    assert "2 images of 10 left out (2 not a picture)" in err and "s0-002" in err and "images: 10/10" in err
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["query"] == "a red car" and result["images"] == 8 and result["left_out"] == {"not a picture": 2}
    model = lift_fast.load(folder / "run", device="cpu")
    from lift_fast.data.shards import Shards

    data = Shards(folder / "data")
    good = [i for i in range(10) if i not in (2, 7)]
    scores = model.similarity(
        model.encode_image([data.image_bytes(i) for i in good]), model.encode_text("a red car")
    ).flatten()
    best = scores.sort(descending=True).values.tolist()
    for line, match, score in zip(out.splitlines(), result["matches"], best[:3], strict=True):
        assert match["score"] == pytest.approx(score, abs=2e-3) and match["sample"] in good
        assert line.startswith(f"  {match['rank']}") and match["key"] in line and match["place"] in line
        assert match["key"] == f"s0-{match['sample']:03d}" and abs(scores[good.index(match["sample"])] - score) < 2e-3
    assert len(out.splitlines()) == len(result["matches"]) == 3
    run(f"search {folder}/run 'a red car' --data {folder}/data --top 3 --json {tmp_path}/again.json --quiet")
    assert json.loads((tmp_path / "again.json").read_text()) == result
    assert "images: " not in capfd.readouterr().err


def test_search_by_image_in_a_folder(folder, tmp_path, capfd):
    for name in ("one.png", "below/two.png", "three.png"):
        image = folder / "images" / name
        run(f"search {folder}/run --image {image} --data {folder}/images --features {tmp_path}/f --top 1")
        rank, score, key, place = capfd.readouterr().out.split()
        assert (rank, key, place) == ("1", name[:-4], str(image)) and float(score) > 0.99
    assert len(list((tmp_path / "f").iterdir())) == 1 and not (folder / "images.features").exists()


@pytest.mark.parametrize("options", ["", "'a text' --image x.png", "'a text' --top 0", "'a text' --batch-size 0"])
def test_what_search_refuses(options, capfd):
    error = error_of(capfd, f"search run --data data {options}")
    assert "must be at least 1" in error or "name what to search for" in error


def test_search_of_images_that_do_not_decode(folder, tmp_path, capfd):
    make_set(tmp_path / "data", 2, broken=(0, 1))
    error = error_of(capfd, f"search {folder}/run 'a text' --data {tmp_path}/data")
    assert error.endswith(f"lift-fast: error: {tmp_path}/data: no image decodes (2 not a picture)\n")
    assert "no data set at" in error_of(capfd, f"search {folder}/run 'a text' --data {tmp_path}/none")


def test_classify(folder, tmp_path, capfd):
    names, templates = ["cat", "a dog", "house"], ["a photo of a {}.", "{}"]
    run(
        f"classify {folder}/run {folder}/images/one.png {folder}/images/below --names cat 'a dog' house "
        f"--templates 'a photo of a {{}}.' '{{}}' --json {tmp_path}/c.json"
    )
    result = json.loads((tmp_path / "c.json").read_text())
    files = [f"{folder}/images/one.png", f"{folder}/images/below/two.png"]
    assert [row["image"] for row in result["images"]] == files and result["left_out"] == []
    expected = lift_fast.load(folder / "run", device="cpu").zero_shot(names, templates)(files)
    for row, shares in zip(result["images"], expected.tolist(), strict=True):
        assert list(row["classes"]) == names and list(row["classes"].values()) == pytest.approx(shares, abs=1e-5)
    for line, row in zip(capfd.readouterr().out.splitlines(), result["images"], strict=True):
        best = max(row["classes"], key=row["classes"].get)
        assert line.startswith(f"{row['image']}: {best} {row['classes'][best]:.1%}, ")


def test_classify_counts_bad_images(folder, tmp_path, capfd):
    (tmp_path / "bad\x1b.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes(encoded(np.full((40, 40, 3), 7, np.uint8), "PNG")[:60])
    (tmp_path / "good.png").write_bytes(png(random.Random(0)))
    error = error_of(
        capfd,
        f"classify {folder}/run {tmp_path} {tmp_path}/none.png --names a b --json {tmp_path}/c.json --batch-size 1",
        status=1,
    )
    result = json.loads((tmp_path / "c.json").read_text())
    assert [row["image"] for row in result["images"]] == [f"{tmp_path}/good.png"]
    assert [entry["cause"] for entry in result["left_out"]] == ["not a picture", "truncated", "missing"]
    assert "bad\\x1b.png: not a picture" in error and "\x1b" not in error
    assert "missing: there is no" in error and "cut.png: truncated" in error


def test_what_classify_refuses(folder, tmp_path, capfd):
    image = folder / "images/one.png"
    assert "two different names" in error_of(capfd, f"classify {folder}/run {image} --names cat")
    assert "each template" in error_of(capfd, f"classify {folder}/run {image} --names a b --templates no")
    assert "holds no image file" in error_of(capfd, f"classify {folder}/run {tmp_path} --names a b")
    assert "must be at least 1" in error_of(capfd, f"classify {folder}/run {image} --names a b --batch-size 0")


def test_embed_images(folder, tmp_path, capfd):
    run(f"embed-images {folder}/run --data {folder}/data --out {tmp_path}/x.npy --batch-size 3")
    out, err = capfd.readouterr()
    assert out == f"8 images, dim 128, float32, in {tmp_path}/x.npy\n"
    assert "2 images of 10 left out (2 not a picture)" in err
    assert np.load(tmp_path / "x.npy").shape == (8, 128)
    assert (tmp_path / "x.keys.txt").read_text().splitlines() == [f"s0-{i:03d}" for i in range(10) if i not in (2, 7)]
    assert "exists already" in error_of(capfd, f"embed-images {folder}/run --data {folder}/data --out {tmp_path}/x.npy")
    assert "must end in" in error_of(capfd, f"embed-images {folder}/run --data {folder}/data --out {tmp_path}/x")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_run_says_how_to_go_on(folder, tmp_path):
    data, out = tmp_path / "data", tmp_path / "x.npy"
    make_set(data, 200, per_shard=10)
    command = [sys.executable, "-c", "from lift_fast.cli import main; main()", "embed-images", folder / "run"]
    command += ["--data", data, "--out", out, "--batch-size", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("x.npy.partial/*.safetensors")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(2)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and f"stay in {out}.partial; run the same command again" in error
    assert 0 < len(list(tmp_path.glob("x.npy.partial/*.safetensors"))) < 20
    run(f"embed-images {folder}/run --data {data} --out {out} --quiet")
    assert np.load(out).shape == (200, 128) and not (tmp_path / "x.npy.partial").exists()


def test_help_needs_no_torch():
    code = "import sys, lift_fast.cli.use; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_arguments_in_any_order():
    command = parse(["search", "--data", "d", "--top", "3", "run", "a text"])
    assert (command.run, command.text, command.top) == ("run", "a text", 3)
    with pytest.raises(ConfigError):
        parse(["search", "--data", "d", "run"])
    command = parse(["classify", "--names", "a", "b", "--device", "cpu", "run", "x.png", "y.png"])
    assert command.names == ("a", "b") and len(command.images) == 2

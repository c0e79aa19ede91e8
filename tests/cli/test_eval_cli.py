"""lift-fast eval, compare and report on data sets of users: names, classes, repeated captions, formats, bad samples."""

import base64
import json
import random
import shlex
import subprocess
import sys

import numpy as np
import pytest
from support import complete  # noqa: F401
from support.hostile import encoded
from support.tiny_benchmarks import write_images
from support.tiny_sets import make_set, png

from lift_fast.cli.evaluate import named_sets
from lift_fast.cli.main import main
from lift_fast.data.shards import ShardWriter


def run(command: str) -> None:
    main(shlex.split(command))


def error_of(capfd, command: str) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    return capfd.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A CLIP run, the tars it was trained on, and the folder of both."""
    root = tmp_path_factory.mktemp("trained")
    make_set(root / "data", 12)
    run(f"train --model clip --data {root}/data --out {root}/run --steps 2 --batch-size 4 --context 12")
    return root


def evaluated(trained, tmp_path, options, capfd) -> tuple[dict, str]:
    """eval.json and what was printed."""
    capfd.readouterr()
    run(f"eval --run {trained}/run --json {tmp_path}/eval.json {options}")
    return json.loads((tmp_path / "eval.json").read_text()), capfd.readouterr().out


def test_data_without_a_name_is_named_by_its_folder(trained, tmp_path, capfd):
    """Line 14 of the issue: "Failed to parse key-value pairs!"."""
    result, out = evaluated(trained, tmp_path, f"--data {trained}/data", capfd)
    assert list(result["retrieval"]) == ["data"] and out.startswith("data: R@1/5/10")


@pytest.mark.parametrize(("words", "names"), [
    ("mine DIR/a", {"mine": "a"}),
    ("one DIR/a two DIR/b", {"one": "a", "two": "b"}),
    ("DIR/a", {"a": "a"}),
    ("DIR/a DIR/b", {"a": "a", "b": "b"}),
    ("DIR/a DIR/b DIR/c", {"a": "a", "b": "b", "c": "c"}),
    ("DIR/t.csv", {"t": "t.csv"}),
])  # fmt: skip
def test_names_of_sets(words, names):
    found = named_sets(words.replace("DIR", "/some/where").split())
    assert {name: str(path) for name, path in found.items()} == {k: f"/some/where/{v}" for k, v in names.items()}


def test_a_folder_where_the_command_runs(tmp_path, monkeypatch):
    (tmp_path / "val").mkdir()
    (tmp_path / "test").mkdir()
    monkeypatch.chdir(tmp_path)
    assert list(named_sets(["val"])) == ["val"] and list(named_sets(["."])) == [tmp_path.name]
    assert named_sets(["val", "val/part"]).keys() == {"val"}
    with pytest.raises(ValueError, match="is val a name or a data set"):  # it would have been one set, called val
        named_sets(["val", "test"])
    assert list(named_sets(["./val", "./test"])) == ["val", "test"]


def test_a_name_with_a_slash_makes_paths_of_all_words(trained, capfd):
    with pytest.raises(ValueError, match="two sets are called b; name each: .*, with no slash in a name"):
        named_sets(["b", "x/b", "with/slash", "x/c"])


def test_names_that_occur_twice(trained, capfd):
    assert "two sets are called data" in error_of(
        capfd, f"eval --run {trained}/run --data {trained}/data {trained}/../{trained.name}/data"
    )


def table(folder, rows, name="metadata.csv"):
    """A folder of images with a table: rows of (caption, the other columns)."""
    folder.mkdir()
    header = ["file_name", "caption", *rows[0][1]]
    lines = [",".join(header)]
    for i, (caption, others) in enumerate(rows):
        (folder / f"{i}.png").write_bytes(png(random.Random(i)))
        lines.append(",".join([f"{i}.png", caption, *map(str, others.values())]))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("column", ["label", "class", "class_name", "cls", "group"])
def test_columns_of_classes_give_zero_shot(trained, tmp_path, capfd, column):
    """Line 14 of the issue: a column `label` gave none."""
    data = table(tmp_path / "data", [(f"caption {i}", {column: ["cat", "dog", "horse"][i % 3]}) for i in range(9)])
    result, out = evaluated(trained, tmp_path, f"--data {data}", capfd)
    assert (result["zero_shot"]["data"]["classes"], result["zero_shot"]["data"]["n"]) == (3, 9)
    assert "data: zero-shot " in out and "of 9 among 3 classes" in out


def test_class_folders_give_zero_shot(trained, tmp_path, capfd):
    for i in range(8):
        folder = tmp_path / "data" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(png(random.Random(i)))
    result, _ = evaluated(trained, tmp_path, f"--data {tmp_path}/data", capfd)
    assert result["zero_shot"]["data"]["classes"] == 2


def test_classes_that_are_numbers_are_told(trained, tmp_path, capfd):
    """The kind of it: "3" says nothing to a text encoder."""
    data = table(tmp_path / "data", [(f"caption {i}", {"label": i % 3}) for i in range(9)])
    result, out = evaluated(trained, tmp_path, f"--data {data}", capfd)
    assert result["zero_shot"] == {}
    assert "data: its classes are numbers, and zero-shot classification needs their names" in out


def test_equal_captions_are_all_right_answers(trained, tmp_path, capfd):
    data = table(tmp_path / "data", [(f"caption {i // 2 if i < 6 else i}", {"n": i}) for i in range(10)])
    result, out = evaluated(trained, tmp_path, f"--data {data}", capfd)
    scores = result["retrieval"]["data"]
    assert scores["repeats"] == 3 and scores["chance"]["i2t"]["r1"] == pytest.approx((6 * 0.2 + 4 * 0.1) / 10)
    assert (
        "data: 3 of 10 captions repeat an earlier one; all images of a caption, and all captions of such an image, "
        "count as right answers\n"
    ) in out
    assert "(chance 16.00%)" in out


def test_several_fields_are_several_captions(tmp_path, capfd):
    make_set(tmp_path / "data", 12)
    run(f"train --model clip --data {tmp_path}/data --out {tmp_path}/run --steps 2 --batch-size 4 --context 12")
    capfd.readouterr()
    run(f"eval --run {tmp_path}/run --data {tmp_path}/data --field txt long --json {tmp_path}/eval.json")
    result, out = json.loads((tmp_path / "eval.json").read_text()), capfd.readouterr().out
    assert (result["retrieval"]["data"]["captions"], result["first_caption"]["data"]["captions"]) == (24, 12)
    assert "n = 12, 24 captions" in out and "data, first caption alone: R@1/5/10" in out


def test_the_examples_say_what_they_hold(trained, tmp_path, capfd):
    """Line 14 of the issue: `png_base64` held JPEG."""
    kinds = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    with ShardWriter(tmp_path / "data") as writer:
        for i, kind in enumerate(kinds):
            writer.write(f"k{i}", encoded(pixels, kind), f"caption {i}", {})
    result, _ = evaluated(trained, tmp_path, f"--data {tmp_path}/data", capfd)
    for example, (kind, name) in zip(result["examples"]["data"]["images"], kinds.items(), strict=True):
        head, _, body = example["image"].partition(",")
        assert head == f"data:image/{name};base64" and base64.b64decode(body) == encoded(pixels, kind)


def test_bad_samples_are_left_out_and_counted_where_they_may_be(trained, tmp_path, capfd):
    """samples in = samples scored + samples counted by cause."""
    data = table(tmp_path / "data", [("" if i == 2 else f"caption {i}", {"n": i}) for i in range(9)])
    (data / "4.png").write_bytes(b"no picture")
    (data / "5.png").unlink()
    message = error_of(capfd, f"eval --run {trained}/run --data {data}")
    assert "has no caption" in message and "Traceback" not in message
    result, out = evaluated(trained, tmp_path, f"--data {data} --skip-bad", capfd)
    causes = result["skipped_causes"]["data"]
    assert causes == {"no caption": 1, "not a picture": 1, "missing": 1} or sum(causes.values()) == 3
    assert result["skipped"]["data"] + result["retrieval"]["data"]["n"] == 9
    assert "data: 3 samples left out (" in out


def test_a_set_without_a_usable_caption(trained, tmp_path, capfd):
    data = table(tmp_path / "data", [("", {"n": i}) for i in range(4)])
    assert "no caption can be used" in error_of(capfd, f"eval --run {trained}/run --data {data} --skip-bad")


def test_images_and_settings_of_the_data_set_can_be_given(trained, tmp_path, capfd):
    """eval takes the same data sets as train, and reads them in the same way."""
    (tmp_path / "photos").mkdir()
    lines = ["picture;words"]
    for i in range(8):
        (tmp_path / "photos" / f"{i}.png").write_bytes(png(random.Random(i)))
        lines.append(f"{i}.png;caption {i}")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    options = f"--pictures {tmp_path}/photos --image-column picture --field words"
    run(f"train --model clip --data {tmp_path}/t.csv {options} --out {tmp_path}/run --steps 2 --batch-size 4")
    written = json.loads((tmp_path / "run/run.json").read_text())
    assert written["read"] == {"image_column": "picture"} and written["field"] == "words"
    run(f"eval --run {tmp_path}/run --data {tmp_path}/t.csv --pictures {tmp_path}/photos --json {tmp_path}/own.json")
    assert json.loads((tmp_path / "own.json").read_text())["retrieval"]["t"]["n"] == 8
    result, _ = evaluated(trained, tmp_path, f"--data {tmp_path}/t.csv {options}", capfd)
    assert result["retrieval"]["t"]["n"] == 8
    message = error_of(capfd, f"eval --run {trained}/run --data a {trained}/data --pictures a b")
    assert "one --pictures for each --data, or none: got 2 for 1" in message


def test_a_set_that_lacks_the_run_s_caption_field_is_told(tmp_path, capfd):
    make_set(tmp_path / "long", 12)
    run(f"train --model clip --data {tmp_path}/long --field long --out {tmp_path}/run --steps 2 --batch-size 4")
    with ShardWriter(tmp_path / "short") as writer:
        for i in range(6):
            writer.write(f"k{i}", png(random.Random(i)), f"caption {i}", {})
    capfd.readouterr()
    run(f"eval --run {tmp_path}/run --data {tmp_path}/long {tmp_path}/short --json {tmp_path}/eval.json")
    out = capfd.readouterr().out
    assert "short: the run was trained on the captions 'long', which it does not have; 'txt' was read" in out
    examples = json.loads((tmp_path / "eval.json").read_text())["examples"]
    assert examples["long"]["images"][0]["caption"] == "long caption 0"
    assert examples["short"]["images"][0]["caption"] == "caption 0"


def test_one_image_that_comes_up_again_and_again_is_one(tmp_path, capfd):
    """Line 14 of the issue: "skipped 12 pictures" for one picture met twelve times."""
    make_set(tmp_path / "data", 6, broken={2})
    run(f"train --model clip --data {tmp_path}/data --out {tmp_path}/run --steps 8 --batch-size 5 --max-skipped 1")
    out = capfd.readouterr().out
    assert "skipped 1 sample (1 not a picture), which came up " in out


def test_compare_takes_captions_that_have_changed_for_other_data(tmp_path, capfd):
    """Line 4 of the issue: only their keys were compared."""
    data = make_set(tmp_path / "data", 12).folder
    run(f"embed --data {data} --out {tmp_path}/cache")
    shared = f"--data {data} --steps 2 --batch-size 4"
    run(f"train --model lift --cache {tmp_path}/cache --out {tmp_path}/lift {shared}")
    run(f"train --model clip --out {tmp_path}/clip {shared}")
    compare = (
        f"compare --preset tiny --context 77 --lift {tmp_path}/lift --clip {tmp_path}/clip --data {data} "
        f"--cache {tmp_path}/cache"
    )
    run(compare)
    run(f"cache condition {tmp_path}/cache {tmp_path}/few --dim 5")
    message = error_of(capfd, compare.replace("/cache", "/few"))
    assert "few have length 5, those of the LIFT run 384; embed these captions as the run's were" in message
    tar = sorted(data.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes().replace(b"caption 1", b"caption 7"))
    message = error_of(capfd, compare)
    assert "captions 'txt'" in message and "00000.tar" in message


def test_options_that_no_set_uses(trained, tmp_path, capfd):
    (tmp_path / "templates.txt").write_text("a photo of {}")
    write_images(tmp_path / "val2017", ["a.png"])
    (tmp_path / "captions_val2017.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a cat"}]})
    )
    capfd.readouterr()
    run(
        f"eval --run {trained}/run --data own {tmp_path}/captions_val2017.json --field nope "
        f"--templates {tmp_path}/templates.txt --classnames imagenet"
    )
    out, err = capfd.readouterr()
    assert "own: --field was not used: this layout has its own captions" in out
    assert "warning: --templates and --classnames not used: no set has classes" in err


def test_a_table_whose_images_lie_elsewhere(trained, tmp_path, capfd):
    (tmp_path / "set.csv").write_text("file_name,txt\na.png,a cat\nb.png,a dog\n")
    assert "no image decodes (2 missing); name the folder of the images with --pictures" in error_of(
        capfd, f"eval --run {trained}/run --data {tmp_path}/set.csv"
    )
    (tmp_path / "b.png").write_bytes(b"no image")
    error = error_of(capfd, f"eval --run {trained}/run --data {tmp_path}/set.csv")
    assert "no image decodes" in error and "--pictures" not in error


def test_a_folder_that_cannot_be_written_is_a_line(trained, tmp_path):
    """Python's own form of the warning has a path and a line of source. (pytest records warnings of its process.)"""
    (tmp_path / "file").write_text("")
    command = f"eval --run {trained}/run --data {trained}/data --features {tmp_path}/file"
    python = [sys.executable, "-c", "from lift_fast.cli import main; main()"]
    done = subprocess.run([*python, *shlex.split(command)], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"lift-fast: warning: features are not kept: {tmp_path}/file cannot be written" in done.stderr
    assert "UserWarning" not in done.stderr and ".py:" not in done.stderr

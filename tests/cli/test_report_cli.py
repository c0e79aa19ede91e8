"""lift-fast report: of one run or two, with and without evaluation, comparison and data sets."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from lift_fast.cli.main import main


def run(command: str) -> None:
    main(shlex.split(command))


def error_of(capfd, command: str) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    return capfd.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with lift, clip, lift/eval.json, clip/eval.json, compare.json and the data; both were evaluated on the
    way."""
    root = tmp_path_factory.mktemp("trained")
    run(f"data scenes --out {root}/data --train 24 --heldout 10 --px 24")
    for name, options in {"cache": "", "short": "", "long": "--field long"}.items():
        data = root / "data" / ("train" if name == "cache" else "heldout")
        run(f"embed --data {data} --out {root}/{name} {options}")
    shared = f"--data {root}/data/train --steps 4 --batch-size 8 --warmup 1"
    on_the_way = f"--eval-data {root}/data/heldout --eval-every 2"
    run(f"train --model lift --cache {root}/cache --out {root}/lift {shared} {on_the_way}")
    run(f"train --model clip --out {root}/clip {shared} {on_the_way}")
    for model in ("lift", "clip"):
        run(f"eval --run {root}/{model} --data scenes {root}/data/heldout --json {root}/{model}/eval.json")
    both = f"--lift {root}/lift --clip {root}/clip --data {root}/data/heldout --cache {root}/short {root}/long"
    run(f"compare --preset tiny {both} --json {root}/compare.json")
    return root


def reported(capfd, out: Path, options: str) -> tuple[dict, str, str]:
    """report.json, the text of the page, and what was printed."""
    capfd.readouterr()
    run(f"report --out {out} {options}")
    page = (out / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S)
    return json.loads((out / "report.json").read_text(encoding="utf-8")), " ".join(body.split()), capfd.readouterr().out


@pytest.mark.parametrize("model", ["lift", "clip"])
def test_one_run_alone(trained, tmp_path, capfd, model):
    numbers, page, printed = reported(capfd, tmp_path, f"--{model} {trained}/{model}")
    assert {"lift", "clip"} & set(numbers) == {model} and "verdict" not in numbers
    assert page.startswith(f"{model.upper()}, one run") and "–" not in page and "ahead" not in page
    assert "10 GiB" not in page and numbers["trained_on"] == {"sets": ["data/train"], "samples": 24}
    assert "Retrieval" in page and "Composition" in page and "Examples" in page
    for head in ("Published", "scale", "caption length", "First caption", "Zero-shot"):
        assert head not in page
    assert "scenes composition" in printed and "LIFT against CLIP" not in printed and "*" not in printed
    curve = numbers[model]["curves"]["heldout"]
    assert [point["step"] for point in curve] == [2, 4] and "On held-out sets while training" in page
    assert {"t2i_r1", "i2t_r1", "composition"} <= set(curve[0]) and "heldout, accuracy" in page


def test_two_runs_without_a_comparison(trained, tmp_path, capfd):
    numbers, page, printed = reported(capfd, tmp_path, f"--lift {trained}/lift --clip {trained}/clip")
    assert set(numbers["verdict"]) == {"lift", "clip", "close"} and "savings" not in numbers
    assert "FLOPs" not in page and "FLOPs" not in printed
    assert "step time, whole step" in printed and "LIFT and CLIP compared" in page


def test_two_runs_with_everything(trained, tmp_path, capfd):
    options = f"--lift {trained}/lift --clip {trained}/clip --compare {trained}/compare.json"
    numbers, page, printed = reported(capfd, tmp_path, f"{options} --data scenes {trained}/data")
    assert numbers["data"] == {"scenes": {"train": 24, "heldout": 10}}
    assert "scenes: 24 to train, 10 held out" in page and "training FLOPs a sample" in printed
    assert "For tiny." in page and "ViT-B/16" not in page and "the paper" not in page
    judged = [name for side in numbers["verdict"].values() for name in side]
    assert len(judged) == len(set(judged)) and "step time, whole step" in judged
    close = "step time, whole step" in numbers["verdict"]["close"]
    row = next(line for line in printed.splitlines() if line.startswith("step time"))
    assert row.rstrip().endswith("too close to call") == close


def test_a_run_that_was_not_evaluated(trained, tmp_path, capfd):
    shutil.copytree(trained / "lift", tmp_path / "lift")
    (tmp_path / "lift" / "eval.json").unlink()
    (tmp_path / "lift" / "metrics.jsonl").unlink()
    run(f"report --lift {tmp_path}/lift --out {tmp_path}")
    printed = capfd.readouterr()
    assert (
        f"no {tmp_path}/lift/eval.json, so the report has no scores of it; make it with: lift-fast eval" in printed.err
    )
    page = (tmp_path / "report.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Training", "What training costs"]


def test_data_may_have_one_split(trained, tmp_path, capfd):
    shutil.copytree(trained / "data" / "train", tmp_path / "data" / "train")
    numbers, page, _ = reported(capfd, tmp_path, f"--lift {trained}/lift --data mine {tmp_path}/data")
    assert numbers["data"] == {"mine": {"train": 24}} and "mine: 24 to train" in page and "held out " not in page


def test_what_is_refused(trained, tmp_path, capfd):
    assert "a report is of a run; name one: --lift RUN" in error_of(capfd, f"report --out {tmp_path}")
    lone = f"report --out {tmp_path} --lift {trained}/lift"
    assert "--compare belongs to two runs" in error_of(capfd, f"{lone} --compare {trained}/compare.json")
    assert "holds neither train nor heldout" in error_of(capfd, f"{lone} --data x {trained}/lift")
    assert "--clip names a run of lift" in error_of(capfd, f"report --out {tmp_path} --clip {trained}/lift")
    shutil.copytree(trained / "lift", tmp_path / "lift")
    content = json.loads((trained / "lift/eval.json").read_text())
    assert content.pop("format") == 2
    (tmp_path / "lift" / "eval.json").write_text(json.dumps(content))
    said = error_of(capfd, f"report --out {tmp_path} --lift {tmp_path}/lift")
    assert "is of an earlier lift-fast; make it again with: lift-fast eval --json" in said
    assert not (tmp_path / "report.html").exists()

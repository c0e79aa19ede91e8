"""measure/gather.py: runs, their scores, curves and comparison become one dict; what does not fit is refused."""

import json
import random
import tracemalloc

import pytest

from lift_fast.errors import ConfigError, DataError
from lift_fast.measure.gather import gather, read_curves
from lift_fast.measure.paper import rows_for

MACHINE = {"cpu": "a CPU", "cores": 2, "memory_gib": 4, "gpu": None, "os": "Linux"}
PROMPTS = "4186863f7cfe1005e11d76ffd467b870cd3c8f511536d62e942444a2f9dbe2a1"  # the authors' for ImageNet


def run_of(model: str, **changed) -> dict:
    config = {"data": ["runs/x/data/scenes/train", "some/folder"], "steps": 3, "batch_size": 8, "seed": 5}
    return {
        "model": model,
        "preset": "tiny",
        "precision": "bf16",
        "device": "cpu",
        "machine": MACHINE,
        "versions": {"torch": "2"},
        "config": config,
        "captions": 40,
        "samples_seen": 24,
        "step_ms": 12.5,
        "step_ms_spread": 0.5,
        "peak_memory_bytes": None,
        "loss": [3.0, 2.0, 1.0],
    } | changed


def retrieval_of(n: int, r1: float) -> dict:
    ways = {way: {"r1": r1 + i / 10, "r5": 0.9, "r10": 1.0} for i, way in enumerate(("i2t", "t2i"))}
    return ways | {"n": n, "captions": 5 * n, "chance": {}}


def eval_of(**changed) -> dict:
    return {
        "format": 2,
        "retrieval": {"scenes": retrieval_of(20, 0.5)},
        "first_caption": {},
        "composition": {},
        "zero_shot": {},
        "benchmarks": {"scenes": None},
        "skipped": {"scenes": 1},
        "skipped_causes": {"scenes": {"truncated": 1}},
        "problems": {"scenes": []},
        "notes": {"scenes": ["a note"]},
        "examples": {},
    } | changed


def pair(evals: dict | None = None, **options) -> dict:
    runs = {"lift": run_of("lift"), "clip": run_of("clip")}
    return gather(runs, {"lift": eval_of(), "clip": eval_of()} if evals is None else evals, "a command", **options)


@pytest.mark.parametrize("model", ["lift", "clip"])
def test_one_run_alone(model):
    report = gather({model: run_of(model)}, {model: eval_of()}, "a command")
    assert {"lift", "clip"} & set(report) == {model}
    own = report[model]
    assert own["retrieval"] == {"scenes": retrieval_of(20, 0.5)} and own["step_ms"] == 12.5
    assert own["notes"] == {"scenes": ["a note"]} and own["skipped"] == {"scenes": 1}
    assert "peak_memory_from" not in own and not {"savings", "paper_scale", "cost_against_length"} & set(report)
    assert report["trained_on"] == {"sets": ["scenes/train", "folder"], "samples": 40}
    assert (report["seed"], report["machine"], report["command"]) == (5, MACHINE, "a command")
    assert report["published"] == [] and report["examples"] == {} and report["data"] == {}


def test_a_run_that_was_not_evaluated():
    report = gather({"lift": run_of("lift", peak_memory_bytes=7)}, {}, "a command")
    assert "retrieval" not in report["lift"] and report["benchmarks"] == {}
    assert (report["lift"]["peak_memory_bytes"], report["lift"]["peak_memory_from"]) == (7, "measured")


def test_compared_runs():
    compared = {
        "runs": {
            m: {"step_ms": 1.0, "flops_per_sample": 2, "peak_memory_from": "fake tensors"} for m in ("lift", "clip")
        },
        "savings": {"flops": 0.1},
        "paper_scale": {"rows": []},
        "cost_against_length": [],
    }
    report = pair(compared=compared, data={"scenes": {"train": 40}}, curves={"lift": {"scenes": [{"step": 1}]}})
    assert report["lift"]["flops_per_sample"] == 2 and report["clip"]["step_ms"] == 1.0
    assert report["savings"] == {"flops": 0.1} and report["data"] == {"scenes": {"train": 40}}
    assert report["lift"]["curves"] == {"scenes": [{"step": 1}]} and "curves" not in report["clip"]


@pytest.mark.parametrize(
    "scores",
    [
        {key: value for key, value in eval_of().items() if key != "format"},
        eval_of(format=1),
        eval_of(format=3),
        [],
        None,
    ],
)
@pytest.mark.parametrize("model", ["lift", "clip"])
def test_scores_of_another_version_are_refused(scores, model):
    match = f"the eval.json of --{model} is of an earlier lift-fast; make it again with: lift-fast eval --json"
    with pytest.raises(DataError, match=match):
        pair({"lift": eval_of(), "clip": eval_of(), model: scores})


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="different sets: .*scenes.* and .*other"):
        pair({"lift": eval_of(), "clip": eval_of(benchmarks={"other": None})})
    with pytest.raises(ConfigError, match="--clip names a run of lift"):
        gather({"clip": run_of("lift")}, {}, "a command")
    with pytest.raises(ConfigError, match="the runs differ in preset: tiny and vit-b16"):
        gather({"lift": run_of("lift"), "clip": run_of("clip", preset="vit-b16")}, {}, "a command")
    with pytest.raises(DataError, match="measured no runs"):
        pair(compared={"paper_scale": {}})


# The paper's rows.


def large(part: str, scores: dict, benchmark: str | None, **run) -> dict:
    evals = {"lift": eval_of(**{part: {"a set": scores}}, benchmarks={"scenes": None, "a set": benchmark})}
    return gather({"lift": run_of("lift", **{"preset": "vit-b16", **run})}, evals, "a command")


def test_published_rows_stand_with_our_scores():
    report = large("first_caption", retrieval_of(5000, 0.25), "coco-val2017")
    [entry] = report["published"]
    assert entry["set"] == "a set" and entry["ours"] == {"lift": {"i2t_r1": 0.25, "t2i_r1": 0.35}}
    rows = rows_for("coco-val2017", "first_caption", {"preset": "vit-b16"}, 5000)
    assert entry["rows"] == [row._asdict() for row in rows] and len(rows) == 4
    assert json.loads(json.dumps(report["published"])) == report["published"]


@pytest.mark.parametrize("one", [None, {"top1": 0.2, "top5": 0.3}])
def test_the_one_template_is_what_the_papers_imagenet_row_stands_with(one):
    scores = {"top1": 0.5, "top5": 0.6, "n": 50_000, "one_template": one, "prompts": PROMPTS}
    [entry] = large("zero_shot", scores, "imagenet")["published"]
    assert entry["ours"] == {"lift": {"top1": 0.2 if one else 0.5}}


@pytest.mark.parametrize(
    ("part", "n", "published", "run"),
    [
        ("retrieval", 5000, "coco-val2017", {}),  # of all captions
        ("first_caption", 5000, "coco-karpathy", {}),  # other images
        ("first_caption", 5000, None, {}),
        ("first_caption", 4990, "coco-val2017", {}),  # some were left out
        ("first_caption", 5000, "coco-val2017", {"preset": "tiny"}),
        ("first_caption", 5000, "coco-val2017", {"vit": {"image_size": 32}}),
    ],
)
def test_no_published_row_where_it_is_not_comparable(part, n, published, run):
    assert large(part, retrieval_of(n, 0.25), published, **run)["published"] == []


# Examples.


def example(caption: str, first: str) -> dict:
    return {"image": f"data:image/png;base64,{caption}", "caption": caption, "first": first, "right": first == caption}


def shown(firsts: str) -> dict:
    return {
        "images": [example(caption, first) for caption, first in zip("abc", firsts, strict=True)],
        "texts": [{"caption": c, "images": [f"data:image/png;base64,{firsts}"], "right": [True]} for c in "ab"],
        "worst": [{"image": "data:image/png;base64,w", "caption": "w", "first": firsts, "rank": 7}],
    }


def test_examples_of_both_models_are_joined():
    found = pair({m: eval_of(examples={"scenes": shown(firsts)}) for m, firsts in (("lift", "abx"), ("clip", "ayz"))})
    scenes = found["examples"]["scenes"]
    assert [each["caption"] for each in scenes["images"]] == ["a", "b", "c"]
    assert scenes["images"][1]["lift"] == {"first": "b", "right": True}
    assert scenes["images"][1]["clip"] == {"first": "y", "right": False}
    assert [each["lift"]["images"] for each in scenes["texts"]] == [["data:image/png;base64,abx"]] * 2
    assert [(each["model"], each["first"]) for each in scenes["worst"]] == [("lift", "abx"), ("clip", "ayz")]


def test_an_example_of_one_model_alone_stays():
    other = shown("abc")
    other["images"] = other["images"][1:]
    other["texts"] = []
    scenes = pair({"lift": eval_of(examples={"scenes": shown("abc")}), "clip": eval_of(examples={"scenes": other})})
    images = scenes["examples"]["scenes"]["images"]
    assert [sorted({"lift", "clip"} & set(each)) for each in images] == [["lift"], ["clip", "lift"], ["clip", "lift"]]
    assert all("clip" not in each for each in scenes["examples"]["scenes"]["texts"])


# Curves.


def lines_of(steps: range, every: int, score) -> list[str]:
    lines = []
    for step in steps:
        record = {"step": step, "samples": 8 * step, "loss": 1.0, "step_ms": 3.0}
        if (step + 1) % every == 0:
            record["evaluation"] = {
                "scenes": {
                    "t2i_r1": score(step),
                    "i2t_r1": score(step) / 2,
                    "n": 20,
                    "left_out": 0,
                    "zero_shot_top1": 0.5,
                }
            }
        lines.append(json.dumps(record))
    return lines


def test_curves_are_read(tmp_path):
    rng = random.Random(3)
    values = [rng.random() for _ in range(60)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines_of(range(60), 7, values.__getitem__)) + "\n")
    found = read_curves(tmp_path / "metrics.jsonl")
    steps = [7, 14, 21, 28, 35, 42, 49, 56]
    expected = [{"step": s, "t2i_r1": values[s - 1], "i2t_r1": values[s - 1] / 2, "zero_shot_top1": 0.5} for s in steps]
    assert found == {"scenes": expected}


@pytest.mark.parametrize("cut", [1, 20, 80, 150])
def test_a_cut_last_line_is_passed_over(tmp_path, cut):
    text = "\n".join(lines_of(range(4), 2, float)) + "\n"
    (tmp_path / "metrics.jsonl").write_text(text[:-cut])
    assert [point["step"] for point in read_curves(tmp_path / "metrics.jsonl")["scenes"]] == [2, 4][: 1 + (cut == 1)]


@pytest.mark.parametrize(
    "line", ["[]", '{"evaluation": {}}', '{"step": 1, "evaluation": 3}', '"evaluation"', "\xff", ""]
)
def test_a_line_that_is_no_record_is_passed_over(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(line.encode("latin-1") + b"\n" + lines_of(range(1), 1, float)[0].encode())
    assert read_curves(tmp_path / "metrics.jsonl") == {
        "scenes": [{"step": 1, "t2i_r1": 0.0, "i2t_r1": 0.0, "zero_shot_top1": 0.5}]
    }


def test_a_run_that_went_on_counts_each_step_once(tmp_path):
    lines = [*lines_of(range(4), 2, float), *lines_of(range(2, 6), 2, lambda step: -step)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [(p["step"], p["t2i_r1"]) for p in read_curves(tmp_path / "metrics.jsonl")["scenes"]] == [
        (2, 1),
        (4, -3),
        (6, -5),
    ]


def test_without_evaluations_there_are_no_curves(tmp_path):
    assert read_curves(tmp_path / "metrics.jsonl") == {}
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines_of(range(9), 10, float)))
    assert read_curves(tmp_path / "metrics.jsonl") == {}


def test_a_long_log_is_not_held_in_memory(tmp_path):
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for start in range(0, 200_000, 1000):
            file.write("\n".join(lines_of(range(start, start + 1000), 20_000, float)) + "\n")
    size = (tmp_path / "metrics.jsonl").stat().st_size
    tracemalloc.start()
    found = read_curves(tmp_path / "metrics.jsonl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found["scenes"]) == 10 and size > 10_000_000 and peak < 1_000_000

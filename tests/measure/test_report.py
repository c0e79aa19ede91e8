"""The page and table of a report of one or two runs: complete, self-contained, escaped, fair, written atomically."""

import copy
import io
import json
import math
import random
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from support.example_reports import MODELS, example_report, with_new_keys

from lift_fast.measure.charts import Line, line_chart
from lift_fast.measure.report import comparison, lead, output, print_table, render_html, summary, verdict, write
from lift_fast.measure.report.page import shortened
from lift_fast.sugarcrepe import TASKS

VOID = {"meta", "img", "br", "hr", "link", "input"}


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


def leaves(tree, path=()):
    """Every place in a report that holds something, as a path."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


@pytest.mark.parametrize("seed", range(5))
def test_page_is_balanced_and_holds_every_number(seed):
    report = example_report(random.Random(seed))
    page = Balance(render_html(report))
    assert page.wrong == []
    words = set(re.split(r"[^0-9.]+", " ".join(page.text)))
    for m in (report["lift"], report["clip"]):
        shares = [
            r for part in ("retrieval", "first_caption") for s in m[part].values() for d in WAYS for r in s[d].values()
        ]
        for scores in m["composition"].values():
            shares += [scores[where][t] for where in ("blind",) for t in (*scores["counts"], "mean")]
            shares += [scores[t] for t in (*scores["counts"], "mean")]
        for scores in m["zero_shot"].values():
            shares += [scores["top1"], scores["top5"], scores["one_template"]["top1"], scores["mean_per_class"]]
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
    for row in report["published"][0]["rows"]:
        assert all(f"{100 * v:.1f}" in words for v in row["scores"].values())


WAYS = ("i2t", "t2i")


def test_page_refers_to_nothing_outside(report):
    html = render_html(report)
    page = Balance(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    addresses = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "data", "srcset", "action")]
    shown = [entry[kind] for entry in report["examples"].values() for kind in ("images", "worst")]
    asked = [entry["texts"] for entry in report["examples"].values()]
    assert len(addresses) == sum(map(len, shown)) + 6 * sum(map(len, asked))
    assert all(v.startswith("data:image/png;base64,") for v in addresses)
    assert "url(" not in html and "@import" not in html and "://" not in html
    assert not [k for k, _ in page.attributes if k.startswith("on")]


@pytest.mark.parametrize("address", ["https://a.example/x.png", "javascript:alert(1)", "/etc/passwd", 3, None])
def test_an_image_that_is_elsewhere_is_not_shown(report, address):
    for entry in report["examples"].values():
        for example in entry["images"] + entry["worst"]:
            example["image"] = address
        for example in entry["texts"]:
            example["lift"]["images"] = [address] * 3
    page = Balance(render_html(report))
    addresses = [v for k, v in page.attributes if k == "src"]
    assert addresses and all(v == "" or v.startswith("data:image/") for v in addresses)


@pytest.mark.attack
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
        for part in ("retrieval", "first_caption", "zero_shot", "skipped", "skipped_causes", "notes"):
            m[part][attack] = m[part].pop("scenes")
        m["composition"][attack] = m["composition"].pop("two captions")
        m["composition"][attack]["counts"][attack] = m["composition"][attack][attack] = 1
        m["curves"][attack] = m["curves"].pop("openmoji")
        m["config"][attack] = 1
        m["text_ms_by_context"][attack] = 1.0
    bad["versions"][attack] = bad["data"][attack] = attack
    bad["examples"][attack] = bad["examples"].pop("scenes")
    html = render_html(bad)
    page = Balance(html)
    assert page.wrong == [] and "script" not in page.tags and "<script" not in html
    assert attack in "".join(page.text)


@pytest.mark.parametrize(
    "part",
    [
        "paper_scale",
        "cost_against_length",
        "published",
        "examples",
        "benchmarks",
        "trained_on",
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
    assert summary({}) == "" and lead({}).startswith("LIFT trains only an image encoder")


def test_every_null_is_left_out_or_a_dash(new_report):
    """Each leaf in turn is null."""
    report = new_report
    report["lift"]["loss"], report["clip"]["loss"] = report["lift"]["loss"][:2], []
    report["examples"] = {"openmoji": {kind: found[:1] for kind, found in report["examples"]["openmoji"].items()}}
    report["published"][0]["rows"] = report["published"][0]["rows"][:1]
    for path in list(leaves(report)):
        if path[-1] in ("context", "step", "scores", "rows") or (isinstance(path[-1], int) and "loss" not in path):
            continue  # every row has its context, every point its step, and what is published its scores
        spot = report
        for key in path[:-1]:
            spot = spot[key]
        kept, spot[path[-1]] = spot[path[-1]], None
        assert Balance(render_html(report)).wrong == [], path
        print_table(report, io.StringIO())
        spot[path[-1]] = kept
    report["lift"]["zero_shot"] = None
    html = render_html(report)
    assert "Zero-shot" in html and '<td class="n lift">–</td>' in html
    report["clip"]["zero_shot"] = None
    assert "Zero-shot" not in render_html(report)


def test_not_a_number_becomes_null(report, tmp_path):
    report["lift"]["loss"][3] = math.nan
    report["clip"]["step_ms"] = math.inf
    write(report, tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["lift"]["loss"][3] is None and saved["clip"]["step_ms"] is None
    assert not re.search(r"\b(nan|inf)\b", render_html(report))


def test_the_sentences_say_who_is_ahead_and_flip_with_the_numbers(old_report):
    other = swapped(old_report)
    ours, theirs = verdict(old_report), verdict(other)
    names = {side: [m.name for m in found] for side, found in ours.items()}
    assert [m.name for m in theirs["clip"]] == names["lift"] and [m.name for m in theirs["lift"]] == names["clip"]
    assert [m.name for m in theirs["close"]] == names["close"]
    assert "scenes image → text R@1" in names["clip"] and "step time, whole step" in names["lift"]
    assert f"LIFT is ahead on {len(names['lift'])} of" in summary(old_report)
    assert f"CLIP on {len(names['lift'])}," in summary(other).replace(" and", ",") + ","
    step = f"{100 * (1 - old_report['lift']['step_ms'] / old_report['clip']['step_ms']):.1f}\u00a0% less step time"
    assert step in lead(old_report) and "less step time" not in lead(other) and "more step time" in lead(other)
    text = "".join(Balance(render_html(old_report)).text)
    assert summary(old_report) in text and lead(old_report) in text


def test_the_first_sentence_names_what_was_lost(old_report):
    for name in ("openmoji", "scenes"):
        for way in WAYS:
            old_report["lift"]["retrieval"][name][way]["r1"] = 0.1
            old_report["clip"]["retrieval"][name][way]["r1"] = 0.9 if way == "i2t" else 0.1
    sentence = lead(old_report)
    assert sentence.count(".\n") == 0 and sentence.endswith(".")
    lower = sentence[sentence.index("scored lower on") :].split("; ")[0]
    assert "openmoji image → text R@1 (10.0\u00a0% against 90.0\u00a0%)" in lower
    assert "scenes image → text R@1 (10.0\u00a0% against 90.0\u00a0%)" in lower
    assert "too close to call" in sentence and lead({**old_report, "clip": None}).startswith("LIFT trains only")


def test_a_loss_is_printed_as_a_loss(report):
    for key in ("flops_per_sample", "peak_memory_bytes", "step_ms", "text_ms_per_step"):
        report["clip"][key], report["lift"][key] = 1000.0, 1123.0
    report["lift"]["embed_ms_per_caption"] = 1e3
    text = " ".join(Balance(render_html(report)).text)
    assert "12.3\u00a0% more" in text and "% less" not in text


def test_equal_and_nearly_equal_are_too_close_to_call(old_report):
    old_report["clip"] = copy.deepcopy(old_report["lift"])
    for task in (*TASKS, "mean"):
        old_report["clip"]["composition"]["scenes"][task] += 0.001
    sides = verdict(old_report)
    assert len(sides["close"]) == 12 and not sides["lift"] and not sides["clip"]
    html = render_html(old_report)
    scores = html[html.index("<h2>Retrieval") : html.index("<h2>Published")]
    assert "best" not in scores and "% less" not in html[: html.index("<h2>At the paper")]


def test_write_replaces_both_files(report, tmp_path):
    folder = tmp_path / "new" / "folder"
    write(report, folder)
    write({**report, "seed": 41}, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.json"]
    saved = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert saved["seed"] == 41
    assert saved["verdict"] == {side: [m.name for m in found] for side, found in verdict(report).items()}
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
    clip = report["clip"]["composition"]["scenes"]
    assert f"{100 * sum(clip[task] for task in TASKS) / 7:.1f} %" in text
    for m in verdict(report)["clip"]:
        line = next(line for line in text.splitlines() if line.startswith(m.name.replace("→", "->")))
        assert line.rindex("*") > len(line) / 2 and line.count("*") == 1
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    rows = lines[2 : lines.index("")]
    assert {len(row) for row in rows} == {len(lines[1])}  # aligned


def test_the_table_holds_no_commands_to_the_terminal(report):
    name = "a\x1b[2J\u202e\u009b\r\nb"
    for model in MODELS:
        report[model]["retrieval"][name] = report[model]["retrieval"].pop("openmoji")
    report["lift"]["encoder"] = {"name": name}
    text = table_text(report)
    assert r"a\x1b[2J\u202e\x9b\r\nb image -> text R@1" in text and all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("points", [[(1, 2.0)], [(1, 2.0), (2, 2.0)], [(0, 0.0)], [(5, -3.5), (6, 1e-9)], [(1, 1e12)]])
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_chart_of_few_or_flat_points_stays_in_its_frame(points, from_zero):
    svg = line_chart("t", "x", "y", [Line("lift", points)], from_zero=from_zero)
    assert Balance(svg).wrong == [] and "nan" not in svg
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", re.search(r'points="([^"]*)"', svg)[1]):
        assert 0 <= float(x) <= 500 and 0 <= float(y) <= 270


def test_a_long_run_makes_a_small_page(report):
    report["lift"]["loss"] = [1 / (1 + i) for i in range(200_000)]
    long = [{"step": step, "t2i_r1": 0.1, "i2t_r1": 0.1} for step in range(100_000)]
    report["lift"]["curves"] = {"scenes": long}
    assert len(render_html(report)) < 250_000


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
    first, _, counted = name.partition(", ")
    assert page.count(f"<h3>{name}</h3>") == 2  # the tile and the bars
    listed = f"{first} ({counted})" if counted else first
    assert f"{listed}," in lead(new_report) or f"{listed} and" in lead(new_report)
    for text in (table.replace("\n", " "), page, lead(new_report)):
        assert text.count("peak memory") == text.count(listed) + (text.count(name) if counted else 0)
    assert ("fake tensors" in page) == ("counted" in name)


def test_the_paper_scale_part_says_forward_and_counted(report):
    report = {"paper_scale": report["paper_scale"]}
    page = render_html(report)
    part = page[page.index("At the paper’s scale") :]
    assert "forward FLOPs a sample" in part and "peak memory, counted" in part and "training FLOPs" not in part
    assert "For ViT-B/16, which was not trained." in part and "the paper</th>" in part


def test_another_scale_names_its_own_preset(report):
    scale = report["paper_scale"] | {"preset": "tiny"}
    for n in ("n77", "n128"):
        scale[n] = scale[n] | {"paper_flops_saved": None, "paper_memory_saved": None}
    page = render_html({**report, "paper_scale": scale})
    part = page[page.index("What LIFT saves, counted") :]
    assert "For tiny." in part and "ViT-B/16" not in part and "the paper</th>" not in part and "35.7" not in part
    report["lift"]["preset"] = report["clip"]["preset"] = "vit-s16"
    page = render_html({**report, "paper_scale": scale})
    assert "For tiny, which was not trained." in page


def test_flops_say_what_they_count(report):
    assert cost(report, "training FLOPs a sample") and not cost(report, "FLOPs a sample")
    page, table = page_text(report), table_text(report)
    assert "Training FLOPs a sample, counted" in page and "training FLOPs a sample" in table
    assert len(re.findall("FLOPs a sample", page)) == len(re.findall("(?:[Tt]raining|forward) FLOPs a sample", page))


def test_text_over_the_whole_run_holds_the_embedding(new_report):
    lift, clip = new_report["lift"], new_report["clip"]
    lift |= {"loss": [1.0] * 100, "captions": 8_000, "embed_ms_per_caption": 2.5, "text_ms_per_step": 40.0}
    clip |= {"loss": [1.0] * 100, "text_ms_per_step": 300.0}
    measure = cost(new_report, "text time over the whole run")
    assert measure.lift == pytest.approx(20 + 4) and measure.clip == pytest.approx(30)
    assert measure.difference == "20.0\u00a0% less" and measure in verdict(new_report)["lift"]
    page, table = page_text(new_report), table_text(new_report)
    assert "8 000 captions × 2.50 ms = 20.0 s" in page
    assert "100 × 40.0 ms = 4.00 s" in page and "100 × 300 ms = 30.0 s" in page
    once = "embedding is paid once per caption and encoder, whatever the number of epochs and runs."
    assert page.count(once) == table.count(once) == 1
    assert re.search(r"^text time over the whole run +24\.0 s \* +30\.0 s +20\.0 % less$", table, re.M)
    assert "8 000 captions x 2.50 ms = 20.0 s of embedding" in table

    lift["embed_ms_per_caption"] = 5.0  # 44 s against 30 s: LIFT is ahead on text a step, but not over the whole run
    assert [m.name for m in verdict(new_report)["clip"] if m.kind == "s"] == ["text time over the whole run"]
    assert "text time a step" in [m.name for m in verdict(new_report)["lift"]]
    assert "46.7\u00a0% more text time over the whole run (in it 40.0\u00a0s once" in lead(new_report)
    assert "46.7 % more" in page_text(new_report)

    clip["loss"] = [1.0] * 300  # the number of steps may differ
    assert cost(new_report, "text time over the whole run").clip == pytest.approx(90)


@pytest.mark.parametrize("key", ["captions", "embed_ms_per_caption"])
@pytest.mark.parametrize("how", ["null", "absent"])
def test_without_the_embedding_there_is_no_whole_run(new_report, key, how):
    if how == "null":
        new_report["lift"][key] = None
    else:
        del new_report["lift"][key]
    assert cost(new_report, "text time over the whole run") is None
    assert "whole run" not in page_text(new_report) and "whole run" not in table_text(new_report)


@pytest.mark.parametrize("model", ["lift", "clip"])
def test_a_run_without_losses_has_no_whole_run_to_compare(new_report, model):
    new_report[model]["loss"] = []
    measure = cost(new_report, "text time over the whole run")
    assert getattr(measure, model) is None and measure.difference is None and measure.ahead is None
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
    saved = "9.1\u00a0% less"
    for text in (page_text(new_report), table_text(new_report), lead(new_report), render_html(new_report)):
        assert (saved.replace("\u00a0", " ") in text.replace("\u00a0", " ")) == (side == "lift")
    row = next(line for line in table_text(new_report).splitlines() if line.startswith("step time"))
    assert row.endswith("too close to call") == (side == "close")


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
    assert f"images, on {place}: LIFT is ahead" in summary(new_report)


def test_counted_sets_that_are_not_the_trained_ones_are_not_called_so(new_report):
    assert "of 3 500 openmoji and 8 000 scenes images" in page_text(new_report)
    del new_report["data"]["scenes"]
    assert "of the 11 500 in openmoji/train and scenes/train" in page_text(new_report)
    del new_report["trained_on"]
    assert "of 3 500 openmoji images" in page_text(new_report)


def test_nearly_all_is_not_printed_as_all(new_report):
    new_report["clip"] |= {"text_ms_per_step": 100.0, "step_ms": 100.0}
    new_report["lift"] |= {"text_ms_per_step": 0.032, "step_ms": 200.0}
    table = table_text(new_report)
    assert "99.968 % less" in table and "100.0 % less" not in table and "100.0 % more" in table


# One run, and less than everything.


@pytest.mark.parametrize("model", MODELS)
def test_a_report_of_one_run_has_nothing_of_the_other(new_report, model):
    other = next(each for each in MODELS if each != model)
    lone = {key: value for key, value in new_report.items() if key != other}
    for part in ("savings", "paper_scale", "cost_against_length", "published"):
        del lone[part]
    for entry in lone["examples"].values():
        for example in entry["images"] + entry["texts"]:
            del example[other]
        entry["worst"] = [example for example in entry["worst"] if example["model"] == model]
    html, table = render_html(lone), table_text(lone)
    page = Balance(html)
    assert page.wrong == [] and "–" not in "".join(page.text)
    classes = " ".join(value or "" for name, value in page.attributes if name == "class").split()
    assert model in classes and other not in classes
    text = page_text(lone)
    assert "ahead" not in text and "close to call" not in text and "compared" not in text
    assert "ahead" not in table and "*" not in table and "LIFT against CLIP" not in table
    if model == "lift":
        assert "CLIP" not in text and "CLIP" not in table
    assert " ".join(lead(lone).split()) in text and f"this run took {round(lone[model]['seconds'])}" in lead(lone)
    assert "(chance 0.25\u00a0%)" in lead(lone)
    shares = [lone[model]["retrieval"][name][way]["r1"] for name in ("openmoji", "scenes") for way in WAYS]
    assert all(f"{100 * share:.1f}" in text for share in shares)


def test_one_run_without_scores(new_report):
    lone = {"lift": {key: new_report["lift"][key] for key in ("params", "seconds", "samples_seen", "loss", "step_ms")}}
    html = render_html(lone)
    page = Balance(html)
    assert page.wrong == [] and "–" not in "".join(page.text)
    assert re.findall("<h2>(.*?)</h2>", html) == ["Training", "What training costs"]


@pytest.mark.parametrize(
    ("part", "head"),
    [
        ("retrieval", "<h2>Retrieval<"),
        ("first_caption", "<h3>First caption<"),
        ("composition", "<h2>Composition<"),
        ("zero_shot", "<h2>Zero-shot classification<"),
        ("curves", "<h3>On held-out sets while training<"),
    ],
)
def test_a_report_with_less(report, part, head):
    """Scores that no model has leave no empty table."""
    assert head in render_html(report)
    for model in MODELS:
        report[model][part] = {}
    html = render_html(report)
    assert head not in html and "<tbody>\n</tbody>" not in html
    assert Balance(html).wrong == []


# Several sets, ties, chance.


def test_every_set_of_a_kind_has_its_own_scores(report):
    text = page_text(report)
    for name in ("scenes composition", "two captions composition", "openmoji zero-shot", "scenes zero-shot"):
        assert name in text
    part = text[text.index("Composition") : text.index("Zero-shot")]
    assert "mean of 7" in part and "mean of 2" in part and "chance, 50" in part and "chance, 33" in part
    assert "swap objects" in part and "moved" in part
    first = text[text.index("First caption") : text.index("Composition")]
    assert "scenes" in first and "openmoji" not in first
    for share in (report["lift"]["first_caption"]["scenes"][way]["r1"] for way in WAYS):
        assert f"{100 * share:.1f}" in first


def test_ties_have_a_column_where_there_are_any(report):
    assert ">ties<" not in render_html(report)
    report["lift"]["composition"]["two captions"]["ties"] = {"swap_obj": 41, "moved": 3}
    html = render_html(report)
    assert html.count(">ties<") == 1
    row = html[html.index("mean of 2<") :]
    assert '<td class="n">44</td>' in row[: row.index("</tr>")]


def test_chance_is_the_one_of_eval_json(report):
    for model in MODELS:
        report[model]["retrieval"]["scenes"]["chance"]["t2i"]["r1"] = 0.0271
    text = page_text(report)
    assert "2.71" in text and "0.25" in text
    row = text[text.index("scenes text → image") :][:400]
    assert text.count("2.71") == 1 and row


@pytest.mark.parametrize("trial", range(20))
def test_a_score_is_close_within_the_errors_of_independent_counts(trial):
    """Against a simulation: two models of equal skill are ahead of each other in about 5 % of all draws."""
    rng = random.Random(trial)
    n, p = rng.randrange(100, 2000), rng.uniform(0.2, 0.8)
    ahead = 0
    for _ in range(400):
        draws = [
            sum(rng.random() < p for _ in range(n)) / n if n < 150 else rng.gauss(p, (p * (1 - p) / n) ** 0.5)
            for _ in "ab"
        ]
        ahead += comparison.share("x", (draws[0], draws[1]), n).ahead != "close"
    assert ahead / 400 < 0.12
    far = (p - 4 * (p * (1 - p) / n) ** 0.5, p)
    assert comparison.share("x", far, n).ahead == "clip"


def test_the_noise_of_a_mean_is_that_of_its_parts():
    parts = [comparison.share("a", (0.5, 0.4), 100), comparison.share("b", (0.3, 0.9), 400)]
    total = comparison.mean("mean", parts)
    variance = (0.25 + 0.24) / 100 + (0.21 + 0.09) / 400
    assert total.lift == pytest.approx(0.4) and total.clip == pytest.approx(0.65)
    assert total.noise == pytest.approx(1.96 * math.sqrt(variance) / 2)
    assert comparison.mean("none", []) is None


def curve(html: str, name: str) -> tuple[str, list[tuple[str, int]]]:
    """The words over a chart, and the style and number of points of each of its lines."""
    figure = html[html.index(f"<figcaption><b>{name}<") :]
    figure = figure[: figure.index("</figure>")]
    lines = re.findall(r'<polyline class="([^"]*)" points="([^"]*)"', figure)
    words = "".join(Balance(figure[: figure.index("</figcaption>")]).text)
    return words, [(style, len(points.split())) for style, points in lines]


def test_curves_are_drawn_for_each_run_and_score(report):
    report["clip"]["curves"] = {
        "openmoji": [{"step": 600, "t2i_r1": 0.5}],
        "classes": [{"step": 300, "zero_shot_top1": 0.1}, {"step": 600, "zero_shot_top1": 0.2}],
    }
    html = render_html(report)
    words, lines = curve(html, "openmoji, R@1")
    assert lines == [("line lift", 6), ("line clip", 1), ("line lift dashed", 6)]
    assert words.endswith("text → image solid, image → text dashed")
    words, lines = curve(html, "classes, accuracy")
    assert lines == [("line clip dashed", 2)] and words.endswith("CLIPzero-shot dashed")
    report["lift"]["best"] = {"step": 1500, "score": 0.5, "of": "r1"}
    assert "<td>best weights after step</td>" not in html and "best weights after step1 500" in page_text(report)
    assert "<b>openmoji, accuracy<" not in html and "<b>classes, R@1<" not in html


def test_notes_and_samples_that_were_left_out_are_listed(report):
    text = page_text(report)
    assert text.count("openmoji: 3 samples left out (2 truncated, 1 empty)") == 1
    assert text.count("openmoji: 3 of 400 captions repeat an earlier one") == 1  # both models' note, once
    assert "scenes: " not in text[text.index("About the held-out sets") : text.index("At the paper")]
    report["clip"]["skipped"]["openmoji"], report["clip"]["skipped_causes"]["openmoji"] = 1, {}
    report["lift"]["skipped"]["scenes"] = 2
    text = page_text(report)
    assert "openmoji: LIFT: 3 samples left out (2 truncated, 1 empty)" in text
    assert "openmoji: CLIP: 1 sample left out" in text
    assert "scenes: LIFT: 2 samples left out" in text and "scenes: CLIP: no samples left out" in text


def test_the_papers_rows_stand_next_to_ours_and_nowhere_else(report):
    text = page_text(report)
    part = text[text.index("Published results") : text.index("At the paper")]
    assert "the paper’s numbers, not ours" in part and "ViT-B/16" in part
    assert part.count("this run") == 2 and part.count("DataComp, the paper") == part.count("Recap, the paper") == 2
    report["published"] = []
    text = page_text(report)
    assert "Published" not in text and "the paper’s numbers" not in text and "DataComp" not in text


# Captions.


HOSTILE = {
    "html": "</b></bdi></div></main><img src=x onerror=alert(1)><style>*{display:none}</style>",
    "rtl": "\u202eתמונה של חתול\u2066 abc \u202b",
    "long": "word " * 400,
    "no spaces": "x" * 2000,
    "lines": "a\n\n\nb\tc\x00\x1b[31m",
    "surrogate": "a\ud800b",
    "empty": "",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_caption_stays_in_its_place(report, tmp_path, name):
    caption = HOSTILE[name]
    for entry in report["examples"].values():
        for example in entry["images"] + entry["texts"] + entry["worst"]:
            example["caption"] = caption
            for model in MODELS:
                if model in example and "first" in example[model]:
                    example[model]["first"] = caption
    write(report, tmp_path)
    html = (tmp_path / "report.html").read_bytes().decode()
    page = Balance(html)
    assert page.wrong == [] and len(html) < 200_000 and "\0" not in html
    assert page.tags.count("style") == 1 and "onerror" not in dict(page.attributes)
    shown = [unescape(text) for text in re.findall(r"<b><bdi>(.*?)</bdi></b>", html[html.index(">Examples<") :])]
    assert shown.count(shortened(caption)) == 6 + 6 + 8  # images, texts, worst


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("a dog", "a dog"),
        (" a\n dog\0", "a dog"),
        ("x" * 240, "x" * 240),
        ("x" * 241, "x" * 238 + " …"),
        (None, "None"),
    ],
)
def test_captions_are_shortened(caption, shown):
    assert shortened(caption) == shown

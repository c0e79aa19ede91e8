"""JSON and weights that others wrote, or altered: each ends in one typed error that says what to do, or is right."""

import json
import os
import random
import re
import resource
import shutil
import time
from dataclasses import dataclass
from functools import partial
from inspect import isfunction
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.damage import flip_bit
from support.foreign_files import (
    GONE,
    VALUES,
    changed,
    comparison,
    places,
    read_cache,
    report_on,
    scores,
    sealed,
    use,
    write_runs,
)
from support.judged import judged
from support.random_models import random_model
from support.tiny_caches import write

import lift_fast
from lift_fast import foreign, run_folder
from lift_fast.cache import Cache
from lift_fast.data.options import DataOptions
from lift_fast.errors import CacheError, ConfigError, DataError, LiftFastError
from lift_fast.eval.composition import Rows, composition
from lift_fast.eval.retrieval import ranks
from lift_fast.eval.sets import options_of
from lift_fast.eval.zero_shot import zero_shot
from lift_fast.foreign import Count, Number, Share
from lift_fast.measure.charts import ticks
from lift_fast.measure.gather import read_curves
from lift_fast.nn.tensors import read_tensors, unusable
from lift_fast.nn.weights import load as load_weights
from lift_fast.nn.weights import read as read_weights
from lift_fast.nn.weights import save as save_weights
from lift_fast.train.folder import read_started, start
from lift_fast.train.identity import differences, digest_of
from lift_fast.train.initial import init_from

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Runs with all that belongs to them, in lift/ and clip/, compare.json; and a cache in cache/."""
    root = tmp_path_factory.mktemp("foreign")
    write_runs(root)
    write(root / "cache", [5, 6], 8)
    return root


@pytest.fixture
def copy(root, tmp_path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def refused(operation, match: str = "", kind: type[LiftFastError] = LiftFastError, seconds: float = 5.0) -> str:
    """The message of the error that an operation must end in, at once."""
    began = time.process_time()
    with pytest.raises(kind, match=match) as caught:
        operation()
    assert time.process_time() - began < seconds
    message = str(caught.value)
    assert 10 < len(message) < 2000 and "Traceback" not in message
    return message


# foreign.check


class Inner(TypedDict):
    n: Count


class Outer(Inner, total=False):
    share: Share
    loss: list[Number | None]
    inner: Inner | None
    by_name: dict[str, Inner]
    kind: Literal["a", "b"]
    pair: tuple[int, str]
    several: tuple[float, ...]
    any: Any


@dataclass
class Sizes:
    width: int
    depth: int = 2


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ({"n": 1, "share": 0.5, "loss": [1, None, float("nan")], "more": 3}, Outer, ""),
        ({"n": 0, "inner": None, "by_name": {"x": {"n": 2}}, "kind": "b", "pair": [1, "a"], "any": [[]]}, Outer, ""),
        ({"n": 0, "several": [1, 2.5], "inner": {"n": 2}}, Outer, ""),
        ({}, Outer, "it has no n"),
        ([], Outer, "it must be an object, not a list"),
        ({"n": True}, Outer, "it.n must be an integer from 0, not True"),
        ({"n": -1}, Outer, "it.n must be an integer from 0, not -1"),
        ({"n": 1 << 63}, Outer, "it.n must be an integer from 0, not 9223372036854775808"),
        ({"n": 1, "share": 1.1}, Outer, "it.share must be a number from 0 to 1, not 1.1"),
        ({"n": 1, "share": float("nan")}, Outer, "it.share must be a number from 0 to 1, not nan"),
        ({"n": 1, "loss": [1, "2"]}, Outer, "it.loss[1] must be a number or null, not '2'"),
        ({"n": 1, "loss": {}}, Outer, "it.loss must be a list, not a dict"),
        ({"n": 1, "inner": {}}, Outer, "it.inner has no n"),
        ({"n": 1, "inner": {"n": "x"}}, Outer, "it.inner.n must be an integer from 0, not 'x'"),
        ({"n": 1, "inner": 3}, Outer, "it.inner must be an object or null, not 3"),
        ({"n": 1, "by_name": {"x": {}}}, Outer, "it.by_name['x'] has no n"),
        ({"n": 1, "kind": "c"}, Outer, "it.kind must be one of 'a', 'b', not 'c'"),
        ({"n": 1, "pair": [1]}, Outer, "it.pair must be a list of 2, not a list"),
        ({"n": 1, "pair": [1, 2]}, Outer, "it.pair[1] must be a text, not 2"),
        ({"n": 1, "several": [1e101]}, Outer, "it.several[0] must be a number, not 1e+101"),
        ({"width": 3}, Sizes, ""),
        ({"depth": 3}, Sizes, "it has no width"),
        ({"width": 3, "other": 1}, Sizes, "it has no field 'other'"),
        ({"width": "x" * 1000}, Sizes, f"it.width must be an integer, not '{'x' * 59}…"),
        (1.0000001, Share, ""),
        (10**400, float, f"it must be a number, not 1{'0' * 59}…"),
    ],
)
def test_check(value, hint, message):
    if not message:
        return foreign.check(value, hint)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        foreign.check(value, hint)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "Expecting value"),
        (b"\xff{}", "utf-8"),
        ("{}".encode("utf-16"), "utf-8"),
        (b'"\xed\xa0\x80"', "utf-8"),  # half a character
        (b"[" * 100_001, "nearly all brackets"),
        (b"[" * 15_000, "nested too deeply"),
        (b'{"a":' * 15_000, "nested too deeply"),
        (b"[" * 66 + b"]" * 66, "nested more than 64 deep"),
        (b"[" + b"[]," * (1 << 20) + b"1]", "nearly all brackets"),
        (b"[" + b"1," * (1 << 21) + b"1]", "nearly all separators"),
        (b"1" * 10_000, "4300 digits"),
        (b'{"a": 1', "delimiter"),
    ],
)
def test_what_is_no_json_within_bounds(data, match):
    with pytest.raises(ValueError, match=match):
        foreign.parse_json(data)


def test_what_is_json():
    assert foreign.parse_json(b"\xef\xbb\xbf[1]") == [1]  # with a byte order mark
    assert foreign.parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    assert foreign.parse_json(b"[" * 65 + b"]" * 65)
    assert foreign.parse_json(b'"\\ud83d\\ude00 \\ud83d"') == "😀 \ud83d"
    assert len(foreign.parse_json(b"[" + b"1," * 999_998 + b"1]")) == 999_999


def test_json_is_read_in_one_place():
    """json.loads bounds neither depth nor memory. The rest makes copies of what the program has just made, is a file of
    the package, or stands in the example of a model card."""
    allowed = {
        "lift_fast/foreign.py": 1,
        "lift_fast/ops/tuned/__init__.py": 1,  # a file of the package
        "lift_fast/export/onnx.py": 1,  # examples of cards
        "lift_fast/export/conditioned.py": 1,
        "lift_fast/export/safetensors.py": 1,
    }
    found = {}
    for path in sorted((ROOT / "lift_fast").rglob("*.py")):
        lines = re.findall(r"json\.loads?\((?!json\.dumps\()", path.read_text())
        if lines:
            found[str(path.relative_to(ROOT))] = len(lines)
    assert found == allowed


def test_tensors_are_read_in_one_place():
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lift_fast").rglob("*.py")
        if re.search(r"^(?!from|weights|head).*\bload_file\(", path.read_text(), re.M)
    }
    assert found == {"lift_fast/nn/tensors.py"}


# Runs: run.json, eval.json, compare.json, metrics.jsonl.


def some_cases(content: dict, seed: int, several: int = 2) -> list[tuple[tuple, Any]]:
    """Places in a file, each with some of VALUES; and always left out, and of another type."""
    rng = random.Random(seed)
    return [(path, value) for path in places(content) for value in (GONE, *rng.sample(VALUES[1:], several - 1))]


def try_all(operation, file: Path, content: dict, cases: list[tuple[tuple, Any]]) -> dict[str, int]:
    """Runs an operation on each altered file, in this process; how many ended in an error and how many did not."""
    outcomes = {"right answer": 0, "error": 0}
    for path, value in cases:
        file.write_text(json.dumps(changed(content, path, value)))
        try:
            operation()
            outcomes["right answer"] += 1
        except LiftFastError as error:
            assert 10 < len(str(error)) < 2000, (path, value)
            outcomes["error"] += 1
        except Exception as error:
            raise AssertionError(f"{path}: {value!r:.80}") from error
    file.write_text(json.dumps(content))
    return outcomes


@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_run_json(copy, kind):
    file = copy / kind / "run.json"
    content = json.loads(file.read_text())
    report_on(copy)
    use(copy / kind)
    cases = some_cases(content, 1)
    assert len(cases) > 150
    used = try_all(partial(use, copy / kind), file, content, cases)
    reported = try_all(partial(report_on, copy), file, content, some_cases(content, 2)[::3])
    assert used["error"] > 50 and reported["error"] > 15, (used, reported)


def test_eval_json(copy):
    file = copy / "lift" / "eval.json"
    used = try_all(partial(use, copy / "lift"), file, scores(), some_cases(scores(), 3))
    reported = try_all(partial(report_on, copy), file, scores(), some_cases(scores(), 4)[::3])
    assert used["error"] > 40 and reported["error"] > 15, (used, reported)


def test_compare_json(copy):
    found = try_all(partial(report_on, copy), copy / "compare.json", comparison(), some_cases(comparison(), 5))
    assert found["error"] > 20


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("preset",), GONE, "run.json: this model's description: it has no preset"),
        (("model",), 3, "it.model must be one of 'lift', 'clip', not 3"),
        (("text_dim",), GONE, "it has no text_dim"),
        (("text_dim",), 10**9, "text_dim must be at least 1 and at most"),
        (("text_dim",), -1, "text_dim must be at least 1"),
        (("text_dim",), "384", "it.text_dim must be an integer, not '384'"),
        (("vit", "width"), [[1]], "it.vit.width must be an integer, not a list"),
        (("vit",), {"depth": 3}, "it.vit has no field 'depth'"),
        (("encoder",), "an encoder", "it.encoder must be an object or null, not 'an encoder'"),
        (("encoder", "name"), "a\0b", "its encoder has no name"),
        (("encoder", "prompt"), "\ud800", "half a Unicode character"),
        (("rotation",), {"kind": "spin", "seed": 0}, "does not know the rotation"),
        (("rotation",), {"kind": "hadamard", "seed": -1}, "does not know the rotation"),
        (("conditioning",), {"power": 2}, "does not know the conditioning"),
        (("machine", "cores"), "two", "it.machine.cores must be an integer from 0 or null, not 'two'"),
        (("loss",), ["x"], r"it.loss\[0\] must be a number or null"),
        (("config", "data"), "a set", "it.config.data must be a list"),
        (("text",), {"context": 5}, "its text has a context of its own"),
    ],
)
def test_a_description_is_refused_in_words(copy, path, value, match):
    file = copy / "lift" / "run.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    refused(lambda: lift_fast.load(copy / "lift", device="cpu"), match, ConfigError)


def test_sizes_without_memory_are_refused_at_once(copy):
    """LIFT's head would have 10^12 numbers; none is allocated."""
    file = copy / "lift" / "run.json"
    content = json.loads(file.read_text()) | {"text_dim": 1_000_000}
    file.write_text(json.dumps(content))
    found = judged(lambda: lift_fast.load(copy / "lift", device="cpu"), most=1 << 28)
    assert found.outcome == "error"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"config": {"data": ["a"]}}, "the run.json of --lift is not as training writes it .it.config has no s"),
        ({"machine": {"cpu": 3}}, "it.machine.cpu must be a text or null, not 3"),
        ({"loss": None}, "it.loss must be a list, not None"),
    ],
)
def test_a_run_without_what_a_report_needs(copy, changes, match):
    file = copy / "lift" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(partial(report_on, copy), match)


def test_a_run_json_permits_nothing_on_this_machine():
    """ "read" says how the run's data was read; links and absolute paths are the user's to allow."""
    read = {"absolute_paths": True, "skip_bad": True, "recorded": 1, "key": "id"}
    assert options_of({"read": read}, DataOptions()) == DataOptions(key="id")
    refused(lambda: options_of({"read": {"key": 3}}, DataOptions()), "it.key must be a text or null")


def test_metrics_with_lines_of_others(copy):
    file = copy / "lift" / "metrics.jsonl"
    good = file.read_text()
    deep = "[" * 10_000 + '"evaluation"'
    for line in ('{"step": 1e400, "evaluation": {}}', '{"step": 2, "evaluation": {"a": 3}}', deep):
        file.write_text(f"{line}\n{good}")
        assert [*read_curves(file)] == ["held out"]


# Files that are none: pipes, devices, loops of links.


def unusual(folder: Path) -> dict[str, Path]:
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "folder").mkdir()
    (folder / "zero").symlink_to("/dev/zero")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("what", ["pipe", "loop", "folder", "zero"])
def test_what_is_no_file_is_refused_at_once(copy, tmp_path, what):
    """On the main branch before this, a pipe was waited for, and a device read until the memory ended."""
    (tmp_path / "u").mkdir()
    place = unusual(tmp_path / "u")[what]
    run, cache = copy / "lift", copy / "cache"

    def put(file: Path) -> None:
        file.unlink()
        file.symlink_to(place)

    operations = {
        run / "eval.json": partial(report_on, copy),
        run / "metrics.jsonl": partial(read_curves, run / "metrics.jsonl"),
        run / "model.safetensors": lambda: lift_fast.load(run, device="cpu"),
        run / "run.json": lambda: run_folder.read_description(run),
        copy / "compare.json": partial(report_on, copy),
        cache / "manifest.json": lambda: Cache(cache),
        cache / "text-00000.safetensors": lambda: Cache(cache).vectors(torch.arange(11)),
    }
    for file, operation in operations.items():
        kept = file.read_bytes()
        put(file)
        if not (what == "loop" and file.name == "metrics.jsonl"):
            assert judged(operation, seconds=10, most=1 << 26).outcome == "error", file
        file.unlink()
        file.write_bytes(kept)
    for name in ("weights.pt", "weights.safetensors"):
        (tmp_path / name).symlink_to(place)
        assert judged(partial(read_weights, tmp_path / name), seconds=10, most=1 << 26).outcome == "error"


# Manifests


def test_manifests(copy, root):
    file, expected = copy / "cache" / "manifest.json", Cache(root / "cache").vectors(torch.arange(11))
    content = json.loads(file.read_text())
    outcomes = {"right answer": 0, "error": 0}
    for path, value in some_cases(content, 6, 6):
        if path == ("checksum",):
            continue
        file.write_text(sealed(changed(content, path, value)))
        try:
            read_cache(copy / "cache", expected)
            outcomes["right answer"] += 1
        except CacheError:
            outcomes["error"] += 1
    assert outcomes["error"] > 80, outcomes


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("dim",), 0, "invalid count or name"),
        (("dim",), 1 << 25, "invalid count or name"),
        (("dim",), True, "it.dim must be an integer, not True"),
        (("shards", 0, "rows"), 1 << 47, "invalid count or name"),
        (("shards", 0, "rows"), -1, "invalid count or name"),
        (("shards", 0, "rows"), 2.0, r"it.shards\[0\].rows must be an integer, not 2.0"),
        (("shards", 0, "skipped"), 6, "invalid count or name"),
        (("shards", 1, "name"), "text-00000.safetensors", "invalid count or name"),
        (("shards", 1, "name"), "../x", "invalid count or name"),
        (("shards", 0, "more"), 1, r"it.shards\[0\] has no field 'more'"),
        (("shards", 0, "sha256"), GONE, "header is damaged"),
        (("shards",), GONE, "it has no shards"),
        (("shards",), {}, "it.shards must be a list"),
        (("codec",), "int3", "int3"),
        (("codec",), 3, "it.codec must be a text"),
        (("rotation",), {"kind": "hadamard", "seed": 0}, "takes no rotation"),
        (("encoder",), [], "it.encoder must be an object"),
        (("format",), True, "format version True"),
        (("endian",), "big", "endian"),
    ],
)
def test_a_manifest_is_refused_in_words(copy, path, value, match):
    file = copy / "cache" / "manifest.json"
    file.write_text(sealed(changed(json.loads(file.read_text()), path, value)))
    refused(lambda: Cache(copy / "cache").vectors(torch.arange(11)), match, CacheError)


@pytest.mark.parametrize("text", ["[]," * 20_000_000, "[1, " * 5_000_000, '{"shards": [' + '{"a":1},' * 5_000_000])
def test_a_large_manifest_of_nothing_costs_nothing(copy, text):
    """One of 100 MB took 2.3 GB and 20 s."""
    (copy / "cache" / "manifest.json").write_text(text)
    began = time.perf_counter()
    found = judged(lambda: Cache(copy / "cache"), most=300 << 20)
    assert found.outcome == "error" and time.perf_counter() - began < 10


# started.json, checkpoints' and exports' descriptions are in test_damaged.py and test_folder.py too.


def test_a_started_json_with_a_right_checksum(tmp_path):
    prints = {"data": [], "caches": [], "left_out": {"samples": 0, "rows": ""}}
    settings = {"mathematics": {"model": "lift", "init_from": None, "read": {}}, "fingerprints": prints}
    prints["data"].append({"samples": 1, "sizes": "", "captions": None, "images": ["a"]})
    out = tmp_path / "out"
    out.mkdir()
    content = start(out, settings, {"config": {}})
    del content["checksum"]
    errors = 0
    for path, value in some_cases(content, 7, 8):
        entries = changed(content, path, value)
        (out / "started.json").write_text(json.dumps(entries | {"checksum": digest_of(entries)}))
        try:
            differences(read_started(out, False), settings)
        except ConfigError:
            errors += 1
    assert errors > 50


# Weights


def with_tensor(copy: Path, name: str, tensor: torch.Tensor) -> None:
    file = copy / "lift" / "model.safetensors"
    save_file(load_file(file) | {name: tensor}, file)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("visual.ln_post.bias", lambda t: t.index_fill(0, torch.tensor([1]), torch.nan), "bias holds NaN or infinity"),
        ("head.fc_1.weight", lambda t: t.clone().fill_(torch.inf), "head.fc_1.weight holds NaN or infinity"),
        ("head.fc_1.weight", lambda t: t.half() * 0 + 60_000, ""),  # its sum is no number of half precision
        ("head.fc_1.weight", lambda t: t.double(), ""),
        ("head.fc_1.weight", lambda t: t.double() * 0 + 1e300, "holds NaN or infinity"),  # in float32
        ("head.fc_1.weight", lambda t: t.int(), "is of another kind .torch.int32"),
        ("head.fc_1.weight", lambda t: t > 0, "is of another kind .torch.bool"),
        ("head.fc_1.weight", lambda t: t.to(torch.complex64), "is of another kind .torch.complex64"),
        ("head.fc_1.weight", lambda t: t[:0], "does not fit its run.json"),
        ("logit_scale", lambda t: torch.tensor(torch.nan), "logit_scale holds NaN"),
        ("logit_scale", lambda t: torch.tensor(1000.0), "its logit_scale is e.1000"),
        ("logit_scale", lambda t: torch.ones(3), "does not fit its run.json"),
        ("more", lambda t: torch.ones(1), "does not fit its run.json"),
    ],
)
def test_weights_of_a_run(copy, name, change, match):
    file = copy / "lift" / "model.safetensors"
    with_tensor(copy, name, change(load_file(file).get(name)))
    if match:
        refused(lambda: lift_fast.load(copy / "lift", device="cpu"), match, ConfigError)
    else:
        assert lift_fast.load(copy / "lift", device="cpu").encode_image(torch.zeros(1, 3, 24, 24)).isfinite().all()


@pytest.mark.parametrize("bit", [62, 60])
def test_headers_of_safetensors_that_lie(copy, bit):
    file = copy / "lift" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[:8] = (1 << bit).to_bytes(8, "little")
    file.write_bytes(data)
    refused(lambda: lift_fast.load(copy / "lift", device="cpu"), "its header has .* bytes, and at most", ConfigError)


def open_clip_state(change=lambda state: None) -> dict[str, Any]:
    state: dict[str, Any] = save_weights(random_model("clip").module.visual, "open_clip")
    change(state)
    return state


def put(key: str, value: Any):
    """A change of a state dict: another tensor, or a function of the one that is there."""
    return lambda state: state.__setitem__(key, value(state[key]) if isfunction(value) else value)


CONV = "visual.conv1.weight"
LAST = "visual.ln_post.bias"
NOT_PLAIN = "not tensors as a model has them"
PICKLED = {
    "meta": (put(LAST, lambda t: t.to("meta")), f"{NOT_PLAIN} .visual.ln_post.bias is on meta"),
    "sparse": (put(CONV, lambda t: t.to_sparse()), f"{NOT_PLAIN} .visual.conv1.weight is on cpu, torch.sparse"),
    "a repeated number": (put(CONV, torch.zeros(1).expand(10**6, 10**6)), NOT_PLAIN),
    "a key that is no text": (lambda state: state.__setitem__(((1,),), torch.ones(1)), "a key is no text but a tuple"),
    "nan": (put(LAST, lambda t: t * torch.nan), "ln_post.bias holds NaN or infinity; these weights have diverged"),
    "int32": (put(LAST, lambda t: t.int()), "of another shape or kind: visual.ln_post.bias torch.int32"),
    "complex": (put(LAST, lambda t: t.to(torch.complex64)), "of another shape or kind"),
    "a list": (None, "neither a state dict nor a dict with one"),
    "nested": (put(LAST, {"a": {}}), "neither a state dict nor a dict with one"),
    "nothing": (lambda state: state.clear(), "not an image tower of"),
}


@pytest.mark.parametrize("what", PICKLED)
def test_weights_of_others(tmp_path, what):
    change, match = PICKLED[what]
    state = [torch.ones(1)] if change is None else open_clip_state(change)
    torch.save(state, tmp_path / "weights.pt")
    refused(lambda: load_weights(tmp_path / "weights.pt", heads=3, activation="gelu"), match, ConfigError)


def test_dicts_in_dicts_a_thousand_times(tmp_path):
    """As many as torch writes."""
    state: Any = {}
    for _ in range(300):
        state = {"a": state}
    torch.save(state, tmp_path / "weights.pt")
    refused(lambda: read_weights(tmp_path / "weights.pt"), "neither a state dict|cut short", ConfigError)


def test_a_storage_that_is_said_to_be_huge(tmp_path):
    """Of the format before zip files: the number of its elements is written next to them."""
    torch.save({"a": torch.ones(7)}, tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "weights.pt").read_bytes()
    (tmp_path / "weights.pt").write_bytes(data.replace((7).to_bytes(8, "little"), (10**12).to_bytes(8, "little")))
    found = judged(partial(read_weights, tmp_path / "weights.pt"), most=1 << 28)
    assert found.outcome == "error" and "cut short" in found.message


def test_tensors_that_share_their_numbers(tmp_path):
    """Two do, as in models with tied weights. Ten thousand would take all memory when they are copied."""
    shared = torch.ones(300_000)
    torch.save({"a": shared, "b": shared}, tmp_path / "two.pt")
    assert len(read_weights(tmp_path / "two.pt")) == 2
    torch.save({str(i): shared for i in range(100)}, tmp_path / "many.pt")
    refused(lambda: read_weights(tmp_path / "many.pt"), "not tensors as a model has them", ConfigError)


def test_no_memory_to_map_weights(copy):
    def load() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1, 1))
        read_tensors(copy / "lift" / "model.safetensors")

    found = judged(load, errors=(ValueError, OSError))
    assert found.outcome == "error"


def test_features_that_are_not_finite(copy):
    """Weights that overflow in half precision: an error, no order of NaN."""
    with_tensor(copy, "head.fc_2.weight", torch.full((14, 14), 3e38))
    model = lift_fast.load(copy / "lift", device="cpu")
    refused(
        lambda: model.encode_image(torch.randn(2, 3, 24, 24)), "the features of some images are not finite", ConfigError
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_ranks_features_that_are_not_finite(value):
    good, bad = torch.eye(3), torch.eye(3).index_fill(0, torch.tensor([1]), value)
    rows = torch.arange(3)
    for image, text in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="not finite"):
            ranks(image, text, rows, rows)
        with pytest.raises(ValueError, match="not finite"):
            zero_shot(image, text[:, None], rows)
        with pytest.raises(ValueError, match="not finite"):
            composition(image, text, [Rows("swap_obj", 0, (1,), 2)])


def test_weights_to_begin_with_of_a_run_without_an_encoder(copy):
    file = copy / "lift" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"encoder": None}))
    said = init_from(random_model("lift").module, copy / "lift")
    assert said == f"Weights: all of the LIFT run {copy / 'lift'}"


def test_loading_stays_fast(copy):
    """All weights are looked at: 100 MB take a tenth of a second."""
    state = {"a": torch.randn(25_000_000)}
    began = time.perf_counter()
    assert unusable(state) == ""
    assert time.perf_counter() - began < 1


# Charts of numbers that are nearly equal, or nearly nothing.


RANGES = [(1.0, 1.0 + 3e-16), (1e17, 1e17), (0.0, 1e-323), (-1e99, 1e99), (3.0, 3.0), (0.0, 0.0), (5e-324, 1e-308)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_ticks(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) < 20 and len({*marks}) == len(marks) and marks[0] <= low and marks[-1] >= high


# A few of each kind that `make campaign` tries by the hundred (tests/campaign/test_foreign_files.py).


def test_bits_of_weights(copy):
    """A run's weights have no checksum: another number is another model, but no crash."""
    for at in (0, 3, 9, 40, 200, -1, -4):
        flip_bit(copy / "lift" / "model.safetensors", at)
        try:
            use(copy / "lift")
        except (ConfigError, DataError):
            pass

"""Runs, manifests and weights that are altered, cut or have a flipped bit: each is a typed error, or right."""

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from support.foreign_files import (
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

from lift_fast.cache import Cache
from lift_fast.nn.weights import load as load_weights
from lift_fast.nn.weights import save as save_weights

pytestmark = pytest.mark.campaign


@pytest.fixture
def root(tmp_path) -> Path:
    write_runs(tmp_path)
    write(tmp_path / "cache", [5, 6], 8)
    return tmp_path


def drawn(content: dict, seed: int, count: int) -> list[tuple[tuple, object]]:
    """Places in a file, each with one of VALUES; no case twice."""
    cases = [(path, value) for path in places(content) for value in VALUES]
    return random.Random(seed).sample(cases, min(count, len(cases)))


def cut_or_flipped(data: bytes, rng: random.Random) -> bytes:
    """The bytes cut short, or with a bit flipped, or a few bytes replaced: near the beginning more often."""
    at = rng.randrange(min(len(data), rng.choice([16, 1000, len(data)])))
    kind = rng.randrange(3)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    return data[:at] + rng.randbytes(4) + data[at + 4 :]


@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_values_of_run_json(root, tally, kind):
    file = root / kind / "run.json"
    content = json.loads(file.read_text())
    for i, (path, value) in enumerate(drawn(content, 1, 200)):
        file.write_text(json.dumps(changed(content, path, value)))
        tally("run", judged(partial(report_on, root) if i % 2 else partial(use, root / kind)).outcome)


def test_values_of_eval_json_and_compare_json(root, tally):
    for file, content, count in (
        (root / "lift" / "eval.json", scores(), 140),
        (root / "compare.json", comparison(), 60),
    ):
        for i, (path, value) in enumerate(drawn(content, 2, count)):
            file.write_text(json.dumps(changed(content, path, value)))
            with_card = i % 2 and file.name == "eval.json"
            tally("run", judged(partial(use, root / "lift") if with_card else partial(report_on, root)).outcome)
        file.write_text(json.dumps(content))


def test_bytes_of_run_json_and_eval_json(root, tally):
    rng = random.Random(3)
    for name in ("run.json", "eval.json"):
        file = root / "lift" / name
        data = file.read_bytes()
        for _ in range(40):
            file.write_bytes(cut_or_flipped(data, rng))
            tally("run", judged(partial(use, root / "lift")).outcome)
        file.write_bytes(data)


def test_manifests(root, tally):
    """A changed value is sealed with the checksum of the changed content."""
    file, expected = root / "cache" / "manifest.json", Cache(root / "cache").vectors(torch.arange(11))
    data = file.read_bytes()
    content, rng = json.loads(data), random.Random(4)
    del content["checksum"]
    for path, value in drawn(content, 4, 260):
        file.write_text(sealed(changed(content, path, value)))
        tally("manifest", judged(partial(read_cache, root / "cache", expected)).outcome)

    def read() -> None:
        assert torch.equal(Cache(root / "cache").vectors(torch.arange(11)), expected)

    for _ in range(60):
        file.write_bytes(cut_or_flipped(data, rng))
        tally("manifest", judged(read).outcome)


def test_weights(root, tally):
    """Weights have no checksum: another number is another model, but never a crash, or a feature that is not finite."""
    rng = random.Random(5)
    file = root / "lift" / "model.safetensors"
    data = file.read_bytes()
    for _ in range(90):
        file.write_bytes(cut_or_flipped(data, rng))
        tally("weights", judged(partial(use, root / "lift")).outcome)
    file.write_bytes(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    body = data[8 + int.from_bytes(data[:8], "little") :]
    for path, value in drawn(header, 6, 60):
        text = json.dumps(changed(header, path, value)).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + body)
        tally("weights", judged(partial(use, root / "lift")).outcome)


@pytest.mark.parametrize("layout", ["open_clip", "timm"])
def test_weights_in_pickles(root, tally, layout):
    model, file, rng = random_model("clip"), root / "weights.pt", random.Random(7)
    torch.save(save_weights(model.module.visual, layout), file)
    data = file.read_bytes()

    def read() -> None:
        found = load_weights(file, heads=3, activation="gelu")
        assert found.visual(torch.zeros(1, 3, 24, 24)).shape == (1, 24)

    read()  # here first: torch imports modules for it, which each child would
    for _ in range(60):
        file.write_bytes(cut_or_flipped(data, rng))
        tally("weights", judged(read).outcome)

"""export/onnx.py: the graphs under onnxruntime, and the classifier of the card, without torch."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from support.small_models import small_model
from support.without import run_without
from torch.nn import functional as F
from transformers import AutoTokenizer

from lift_fast.errors import BackendError
from lift_fast.export import export
from lift_fast.export import onnx as target

ROOT = Path(__file__).parents[2]
NAMES = ["dog", "cat", "ein Fuß"]


@pytest.fixture(scope="module", params=["lift", "clip"])
def exported(request, tmp_path_factory):
    """(the model, the folder of its export)"""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp(request.param)
    model = small_model(folder / "run", request.param, class_token=request.param == "lift")
    export(model, "onnx", folder / "out", names=NAMES, templates=["a {}", "two {}s"])
    return model, folder / "out"


def run(file: Path, **given: np.ndarray) -> torch.Tensor:
    (features,) = onnxruntime.InferenceSession(file).run(["features"], given)
    return torch.from_numpy(features)


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_image_features(exported, batch):
    model, folder = exported
    pixels = torch.randn(batch, 3, 42, 42)
    features = run(folder / "image_encoder.onnx", pixels=pixels.numpy())
    torch.testing.assert_close(features, model.encode_image(pixels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_text_features(exported, batch):
    model, folder = exported
    if not hasattr(model.module, "encode_text"):
        assert not (folder / "text_encoder.onnx").exists()
        return
    tokens = torch.randint(1, 49406, (batch, 9))
    for row in range(batch):
        end = 1 + row % 8
        tokens[row, end], tokens[row, end + 1 :] = 49407, 0
    features = run(folder / "text_encoder.onnx", tokens=tokens.numpy())
    with torch.no_grad():
        expected = F.normalize(model.module.encode_text(tokens), dim=-1)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


def test_the_tokenizer(exported):
    """transformers pads with the end of the text, lift-fast with zeros; the graph reads the first end."""
    model, folder = exported
    if not hasattr(model.module, "encode_text"):
        return
    texts = ["a dog", "two dogs and a cat that is longer than the nine tokens", "Ein Fuß!"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
    features = run(folder / "text_encoder.onnx", tokens=tokens)
    torch.testing.assert_close(features, model.encode_text(texts), rtol=0, atol=1e-4)


def test_the_graphs(exported):
    model, folder = exported
    for file in folder.glob("*.onnx"):
        graph = onnx.load(file)
        onnx.checker.check_model(graph, full_check=True)
        assert [(one.domain, one.version) for one in graph.opset_import] == [("", target.OPSET)]
        for value in (*graph.graph.input, *graph.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert str(ROOT).encode() not in file.read_bytes() and sys.prefix.encode() not in file.read_bytes()


def example(folder: Path) -> str:
    """The classifier of the card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    (found,) = [block for block in blocks if "onnxruntime" in block]
    return found.replace("FOLDER", str(folder))


def test_the_classifier_needs_neither_torch_nor_lift_fast(exported, tmp_path):
    model, folder = exported
    random = np.random.default_rng(5)
    paths = []
    for name, (height, width) in {"same": (42, 42), "other": (83, 131)}.items():
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{name}.png"))
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    code = example(folder).replace('["image.jpg"]', repr(paths))
    printed = run_without(["torch", "lift_fast"], code).splitlines()
    expected = model.zero_shot(NAMES, ["a {}", "two {}s"])(paths)
    assert [line.split(" {")[0] for line in printed] == paths
    for line, row, tolerance in zip(printed, expected, (1e-3, 2e-2), strict=True):
        scores = ast.literal_eval(line[line.index("{") :])
        assert list(scores) == NAMES
        torch.testing.assert_close(torch.tensor(list(scores.values())), row, rtol=0, atol=tolerance)


def test_weights_of_two_gigabytes_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "_MOST_BYTES", 1000)
    model = small_model(tmp_path / "run", "lift", layers=1)
    export(model, "onnx", tmp_path / "out")
    assert (tmp_path / "out" / "image_encoder.onnx.data").stat().st_size > 1000
    pixels = torch.randn(2, 3, 42, 42)
    features = run(tmp_path / "out" / "image_encoder.onnx", pixels=pixels.numpy())
    torch.testing.assert_close(features, model.encode_image(pixels), rtol=0, atol=1e-4)


def test_without_onnxscript(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BackendError, match=r"onnxscript is not installed.*lift-fast\[onnx\]"):
        export(small_model(tmp_path / "run", "lift"), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()

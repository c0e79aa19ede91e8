"""docs/export.md: the lines of Python are those of the model cards, and run as pasted, each after the export above it.

The lines of hf and sentence-transformers are run by test_hf.py and test_sentence_transformers.py; the ```bash blocks
run alone in tests/project/test_docs_blocks.py, which leaves the ```python blocks of this page to this test.
"""

import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import peers
from support.small_models import small_model
from support.without import run_without

from lift_fast.cache import Conditioning
from lift_fast.cli.main import main
from lift_fast.export import TARGETS, conditioned, safetensors

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
BLOCKS = {
    re.search(r"--to (\S+)", bash)[1]: (bash, python)
    for bash, python in re.findall(r"```bash\n(.*?)```.*?```python\n(.*?)```", PAGE, re.S)
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run at runs/demo/lift of the folder `model.source` starts with, next to cat.jpg."""
    torch.manual_seed(2)
    root = tmp_path_factory.mktemp("docs")
    (root / "runs/demo").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "cat.jpg")
    return small_model(root / "runs/demo/lift", "lift", image_size=72, patch_size=12)  # the demo's


@pytest.fixture
def place(model, monkeypatch) -> Path:
    folder = Path(model.source).parents[2]
    monkeypatch.chdir(folder)
    return folder


def test_every_target_has_its_blocks():
    assert set(BLOCKS) == set(TARGETS)


@pytest.mark.parametrize("to", TARGETS)
def test_the_lines_are_those_of_the_card(model, to):
    bash, python = BLOCKS[to]
    lines = import_module(f"lift_fast.export.{TARGETS[to]}").use(model)
    out = re.search(r"--out (\S+)", bash)[1]
    assert re.sub(r'"\w+\.jpg"', '"cat.jpg"', lines).replace("FOLDER", out) == python


@pytest.mark.parametrize("to", ["open_clip", "timm", "onnx", "torch-export", "safetensors"])
def test_the_lines_run(to, place):
    bash, python = BLOCKS[to]
    main(shlex.split(bash)[1:])
    if to in ("open_clip", "timm"):
        peers.run(python, cwd=place)
    elif to == "onnx":
        printed = run_without(["torch", "lift_fast"], python)
        assert re.fullmatch(r"cat\.jpg \{'cat': [\d.]+, 'dog': [\d.]+\}\n", printed)
    else:
        subprocess.run([sys.executable, "-c", python], check=True, timeout=300)


def test_other_python_blocks_run(place):
    others = set(re.findall(r"```python\n(.*?)```", PAGE, re.S)) - {python for _, python in BLOCKS.values()}
    # The lines of the cards, which test_conditioned_export.py runs.
    others.remove(conditioned.CODE.replace("FOLDER", "exports/weights"))
    for block in others:
        assert "exports/onnx" in block  # the export from Python
        shutil.rmtree("exports/onnx", ignore_errors=True)
        exec(block, {})
    assert len(others) == 1


def test_every_field_of_config_json_is_described(model):
    table = PAGE[PAGE.index("### config.json") : PAGE.index("## The hub")]
    for name, value in safetensors.config(model).items():
        fields = list(value) if isinstance(value, dict) and name not in ("encoder", "head") else [name]
        assert not [field for field in fields if f"`{field}`" not in table and f".{field}`" not in table]


def test_every_field_of_a_conditioning_is_described():
    row = PAGE[PAGE.index("| `conditioning` |") : PAGE.index("## Conditioned text vectors")]
    made = Conditioning(torch.zeros(3).double(), torch.eye(3)[:2], torch.ones(3).double(), 0.5)
    assert not [field for field in conditioned.entry(made) if f"`{field}`" not in row]

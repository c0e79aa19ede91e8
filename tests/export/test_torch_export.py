"""export/torch_export.py: the graphs in a process without lift-fast."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.small_models import small_model
from support.without import run_without
from torch.nn import functional as F

from lift_fast.export import export

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
folder = sys.argv[1]
for file, given in torch.load(folder + "/given.pt").items():
    encode = torch.export.load(folder + "/" + file).module()
    torch.save([encode(batch) for batch in given], folder + "/" + file + ".features")
"""


@pytest.mark.parametrize("kind", ["lift", "clip"])
def test_features_without_lift_fast(kind, tmp_path):
    model = small_model(tmp_path / "run", kind, activation="quick_gelu" if kind == "clip" else "gelu")
    out = tmp_path / "out"
    export(model, "torch-export", out)
    pixels = [torch.randn(batch, 3, 42, 42) for batch in (1, 3, 17)]
    given, expected = {"image_encoder.pt2": pixels}, {"image_encoder.pt2": [model.encode_image(p) for p in pixels]}
    if kind == "clip":
        tokens = [torch.randint(0, 49408, (batch, 9)) for batch in (1, 3, 17)]
        given["text_encoder.pt2"] = tokens
        with torch.no_grad():
            expected["text_encoder.pt2"] = [F.normalize(model.module.encode_text(t), dim=-1) for t in tokens]
    assert {file.name for file in out.glob("*.pt2")} == set(given)
    torch.save(given, out / "given.pt")
    run_without(["lift_fast"], SCRIPT, str(out))
    for file in given:
        torch.testing.assert_close(torch.load(out / f"{file}.features"), expected[file], rtol=1e-5, atol=1e-5)


def test_no_path_of_this_machine(tmp_path):
    export(small_model(tmp_path / "run", "lift", layers=1), "torch-export", tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out" / "image_encoder.pt2") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert str(ROOT).encode() not in content and sys.prefix.encode() not in content


def test_a_full_disk_is_a_message(tmp_path):
    """In a process of its own, whose files may have no more than 100 kB: torch, given a path, would end it."""
    small_model(tmp_path / "run", "lift")
    code = """
import resource, sys, lift_fast
from lift_fast.export import export
model = lift_fast.load(sys.argv[1], device="cpu")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    export(model, "torch-export", sys.argv[2])
except lift_fast.errors.ConfigError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, tmp_path / "run", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "cannot be written (File too large)" in done.stdout, done.stderr[-600:]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}

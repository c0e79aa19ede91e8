"""Runs the tests of the C++ engine in a build with AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def library(name):
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "tests",
    [
        "rows/test_gather.py",
        "pairs/test_contrastive_cpp.py",
        "transformer/test_blocks_cpp.py",
        "attention/test_attention_cpp.py",
    ],
)
def test_the_engine_runs_clean(tmp_path, tests):
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "lift_fast", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=skip)
    shutil.copytree(ROOT / "kernels", tree / "lift_fast" / "kernels", ignore=skip)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    build = {**os.environ, "LIFT_FAST_CUDA": "0", "CFLAGS": FLAGS, "LDFLAGS": FLAGS}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tree)]
    built = subprocess.run(command, cwd=tree, env=build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    preload = ":".join(library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    run = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tree)}
    show = "import lift_fast._C as c; print(c.__file__)"
    there = subprocess.run([sys.executable, "-c", show], cwd=tree, env=run, capture_output=True, text=True)
    assert there.stdout.startswith(str(tree)), there.stderr
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]
    done = subprocess.run(command, cwd=tree, env=run, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

"""Runs the tests of the C++ engine in a build with AddressSanitizer and UndefinedBehaviorSanitizer, and its races with
ThreadSanitizer, in a program without Python and torch, which that knows too little of."""

import os
import re
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
        "cache/test_cache_races.py",
        "cache/test_cache_changes.py",
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
    # Workers that start by themselves take minutes; a limit on addresses leaves no room for the sanitizer's own.
    left_out = "not workers_of and not does_not_map and not arguments_of_a_map"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", left_out, f"tests/{tests}"]
    done = subprocess.run(command, cwd=tree, env=run, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


RACES = [f"rows/{name}.cpp" for name in ("table", "keys", "dequant", "mapping")]
RACES += [f"common/{name}.cpp" for name in ("fork", "isa", "parallel", "scratch")]


@pytest.mark.campaign
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_engine_has_no_races(tmp_path, sanitizer):
    """But for the one that is wanted: who calls may write to the row numbers while they are copied."""
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    sources = [ROOT / "tests/support/engine_races.cpp", *(ROOT / "csrc" / name for name in RACES)]
    command = ["g++", *flags, *map(str, sources), "-pthread", "-ldl", "-o", str(tmp_path / "races")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    (tmp_path / "wanted").write_text("race:RowNumbers\n")
    run = {**os.environ, "TSAN_OPTIONS": f"suppressions={tmp_path / 'wanted'}"}
    done = subprocess.run([tmp_path / "races", tmp_path], env=run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "WARNING" not in done.stderr, (done.stdout + done.stderr)[-4000:]
    right, errors, wrong, lost = map(int, re.findall(r"\d+", done.stdout))
    assert right and errors and lost and not wrong

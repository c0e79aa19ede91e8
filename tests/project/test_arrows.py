"""Imports point down only: each room may import the rooms listed for it, and nothing else of ours."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "former_paths": set(),
    "devices": {"errors"},
    "kernels": set(),
    "sugarcrepe": set(),
    "ops": {"errors", "kernels", "_C"},
    "losses": {"errors", "ops"},
    "nn": {"errors", "ops"},
    "cache": {"errors", "files", "ops"},
    "data": {"errors", "files", "ops"},
    "demo": {"errors", "sugarcrepe", "data"},
    "text": {"errors", "ops", "cache", "data"},
    "run_folder": {"errors", "files", "nn", "cache", "text"},
    "measure": {"errors", "files", "sugarcrepe", "ops", "losses", "nn", "cache", "text"},
    "train": {"errors", "devices", "run_folder", "ops", "losses", "nn", "cache", "data", "text", "measure"},
    "eval": {"errors", "devices", "run_folder", "sugarcrepe", "data"},
}
TOP = {"cli", "__init__"}  # may import anything


def sources() -> list[Path]:
    return sorted([*ROOT.glob("lift_fast/**/*.py"), *ROOT.glob("kernels/*.py")])


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported_rooms(path: Path) -> set[str]:
    """The rooms of ours that a file imports, at the top or inside a function."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ["lift_fast", *parts[:-1]] if parts[0] == "kernels" else list(parts[:-1])
    modules: list[list[str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            modules += [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
    return {module[1] for module in modules if module[0] == "lift_fast" and len(module) > 1}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_lies_below(path):
    here = room(path)
    if here in TOP:
        return
    assert here in ARROWS, f"{path}: no arrows are drawn for the room {here!r}"
    wrong = imported_rooms(path) - ARROWS[here] - {here, "__version__"}
    assert not wrong, f"{path} imports {sorted(wrong)}; {here} may import {sorted(ARROWS[here])}"


def test_rooms_make_no_loop():
    merged = {name: {below for below in rooms if below not in ("_C", name)} for name, rooms in ARROWS.items()}
    done: set[str] = set()
    while len(done) < len(merged):
        ready = {name for name, rooms in merged.items() if name not in done and rooms <= done}
        assert ready, f"a loop among {sorted(set(merged) - done)}"
        done |= ready


def test_the_test_sees_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "lift_fast" / "ops" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..train import loop\nfrom . import y\ndef f():\n    import lift_fast.cache.reader\n")
    assert imported_rooms(file) == {"train", "ops", "cache"}


def test_only_ops_names_a_backend():
    backends = {"triton", "flash_attn", "xformers"}
    for path in sources():
        if room(path) in ("ops", "kernels"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            assert not backends & {name.split(".")[0] for name in names}, f"{path} names a backend"

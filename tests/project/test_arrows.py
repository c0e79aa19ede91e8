"""Imports point down only: each room may import the rooms listed for it, and no other part of lift_fast."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GROUND = {"errors", "files", "foreign", "printable", "progress"}  # what reads and shows files of users
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "printable": set(),
    "foreign": {"files"},
    "scores": {"foreign"},
    "former_paths": set(),
    "progress": {"printable"},
    "devices": {"errors", "ranks"},
    "ranks": {"errors"},
    "kernels": set(),
    "sugarcrepe": set(),
    "ops": {"errors", "kernels", "_C"},
    "losses": {"errors", "ops"},
    "nn": GROUND | {"ops"},
    "cache": GROUND | {"ops"},
    "data": GROUND | {"ops"},
    "demo": GROUND | {"sugarcrepe", "data"},
    "text": GROUND | {"ranks", "ops", "cache", "data"},
    "run_folder": GROUND | {"nn", "cache", "text"},
    "measure": GROUND | {"scores", "sugarcrepe", "ops", "losses", "nn", "cache", "text"},
    "eval": GROUND | {"scores", "devices", "ranks", "run_folder", "sugarcrepe", "nn", "data"},
    "train": GROUND
    | {"devices", "ranks", "run_folder", "ops", "losses", "nn", "cache", "data", "text", "measure", "eval"},
    "inference": GROUND | {"devices", "run_folder", "ops", "nn", "cache", "data", "text", "train", "eval"},
    "export": GROUND | {"scores", "run_folder", "nn", "cache", "text", "data", "inference"},
    "gallery": GROUND | {"devices", "run_folder", "nn", "data", "text", "inference"},
}
TOP = {"cli", "__init__"}  # may import anything
FAMILIES = ("attention", "pairs", "rows", "transformer")  # of ops; they do not import each other
LONG = {"lift_fast/demo/scenes.py"}  # one drawing after another


def sources() -> list[Path]:
    return sorted([*ROOT.glob("lift_fast/**/*.py"), *ROOT.glob("kernels/*.py")])


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("lift_fast", *parts) if parts[0] == "kernels" else parts).removesuffix(".__init__")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the code that runs when a module is imported: none inside functions, and none only for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


def imported(path: Path, walk: Callable[[ast.AST], Iterable[ast.AST]] = ast.walk) -> set[str]:
    """The dotted names below lift_fast that a file imports: modules, or names from modules."""
    parts = module_name(path).split(".")
    package = parts if path.name == "__init__.py" else parts[:-1]
    names: set[str] = set()
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return {name for name in names if name.startswith("lift_fast.")}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of lift_fast that a file imports, at the top or inside a function."""
    return {name.split(".")[1] for name in imported(path)}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_lies_below(path):
    here = room(path)
    if here in TOP:
        return
    assert here in ARROWS, f"{path}: no arrows are drawn for the room {here!r}"
    wrong = imported_rooms(path) - ARROWS[here] - {here, "__version__"}
    assert not wrong, f"{path} imports {sorted(wrong)}; {here} may import {sorted(ARROWS[here])}"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_ops_do_not_know_each_other(family):
    known = {"lift_fast.errors", "lift_fast.kernels"}
    known |= {f"lift_fast.ops.{module}" for module in ("backends", "tuned", family)}
    for path in (ROOT / "lift_fast" / "ops" / family).glob("**/*.py"):
        wrong = [name for name in imported(path) if not any(f"{name}.".startswith(f"{one}.") for one in known)]
        assert not wrong, f"{path} imports {wrong}; a family may import {sorted(known)}"


def test_every_folder_of_ops_is_a_family_or_the_tables():
    folders = {path.parent.name for path in ROOT.glob("lift_fast/ops/*/__init__.py")}
    assert folders == {*FAMILIES, "tuned"}


def test_modules_make_no_loop():
    """Considers only the imports that run when a module is imported."""
    graph = {module_name(path): imported(path, statements) for path in sources()}
    for module, names in graph.items():
        # `from package import name` imports the module package.name if there is one, else the package.
        found = {name if name in graph else name.rpartition(".")[0] for name in names}
        graph[module] = {name for name in found if name in graph and name != module}
    while ready := {module for module, below in graph.items() if not below}:
        graph = {module: below - ready for module, below in graph.items() if module not in ready}
    assert not graph, f"a loop among {sorted(graph)}"


def test_no_module_is_longer_than_500_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name for name, lines in lengths.items() if lines > 500} == LONG


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
    assert imported(file, statements) == {"lift_fast.train.loop", "lift_fast.ops.y"}


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


def test_families_of_csrc_include_themselves_and_common():
    csrc = ROOT / "csrc"
    families = {folder.name for folder in csrc.iterdir() if folder.is_dir()}
    for path in sorted(csrc.rglob("*.*")):
        for included in re.findall(r'#include "(\w+)/', path.read_text()):
            here = path.parent.name
            assert included not in families - {here, "common"}, f"{path.relative_to(ROOT)} includes {included}"
            assert here != "common" or included == "common", f"{path.relative_to(ROOT)} includes {included}"

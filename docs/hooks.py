"""Hooks of the documentation site (mkdocs.yml): pages from outside docs/, and the check of docstrings.

A name is public if a page under docs/api/ documents it (`::: NAME`), or if it belongs to a module or class documented
there: the functions and classes in a module's `__all__`, or without one those that it defines; the methods and
properties of a class; of all these, the names without a leading underscore. The build fails if a public name has no
docstring. `forward` of an nn.Module is exempt: the class may describe its call.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
FROM_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}


def documented(pages: Path = ROOT / "docs" / "api") -> list[str]:
    """The names that the API pages ask mkdocstrings for."""
    return [name for page in sorted(pages.glob("*.md")) for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]


def resolved(name: str) -> Any:
    """The module, class or function of a dotted name. Raises ImportError or AttributeError."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def public(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """The thing itself and its public functions, classes, methods and properties, with their dotted names."""
    yield name, thing
    if isinstance(thing, ModuleType):
        for member in getattr(thing, "__all__", None) or [m for m in vars(thing) if not m.startswith("_")]:
            found = getattr(thing, member)
            its_own = "__all__" in vars(thing) or getattr(found, "__module__", None) == thing.__name__
            if its_own and (inspect.isclass(found) or inspect.isfunction(found)):
                yield from public(f"{name}.{member}", found)
    elif inspect.isclass(thing):
        for member, found in vars(thing).items():
            found = getattr(found, "__func__", None) or getattr(found, "fget", None) or found
            if not member.startswith("_") and inspect.isfunction(found):
                yield f"{name}.{member}", found


def has_docstring(thing: Any) -> bool:
    """Whether the source has one: dataclass and NamedTuple make a `__doc__` of their own."""
    if inspect.isclass(thing) or inspect.isfunction(thing):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
        assert isinstance(definition, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        return bool(ast.get_docstring(definition))
    return bool(thing.__doc__)


def undocumented(names: list[str]) -> list[str]:
    """The public names without a docstring, of these and what belongs to them."""
    everything = dict(each for name in names for each in public(name, resolved(name)))
    return [name for name, thing in everything.items() if not has_docstring(thing) and not name.endswith(".forward")]


def on_pre_build(config: Any) -> None:
    """Fails the build for public names without a docstring."""
    from mkdocs.exceptions import PluginError

    if missing := undocumented(documented()):
        raise PluginError(f"public names without a docstring: {', '.join(missing)}")


def on_files(files: Any, config: Any) -> None:
    """Adds the README as the front page, CONTRIBUTING.md, and the raw results that the pages link to."""
    from mkdocs.structure.files import File

    for page, source in FROM_ROOT.items():
        text = re.sub(r"\]\(docs/", "](", (ROOT / source).read_text())
        files.append(File.generated(config, page, content=_in_site(text)))
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.json*")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "LICENSE.txt", abs_src_path=str(ROOT / "LICENSE")))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points links that leave docs/ at their copies in the site."""
    return _in_site(markdown)


def _in_site(text: str) -> str:
    names = {source: page for page, source in FROM_ROOT.items()} | {"LICENSE": "LICENSE.txt"}
    text = re.sub(r"\]\((?:\.\./)+benchmarks/", "](benchmarks/", text)
    return re.sub(r"\]\((?:\.\./)?(README\.md|CONTRIBUTING\.md|LICENSE)(?=[)#])", lambda m: f"]({names[m[1]]}", text)

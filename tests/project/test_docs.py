"""The documentation site: public names have docstrings, examples run, and `make docs` builds it without a network."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


hooks = load(ROOT / "docs" / "hooks.py")


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_public_names_have_docstrings():
    assert hooks.undocumented(hooks.documented()) == []


def test_a_missing_docstring_is_noticed(tmp_path, monkeypatch):
    source = (
        '"""A module."""\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Bare:\n    x: int\n\n'
        "    def method(self): ...\n\n    @property\n    def prop(self): ...\n\n    def _hidden(self): ...\n\n\n"
        'class Module:\n    """Has one."""\n\n    def forward(self): ...\n\n\n'
        'def good():\n    """Does nothing."""\n\n\ndef bad(): ...\n'
    )
    (tmp_path / "some_names.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = hooks.undocumented(["some_names"])
    assert found == [f"some_names.{name}" for name in ("Bare", "Bare.method", "Bare.prop", "bad")]


def test_the_api_pages_have_every_exported_name():
    """Every package and top-level module with an `__all__` has a page, or a page for each of its names."""
    documented = set(hooks.documented())
    sources = [*(ROOT / "lift_fast").glob("*.py"), *(ROOT / "lift_fast").rglob("__init__.py")]
    for source in sources:
        if "__all__ =" in source.read_text():
            parts = source.relative_to(ROOT).with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            if module == "lift_fast.cli":  # its commands are in the README and in --help
                continue
            names = {f"{module}.{name}" for name in hooks.resolved(module).__all__}
            assert module in documented or names <= documented, f"no page under docs/api/ for {module}"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120
    for table in re.findall(r"(?:^\|.*\n)+", README, re.M):
        assert len(table.splitlines()) - 2 <= 6, table
    assert len(re.findall(r"!\[", README)) == 1


def test_the_readme_s_loss_runs():
    (example,) = [block for block in examples(README) if "lift_fast.losses" in block]
    names = {"image_features": torch.randn(9, 8), "text_features": torch.randn(9, 8), "logit_scale": torch.tensor(1.0)}
    exec(example, names)
    assert names["loss"].isfinite()


def test_the_examples_of_docs_losses_md_run():
    first, cached, codes = ({} for _ in range(3))
    for example, names in zip(examples((ROOT / "docs" / "losses.md").read_text()), (first, cached, codes), strict=True):
        exec(example, names)
        assert names["loss"].isfinite()
    assert first["image"].grad is not None and cached["tower"].weight.grad is not None
    assert torch.equal(first["same"], first["loss"])


def build(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Runs `mkdocs build` with proxies that refuse every connection.

    It runs without --quiet, which would hide warnings from `strict`.
    """
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="`make docs` installs it")
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    command = [sys.executable, "-m", "mkdocs", "build", *map(str, arguments)]
    environment = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_site(tmp_path):
    """The site builds without warnings, has an entry for every public name, and loads nothing from other hosts."""
    site = tmp_path / "site"
    done = build("--site-dir", site)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(site).as_posix(): page.read_text() for page in site.rglob("*.html")}
    loaded = re.compile(
        r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
    )
    assert not [name for name, page in pages.items() if loaded.search(page)]
    text = "".join(pages.values())
    for name in hooks.documented():
        for public, _ in hooks.public(name, hooks.resolved(name)):
            assert f'id="{public}"' in text or public.endswith(".forward"), f"no entry for {public}"
    assert (site / "benchmarks" / "results" / "cpu" / "demo.json").exists()


def test_a_broken_link_fails_the_build(tmp_path):
    """Builds a single page with the settings of the site."""
    (tmp_path / "docs").mkdir()
    config = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nplugins: []\nhooks: []\nnav: [index.md]\ntheme: null\n"
    (tmp_path / "mkdocs.yml").write_text(config)
    broken = ["[x](other.md)", "[x](#other)", "[x](index.md#another)", "![x](other.svg)"]
    for links, code in ((["[x](#one)"], 0), (broken, 1)):
        (tmp_path / "docs" / "index.md").write_text("\n\n".join(["# One", *links, ""]))
        done = build("--config-file", tmp_path / "mkdocs.yml", "--site-dir", tmp_path / "site")
        assert done.returncode == code, done.stdout + done.stderr
    assert f"Aborted with {len(broken)} warnings" in done.stdout + done.stderr

"""docs/troubleshooting.md lists every message of a LiftFastError in lift_fast/, and no other message."""

import ast
import re
from functools import cache
from pathlib import Path

from lift_fast import errors

ROOT = Path(__file__).parents[2]
# A message with fewer letters only wraps another message.
LEAST_LETTERS = 6
# Subclasses that no other module needs to know, listed as their base.
SUBCLASSES = {"BadText": "DataError", "NoTokens": "EncoderError"}
CLASSES = {name for name, thing in vars(errors).items() if isinstance(thing, type)}


def template(node: ast.expr) -> str:
    """A message with {} in place of its variable parts."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


def named(tree: ast.AST, name: str) -> list[str]:
    """The messages that are assigned to a constant or returned by a function of this name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            found.append(template(node.value))
        if isinstance(node, ast.FunctionDef) and node.name == name:
            found += [template(n.value) for n in ast.walk(node) if isinstance(n, ast.Return) and n.value]
    return found


@cache
def raised() -> frozenset[tuple[str, str, str]]:
    """(class, message, module) of every typed error that the package creates."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "lift_fast").rglob("*.py"))}
    found = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            kind = SUBCLASSES.get(node.func.id, node.func.id)
            if kind in CLASSES:
                message, module = node.args[-1], str(path.relative_to(ROOT))
                if isinstance(message, ast.JoinedStr | ast.Constant):
                    texts = [template(message)]
                else:
                    called = message.func if isinstance(message, ast.Call) else message
                    name = called.attr if isinstance(called, ast.Attribute) else ast.unparse(called)
                    texts = [text for each in trees.values() for text in named(each, name)]
                    assert texts, f"{module}:{node.lineno}: where does the message {name} come from?"
                found |= {(kind, text, module) for text in texts if letters(text) >= LEAST_LETTERS}
    return frozenset(found)


@cache
def listed() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Class -> the messages listed in its section, as text and as a pattern in which … matches anything."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    sections = re.split(r"^## (.+)$", page, flags=re.M)[1:]
    found = {}
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        cells = re.findall(r"^\| (.*?) \| ", text, re.M)
        words = [quoted for cell in cells for quoted in re.findall(r"`` ?(.+?) ?``(?!`)|`([^`]+)`", cell)]
        texts = [double or single for double, single in words]
        found[title] = [(text, re.compile(".*".join(map(re.escape, text.split("…"))), re.S)) for text in texts]
    return found


def test_every_error_class_has_a_section():
    assert set(listed()) >= CLASSES


def test_every_message_is_listed():
    missing = [
        f"{name} in {module}: {message}"
        for name, message, module in sorted(raised())
        if not any(pattern.search(message) for _, pattern in listed()[name])
    ]
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)


def test_every_listed_message_exists():
    vague = [text for name in CLASSES for text, _ in listed()[name] if letters(text) < LEAST_LETTERS]
    assert not vague, f"these match almost anything: {vague}"
    stale = [
        f"{name}: {text}"
        for name in sorted(CLASSES)
        for text, pattern in listed()[name]
        if not any(kind == name and pattern.search(message) for kind, message, _ in raised())
    ]
    assert not stale, "in docs/troubleshooting.md and nowhere raised:\n" + "\n".join(stale)

"""docs/security.md says of every command what it may touch, and of those alone."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from support import complete  # noqa: F401

from lift_fast.cli.main import Command

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()


def commands(choices, group=""):
    """command, of two words in a group -> its class."""
    found = {}
    for choice in get_args(choices):
        kind, subcommand = get_args(choice)
        inner = get_type_hints(kind, include_extras=True).get("command")
        if not get_args(inner):
            found[group + subcommand.name] = kind
        else:
            found |= commands(get_args(inner)[0], f"{subcommand.name} ")
    return found


def options(kind):
    """The names of a command's options."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        yield field.name
        if is_dataclass(hints[field.name]):
            yield from options(hints[field.name])


def test_every_command_has_a_row():
    rows = {}
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            first, *cells = line.strip("| ").split(" | ")
            rows |= {name: cells for name in re.findall("`([^`]+)`", first)}
    found = commands(Command)
    assert rows.keys() == found.keys()
    for name, (*_, code) in rows.items():
        assert (code == "`--trust-remote-code`") == ("trust_remote_code" in options(found[name])), name

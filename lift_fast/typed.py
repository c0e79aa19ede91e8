"""Validates what JSON files say against type hints, before it is used: files may be damaged, or not one's own.

Known hints: those of JSON values, Any, Literal, unions, list[…], dict[str, …], tuple[…] of a fixed length (a list in
JSON), and TypedDicts, whose unknown keys are ignored. An int may stand for a float, a bool not for an int.
"""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import ConfigError


def check(value: Any, hint: Any, name: str) -> None:
    """Validates a value. name: what to call it in a message. Raises ConfigError."""
    if is_typeddict(hint):
        check(value, dict[str, Any], name)
        for key, of_key in get_type_hints(hint).items():
            if key in value:
                check(value[key], of_key, key)
    elif not _fits(value, hint):
        said = getattr(hint, "__name__", hint) if isinstance(hint, type) else str(hint).replace("typing.", "")
        raise ConfigError(f"this model's description: {name} must be {said}, not {_shown(value)}")


def check_fields(values: Any, of: type, name: str) -> None:
    """Validates values for the fields of the dataclass `of`. Raises ConfigError, for unknown fields too."""
    check(values, dict[str, Any], name)
    hints = get_type_hints(of)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"this model's description: {name} has no field {_shown(key)}")
        check(value, hints[key], f"{name}.{key}")


def _fits(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(_fits(each, parts[0]) for each in value)
    if kind is tuple:
        same = isinstance(value, list | tuple) and len(value) == len(parts)
        return same and all(map(_fits, value, parts))
    if kind is dict:
        return isinstance(value, Mapping) and all(_fits(each, parts[1]) for each in value.values())
    return type(value) in {float: (int, float), None: (NoneType,)}.get(hint, (hint,))


def _shown(value: Any) -> str:
    """A value for a message: at most 60 characters, however deep or long it is."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"

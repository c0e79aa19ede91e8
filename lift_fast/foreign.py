"""JSON that others wrote, or altered: read within bounds, and its types checked where it is used.

A value's type is compared exactly: an int does for a float, a bool not for an int.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import ConfigError
from .files import read_regular

MOST_BYTES = 1 << 26  # of a JSON file, unless a reader says another number
_DEEPEST = 64  # lists and objects within each other: code that walks through them may not run out of stack
_FEW = 10_000  # lists and objects in any file; more only where the text has 32 bytes for each: they take up to 232


def read_json(path: str | Path, most: int = MOST_BYTES, pairs: Callable[[list], Any] | None = None) -> Any:
    """The content of a JSON file of at most `most` bytes. pairs: json.loads' object_pairs_hook.

    Raises OSError as files.read_regular, ValueError as parse_json.
    """
    return parse_json(read_regular(path, most), pairs)


def parse_json(data: bytes, pairs: Callable[[list], Any] | None = None) -> Any:
    """The value of a JSON text in UTF-8. pairs: json.loads' object_pairs_hook.

    Raises ValueError for what is not JSON, for lists and objects nested deeper than 64, and for so many of them that
    they would take far more memory than the text.
    """
    count = data.count(b"[") + data.count(b"{")
    if count > max(_FEW, len(data) // 32):
        raise ValueError(f"it is nearly all brackets: {count} in {len(data)} bytes")
    try:
        content = json.loads(data, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    level: list[Any] = [content]
    for _ in range(_DEEPEST + 1):
        level = [each for value in level for each in _inside(value) if isinstance(each, list | tuple | dict)]
        if not level:
            return content
    raise ValueError(f"its lists and objects are nested more than {_DEEPEST} deep")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


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

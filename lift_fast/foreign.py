"""JSON that others wrote, or altered: read within bounds, and its types checked where it is used.

A kind of file is described by a TypedDict or a dataclass beside the code that reads it, and `check` compares a content
with that. Besides the types of Python a description may have Count, Share and Number.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints, is_typeddict

from .files import read_regular

Count = NewType("Count", int)
"""An integer from 0."""
Share = NewType("Share", float)
"""A number from 0 to 1."""
Number = NewType("Number", float)
"""A number that may also be infinite or NaN, as the loss of a run that diverged."""

MOST_BYTES = 1 << 26  # of a JSON file, unless a reader says another number
_DEEPEST = 64  # lists and objects within each other: code that walks through them may not run out of stack
# Lists and objects take up to 232 bytes each, other values about 100. So many in any file, and more only where the text
# has so many bytes for each.
_FEW, BYTES_EACH = 100_000, 32
MOST_VALUES, _BYTES_EACH_VALUE = 1_000_000, 8
_LARGEST_INT, _LARGEST = 1 << 63, 1e100  # sums and products of a few such numbers are no infinity
_ROUNDING = 1e-6  # by which a mean of shares may be off
_SHOWN = 60  # characters of a value in a message

_Problem = tuple[str, str] | None  # where in the value, and what is wrong there
_Rule = Callable[[Any], _Problem]


def read_json(path: str | Path, most: int = MOST_BYTES, pairs: Callable[[list], Any] | None = None) -> Any:
    """The content of a JSON file of at most `most` bytes. pairs: json.loads' object_pairs_hook.

    Raises OSError as files.read_regular, ValueError as parse_json.
    """
    return parse_json(read_regular(path, most), pairs)


def parse_json(data: bytes, pairs: Callable[[list], Any] | None = None, values: int = MOST_VALUES) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark. pairs: json.loads' object_pairs_hook.
    values: how many it may have however short it is.

    Raises ValueError for what is not JSON, for lists and objects nested deeper than 64, and for so many values that
    they would take far more memory than the text.
    """
    brackets = count = data.count(b"[") + data.count(b"{")
    if count > max(_FEW, len(data) // BYTES_EACH):
        raise ValueError(f"it is nearly all brackets: {count} in {len(data)} bytes")
    count = data.count(b",") + data.count(b":")
    if count > max(values, len(data) // _BYTES_EACH_VALUE):
        raise ValueError(f"it is nearly all separators: {count} in {len(data)} bytes")
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deeply") from None
    if brackets <= _DEEPEST:  # as in the rows of a table, of which there are millions
        return content
    level: list[Any] = [content]
    for _ in range(_DEEPEST + 1):
        level = [each for value in level for each in _inside(value) if isinstance(each, list | tuple | dict)]
        if not level:
            return content
    raise ValueError(f"its lists and objects are nested more than {_DEEPEST} deep")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


def check(value: Any, hint: Any, name: str = "it") -> None:
    """Validates a value of a JSON file. name: what to call it in a message. Raises ValueError.

    hint: what it must be: a type of Python, Count, Share, Number, Any, a Literal, a union, a list or tuple or dict of
    them; a TypedDict, whose required keys must be there, and whose others must be of their type if they are there; a
    dataclass, which must have all keys but those of fields with a default, and no others.

    A type is compared exactly: an int does for a float, a bool not for an int. Floats must be finite and below 10^100
    in magnitude, integers below 2^63. A string may have halves of characters (lone surrogates), as names of files have
    that are not in UTF-8: it can be printed by `printable`, but not encoded.
    """
    if found := _rule(hint)(value):
        where, problem = found
        raise ValueError(f"{name}{where} {problem}")


def shown(value: Any) -> str:
    """A value for a message, however deep or long it is."""
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@cache
def _rule(hint: Any) -> _Rule:
    """The function that finds what is wrong with a value, as `check` says it. It is made once for each hint: a file may
    have a million values."""
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: None
    if is_typeddict(hint):
        return _object(get_type_hints(hint), hint.__required_keys__, open_ended=True)
    if dataclasses.is_dataclass(hint):
        fields = dataclasses.fields(hint)
        missing, hints = dataclasses.MISSING, get_type_hints(hint)
        required = [each.name for each in fields if each.default is missing and each.default_factory is missing]
        return _object({each.name: hints[each.name] for each in fields if each.init}, required, open_ended=False)
    if kind is Literal:
        return _simple(_called(hint), lambda value: any(type(value) is type(each) and value == each for each in parts))
    if kind in (Union, UnionType):
        return _union(hint, parts)
    if kind is list or (kind is tuple and parts[1:] == (...,)):
        return _list(hint, parts[0], None)
    if kind is tuple:
        return _list(hint, parts, len(parts))
    if kind is dict:
        of_key, of_value = map(_rule, parts)

        def in_dict(value: Any) -> _Problem:
            if not isinstance(value, dict):
                return "", f"must be {_called(hint)}, not {shown(value)}"
            for key, each in value.items():
                if (found := of_key(key)) or (found := of_value(each)):
                    return f"[{shown(key)}]{found[0]}", found[1]
            return None

        return in_dict
    words, fits = _SIMPLE[hint]
    return _simple(words, fits)


def _simple(words: str, fits: Callable[[Any], bool]) -> _Rule:
    def found(value: Any) -> _Problem:
        return None if fits(value) else ("", f"must be {words}, not {shown(value)}")

    return found


def _object(hints: dict[str, Any], required: Any, open_ended: bool) -> _Rule:
    rules = {key: _rule(hint) for key, hint in hints.items()}
    needed = [key for key in hints if key in required]  # in order, so that messages are always the same

    def in_object(value: Any) -> _Problem:
        if not isinstance(value, dict):
            return "", f"must be an object, not {shown(value)}"
        for key in needed:
            if key not in value:
                return "", f"has no {key}"
        for key, each in value.items():
            if key not in rules:
                if open_ended:
                    continue
                return "", f"has no field {shown(key)}"
            if found := rules[key](each):
                return f".{key}{found[0]}", found[1]
        return None

    return in_object


def _list(hint: Any, of: Any, length: int | None) -> _Rule:
    """Of a list, or a tuple, which is a list in JSON. length: of a tuple, whose elements are of the types in `of`."""
    rules = [_rule(of)] if length is None else [_rule(each) for each in of]

    def in_list(value: Any) -> _Problem:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            return "", f"must be {_called(hint)}, not {shown(value)}"
        for i, each in enumerate(value):
            if found := rules[0 if length is None else i](each):
                return f"[{i}]{found[0]}", found[1]
        return None

    return in_list


def _union(hint: Any, parts: tuple[Any, ...]) -> _Rule:
    rules = [_rule(part) for part in parts]

    def in_union(value: Any) -> _Problem:
        problems = []
        for rule in rules:
            found = rule(value)
            if found is None:
                return None
            problems.append(found)
        # What is wrong within the one that it looks like; else that it is none of them.
        deepest = max(problems, key=lambda found: bool(found[0]) or found[1].startswith("has no"))
        if deepest[0] or deepest[1].startswith("has no"):
            return deepest
        return "", f"must be {_called(hint)}, not {shown(value)}"

    return in_union


def _called(hint: Any) -> str:
    """A hint in the words of a message."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_called, parts))
    if kind is list or (kind is tuple and parts[1:] == (...,)):
        return "a list"
    if kind is tuple:
        return f"a list of {len(parts)}"
    if kind is dict or is_typeddict(hint) or dataclasses.is_dataclass(hint):
        return "an object"
    if kind is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    return _SIMPLE[hint][0]


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) < _LARGEST_INT


def _is_float(value: Any) -> bool:
    return _is_int(value) or (type(value) is float and abs(value) < _LARGEST)


# Type -> in the words of a message, and whether a value is of it.
_SIMPLE: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("an integer", _is_int),
    float: ("a number", _is_float),
    str: ("a text", lambda value: type(value) is str),
    NoneType: ("null", lambda value: value is None),
    Count: ("an integer from 0", lambda value: _is_int(value) and value >= 0),
    Share: ("a number from 0 to 1", lambda value: _is_float(value) and -_ROUNDING <= value <= 1 + _ROUNDING),
    Number: ("a number", lambda value: _is_float(value) or (type(value) is float and not math.isfinite(value))),
}

"""What a caption and a sample key may be: one check for all layouts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ..foreign import parse_json
from .samples import BadText, SeveralCaptions


def checked_caption(value: Any, field: str, where: Callable[[], str]) -> str:
    """Returns a caption without surrounding space.

    value: what the data set holds: str, or bytes that must be UTF-8. where: names the sample, for the message. Raises
    BadText: "no caption" for None and for blank text; "not UTF-8"; "not text" for anything else, such as a number or
    NaN; SeveralCaptions, which is "not text" too, for a list of text.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadText(
                "not UTF-8",
                f"{where()}: {field!r} is not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8",
            ) from error
    if value is not None and not isinstance(value, str):
        reason = f"{where()}: {field!r} is {_described(value)}, not text; write one caption there"
        if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
            raise SeveralCaptions(reason, value)
        raise BadText("not text", reason)
    text = (value or "").strip()
    if not text:
        raise BadText("no caption", f"{where()} has no caption {field!r}; add one or drop the sample")
    if halved(text):
        raise BadText("not UTF-8", f"{where()}: half a Unicode character in {field!r}")
    return text


def checked_captions(values: Sequence[Any], field: str, where: Callable[[int], str]) -> list[str | BadText]:
    """What checked_caption returns or raises for each caption of a shard, in order.

    values: what the data set holds; a BadText stays as it is. where(row): names the row, for messages.
    """
    found: list[str | BadText] = []
    for row, value in enumerate(values):
        if isinstance(value, BadText):
            found.append(value)
        elif type(value) is str and value.isascii() and (text := value.strip()):
            found.append(text)  # what checked_caption would return, in a third of the time
        else:
            try:
                found.append(checked_caption(value, field, functools.partial(where, row)))
            except BadText as error:
                found.append(kept(error))
    return found


def kept(error: BadText) -> BadText:
    """An error to keep for later: without its frames and those of its cause, which hold all values of a shard."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def checked_keys(keys: Sequence[Any], where: Callable[[int], str]) -> list[str]:
    """Returns the keys of a shard as text. Raises DataError for the first that is no valid key, or a duplicate."""
    names, bad = sorted_out(keys, where)
    for error in bad.values():
        raise error
    return names


def sorted_out(keys: Sequence[Any], where: Callable[[int], str]) -> tuple[list[str], dict[int, BadText]]:
    """The keys of a shard as text, "" for one that cannot be a key, and row -> what is wrong with its key, in order.

    where(row): names the row, for messages. A duplicate is bad, the first that has the key is not.
    """
    names: list[str] = []
    bad: dict[int, BadText] = {}
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if isinstance(key, BadText):
            bad[row] = key
            names.append("")
            continue
        if problem := _key_problem(key):
            bad[row] = BadText("no key", f"{where(row)} has {problem}")
            names.append("")
            continue
        name = str(key)
        names.append(name)
        if (earlier := first.setdefault(name, row)) != row:
            bad[row] = BadText("repeated key", f"{where(row)} has the key {name!r}, as {where(earlier)} has")
    return names, bad


def parsed_meta(data: bytes | None, where: Callable[[], str]) -> dict:
    """The JSON object in the content of a .json; {} for None. Raises BadText."""
    if data is None:
        return {}
    try:
        meta = parse_json(data)
    except UnicodeDecodeError as error:
        raise BadText("not UTF-8", f"{where()}: its .json is not UTF-8 (byte {error.start})") from error
    except ValueError as error:
        raise BadText("does not parse", f"{where()}: its .json does not parse ({error})") from error
    if not isinstance(meta, dict):
        raise BadText("does not parse", f"{where()}: its .json is not an object")
    return meta


def halved(text: str) -> bool:
    """Whether the text holds half a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _described(value: Any) -> str:
    """What a value is, in words: "a list of 2"."""
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and value != value:
        return "NaN"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return f"of type {type(value).__name__}"


def _key_problem(key: Any) -> str:
    """Why a value cannot be a sample's key, "" for text and whole numbers."""
    if key is None or key == "":
        return "no key"
    if isinstance(key, bool) or not isinstance(key, (str, int)):
        return f"the key {key!r}, neither text nor a whole number"
    return f"the key {str(key)!r}, with half a Unicode character" if halved(str(key)) else ""

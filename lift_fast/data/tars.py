"""The members of a tar, by its 512-byte headers alone: ustar, GNU long names, pax paths and sizes.

`tarfile` makes an object of everything that a header says; a data set has hundreds of millions.
"""

import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
END_MARK = 2 * BLOCK  # zero bytes that end a tar
_MOST_EXTRA = 1 << 20  # bytes of a long name or of a pax header
_FILES = b"0\x007"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: whatever size they tell, nothing follows the header
_PAX = re.compile(rb"(\d{1,20}) ([^=\n]+)=")


class NotWhole(Exception):
    """A tar that is cut short, damaged, or of a kind that is not read."""


class Member(NamedTuple):
    """One file: where its bytes lie."""

    name: bytes
    offset: int
    size: int


def members(file: int, length: int) -> Iterator[Member]:
    """The files of a tar (a descriptor) of `length` bytes, in order; no link, folder or device.

    Raises NotWhole; OSError.
    """
    mark = os.pread(file, END_MARK, max(0, length - END_MARK))
    if len(mark) < END_MARK or any(mark) or length % BLOCK:
        raise NotWhole("its end-of-archive mark is missing")
    at = 0
    name: bytes | None = None  # by a header of its own before the file's; of several the first counts
    size: int | None = None
    while any(header := os.pread(file, BLOCK, at)):
        if not _sums_up(header):
            raise NotWhole(f"no header of a member at byte {at}")
        kind, data = header[156], at + BLOCK
        long = size if size is not None and kind not in b"xgLK" else _number(header[124:136], at)
        at = data + (0 if kind in _WITHOUT_DATA else -(-long // BLOCK) * BLOCK)
        if long < 0 or at > length - END_MARK:
            raise NotWhole(f"its member at byte {data - BLOCK} reaches beyond the end")
        if kind in b"xgLK":
            if long > _MOST_EXTRA:
                raise NotWhole(f"a name of {long} bytes at byte {data}")
            extra = os.pread(file, long, data)
            if kind == ord("L"):
                name = _text(extra) if name is None else name
            elif kind != ord("K"):
                told = _pax(extra, data)
                if any(key.startswith(b"GNU.sparse") for key in told):
                    raise NotWhole(f"a sparse file at byte {data}; write the tar without --sparse")
                if kind == ord("x"):
                    name = told.get(b"path") if name is None else name
                    size = _decimal(told[b"size"], data) if size is None and b"size" in told else size
            continue
        if kind == ord("S"):
            raise NotWhole(f"a sparse file at byte {data}; write the tar without --sparse")
        if kind in _FILES:
            if name is None:
                name = _text(header[:100])
                if header[257:263] == b"ustar\0" and header[345]:
                    name = _text(header[345:500]) + b"/" + name
            if not name.endswith(b"/"):  # so old tars mark a folder
                yield Member(name, data, long)
        name = size = None
    if len(header) < BLOCK:
        raise NotWhole("its end-of-archive mark is missing")
    # Two tars joined with `cat`: what lies behind the first one's end would be lost without a word.
    while at < length:
        rest = os.pread(file, 1 << 20, at)
        if not rest or rest.count(0) < len(rest):
            raise NotWhole(f"there is more behind its end at byte {at}, as when tars are joined")
        at += len(rest)


def _sums_up(header: bytes) -> bool:
    """Whether the header's sum of bytes, its own field taken for spaces, is the one that it tells."""
    # The lower half of Adler-32 is 1 + the sum of the bytes, modulo 65 521: much faster than sum().
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    try:
        return (total - int(_text(header[148:156]).strip() or b"0", 8)) % 65_521 == 0
    except ValueError:
        return False


def _number(field: bytes, at: int) -> int:
    """Octal digits, or base 256 behind a byte of 0x80 (0xff: negative)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    try:
        return int(_text(field).strip() or b"0", 8)
    except ValueError:
        raise NotWhole(f"no size in the header at byte {at}") from None


def _decimal(digits: bytes, at: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,20}", digits):
        raise NotWhole(f"no size in the pax header at byte {at}")
    return int(digits)


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _pax(data: bytes, place: int) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\n" of a pax header."""
    told: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        found = _PAX.match(data, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise NotWhole(f"a pax header at byte {place} that does not parse")
        told[found[2]] = data[found.end() : end - 1]
        at = end
    return told

"""Lists the members of a tar by reading its 512-byte headers alone: ustar, GNU long names, pax paths and sizes.

Written by hand, because Python's `tarfile` makes an object with every field of each header, which is slow for the
hundreds of millions of files of a data set; nor does it report an archive that is cut after a member.
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
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: no data follows the header, whatever size it declares
_PAX = re.compile(rb"(\d{1,20}) ([^=\n]+)=")


class NotWhole(Exception):
    """A tar that is cut short, damaged, or in a form that is not read."""


class Member(NamedTuple):
    """One file in a tar: its name, and the offset and size of its bytes."""

    name: bytes
    offset: int
    size: int


def members(file: int, length: int) -> Iterator[Member]:
    """The files in a tar, in order, without links, folders and devices.

    file: descriptor of the tar; length: its bytes. Raises NotWhole; OSError when it cannot be read.
    """
    mark = os.pread(file, END_MARK, max(0, length - END_MARK))
    if len(mark) < END_MARK or any(mark) or length % BLOCK:
        raise NotWhole("its end-of-archive mark is missing")
    at = 0
    name: bytes | None = None  # from a GNU or pax header before the file's own; the first of several counts
    size: int | None = None
    while any(header := os.pread(file, BLOCK, at)):
        if not _checksum_is_valid(header):
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
                records = _pax(extra, data)
                if any(key.startswith(b"GNU.sparse") for key in records):
                    raise NotWhole(f"a sparse file at byte {data}; write the tar without --sparse")
                if kind == ord("x"):
                    name = records.get(b"path") if name is None else name
                    size = _decimal(records[b"size"], data) if size is None and b"size" in records else size
            continue
        if kind == ord("S"):
            raise NotWhole(f"a sparse file at byte {data}; write the tar without --sparse")
        if kind in _FILES:
            if name is None:
                name = _text(header[:100])
                if header[257:263] == b"ustar\0" and header[345]:
                    name = _text(header[345:500]) + b"/" + name
            if not name.endswith(b"/"):  # old tars mark a folder like this
                yield Member(name, data, long)
        name = size = None
    if len(header) < BLOCK:
        raise NotWhole("its end-of-archive mark is missing")
    # The second of two tars joined with `cat` lies behind the end of the first and would be dropped silently.
    while at < length:
        rest = os.pread(file, 1 << 20, at)
        if not rest or rest.count(0) < len(rest):
            raise NotWhole(f"there is data behind its end at byte {at}, as when tars are joined")
        at += len(rest)


def _checksum_is_valid(header: bytes) -> bool:
    """Whether the header checksum, the sum of its bytes with its own field read as spaces, is valid."""
    # The lower half of Adler-32 is 1 + the sum of the bytes, modulo 65 521: much faster than sum().
    total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * ord(" ")
    try:
        return (total - int(_text(header[148:156]).strip() or b"0", 8)) % 65_521 == 0
    except ValueError:
        return False


def _number(field: bytes, at: int) -> int:
    """A number in a header: octal digits, or base 256 after a byte of 0x80; -1 for any negative one (0xff)."""
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
    """The records "LENGTH KEY=VALUE\n" of a pax header, KEY -> VALUE."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        found = _PAX.match(data, at)
        end = at + int(found[1]) if found else 0
        if found is None or not found.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise NotWhole(f"a pax header at byte {place} that does not parse")
        records[found[2]] = data[found.end() : end - 1]
        at = end
    return records

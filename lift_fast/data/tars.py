"""Lists the members of a tar by reading its 512-byte headers alone: ustar, GNU long names, pax paths and sizes.

Written by hand, because Python's `tarfile` makes an object with every field of each header, which is slow for the
hundreds of millions of files of a data set; nor does it report an archive that is cut after a member.

Needs os.pread, which Windows does not have.
"""

import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
END_MARK = 2 * BLOCK  # zero bytes that end a tar
_MOST_EXTRA = 1 << 20  # bytes of a long name or of a pax header
_MOST_PADDING = 1 << 24  # bytes of zeros behind the files; tar pads to 1 MiB at most
_FILES = b"0\x007"
_LINKS = b"12"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: no data follows the header, whatever size it declares
# First bytes of files that are called .tar and are none, and what to say of them.
_NO_TARS = {
    b"\x1f\x8b": "it is compressed with gzip; decompress it with gzip -dc",
    b"BZh": "it is compressed with bzip2; decompress it with bzip2 -dc",
    b"\xfd7zXZ\0": "it is compressed with xz; decompress it with xz -dc",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; decompress it with zstd -dc",
    b"\x04\x22\x4d\x18": "it is compressed with lz4; decompress it with lz4 -dc",
    b"PK\x03\x04": "it is a zip archive",
    b"version https://git-lfs": "it is a pointer of Git LFS; fetch the file with git lfs pull",
}
_PAX = re.compile(rb"(\d{1,20}) ([^=\n]+)=")


class NotWhole(Exception):
    """A tar that is cut short, damaged, or in a form that is not read; what comes before that has been read."""


class Member(NamedTuple):
    """One file in a tar: its name, and the offset and size of its bytes."""

    name: bytes
    offset: int
    size: int


def members(file: int, length: int, links: list[bytes] | None = None) -> Iterator[Member]:
    """The files in a tar, in order, without links, folders and devices.

    file: descriptor of the tar; length: its bytes. links: receives the names of links. Raises NotWhole after the files
    that lie whole before the damage; OSError when the tar cannot be read.
    """
    at = 0
    name: bytes | None = None  # from a GNU or pax header before the file's own; the first of several counts
    size: int | None = None
    while any(header := os.pread(file, BLOCK, at)):
        if len(header) < BLOCK or not _checksum_is_valid(header):
            known = [what for magic, what in _NO_TARS.items() if not at and header.startswith(magic)]
            raise NotWhole(known[0] if known else f"no header of a member at byte {at}")
        kind, data = header[156], at + BLOCK
        long = size if size is not None and kind not in b"xgLK" else _number(header[124:136], at)
        end = data if kind in _WITHOUT_DATA else data + long
        if long < 0 or end > length:
            raise NotWhole(f"its member at byte {at} reaches beyond the end")
        at = end + -end % BLOCK
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
        if kind in _FILES or (kind in _LINKS and links is not None):
            if name is None:
                name = _text(header[:100])
                if header[345] and header[257:263] == b"ustar\0":
                    name = _text(header[345:500]) + b"/" + name
            if kind in _LINKS:
                assert links is not None
                links.append(name)
            elif not name.endswith(b"/"):  # old tars mark a folder like this
                yield Member(name, data, long)
        name = size = None
    mark = os.pread(file, END_MARK, at)
    if len(mark) < END_MARK and not any(mark):
        raise NotWhole(f"its end-of-archive mark is missing at byte {at}")
    # The second of two tars joined with `cat` lies behind the end of the first and would be dropped silently.
    end = at
    while rest := os.pread(file, 1 << 20, at):
        if behind := rest.lstrip(b"\0"):
            raise NotWhole(
                f"there is data behind its end at byte {at + len(rest) - len(behind)}, as when tars are joined or an "
                "end-of-archive mark is damaged"
            )
        at += len(rest)
        if at - end > _MOST_PADDING:
            raise NotWhole(f"there are only zeros from byte {end} on, as when a download broke off")


def _checksum_is_valid(header: bytes) -> bool:
    """Whether the header checksum, the sum of its bytes with its own field read as spaces, is valid."""
    # The lower half of Adler-32 is 1 + the sum of the bytes, modulo 65 521: much faster than sum().
    field = header[148:156]
    total = (zlib.adler32(header) & 0xFFFF) - (zlib.adler32(field) & 0xFFFF) + 8 * ord(" ")
    try:
        return (total - int(_text(field).strip() or b"0", 8)) % 65_521 == 0
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

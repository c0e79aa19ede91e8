"""Damages files, and makes JPEGs that deviate from the standard."""

import re
from pathlib import Path


def flip_bit(path: Path, at: int) -> None:
    """Flips the lowest bit of the byte at this offset, which counts from the end if it is negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def scan_of(jpeg: bytes, start: int = 0) -> tuple[int, int]:
    """Where the header of a JPEG's first scan from `start` on begins, and where its pixels begin."""
    at = jpeg.find(b"\xff\xda", start)
    return at, at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def frame_of(jpeg: bytes) -> int:
    """Where the frame header of a JPEG begins."""
    return max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc1"), jpeg.find(b"\xff\xc2"))


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    """The same bytes with others from `at` on."""
    return data[:at] + new + data[at + len(new) :]


def inserted(data: bytes, at: int, new: bytes) -> bytes:
    """The same bytes with more at `at`."""
    return data[:at] + new + data[at:]


def with_scan_parameters(jpeg: bytes, parameters: bytes = b"\0\0\0") -> bytes:
    """A JPEG with other parameters Ss, Se, Ah and Al of its first scan: zeros, as Samsung's phones write them."""
    return replaced(jpeg, scan_of(jpeg)[1] - 3, parameters)


def padded_end(jpeg: bytes, padding: bytes) -> bytes:
    """A JPEG with bytes before its end."""
    return inserted(jpeg, len(jpeg) - 2, padding)


def padded_restarts(jpeg: bytes, padding: bytes) -> bytes:
    """A JPEG with bytes before every restart marker."""
    pixels = scan_of(jpeg)[1]
    return jpeg[:pixels] + re.sub(rb"\xff[\xd0-\xd7]", lambda found: padding + found[0], jpeg[pixels:])


def with_jfif_version(jpeg: bytes, major: int, minor: int) -> bytes:
    """A JPEG of another version of JFIF."""
    return replaced(jpeg, jpeg.find(b"JFIF\0") + 5, bytes((major, minor)))

"""Damages files."""

from pathlib import Path


def flip_bit(path: Path, at: int) -> None:
    """Flips the lowest bit of the byte at this offset, which counts from the end if it is negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)

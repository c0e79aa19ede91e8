"""The chunks of PNG files: which of them make the pixels, and whether all rows are there. Pillow checks neither."""

import struct
import zlib
from collections.abc import Iterator

from .samples import BadSample

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = (  # of each pass: first row, row step, first column, column step
    *((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4)),
    *((2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)),
)
_MOST_DEFLATED = 1032  # the largest ratio of unpacked to packed bytes in a zlib stream
_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_END = b"\0\0\0\0IEND\xaeB`\x82"  # written anew, since the checksum of no data says nothing about the pixels


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (type, offset of the data, length) of each chunk of a PNG up to IEND. Raises BadSample without IEND."""
    at = len(SIGNATURE)
    while True:
        if at + 12 > len(data):
            raise BadSample("truncated", f"no end of the PNG within {len(data)} bytes")
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 12 + length > len(data):
            raise BadSample("truncated", f"ends after {len(data)} bytes, within a PNG chunk {kind!r}")
        yield kind, at + 8, length
        if kind == b"IEND":
            return
        at += 12 + length


def only_pixels(data: bytes) -> bytes:
    """Copies the chunks of a PNG that make its pixels, and validates their checksums, which Pillow does not.

    Without the rest no text or colour profile can unpack to gigabytes, and there is one frame. Raises BadSample.
    """
    parts = [SIGNATURE]
    for kind, start, length in chunks(data):
        if kind in _PIXELS:
            end = start + length
            if zlib.crc32(memoryview(data)[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise BadSample("corrupt", f"wrong checksum of the PNG chunk {kind!r} at byte {start - 8}")
            parts.append(data[start - 8 : end + 4])
    parts.append(_END)
    packed = sum(len(part) for part in parts)
    if _unpacked(data) > _MOST_DEFLATED * packed:
        raise BadSample("corrupt", f"a PNG with too little data: {packed} bytes for {_unpacked(data)} of pixels")
    return b"".join(parts)


def _unpacked(data: bytes) -> int:
    """Size in bytes of the unpacked rows of a PNG, computed from its header."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack_from(">II5B", data, 16)
    bits, total = depth * _CHANNELS.get(colour_type, 0), 0
    for top, down, left, across in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        rows, columns = -(-(height - top) // down), -(-(width - left) // across)
        if rows > 0 and columns > 0:
            total += rows * (1 + -(-columns * bits // 8))
    return total


def check_all_rows(data: bytes) -> None:
    """Raises BadSample for a PNG whose stream of pixels ends properly but before the last row: Pillow accepts it."""
    missing, stream = _unpacked(data), zlib.decompressobj()
    for kind, start, length in chunks(data):
        packed = data[start : start + length] if kind == b"IDAT" else b""
        while packed and missing > 0:
            missing -= len(stream.decompress(packed, 1 << 20))
            packed = stream.unconsumed_tail
    if missing > 0:
        raise BadSample("corrupt", f"the pixels of the PNG end {missing} bytes too early")

"""Alters the index of a folder of tars, with right checksums, as somebody would who means it."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

TAIL = struct.Struct("<QQQ8s")


def forge(
    path: Path, at: int = 0, new: bytes = b"", directory: Callable[[dict[str, Any]], None] = lambda content: None
) -> None:
    """Writes `new` over the segments from `at` on, alters the directory, and makes all checksums right."""
    data = bytearray(path.read_bytes())
    start, size, _, magic = TAIL.unpack(data[-TAIL.size :])
    content = json.loads(bytes(data[start : start + size]))
    segments = data[:start]
    segments[at : at + len(new)] = new
    for tar in content["tars"]:
        _, _, _, _, begin, length, _, _ = tar
        tar[6] = zlib.crc32(segments[begin : begin + length])
    directory(content)
    text = json.dumps(content).encode()
    path.write_bytes(bytes(segments) + text + TAIL.pack(start, len(text), zlib.crc32(text), magic))

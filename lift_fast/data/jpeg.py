"""JPEGs that deviate from the standard and still have all their pixels: finds the deviations and removes them.

libjpeg warns of what it finds wrong and goes on, and a warning says nothing about the pixels: bytes left over before
the end are padding, or what a flipped bit left of a scan. TurboJPEG reports the first warning alone, so that a harmless
one hides another. So a JPEG is decoded strictly, with every warning an error; where the first warning may be harmless,
`repaired` writes the JPEG anew without the deviations that it recognises, and that is decoded strictly. Other decoders,
such as nvJPEG, need not read the original alike.

What is recognised, with libjpeg's warning and where it comes from:

- "Invalid SOS parameters for sequential JPEG" (Samsung phones, webcams write zeros). Baseline decoders ignore the three
  bytes. Only in a baseline frame (SOF0) whose single scan has all components in the frame's order: in other frames the
  bytes have a meaning. libjpeg-turbo's issue 778 has a file with this warning and wrong colours.
- "unknown JFIF revision number": any but 1.
- "bad ICC marker": colour profiles are not used. Comments and unknown segments are dropped as well.
- "Unknown Adobe color transform" of three components with subsampled chroma, which RGB never has.
- "extraneous bytes before marker", in the header: any bytes between two segments, as long as nothing that the pixels
  need can be lost in them: a table, or an Adobe, JFIF or Exif segment.
- "extraneous bytes before marker", after pixels: two or more zero bytes, or bytes of ones (FF 00), before a restart
  marker, the end or another scan. Any other bytes there are taken for damage. Where zero bits encode blocks without
  detail, the end of a scan that got out of step looks like padding: there the pixels must end in the ones that fill
  their last byte.

Of a JPEG of several scans, pixels that end in a byte like padding are not told from it, and it is refused. Premature
ends, bad Huffman codes, restart markers out of order and inconsistent progressions are never repaired.
"""

import re
import struct
from collections.abc import Iterator

import simplejpeg

from .samples import BadSample

_HARMLESS = re.compile(
    "Invalid SOS parameters|extraneous bytes before marker|unknown JFIF revision|bad ICC marker|"
    "Unknown Adobe color transform"
)
MAX_SIDE = 65_535  # pixels: the limit of JPEG; a longer, thinner image costs as much as its rows
_MARKER = re.compile(rb"\xff[\x01-\xfe]")
_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SOI, _EOI, _SOS, _DHT, _DRI, _APP0, _APP1, _APP14, _COM = 0xD8, 0xD9, 0xDA, 0xC4, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended sequential, progressive
SEQUENTIAL = b"\0\x3f\0"  # the parameters of a scan that is not progressive
_NAMED = ((_APP0, b"JFIF\0"), (_APP1, b"Exif\0\0"), (_APP14, b"Adobe\0"))  # segments that change what pixels mean
_LEAST_PADDING = 2  # bytes, of zeros or of ones: libjpeg itself passes over some single bytes
_MOST_TESTS = 4096  # parts of a scan whose end is tested
# Of the tables that libjpeg assumes where there are none: class and number -> symbol of the code of zero bits.
_USUAL_SYMBOLS = {0x00: 0, 0x01: 0, 0x10: 1, 0x11: 0}


# Marker; where the segment begins, with its FF; where it ends; whether other bytes precede it.
Segment = tuple[int, int, int, bool]


def segments(data: bytes, at: int = 2) -> Iterator[Segment]:
    """Yields the segments from `at` to the next scan's header, which is the last. Skips what libjpeg skips.

    Raises BadSample for a second start and for an end before the scan; IndexError where the bytes end.
    """
    stray = False
    while True:
        if data[at] != 0xFF:
            start, at = at, data.find(b"\xff", at)
            if at < 0:
                raise BadSample("corrupt", f"no JPEG marker from byte {start} on")
            stray = True
        while data[at + 1] == 0xFF:  # fill bytes
            at += 1
        marker = data[at + 1]
        if marker == 0x00:
            stray, at = True, at + 2
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # markers without a segment
            at += 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if length < 2 or marker == _SOI or marker == _EOI:
            raise BadSample("corrupt", f"JPEG marker {marker:02x} at byte {at}")
        end = at + 2 + length
        yield marker, at, end, stray
        if marker == _SOS:
            return
        stray, at = False, end


def harmless(warning: str) -> bool:
    """Whether an error of the strict decoder is a warning that repaired() may remove."""
    return _HARMLESS.search(warning) is not None


def repaired(data: bytes) -> bytes | None:
    """A JPEG without the deviations above, to be decoded strictly; None where it has others or they may be damage."""
    try:
        return _Repair(data).written()
    except (BadSample, IndexError):
        return None


def padded(data: bytes) -> bool:
    """Whether there may be padding after the pixels of a JPEG: a quick look, without decoding. Raises as segments."""
    *_, (_, _, start, _) = segments(data)
    return data.find(b"\0\0\xff", start) >= 0 or data.find(b"\xff\0\xff\0\xff", start) >= 0


class _Scan:
    """The header of a scan: components (number, DC table, AC table) and parameters (Ss, Se, Ah and Al)."""

    def __init__(self, segment: bytes):
        count = segment[4]
        pairs = segment[5 : 5 + 2 * count]
        self.components = [(pairs[i], pairs[i + 1] >> 4, 0x10 | pairs[i + 1] & 15) for i in range(0, 2 * count, 2)]
        self.parameters = segment[5 + 2 * count : 8 + 2 * count]
        if len(segment) != 8 + 2 * count:
            raise BadSample("corrupt", "the header of a scan of the wrong length")


class _Repair:
    """Writes one JPEG anew. Raises BadSample or IndexError for one that is not repaired."""

    def __init__(self, data: bytes):
        self.data = data
        self.head = list(segments(data))
        self.bodies = [(marker, data[at:end]) for marker, at, end, _ in self.head]
        _, self.scan_at, self.pixels_at, _ = self.head[-1]
        (self.kind, frame), *more = [(marker, body) for marker, body in self.bodies if marker in _FRAMES]
        if more:
            raise BadSample("corrupt", "a second frame")
        self.height, self.width, count = frame[5] << 8 | frame[6], frame[7] << 8 | frame[8], frame[9]
        self.parts = [frame[10 + 3 * i : 13 + 3 * i] for i in range(count)]
        self.interval = 0
        self.symbols: dict[int, int] = {}  # class and number of a Huffman table -> symbol of the code of zero bits
        for marker, body in self.bodies:
            self._read_tables(marker, body)
            if marker == _DRI:
                self.interval = body[4] << 8 | body[5]
        self.scan = _Scan(self.bodies[-1][1])

    def written(self) -> bytes:
        """The bytes of the new JPEG."""
        if any(stray for *_, stray in self.head) and not self._nothing_lost():
            raise BadSample("corrupt", "a segment may be lost")
        end = _END_OF_SCAN.search(self.data, self.pixels_at)
        alone = end is not None and end[0][1] == _EOI  # the first scan is the only one
        if self.kind != 0xC2 and self.scan.parameters != SEQUENTIAL:
            numbers = [number for number, _, _ in self.scan.components]
            if self.kind != 0xC0 or not alone or numbers != [part[0] for part in self.parts]:
                raise BadSample("corrupt", "parameters of a scan that mean something")
            self.bodies[-1] = _SOS, self.bodies[-1][1][:-3] + SEQUENTIAL
        pixels = self._only_scan() if alone else self._scans()
        return b"".join((self._header(self.height, self.width), *pixels, b"\xff\xd9"))

    def _header(self, height: int, width: int) -> bytes:
        """The start, and the segments up to the first scan's that the pixels need, for an image of this size."""
        size = struct.pack(">HH", height, width)
        parts = [b"\xff\xd8"]
        for marker, body in self.bodies:
            if marker == self.kind:
                body = body[:5] + size + body[9:]
            elif marker == _APP0 and body.startswith(b"JFIF\0", 4) and len(body) > 9:
                body = body[:9] + b"\1" + body[10:]
            elif marker == _APP14 and body.startswith(b"Adobe", 4) and len(body) >= 16:
                if body[15] > 1 and len(self.parts) == 3 and self.parts[0][1] != self.parts[1][1]:
                    body = body[:15] + b"\1" + body[16:]
            elif _is_comment(marker):
                continue
            parts.append(body)
        return b"".join(parts)

    def _nothing_lost(self) -> bool:
        """Whether stray bytes in the header cannot be what is left of a segment that the pixels need."""
        header = self.data[: self.scan_at]
        for marker, name in _NAMED:
            if name in header and not any(kind == marker and body.startswith(name, 4) for kind, body in self.bodies):
                return False
        # A transfer as text writes CR LF for LF: segments grow, and their ends look like bytes between them.
        if any(b"\r\n" in body for marker, body in self.bodies if not _is_comment(marker)):
            return False
        # Where a table is missing libjpeg uses a standard one. Progressive JPEGs have none.
        needed = {table for _, *tables in self.scan.components for table in tables}
        return self.kind == 0xC2 or needed <= set(self.symbols)

    def _read_tables(self, marker: int, body: bytes) -> None:
        at = 4
        while marker == _DHT and at + 17 < len(body):
            count = sum(body[at + 1 : at + 17])
            self.symbols[body[at]] = body[at + 17]
            at += 17 + count

    def _pieces(self, at: int) -> Iterator[tuple[bytes, int, int]]:
        """Yields (entropy-coded bytes without fill bytes, the marker after them, its offset) up to the scan's end."""
        for match in _MARKER.finditer(self.data, at):
            marker = self.data[match.start() + 1]
            yield self.data[at : match.start()].rstrip(b"\xff"), marker, match.start()
            if not 0xD0 <= marker <= 0xD7:
                return
            at = match.end()

    def _only_scan(self) -> Iterator[bytes]:
        """Yields the pixels of a JPEG of one scan, without padding."""
        across, down = 8, 8
        if len(self.parts) > 1:
            across, down = 8 * max(part[1] >> 4 for part in self.parts), 8 * max(part[1] & 15 for part in self.parts)
        left = -(-self.width // across) * -(-self.height // down)
        tests = 0
        for number, (piece, marker, _) in enumerate(self._pieces(self.pixels_at)):
            if left <= 0 or marker not in (_EOI, 0xD0 | number & 7):
                raise BadSample("corrupt", "restart markers that do not fit")
            bare, unit = self._bare(piece)
            # Blocks up to a restart marker are an image of their own, one block high.
            units = min(self.interval or left, left)
            height, width = (down, across * units) if self.interval else (self.height, self.width)
            if unit and tests < _MOST_TESTS and width <= MAX_SIDE:
                tests += 1
                if not _is_whole(self._header(height, width) + bare + b"\xff\xd9"):
                    bare += unit  # the last byte of the pixels looked like padding
            left -= units
            yield bare if marker == _EOI else bare + bytes((0xFF, marker))

    def _scans(self) -> Iterator[bytes]:
        """Yields the pixels of all scans and the segments between them, without padding."""
        at = self.pixels_at
        while True:
            for piece, marker, found in self._pieces(at):
                bare, _ = self._bare(piece)
                yield bare if not 0xD0 <= marker <= 0xD7 else bare + bytes((0xFF, marker))
                at = found
            if marker == _EOI:
                return
            for marker, begin, end, stray in segments(self.data, at):
                body = self.data[begin:end]
                if stray:
                    raise BadSample("corrupt", "a segment may be lost")
                self._read_tables(marker, body)
                yield body
                at = end
            self.scan = _Scan(body)

    def _bare(self, piece: bytes) -> tuple[bytes, bytes]:
        """Entropy-coded bytes without the padding at their end, and a unit of that padding; b"" where there is none."""
        bare = piece.rstrip(b"\0")
        if bare.endswith(b"\xff"):
            bare = piece[: len(bare) + 1]  # the zero belongs to the FF
        ended = bool(bare) and bare[-1] & 1  # by the ones that fill the last byte
        if len(piece) - len(bare) >= _LEAST_PADDING and (ended or not self._zeros_are_blocks()):
            return bare, b"\0"
        end = len(piece)
        while end >= 2 and piece[end - 2 : end] == b"\xff\0":
            end -= 2
        return (piece[:end], b"\xff\0") if len(piece) - end >= 2 * _LEAST_PADDING else (piece, b"")

    def _zeros_are_blocks(self) -> bool:
        """Whether zero bits encode blocks without detail in all components of the scan."""
        first, _, approximation = self.scan.parameters
        symbols = _USUAL_SYMBOLS | self.symbols
        if self.kind != 0xC2:
            return not any(symbols.get(table) for _, *tables in self.scan.components for table in tables)
        if first:
            return False
        return approximation > 15 or not any(symbols.get(table) for _, table, _ in self.scan.components)


def _is_comment(marker: int) -> bool:
    """Whether a segment is a comment or an application's."""
    return 0xE0 <= marker <= 0xEF or marker == _COM


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG decodes strictly."""
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError:
        return False
    return True

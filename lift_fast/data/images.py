"""Encoded images -> RGB pixels: the header first, then the whole image or as much of it as a crop needs.

Headers are parsed without decoding, so that an image that is too large, cut short or in another format costs
microseconds. libjpeg-turbo (simplejpeg) decodes all JPEGs in its strict mode: an image with a damaged part is refused,
never half grey. A JPEG that deviates from the standard without harm to its pixels is written anew first (jpeg.py).
Pillow decodes the other formats, after the size is known, and gets only those chunks of a PNG that make its pixels.

The headers are parsed by hand because Pillow is laxer with damaged files: it accepts, for one, a PNG whose pixels have
a wrong checksum or too few rows. It also does not say which JPEGs every decoder reads alike (Header.plain).
"""

import io
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
from PIL import Image

from .jpeg import MAX_SIDE, SEQUENTIAL, harmless, repaired, segments
from .memory import DECODING
from .png import SIGNATURE, check_all_rows, chunks, only_pixels
from .samples import BadSample

MAX_PIXELS = 1 << 26
_MAX_SCANS = 500  # of a JPEG, as in libjpeg-turbo's own tools: each scan is a pass over the image
_MAX_SCANNED = 1 << 30  # pixels of all passes, about a second's work
_ANY_SCANS = 20  # scans that are allowed for an image of any size
_UPRIGHT = 1
_STRIP = 1 << 18  # pixels of which Pillow makes copies at a time
# Bytes of memory for each pixel: of the result; of what Pillow holds besides; of the frames that WebP's decoder holds
# besides that; of the copies of a strip.
_RESULT, _PILLOW, _FRAMES, _COPIES = 3, 4, 11, 24
# Sampling factors (of the first component, of the second and third) that TurboJPEG supports.
_SAMPLINGS = {
    *((0x11, 0x11), (0x12, 0x11), (0x12, 0x12), (0x14, 0x11), (0x21, 0x11)),
    *((0x21, 0x21), (0x22, 0x11), (0x22, 0x12), (0x22, 0x21), (0x41, 0x11)),
}
_OTHER_KINDS = (  # (offset, signature, name)
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (0, b"MM\0+", "TIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypmsf1", "HEIC"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"<svg", "SVG"),
)

# Pillow allocates images in blocks. malloc keeps freed blocks of its usual 16 MB for each thread, and gives those above
# 32 MB back.
Image.core.set_block_size(1 << 26)

Box = tuple[int, int, int, int]  # left, top, width, height


@dataclass(frozen=True)
class Header:
    """What an image's header says.

    format: "jpeg", "png", "webp", "gif" or "bmp". width, height: of the upright image. plain: it is an upright JPEG in
    YCbCr or grey without deviations, which every decoder reads alike. orientation: EXIF's, 1 to 8. deviates: the header
    of the JPEG deviates from the standard, perhaps without harm (jpeg.py). made, kept: bytes of memory that decoding
    takes for each pixel, of the image that is made, and of the whole image even when a smaller one is made.
    """

    format: str
    width: int
    height: int
    plain: bool
    orientation: int = _UPRIGHT
    deviates: bool = False
    made: int = _PILLOW + _RESULT
    kept: int = 0

    def memory(self, factor: int = 1) -> int:
        """The bytes of memory that decoding at 1/factor of the size takes."""
        whole, made = self.width * self.height, -(-self.width // factor) * -(-self.height // factor)
        copies = 0 if self.format == "jpeg" else _COPIES * min(whole, _STRIP)
        return self.kept * whole + self.made * made + copies


def read_header(data: bytes) -> Header:
    """Parses the header of an image, whose format its bytes determine. Decodes nothing.

    Raises BadSample: "empty"; "not a picture"; "unsupported" for a format that is not read; "truncated" when the end is
    missing; "corrupt" for a contradiction; "too large" for more than MAX_PIXELS pixels, a side above MAX_SIDE, or more
    memory than DECODING has.
    """
    if not data:
        raise BadSample("empty", "0 bytes")
    parse = _parser_for(data)
    try:
        header = parse(data)
    except (IndexError, struct.error) as error:
        raise BadSample("truncated", f"ends after {len(data)} bytes, within its header") from error
    if header.width < 1 or header.height < 1:
        raise BadSample("corrupt", f"its header says {header.width} x {header.height} pixels")
    if header.width * header.height > MAX_PIXELS or max(header.width, header.height) > MAX_SIDE:
        most = f"{MAX_PIXELS} at most, {MAX_SIDE} a side"
        raise BadSample("too large", f"{header.width} x {header.height} pixels, of {most}")
    if header.memory() > DECODING.most:
        most = f"more than {DECODING.most} bytes of memory to decode"
        raise BadSample("too large", f"{header.width} x {header.height} pixels, which take {most}")
    if header.orientation > 4:
        return replace(header, width=header.height, height=header.width)
    return header


def decode(data: bytes, header: Header) -> np.ndarray:
    """Decodes a whole image, upright: uint8 [height, width, 3]; transparency on white, 16 bits scaled to 8.

    header: read_header(data). Raises BadSample: "truncated"; "corrupt"; "too large" for the available memory.
    """
    return _decode(data, header, 1)[0]


def is_regular(data: bytes, header: Header) -> bool:
    """Whether a JPEG decodes as it is, so that every decoder reads it alike if its header is plain, and not only
    without deviations from the standard. Takes little more than reading its entropy code, where damage shows.

    Raises BadSample, as decode does, for a JPEG that does not decode.
    """
    return _decode(data, header, scale_of((0, 0, header.width, header.height), 1))[1]


def scale_of(box: Box, size: int) -> int:
    """The largest of 1, 2, 4 and 8 by which both sides of a box can be divided and still have `size` pixels."""
    factor = 1
    while factor < 8 and min(box[2:]) >= 2 * factor * size:
        factor *= 2
    return factor


def decode_box(data: bytes, header: Header, box: Box, size: int) -> tuple[np.ndarray, Box]:
    """Decodes an image for a crop: `box` will be cut out and resized to size x size.

    A JPEG is decoded at 1/scale_of(box, size) of its size: libjpeg then skips the frequencies that the resize would
    remove. The box is scaled along and rounded to whole pixels.

    Returns the pixels, uint8 [h, w, 3], and the box in them, which is not empty and lies within. Raises BadSample as
    decode does.
    """
    factor = _factor(header, box, size)
    pixels, _ = _decode(data, header, factor)
    if factor == 1:
        return pixels, box
    upside_down, mirrored = _flips(header.orientation)
    left, width = _scaled(box[0], box[2], factor, header.width, mirrored)
    top, height = _scaled(box[1], box[3], factor, header.height, upside_down)
    return pixels, (left, top, width, height)


def memory_for(header: Header, box: Box | None = None, size: int = 1) -> AbstractContextManager[None]:
    """A block in which an image is decoded and used, for a crop where there is a box. It begins when there is memory
    for that. Outside of such a block the decoding functions wait for memory themselves."""
    return DECODING.taken(header.memory(1 if box is None else _factor(header, box, size)))


def _factor(header: Header, box: Box, size: int) -> int:
    return scale_of(box, size) if header.format == "jpeg" else 1


def _scaled(start: int, extent: int, factor: int, whole: int, flipped: bool) -> tuple[int, int]:
    """Scales the range of `extent` pixels from `start`, of `whole`, to an image of 1/factor the size.

    Returns (start, extent) there. flipped: the axis was reversed after decoding.
    """
    if flipped:  # the pixel that covers fewer than `factor` original ones then comes first
        start += -whole % factor
    limit = -(-whole // factor)
    first = min(round(start / factor), limit - 1)
    return first, max(1, min(round((start + extent) / factor), limit) - first)


def _flips(orientation: int) -> tuple[bool, bool]:
    """Whether to reverse the rows, and the columns, to make an image upright; above 4, after transposing it."""
    return orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)


def _decode(data: bytes, header: Header, factor: int) -> tuple[np.ndarray, bool]:
    """Decodes an image upright at 1/factor of its size; factors above 1 are for JPEG. Raises BadSample.

    Returns the pixels, and whether these are the bytes that were decoded, and not those of a repaired JPEG.
    """
    regular, turned = True, header.orientation > 4
    sides = (header.width, header.height) if turned else (header.height, header.width)
    height, width = (-(-side // factor) for side in sides)
    try:
        with DECODING.taken(header.memory(factor)):
            if header.format == "jpeg":
                pixels, regular = _by_libjpeg(data, header.deviates, height, width, factor)
            else:
                pixels = _by_pillow(data, header.format)
    except BadSample:
        raise
    except MemoryError as error:
        raise BadSample("too large", f"not enough memory for {width} x {height} pixels") from error
    except Exception as error:  # decoders raise many kinds of exceptions for damaged data
        reason = str(error) or type(error).__name__
        cut = "truncated" in reason or "Premature end of JPEG file" in reason
        raise BadSample("truncated" if cut else "corrupt", reason) from error
    if pixels.shape[:2] != (height, width):
        found = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise BadSample("corrupt", f"its header says {width} x {height} pixels, and there are {found}")
    if header.orientation == _UPRIGHT:
        return pixels, regular
    if turned:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = (slice(None, None, -1 if flip else 1) for flip in _flips(header.orientation))
    return pixels[rows, columns], regular


def _by_libjpeg(data: bytes, deviates: bool, height: int, width: int, factor: int) -> tuple[np.ndarray, bool]:
    """Decodes a JPEG strictly, as it is stored, or else without its deviations: uint8 [height, width, 3], and whether
    it was decoded as it is. deviates: it need not be tried as it is. Raises ValueError."""

    def decoded(encoded: bytes) -> np.ndarray:
        return simplejpeg.decode_jpeg(encoded, min_height=height, min_width=width, min_factor=factor, strict=True)

    if deviates and (better := repaired(data)) is not None:
        return decoded(better), False
    try:
        return decoded(data), True
    except ValueError as error:
        if not harmless(str(error)) or (better := repaired(data)) is None:
            raise
    return decoded(better), False


def _by_pillow(data: bytes, kind: str) -> np.ndarray:
    """Decodes a PNG, WebP, GIF or BMP, as it is stored: uint8 [height, width, 3]."""
    with Image.open(io.BytesIO(only_pixels(data) if kind == "png" else data), formats=(kind,)) as opened:
        opened.load()
        if kind == "png":
            # Pillow leaves missing rows at 0. Unpacking the file again to count them is slow, so it is done only for
            # an image that is interlaced or ends in a row of zeros.
            last = np.asarray(opened.crop((0, opened.height - 1, *opened.size)))
            if data[28] or not last.any():
                check_all_rows(data)
        width, height = opened.size
        rows = max(1, _STRIP // width)
        if height <= rows:
            return _on_white(opened, data, kind)
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, rows):
            strip = opened.crop((0, top, width, min(top + rows, height)))
            pixels[top : top + rows] = _on_white(strip, data, kind)
        return pixels


def _on_white(image: Image.Image, data: bytes, kind: str) -> np.ndarray:
    """The pixels of an image or of rows of it, with transparency on white: uint8 [height, width, 3]. data: the file."""
    if image.mode == "RGB" and not image.has_transparency_data:
        # A copy: a view of Pillow's pixels is read-only, and torch warns.
        return np.array(image)
    image = _eight_bits(image, data[24], data[25]) if kind == "png" else image
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return np.array(image.convert("RGB"))


def _eight_bits(image: Image.Image, depth: int, colour_type: int) -> Image.Image:
    """Converts 16-bit grey to 8 bits, and scales the transparent colour (tRNS) likewise: Pillow does neither."""
    clear = image.info.get("transparency")
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if clear is not None and colour_type in (0, 2) and depth in (2, 4, 16):

        def scaled(level: int) -> int:
            return level >> 8 if depth == 16 else level * (255 // ((1 << depth) - 1))

        image.info["transparency"] = scaled(clear) if isinstance(clear, int) else tuple(map(scaled, clear))
    return image


# ---- headers


def _parser_for(data: bytes) -> Callable[[bytes], Header]:
    """The header parser of the format that the first bytes indicate. Raises BadSample."""
    if data.startswith(b"\xff\xd8\xff"):
        return _parse_jpeg
    if data.startswith(SIGNATURE):
        return _parse_png
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _parse_webp
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _parse_gif
    if data.startswith(b"BM"):
        return _parse_bmp
    for offset, signature, name in _OTHER_KINDS:
        if data.startswith(signature, offset):
            raise BadSample("unsupported", f"a {name} image; JPEG, PNG, WebP, GIF and BMP are read")
    if b"<svg" in data[:1024]:
        raise BadSample("unsupported", "an SVG drawing; JPEG, PNG, WebP, GIF and BMP are read")
    for signature in (b"\xff\xd8\xff", SIGNATURE, b"GIF89a"):
        if signature.startswith(data):
            raise BadSample("truncated", f"ends after {len(data)} bytes")
    raise BadSample("not a picture", f"begins with {data[:16]!r}")


def _parse_jpeg(data: bytes) -> Header:
    frame, exif, adobe, deviates, exif_at = b"", b"", -1, False, 0
    for marker, at, end, stray in segments(data):
        if exif_at:  # with the bytes after the segment, which are its own where its length is wrong
            exif, exif_at = data[exif_at:at], 0
        if stray:
            deviates = True
        if marker == 0xE1:
            if not exif and data.startswith(b"Exif\0\0", at + 4):
                exif_at = at + 10  # the first of several has the directory; the rest continue it
        elif marker == 0xE0:
            if data.startswith(b"JFIF\0", at + 4) and end - at >= 18 and data[at + 9] != 1:
                deviates = True
        elif marker == 0xEE:
            if data.startswith(b"Adobe", at + 4) and end - at >= 16:
                adobe = data[at + 15]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = data[at + 4 : end]
            if marker > 0xC2 or frame[0] != 8:
                raise BadSample("unsupported", f"a {frame[0]}-bit JPEG of kind SOF{marker - 0xC0}")
            progressive = marker == 0xC2
    if not frame:
        raise BadSample("corrupt", "a JPEG without a frame header")
    height, width, count = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4], frame[5]
    parts = [frame[6 + 3 * i : 9 + 3 * i] for i in range(count)]
    if count not in (1, 3, 4):
        raise BadSample("unsupported", f"a JPEG of {count} components")
    if count > 1:
        first, second, third, *fourth = (part[1] for part in parts)
        if (first, second) not in _SAMPLINGS or third != second or (fourth and fourth[0] != first):
            factors = ", ".join(f"{part[1] >> 4}x{part[1] & 15}" for part in parts)
            raise BadSample("unsupported", f"a JPEG with sampling factors {factors}")
    if not height:
        raise BadSample("unsupported", "a JPEG whose height follows its pixels (DNL)")
    if data.rfind(b"\xff\xd9", at) < 0:
        raise BadSample("truncated", f"no end of the JPEG within {len(data)} bytes")
    scans = data.count(b"\xff\xda", at) if progressive or data[at + 4] < count else 1
    if scans > min(_MAX_SCANS, max(_ANY_SCANS, _MAX_SCANNED // (width * height or 1))):
        raise BadSample("unsupported", f"a JPEG of {width} x {height} pixels in {scans} scans")
    rgb = count == 3 and (adobe == 0 or bytes(part[0] for part in parts) == b"RGB")
    orientation = _orientation(exif)
    deviates = deviates or not (progressive or data[end - 3 : end] == SEQUENTIAL)
    plain = orientation == _UPRIGHT and count < 4 and not rgb and not deviates
    made, kept = _RESULT if count < 4 else 4 + _RESULT, 0  # CMYK is converted
    if progressive or data[at + 4] < count:  # all coefficients, of 2 bytes
        areas = [(part[1] >> 4) * (part[1] & 15) for part in parts]
        kept = -(-2 * sum(areas) // max(1, *areas)) if count > 1 else 2
    return Header("jpeg", width, height, plain, orientation, deviates, made, kept)


def _parse_png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    if data[12:16] != b"IHDR":
        raise BadSample("corrupt", "a PNG without a header")
    orientation = _UPRIGHT
    for kind, start, length in chunks(data):
        if kind == b"eXIf":
            orientation = _orientation(data[start : start + length])
    return Header("png", width, height, False, orientation)


def _parse_webp(data: bytes) -> Header:
    whole = int.from_bytes(data[4:8], "little") + 8
    if whole > len(data):
        raise BadSample("truncated", f"{len(data)} bytes of a WebP of {whole}")
    kind = data[12:16]
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise BadSample("corrupt", "a WebP without a key frame")
        width, height = struct.unpack_from("<HH", data, 26)
        return _webp(width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        if data[20] != 0x2F:
            raise BadSample("corrupt", "a lossless WebP without its signature")
        (bits,) = struct.unpack_from("<I", data, 21)
        return _webp((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise BadSample("corrupt", f"a WebP that begins with the chunk {kind!r}")
    if whole < 30:
        raise BadSample("corrupt", f"a WebP of {whole} bytes")
    width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    orientation, at = _UPRIGHT, 30
    while data[20] & 8 and at + 8 <= whole:  # the flag for EXIF
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            orientation = _orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
            break
        at += 8 + length + (length & 1)
    return _webp(width, height, orientation)


def _webp(width: int, height: int, orientation: int = _UPRIGHT) -> Header:
    return Header("webp", width, height, False, orientation, made=_FRAMES + _PILLOW + _RESULT)


def _parse_gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    while data[at] == 0x21:  # extensions before the first frame
        at += 2
        while data[at]:
            at += 1 + data[at]
        at += 1
    if data[at] != 0x2C:
        raise BadSample("corrupt", "a GIF without a frame")
    left, top, frame_width, frame_height = struct.unpack_from("<4H", data, at + 1)
    # A frame may reach beyond the screen; Pillow then enlarges the screen.
    return Header("gif", max(width, left + frame_width), max(height, top + frame_height), False)


def _parse_bmp(data: bytes) -> Header:
    size = int.from_bytes(data[14:18], "little")
    if size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    elif 40 <= size <= 256:
        width, height = struct.unpack_from("<ii", data, 18)
    else:
        raise BadSample("not a picture", f"begins like a BMP, but no BMP header has {size} bytes")
    return Header("bmp", width, abs(height), False)


def _orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, 1 to 8; 1, upright, when the block has none or cannot be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return _UPRIGHT
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else _UPRIGHT
    except struct.error:
        pass
    return _UPRIGHT

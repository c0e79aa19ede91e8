"""Unusual and damaged images by kind, each with the cause under which it must be counted."""

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

from lift_fast.data.samples import Cause

from .damage import frame_of, inserted, padded_end, padded_restarts, scan_of, with_jfif_version, with_scan_parameters

Case = tuple[bytes, Cause | None]


def scene(rng: random.Random, width: int = 48, height: int = 36) -> np.ndarray:
    """Smooth uint8 pixels [height, width, 3], which JPEG preserves; all corners differ, so that a rotation shows."""
    y, x = np.mgrid[0:height, 0:width]
    x, y = x / max(1, width - 1), y / max(1, height - 1)
    planes = [128 + 110 * np.sin(rng.uniform(1, 3) * x + rng.uniform(1, 3) * y + rng.uniform(0, 6)) for _ in range(3)]
    return np.stack(planes, -1).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **settings) -> bytes:
    """Pixels as Pillow saves them."""
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **settings)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *extra: bytes, interlaced=0) -> bytes:
    """A PNG of rows with their filter bytes. extra: whole chunks before the pixels."""
    header = struct.pack(">II5B", width, height, depth, colour_type, 0, 0, interlaced)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def interlaced_png(pixels: np.ndarray) -> bytes:
    """An RGB PNG with Adam7 interlacing, which Pillow reads but does not write."""
    rows = b""
    for top, left, down, across in (
        *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
        *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
    ):
        part = pixels[top::down, left::across]
        rows += b"".join(b"\0" + row.tobytes() for row in part if part.size)
    return raw_png(pixels.shape[1], pixels.shape[0], 8, 2, rows, interlaced=1)


def exif(orientation: int) -> bytes:
    """An EXIF block, in the form that Pillow's save accepts."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def insert_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    """A JPEG with one more segment after its first marker."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + jpeg[2:]


def with_size(data: bytes, kind: str, width: int, height: int) -> bytes:
    """The same bytes with another size in the header."""
    out = bytearray(data)
    if kind == "jpeg":
        struct.pack_into(">HH", out, max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5, height, width)
    elif kind == "png":
        struct.pack_into(">II", out, 16, width, height)
        struct.pack_into(">I", out, 29, zlib.crc32(bytes(out[12:29])))
    elif kind == "webp":
        struct.pack_into("<HH", out, 26, width, height)
    elif kind == "gif":
        struct.pack_into("<HH", out, 6, width, height)
    else:
        struct.pack_into("<ii", out, 18, width, height)
    return bytes(out)


def png_that_ends_early(pixels: np.ndarray) -> bytes:
    """A PNG with one flipped bit, because of which the pixels end before the last row; zlib and Pillow accept it."""
    data = encoded(pixels, "PNG")
    for at in range(data.find(b"IDAT") + 50, len(data) - 100):
        damaged = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
        try:
            if (np.asarray(Image.open(io.BytesIO(damaged))) != pixels).any():
                return damaged
        except (OSError, SyntaxError):
            continue
    raise AssertionError("no bit has this effect")


def hostile(rng: random.Random) -> dict[str, Case]:
    """kind -> (bytes, the cause it must be counted under; None: it must decode)."""
    return {**_unusual(rng), **_damaged(rng), **_not_images(rng)}


def _unusual(rng: random.Random) -> dict[str, Case]:
    pixels = scene(rng)
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    grey = image.convert("L")
    clear = image.convert("RGBA")
    clear.putalpha(grey)
    palette = image.quantize(16)
    frames = [Image.fromarray(scene(rng)) for _ in range(2)]
    moving = {"save_all": True, "append_images": frames, "duration": 50}
    jpeg = encoded(pixels, "JPEG", quality=92)
    cmyk = encoded(image.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.find(b"Adobe")
    deep = (pixels[..., 0].astype(np.uint16) << 8).astype(">u2")
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    found = {
        "jpeg": jpeg,
        "jpeg grey": encoded(grey, "JPEG"),
        "jpeg 4:4:4": encoded(pixels, "JPEG", subsampling=0),
        "jpeg progressive": encoded(pixels, "JPEG", progressive=True),
        "jpeg with restarts": encoded(pixels, "JPEG", restart_marker_rows=1),
        "jpeg rgb": encoded(pixels, "JPEG", keep_rgb=True),
        "jpeg cmyk": cmyk,
        "jpeg ycck": cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :],
        "jpeg cmyk without adobe": cmyk[: adobe - 4] + cmyk[adobe + 12 :],
        "jpeg then junk": jpeg + rng.randbytes(100),
        "jpeg then another": encoded(pixels, "MPO", save_all=True, append_images=frames),
        "jpeg with a broken exif": insert_segment(jpeg, 0xE1, b"Exif\0\0II*\0" + rng.randbytes(30)),
        "jpeg with an endless exif": insert_segment(jpeg, 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        "jpeg with a broken profile": insert_segment(jpeg, 0xE2, b"ICC_PROFILE\0\3\1profile"),
        "jpeg with bytes between": inserted(jpeg, frame_of(jpeg), b"xyz"),
        "jpeg with a scan of zeros": with_scan_parameters(jpeg),
        "jpeg with padding": padded_end(jpeg, bytes(30)),
        "jpeg with padded restarts": padded_restarts(encoded(pixels, "JPEG", restart_marker_rows=1), bytes(30)),
        "jpeg of jfif 2": with_jfif_version(jpeg, 2, 1),
        "jpeg 1 x 1": encoded(pixels[:1, :1], "JPEG"),
        "png": encoded(pixels, "PNG"),
        "png grey": encoded(grey, "PNG"),
        "png 1 bit": encoded(grey.convert("1"), "PNG"),
        "png 2 bit": raw_png(4, 1, 2, 0, b"\0\x1b"),
        "png 4 bit": raw_png(2, 1, 4, 0, b"\0\x0f"),
        "png 16 bit grey": encoded(Image.fromarray(deep.astype(np.uint16)), "PNG"),
        "png 16 bit": raw_png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0)),
        "png 16 bit with alpha": raw_png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 0, 0, 0, 0x8000)),
        "png 16 bit grey with alpha": raw_png(1, 1, 16, 4, b"\0" + struct.pack(">2H", 0, 0x8000)),
        "png with alpha": encoded(clear, "PNG"),
        "png grey with alpha": encoded(clear.convert("LA"), "PNG"),
        "png palette": encoded(palette, "PNG"),
        "png palette with a clear colour": encoded(palette, "PNG", transparency=3),
        "png palette with alpha": encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "png with a clear colour": encoded(pixels, "PNG", transparency=tuple(pixels[0, 0].tolist())),
        "png interlaced": interlaced_png(pixels),
        "png animated": encoded(pixels, "PNG", **moving),
        "png with a text bomb": raw_png(
            width, height, 8, 2, rows, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 25)))
        ),
        "png with a profile bomb": raw_png(
            width, height, 8, 2, rows, png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 25)))
        ),
        "png with no animation": raw_png(width, height, 8, 2, rows, png_chunk(b"acTL", bytes(8))),
        "png 1 x 1": encoded(pixels[:1, :1], "PNG"),
        "png 1 x 3000": encoded(scene(rng, 1, 3000), "PNG"),
        "png 3000 x 1": encoded(scene(rng, 3000, 1), "PNG"),
        "webp": encoded(pixels, "WEBP", quality=90),
        "webp lossless": encoded(pixels, "WEBP", lossless=True),
        "webp with alpha": encoded(clear, "WEBP"),
        "webp lossless with alpha": encoded(clear, "WEBP", lossless=True),
        "webp animated": encoded(pixels, "WEBP", **moving),
        "webp with exif": encoded(pixels, "WEBP", exif=exif(1)),
        "gif": encoded(palette, "GIF"),
        "gif with a clear colour": encoded(palette, "GIF", transparency=3),
        "gif larger than its screen": with_size(encoded(palette, "GIF"), "gif", 5, 7),
        "gif animated": encoded(palette, "GIF", **moving),
        "bmp": encoded(pixels, "BMP"),
        "bmp grey": encoded(grey, "BMP"),
        "bmp palette": encoded(palette, "BMP"),
    }
    for orientation in range(1, 9):
        block = exif(orientation)
        found[f"jpeg orientation {orientation}"] = encoded(pixels, "JPEG", exif=block)
        found[f"png orientation {orientation}"] = encoded(pixels, "PNG", exif=block)
        found[f"webp orientation {orientation}"] = encoded(pixels, "WEBP", exif=block)
    return {kind: (data, None) for kind, data in found.items()}


def _damaged(rng: random.Random) -> dict[str, Case]:
    pixels = scene(rng)
    noise = np.frombuffer(rng.randbytes(64 * 48 * 3), np.uint8).reshape(48, 64, 3)
    jpeg, png = encoded(noise, "JPEG", quality=90), encoded(noise, "PNG")
    progressive = encoded(noise, "JPEG", progressive=True)
    webp, lossless = encoded(noise, "WEBP", quality=90), encoded(noise, "WEBP", lossless=True)
    gif, bmp = encoded(Image.fromarray(pixels).quantize(64), "GIF"), encoded(pixels, "BMP")
    scan, frame = scan_of(jpeg)[1], frame_of(jpeg)
    middle = png.find(b"IDAT") + 2000
    scans = progressive.rfind(b"\xff\xda")
    cut = webp[: len(webp) // 2]

    def patched(data: bytes, at: int, new: bytes) -> bytes:
        return data[:at] + new + data[at + len(new) :]

    cases: dict[str, Case] = {
        "jpeg without end": (jpeg[:-2], "truncated"),
        "jpeg cut in half": (jpeg[: len(jpeg) // 2], "truncated"),
        "jpeg cut in its header": (jpeg[:30], "truncated"),
        "jpeg of 3 bytes": (jpeg[:3], "truncated"),
        "jpeg cut in half and ended": (jpeg[: len(jpeg) // 2] + b"\xff\xd9", "corrupt"),
        "jpeg with a hole": (jpeg[:scan] + jpeg[-len(jpeg) // 4 :], "corrupt"),
        "jpeg with zeros": (patched(jpeg, scan + 500, bytes(300)), "corrupt"),
        "jpeg progressive and cut": (progressive[: len(progressive) // 2], "truncated"),
        "jpeg with bytes before its end": (padded_end(jpeg, bytes(range(1, 31))), "corrupt"),
        "jpeg with a scan of zeros and cut": (
            padded_end(with_scan_parameters(jpeg)[: len(jpeg) // 2] + b"\xff\xd9", bytes(30)),
            "corrupt",
        ),
        "jpeg progressive and not called so": (
            patched(progressive, progressive.find(b"\xff\xc2"), b"\xff\xc0"),
            "corrupt",
        ),
        "jpeg without tables": (jpeg[:2] + jpeg[frame:], "corrupt"),
        "jpeg 0 wide": (with_size(jpeg, "jpeg", 0, 48), "corrupt"),
        "jpeg without height": (with_size(jpeg, "jpeg", 64, 0), "unsupported"),
        "jpeg 12 bit": (patched(jpeg, frame + 4, b"\x0c"), "unsupported"),
        "jpeg lossless": (patched(jpeg, frame, b"\xff\xc3"), "unsupported"),
        "jpeg arithmetic": (patched(jpeg, frame, b"\xff\xc9"), "unsupported"),
        "jpeg of 2 components": (patched(jpeg, frame + 9, b"\2"), "unsupported"),
        "jpeg with odd sampling": (patched(jpeg, frame + 11, b"\x11\0\2\x21"), "unsupported"),
        "jpeg with sampling of no name": (patched(jpeg, frame + 11, b"\x22\0\2\x22\1\3\x22"), "unsupported"),
        "jpeg of many scans": (progressive[:scans] + progressive[scans:-2] * 600 + b"\xff\xd9", "unsupported"),
        "jpeg too large": (with_size(jpeg, "jpeg", 20000, 20000), "too large"),
        "png without end": (png[:-12], "truncated"),
        "png cut in half": (png[: len(png) // 2], "truncated"),
        "png cut in its header": (png[:20], "truncated"),
        "png with a wrong pixel": (patched(png, middle, bytes([png[middle] ^ 1])), "corrupt"),
        "png that ends early": (png_that_ends_early(pixels), "corrupt"),
        "png without pixels": (png[:33] + png_chunk(b"IEND", b""), "corrupt"),
        "png with no stream": (png[:33] + png_chunk(b"IDAT", b"none") + png_chunk(b"IEND", b""), "corrupt"),
        "png 0 wide": (with_size(png, "png", 0, 48), "corrupt"),
        "png of 3 bits": (raw_png(4, 1, 3, 0, b"\0\0\0"), "corrupt"),
        "png too large": (with_size(png, "png", 20000, 20000), "too large"),
        "png far too large": (with_size(png, "png", 2**31 - 1, 2**31 - 1), "too large"),
        "webp cut": (cut, "truncated"),
        "webp cut and said so": (patched(cut, 4, struct.pack("<I", len(cut) - 8)), "corrupt"),
        "webp lossless and cut": (lossless[: len(lossless) // 2], "truncated"),
        "webp 0 wide": (with_size(webp, "webp", 0, 48), "corrupt"),
        "webp too large": (with_size(webp, "webp", 16383, 16383), "too large"),
        "gif cut": (gif[: len(gif) // 2], "truncated"),
        "gif too large": (with_size(gif, "gif", 20000, 20000), "too large"),
        "bmp cut": (bmp[: len(bmp) // 2], "truncated"),
        "bmp too large": (with_size(bmp, "bmp", 20000, -20000), "too large"),
    }
    return cases


def _not_images(rng: random.Random) -> dict[str, Case]:
    pixels = scene(rng)
    cases: dict[str, Case] = {
        "nothing": (b"", "empty"),
        "text": (b"a photograph of a cat", "not a picture"),
        "a web page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not a picture"),
        "a text about cars": (b"BMW is a maker of cars, and this is no bitmap", "not a picture"),
        "zeros": (bytes(1000), "not a picture"),
        "noise": (b"\1" + rng.randbytes(1000), "not a picture"),
        "a zip": (b"PK\3\4" + rng.randbytes(100), "not a picture"),
        "a sound": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(100), "not a picture"),
        "tiff": (encoded(pixels, "TIFF"), "unsupported"),
        "icon": (encoded(pixels, "ICO"), "unsupported"),
        "avif": (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(100), "unsupported"),
        "heic": (b"\0\0\0\x20ftypheic\0\0\0\0mif1heic" + bytes(100), "unsupported"),
        "jpeg xl": (b"\xff\x0a" + rng.randbytes(100), "unsupported"),
        "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "unsupported"),
        "psd": (b"8BPS\0\1" + bytes(100), "unsupported"),
        "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "unsupported"),
    }
    return cases

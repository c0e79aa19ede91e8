"""Synthetic photographs for benchmarks of decoders; they match real ones in what a JPEG decoder's time depends on.

Overlapping objects give sharp edges and flat regions: "dead leaves", discs and slabs of power-law sizes (Lee, Mumford
and Huang, 2001). Each has a texture whose amplitude falls as 1 / f^1.1, close to that of natural images (Field, 1987),
with a contrast of its own and small differences between the colour channels. Sizes, quality and chroma subsampling are
those of images on the web. The same seed gives the same images.
"""

import hashlib
import io
import json
import math
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FALL = 1.1  # amplitude of a texture: frequency ** -FALL
FIELD, FIELDS = 1024, 9  # side of a periodic texture in pixels; number of textures
LEAVES = 500  # objects of an image
# Width and height of landscape images -> relative frequency.
SIZES = {
    (400, 300): 2,
    (500, 333): 3,
    (500, 375): 4,
    (640, 427): 4,
    (640, 480): 4,
    (800, 600): 2,
    (1024, 683): 1,
    (1024, 768): 1,
}
PORTRAITS = 0.25  # share of images with width and height exchanged
QUALITY = 80, 95  # least and greatest JPEG quality
SUBSAMPLED = 0.9  # share with chroma subsampling 4:2:0; the others have 4:4:4
WORDS = ("a", "photograph", "of", "the", "old", "harbour", "two", "people", "near", "green", "hills", "at", "night")


@cache
def fields() -> np.ndarray:
    """Periodic textures of mean 0 and standard deviation 1, float32 [FIELDS, FIELD, FIELD]; made once per process."""
    rng = np.random.default_rng(0)
    y, x = np.fft.fftfreq(FIELD)[:, None], np.fft.rfftfreq(FIELD)
    frequency = np.hypot(y, x)
    frequency[0, 0] = np.inf
    out = np.empty((FIELDS, FIELD, FIELD), np.float32)
    for texture in out:
        texture[:] = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((FIELD, FIELD))) / frequency**FALL)
        texture /= texture.std()
    return out


def photograph(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A photograph, uint8 [height, width, 3]."""
    colours, contrast = _leaves(rng, width, height)
    light, *chroma = (_cut(rng, width, height) for _ in range(3))
    channels = (light, light + 0.3 * chroma[0], light + 0.3 * chroma[1])
    for channel, texture in enumerate(channels):
        colours[..., channel] += contrast * texture
    return np.clip(colours, 0, 255).astype(np.uint8)


def _leaves(rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Each pixel's colour and its texture's contrast, float32 [height, width, 3] and [height, width]."""
    size = 2 * width, 2 * height  # halved at the end, which makes edges smooth
    colours, contrast = Image.new("RGB", size), Image.new("L", size)
    paint, texture = ImageDraw.Draw(colours), ImageDraw.Draw(contrast)
    least, most = 0.008 * max(size), 0.4 * max(size)
    # Radii of density r^-3, from the inverse of their distribution function; the first leaf is the background.
    radii = (least**-2 - rng.random(LEAVES) * (least**-2 - most**-2)) ** -0.5
    radii[0] = sum(size)
    for radius in radii.tolist():
        x, y = (rng.random(2) * size).tolist()
        light, tint = rng.normal(118, 52), rng.normal(0, 18, 3)
        colour = tuple(np.clip(light + tint, 0, 255).astype(int).tolist())
        depth = int(rng.choice((3, 14, 30, 50)))  # sky, skin, cloth, grass
        if rng.random() < 0.7:
            for canvas, ink in ((paint, colour), (texture, depth)):
                canvas.ellipse((x - radius, y - radius, x + radius, y + radius), ink)
        else:
            turn, half = rng.random() * math.pi, rng.uniform(0.1, 1) * math.pi / 2
            corners = [
                (x + radius * math.cos(angle), y + radius * math.sin(angle))
                for angle in (turn - half, turn + half, turn + math.pi - half, turn + math.pi + half)
            ]
            for canvas, ink in ((paint, colour), (texture, depth)):
                canvas.polygon(corners, ink)
    return tuple(np.asarray(canvas.reduce(2), np.float32) for canvas in (colours, contrast))  # type: ignore[return-value]


def _cut(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A random piece of a texture, transposed and mirrored at random, float32 [height, width]."""
    texture = fields()[rng.integers(FIELDS)]
    if rng.random() < 0.5:
        texture = texture.T
    top, left = rng.integers(FIELD, size=2)
    rows, columns = (np.arange(start, start + n) % FIELD for start, n in ((top, height), (left, width)))
    return texture[np.ix_(rows, columns[:: rng.choice((-1, 1))])]


def size_of(rng: np.random.Generator) -> tuple[int, int]:
    """A width and height that are common on the web."""
    weights = np.array(list(SIZES.values()))
    width, height = list(SIZES)[rng.choice(len(SIZES), p=weights / weights.sum())]
    return (height, width) if rng.random() < PORTRAITS else (width, height)


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A photograph as a JPEG with a quality and chroma subsampling that are common on the web."""
    quality = int(rng.integers(QUALITY[0], QUALITY[1], endpoint=True))
    subsampling = 2 if rng.random() < SUBSAMPLED else 0
    out = io.BytesIO()
    Image.fromarray(photograph(rng, width, height)).save(out, "JPEG", quality=quality, subsampling=subsampling)
    return out.getvalue()


def write_shards(
    folder: Path, count: int, seed: int, size: tuple[int, int] | None = None, shards: int = 4
) -> list[bytes]:
    """Writes `count` photographs in the layout of img2dataset and returns the JPEG files.

    A tar has KEY.jpg, KEY.json and KEY.txt for each sample; the key is the shard's number in five digits and the
    sample's in four. size: (width, height) of all images; None: mixed.
    """
    folder.mkdir(parents=True)
    files = []
    for shard, samples in enumerate(np.array_split(np.arange(count), min(shards, count))):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for place, sample in enumerate(samples.tolist()):
                rng = np.random.default_rng([seed, sample])
                width, height = size or size_of(rng)
                image = jpeg(rng, width, height)
                key, caption = f"{shard:05d}{place:04d}", " ".join(rng.choice(WORDS, rng.integers(6, 20)))
                meta = {
                    "caption": caption,
                    "url": f"https://example.org/{seed}/{sample}.jpg",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": width,
                    "height": height,
                    "original_width": width,
                    "original_height": height,
                    "exif": "{}",
                    "sha256": hashlib.sha256(image).hexdigest(),
                }
                for suffix, data in ("jpg", image), ("json", json.dumps(meta).encode()), ("txt", caption.encode()):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                files.append(image)
    return files

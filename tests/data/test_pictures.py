"""Encoded images: what is read, what is refused and with which cause; crops, the resize, views, colours."""

import collections
import io
import os
import random
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support import complete  # noqa: F401
from support.hostile import encoded, exif, hostile, insert_segment, interlaced_png, png_chunk, raw_png, scene

from lift_fast.data.images import MAX_PIXELS, BadSample, Header, decode, decode_box, read_header, scale_of
from lift_fast.data.loading import Loading
from lift_fast.data.order import uniform
from lift_fast.data.pixels import MEAN, STD, normalise
from lift_fast.data.transforms import (
    DRAWS,
    View,
    recoloured,
    render,
    render_centre,
    resize,
    view_of,
)

CASES = hostile(random.Random(0))
GOOD = [kind for kind, (_, cause) in CASES.items() if cause is None]


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def whole(data: bytes) -> np.ndarray:
    return decode(data, read_header(data))


def by_pillow(data: bytes) -> np.ndarray:
    """Upright and on white, with nothing but Pillow."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def photograph(seed: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3] with the spectrum of photographs, 1/f."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1 / max(width, height)
    planes = []
    for _ in range(3):
        z = rng.standard_normal((2, *f.shape))
        x = np.fft.irfft2((z[0] + 1j * z[1]) / f**1.1, s=(height, width))
        planes.append((x - x.mean()) / x.std())
    y, blue, red = planes
    rgb = np.stack([y + 0.3 * red, y - 0.15 * blue - 0.1 * red, y + 0.3 * blue], -1)
    return np.clip(120 + 55 * rgb, 0, 255).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int))


# ---- what is read and what is refused


@pytest.mark.parametrize("kind", CASES)
def test_every_kind_decodes_or_is_refused_by_its_cause(kind):
    data, cause = CASES[kind]
    if cause is None:
        header = read_header(data)
        pixels = decode(data, header)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (header.height, header.width, 3)
        assert render_centre(data, header, 8).shape == (8, 8, 3)
    else:
        with pytest.raises(BadSample) as caught:
            whole(data)
        assert caught.value.cause == cause, caught.value.reason
        assert caught.value.reason


@pytest.mark.parametrize("kind", [kind for kind, (_, cause) in CASES.items() if cause == "too large"])
def test_what_is_too_large_is_told_by_the_header(kind):
    with pytest.raises(BadSample, match=f"of {MAX_PIXELS} at most"):
        read_header(CASES[kind][0])


def test_plain_is_what_every_decoder_reads_alike():
    plain = {kind for kind in GOOD if read_header(CASES[kind][0]).plain}
    assert plain == {
        *("jpeg", "jpeg grey", "jpeg 4:4:4", "jpeg progressive", "jpeg with restarts", "jpeg then junk"),
        *("jpeg then another", "jpeg with a broken exif", "jpeg with an endless exif", "jpeg 1 x 1"),
        "jpeg orientation 1",
        # Their headers do not say how they deviate; see is_regular.
        *("jpeg with a broken profile", "jpeg with padding", "jpeg with padded restarts"),
    }


def test_plain_pictures_are_dalis():
    pytest.importorskip("nvidia.dali", reason="DALI comes with lift-fast[dali]")
    from nvidia.dali import fn, pipeline_def, types

    plain = [data for data, cause in CASES.values() if cause is None and read_header(data).plain]

    @pipeline_def(batch_size=len(plain), num_threads=1, device_id=None)
    def decoded():
        files = fn.external_source(source=[[np.frombuffer(data, np.uint8) for data in plain]], batch=True)
        return fn.decoders.image(files, device="cpu", output_type=types.RGB)

    pipe = decoded()
    pipe.build()
    (pictures,) = pipe.run()
    for data, picture in zip(plain, pictures, strict=True):
        assert (whole(data) == np.asarray(picture)).all()


# Pillow warns, refuses or clips.
NOT_PILLOWS = {
    *("jpeg with a broken exif", "jpeg with an endless exif", "png with a text bomb", "png with a profile bomb"),
    *("png with no animation", "png 16 bit grey"),
}


@pytest.mark.parametrize("kind", sorted({*GOOD} - NOT_PILLOWS))
def test_pixels_are_pillows(kind):
    data = CASES[kind][0]
    assert difference(whole(data), by_pillow(data)).max() <= 1


def test_lossless_kinds_give_the_pixels_back():
    pixels = scene(random.Random(3))
    for data in (
        encoded(pixels, "PNG"),
        interlaced_png(pixels),
        encoded(pixels, "WEBP", lossless=True),
        encoded(pixels, "BMP"),
        encoded(pixels, "PNG", save_all=True, append_images=[Image.new("RGB", (48, 36))]),
        encoded(pixels, "WEBP", save_all=True, append_images=[Image.new("RGB", (48, 36))], lossless=True),
    ):
        assert (whole(data) == pixels).all()


def test_formal_faults_that_leave_the_pixels_alone():
    """Bytes after the end, wrong checksums of what makes no pixels, sizes that are not used."""
    pixels = scene(random.Random(3), 47, 36)
    png, bmp = encoded(pixels, "PNG"), encoded(pixels, "BMP")
    palette = Image.fromarray(pixels).quantize(64)
    gif, webp = encoded(palette, "GIF"), encoded(pixels, "WEBP", lossless=True)
    note, zlib_end = png_chunk(b"tEXt", b"a\0note"), png.find(b"IEND") - 4
    files = {
        "png then junk": png + b"junk",
        "png with a wrong checksum of its end": png[:-4] + b"junk",
        "png with a wrong checksum of a note": png[:33] + note[:-4] + b"junk" + png[33:],
        "png with a broken profile": png[:33] + png_chunk(b"iCCP", b"a\0\0junk") + png[33:],
        "png with junk after its stream": png[:zlib_end] + png_chunk(b"IDAT", b"junk") + png[zlib_end:],
        "webp then junk": webp + b"junk",
        "bmp then junk": bmp + b"junk",
        "bmp of no size": bmp[:2] + bytes(4) + bmp[6:],
        "bmp without its last padding": bmp[:-3],
    }
    for name, data in files.items():
        assert (whole(data) == pixels).all(), name
    for data in (gif + b"junk", gif[:-1], gif[:-1] + bytes(9) + b";"):
        assert (whole(data) == np.asarray(palette.convert("RGB"))).all()


def test_the_name_does_not_matter_and_the_format_is_told():
    formats = {kind.split()[0] for kind in GOOD}
    assert formats == {"jpeg", "png", "webp", "gif", "bmp"}
    assert all(read_header(CASES[kind][0]).format == kind.split()[0] for kind in GOOD)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    data = encoded(Image.new(mode, (9, 7)), "JPEG" if mode == "CMYK" else "PNG")
    assert whole(data).shape == (7, 9, 3)


def test_sixteen_bits_are_scaled():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)[None]
    grey = whole(encoded(Image.fromarray(ramp), "PNG"))
    assert (grey == np.arange(256)[None, :, None]).all()
    rgb = raw_png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0xFFFF, 0x8080, 0x0101))
    assert whole(rgb).tolist() == [[[255, 128, 1]]]
    assert whole(raw_png(1, 1, 16, 4, b"\0" + struct.pack(">2H", 0, 0x8000)))[0, 0, 0] == 127


def test_alpha_lies_on_white():
    clear = Image.new("RGBA", (3, 2), (10, 20, 30, 0))
    for kind, settings in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert (whole(encoded(clear, kind, **settings)) == 255).all()
    half = whole(encoded(Image.new("RGBA", (3, 2), (0, 100, 200, 128)), "PNG"))
    assert difference(half, np.full((2, 3, 3), (127, 177, 227))).max() <= 1


@pytest.mark.parametrize(
    "depth, colour_type, colour, rows",
    [
        (1, 0, (1,), b"\0\x80"),
        (2, 0, (2,), b"\0\x80"),
        (4, 0, (7,), b"\0\x70"),
        (8, 0, (7,), b"\0\7\0"),
        (16, 0, (0x1234,), b"\0\x12\x34\0\0"),
        (8, 2, (1, 2, 3), b"\0\1\2\3\0\0\0"),
        (16, 2, (0x1234, 0x5678, 0x9ABC), b"\0\x12\x34\x56\x78\x9a\xbc" + bytes(6)),
    ],
)
def test_the_clear_colour_of_a_png_becomes_white(depth, colour_type, colour, rows):
    clear = png_chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))
    data = raw_png(2, 1, depth, colour_type, rows, clear)
    assert whole(data).tolist() == [[[255, 255, 255], [0, 0, 0]]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(kind, orientation):
    data = encoded(scene(random.Random(1)), kind, exif=exif(orientation))
    header = read_header(data)
    assert header.orientation == orientation
    assert header.plain == (orientation == 1 and kind == "JPEG")
    assert (header.width, header.height) == ((48, 36) if orientation < 5 else (36, 48))
    assert difference(decode(data, header), by_pillow(data)).max() <= 1


@pytest.mark.parametrize("value", [0, 9, 70000])
def test_an_orientation_that_is_none_is_left_alone(value):
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, value, 0) if value < 65536 else struct.pack(">HHII", 0x0112, 4, 1, 6)
    block = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry
    assert read_header(encoded(scene(random.Random(1)), "JPEG", exif=block)).orientation == 1


def test_bytes_in_any_order_are_refused_as_bad_samples():
    """Flips, cuts, insertions in every kind: pixels of the size that the header says, or BadSample, nothing else."""
    rng = random.Random(0)
    seeds = [data for data, _ in CASES.values() if 0 < len(data) < 20_000]
    found: collections.Counter[str] = collections.Counter()
    for number in range(30_000):
        data = bytearray(seeds[number % len(seeds)])
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(min(len(data), rng.choice((60, 400, 20_000))))
            match rng.randrange(6):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.choice((0, 1, 127, 128, 255))
                case 2:
                    data[at:at] = rng.randbytes(rng.randrange(1, 20))
                case 3:
                    del data[at + 1 : at + rng.randrange(2, 50)]
                case 4:
                    del data[max(1, at) :]
                case 5:
                    data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", bytes(4), b"\0\0\1\0"))
        if number % 2 and data.startswith(b"\x89PNG\r\n\x1a\n"):
            _repair(data)
        damaged = bytes(data)
        try:
            header = read_header(damaged)
            if header.width * header.height > 1 << 20:
                continue  # a size that the damage invented: decoding it is right, and slow
            assert decode(damaged, header).shape == (header.height, header.width, 3)
            decode_box(damaged, header, (0, 0, header.width, header.height), 4)
            found["decoded"] += 1
        except BadSample as error:
            found[error.cause] += 1
    assert set(found) == {"decoded", "not a picture", "unsupported", "too large", "truncated", "corrupt"}, found
    assert all(count > 50 for count in found.values()), found


def _repair(png: bytearray) -> None:
    """Right checksums, so that the damage reaches the decoder."""
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            return
        struct.pack_into(">I", png, end, zlib.crc32(png[at + 4 : end]))
        at = end + 4


def test_damage_in_the_pixels_of_a_photograph_is_seen():
    """A JPEG of which a block (a sector, a packet) was overwritten by zeros, or that was cut and ended, never decodes,
    scaled or not."""
    data = encoded(photograph(0, 320, 240), "JPEG", quality=90)
    rng = random.Random(0)
    scan = data.find(b"\xff\xda") + 14
    for _ in range(50):
        at = rng.randrange(scan, len(data) - 1100)
        for damaged in (data[:at] + bytes(512) + data[at + 512 :], data[:at] + b"\xff\xd9"):
            with pytest.raises(BadSample, match="corrupt"):
                whole(damaged)
            with pytest.raises(BadSample, match="corrupt"):
                decode_box(damaged, read_header(damaged), (0, 0, 320, 240), 64)


def test_threads_do_not_mix_their_errors_up():
    kinds = [
        "jpeg",
        "jpeg without tables",
        "jpeg cut in half and ended",
        "png",
        "png with no stream",
        "webp",
        "gif cut",
    ]

    def cause(number: int) -> str | None:
        try:
            whole(CASES[kinds[number % len(kinds)]][0])
        except BadSample as error:
            return error.cause
        return None

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(cause, range(700)))
    assert found == [CASES[kinds[number % len(kinds)]][1] for number in range(700)]


# ---- boxes


@pytest.mark.parametrize("box, size, factor", [
    ((0, 0, 448, 448), 224, 2), ((0, 0, 447, 900), 224, 1), ((0, 0, 896, 1000), 224, 4), ((0, 0, 9999, 9999), 1, 8),
    ((0, 0, 1, 1), 1, 1), ((5, 5, 2, 2), 1, 2),
])  # fmt: skip
def test_scale_of(box, size, factor):
    assert scale_of(box, size) == factor


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("width, height", [(1, 1), (1, 50), (50, 1), (7, 9), (33, 47), (321, 243)])
def test_a_box_lies_within_its_picture(width, height, orientation):
    data = encoded(scene(random.Random(0), width, height), "JPEG", exif=exif(orientation))
    header = read_header(data)
    rng = random.Random(0)
    for _ in range(30):
        w, h = rng.randint(1, header.width), rng.randint(1, header.height)
        box = (rng.randint(0, header.width - w), rng.randint(0, header.height - h), w, h)
        size = rng.choice((1, 2, 5, 40))
        picture, (left, top, inner, high) = decode_box(data, header, box, size)
        assert left >= 0 and top >= 0 and inner >= 1 and high >= 1
        assert left + inner <= picture.shape[1] and top + high <= picture.shape[0]
        factor = scale_of(box, size)
        assert abs(inner - w / factor) <= 1 and abs(high - h / factor) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_shows_the_same_box(orientation):
    pixels = scene(random.Random(2), 403, 301)
    data = encoded(pixels, "JPEG", quality=95, exif=exif(orientation))
    header = read_header(data)
    upright = decode(data, header)
    for box in ((0, 0, 200, 240), (40, 24, 160, 160), (100, 48, 200, 176)):
        view = View(box, False, None)
        assert scale_of(box, 40) == 4
        assert decode_box(data, header, box, 40)[0].shape[0] == -(-header.height // 4)
        left, top, width, height = box
        want = Image.fromarray(upright[top : top + height, left : left + width]).resize((40, 40), 3)
        assert difference(render(data, header, view, 40), np.asarray(want)).mean() < 1.5


def test_only_jpegs_are_scaled():
    pixels = scene(random.Random(2), 64, 64)
    for kind in ("PNG", "WEBP", "BMP"):
        data = encoded(pixels, kind)
        picture, box = decode_box(data, read_header(data), (0, 0, 64, 64), 8)
        assert picture.shape == (64, 64, 3) and box == (0, 0, 64, 64)


# ---- the resize


def test_resize_to_the_same_size_gives_the_same_pixels():
    pixels = photograph(0, 40, 40)
    assert (resize(pixels, 40, 40) == pixels).all()


@pytest.mark.parametrize("width, height, size", [
    (1, 1, 7), (1, 50, 8), (50, 1, 8), (2, 3, 224), (37, 41, 64), (300, 200, 7), (440, 350, 224), (8, 8, 1),
])  # fmt: skip
def test_resize_is_pillows_within_a_level(width, height, size):
    pixels = photograph(1, max(2, width), max(2, height))[:height, :width]
    want = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    got = resize(pixels, size, size)
    assert got.dtype == np.uint8
    assert difference(got, want).max() <= 1
    assert difference(got, want).mean() < 0.1


def test_resize_takes_views():
    pixels = photograph(2, 60, 50)
    for view in (pixels[5:40, 7:50], pixels[::-1], pixels.swapaxes(0, 1)[:, ::-1], pixels[::2, ::3]):
        assert (resize(view, 16, 16) == resize(view.copy(), 16, 16)).all()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_a_worker_starts_no_threads():
    data = encoded(photograph(0, 640, 480), "JPEG")
    header = read_header(data)
    counts = []

    def work() -> None:
        for box in ((10, 20, 600, 400), (0, 0, 640, 480), (50, 50, 100, 100)):
            before = len(os.listdir("/proc/self/task"))
            render(data, header, View(box, True, (1.2, 0.9, 1.1)), 224)
            render_centre(data, header, 224)
            counts.append(len(os.listdir("/proc/self/task")) - before)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert counts == [0, 0, 0]


# ---- views


def views(width: int, height: int, count: int = 2000, **settings) -> list[View]:
    loading = Loading(batch_size=1, **{"image_size": 224, **settings})
    return [view_of(width, height, draws, loading) for draws in uniform(DRAWS, 0, 0, np.arange(count))]


@pytest.mark.parametrize("width, height", [(1, 1), (1, 50), (50, 1), (2, 3), (8, 8), (640, 480), (30, 3000)])
def test_boxes_lie_within_the_picture(width, height):
    for least in (0.08, 0.9, 1.0):
        for view in views(width, height, 200, min_crop_area=least, image_size=16):
            left, top, w, h = view.box
            assert 0 <= left and 0 <= top and w >= 1 and h >= 1
            assert left + w <= width and top + h <= height
            assert all(isinstance(edge, int) for edge in view.box)


def test_boxes_keep_area_and_aspect_and_go_everywhere():
    boxes = np.array([view.box for view in views(1000, 1000, min_crop_area=0.25, image_size=600)])
    area, aspect = boxes[:, 2] * boxes[:, 3] / 1e6, boxes[:, 2] / boxes[:, 3]
    assert 0.245 < area.min() < 0.26 and area.max() > 0.95
    assert 0.745 < aspect.min() < 0.76 and 1.31 < aspect.max() < 1.34
    assert abs(np.log(aspect).mean()) < 0.02
    space = 1000 - boxes[:, 2:]
    place = boxes[:, :2] / np.maximum(space, 1)
    place = place[(space > 100).all(1)]
    assert (abs(place.mean(0) - 0.5) < 0.03).all()
    free = space > 0
    assert (boxes[:, :2] == 0)[free].any() and (boxes[:, :2] == space)[free].any()


def test_all_of_a_square_picture():
    assert [v.box for v in views(100, 100, 30, min_crop_area=1.0) if v.box == (0, 0, 100, 100)]


def test_a_picture_too_long_gives_its_centred_square():
    assert {view.box for view in views(3000, 30, 50, min_crop_area=0.9, image_size=28)} == {(1485, 0, 30, 30)}


def test_boxes_of_scaled_pictures_lie_on_their_pixels():
    for view in views(4003, 3001, 300, min_crop_area=0.08):
        factor = scale_of(view.box, 224)
        assert factor in (2, 4, 8)
        assert not any(edge % factor for edge in view.box)


def test_flips_and_colours_are_drawn():
    assert {view.flip for view in views(64, 64)} == {False}
    assert {view.colour for view in views(64, 64)} == {None}
    assert {view.flip for view in views(64, 64, flip=1.0)} == {True}
    drawn = views(64, 64, flip=0.25, colour=0.4)
    assert abs(np.mean([view.flip for view in drawn]) - 0.25) < 0.03
    colours = np.array([view.colour for view in drawn])
    assert (colours.min(0) < 0.62).all() and (colours.min(0) >= 0.6).all()
    assert (colours.max(0) > 1.38).all() and (colours.max(0) <= 1.4).all()
    assert (abs(np.corrcoef(colours.T) - np.eye(3)) < 0.1).all()


def test_a_view_takes_just_its_draws():
    loading = Loading(batch_size=1, image_size=8, colour=0.1)
    for count in (DRAWS - 1, DRAWS + 1):
        with pytest.raises(ValueError):
            view_of(9, 9, np.full(count, 0.5), loading)


def test_a_view_depends_on_its_draws_alone():
    assert views(640, 480, 20, colour=0.2) == views(640, 480, 20, colour=0.2)
    # The crop stays where it is when flips and colours are asked for.
    assert [v.box for v in views(640, 480, 20)] == [v.box for v in views(640, 480, 20, flip=0.5, colour=0.2)]


# ---- rendering


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (8, 8), (300, 200)])
def test_rendered_pictures_have_the_size_asked_for(size):
    data = encoded(Image.new("RGB", size, "blue"), "PNG")
    header = read_header(data)
    for view in views(*size, 5, flip=0.5, image_size=8):
        pixels = render(data, header, view, 8)
        assert pixels.shape == (8, 8, 3) and pixels.flags.c_contiguous
        assert (pixels == (0, 0, 255)).all()
    assert (render_centre(data, header, 8) == np.full((8, 8, 3), (0, 0, 255))).all()


def test_render_is_pillows_crop_and_resize():
    """Mean difference in levels, on pictures like photographs: 0.5 without scaled decoding; with it, 4."""
    for number, (width, height) in enumerate([(500, 375), (640, 480), (375, 500)]):
        data = encoded(photograph(number, width, height), "JPEG", quality=90)
        header, picture = read_header(data), Image.open(io.BytesIO(data))
        for size, bar in ((250, 0.5), (120, 4)):
            for view in views(width, height, 6, min_crop_area=0.6, image_size=size):
                left, top, w, h = view.box
                assert scale_of(view.box, size) == (2 if size == 120 else 1)
                box = (left, top, left + w, top + h)
                want = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
                assert difference(render(data, header, view, size), want).mean() < bar


def test_flip_and_colour_come_after_the_resize():
    pixels = photograph(5, 50, 40)
    data = encoded(pixels, "PNG")
    header = read_header(data)
    box = (3, 4, 30, 20)
    plain = render(data, header, View(box, False, None), 16)
    assert (plain == resize(pixels[4:24, 3:33], 16, 16)).all()
    assert (render(data, header, View(box, True, None), 16) == plain[:, ::-1]).all()
    colour = (1.1, 0.8, 1.3)
    assert (render(data, header, View(box, True, colour), 16) == recoloured(plain, *colour)[:, ::-1]).all()


def test_rendering_keeps_the_area():
    ramp = np.repeat(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 1)), 3, 2)
    data = encoded(ramp, "PNG")
    for view in views(200, 200, 20, min_crop_area=0.81, image_size=50):
        assert np.ptp(render(data, read_header(data), view, 50).astype(int)) >= 200 * 0.81 * (3 / 4) ** 0.5 - 8


def test_render_refuses_what_is_broken():
    data = CASES["jpeg cut in half and ended"][0]
    header = read_header(data)
    with pytest.raises(BadSample, match="corrupt"):
        render(data, header, View((0, 0, 64, 48), False, None), 8)
    with pytest.raises(BadSample, match="corrupt"):
        render_centre(data, header, 8)
    with pytest.raises(BadSample, match=r"corrupt.*48 x 48"):
        decode(CASES["jpeg"][0], Header("jpeg", 48, 48, True))


def test_centre_crop_is_centred():
    picture = Image.new("RGB", (30, 10), "white")
    picture.paste("black", (10, 0, 20, 10))
    data = encoded(picture, "PNG")
    assert (render_centre(data, read_header(data), 10) == 0).all()


@pytest.mark.parametrize(
    "width, height", [(500, 375), (640, 481), (333, 500), (338, 250), (250, 338), (224, 224), (100, 57), (57, 100)]
)
@pytest.mark.parametrize("size", [112, 224])
def test_centre_crop_is_torchvisions(width, height, size):
    """Resize(size, bicubic, antialias) and CenterCrop(size), written out with Pillow."""
    data = encoded(photograph(7, width, height), "JPEG", quality=90)
    short = min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    picture = Image.open(io.BytesIO(data)).resize((wide, high), Image.Resampling.BICUBIC)
    left, top = int(round((wide - size) / 2)), int(round((high - size) / 2))
    want = np.asarray(picture.crop((left, top, left + size, top + size)))
    assert difference(render_centre(data, read_header(data), size), want).mean() <= 0.5


def test_the_centre_of_a_very_long_picture_costs_little():
    pixels = np.zeros((1, 60_001, 3), dtype=np.uint8)
    pixels[0, 30_000] = 200
    for data in (encoded(pixels, "PNG"), encoded(pixels.swapaxes(0, 1), "PNG")):
        centre = render_centre(data, read_header(data), 225)
        assert centre.shape == (225, 225, 3)
        assert centre.min() > 60 and centre[112, 112].tolist() == [200] * 3


# ---- colour


def test_colours_of_1_change_nothing():
    pixels = photograph(1, 33, 21)
    assert (recoloured(pixels, 1, 1, 1) == pixels).all()


def test_recoloured_is_saturation_then_contrast_then_brightness():
    pixels = photograph(1, 33, 21)
    for brightness, contrast, saturation in ((1.3, 0.7, 1.4), (0.6, 1.4, 0.6), (1, 1, 0), (1, 0, 1), (0, 1, 1)):
        luma = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
        wanted = luma + saturation * (pixels - luma)
        wanted = brightness * (128 + contrast * (wanted - 128))
        got = recoloured(pixels, brightness, contrast, saturation)
        assert got.dtype == np.uint8
        assert np.abs(got - np.clip(wanted, 0, 255)).max() <= 1.2
        assert np.abs(got - np.clip(wanted, 0, 255)).mean() <= 0.3


def test_recoloured_is_dalis_color_twist():
    pytest.importorskip("nvidia.dali", reason="DALI comes with lift-fast[dali]")
    from nvidia.dali import fn, pipeline_def

    pixels = [photograph(number, 33, 21) for number in range(8)]
    levels = 1 + 0.4 * (2 * uniform(3, 0, np.arange(8)) - 1).astype(np.float32)

    @pipeline_def(batch_size=8, num_threads=1, device_id=None)
    def twist():
        brightness, contrast, saturation = (
            fn.external_source(source=[list(column)], batch=True) for column in levels.T
        )
        source = fn.external_source(source=[pixels], batch=True, layout="HWC")
        return fn.color_twist(source, brightness=brightness, contrast=contrast, saturation=saturation)

    pipe = twist()
    pipe.build()
    (twisted,) = pipe.run()
    for number, picture in enumerate(pixels):
        off = difference(recoloured(picture, *levels[number].tolist()), np.asarray(twisted[number]))
        assert off.max() <= 1 and off.mean() <= 0.01


def test_normalise():
    pixels = torch.randint(256, (2, 5, 4, 3), dtype=torch.uint8)
    got = normalise(pixels)
    assert got.shape == (2, 3, 5, 4)
    want = (pixels.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    torch.testing.assert_close(got.double(), want.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


# ---- faults that a decoder could miss


@pytest.mark.parametrize("more", [b"Exif\0\0" + b"abc" * 99, b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0", exif(3)])
@pytest.mark.parametrize("orientation", [3, 6])
def test_of_several_exif_blocks_the_first_counts(orientation, more):
    jpeg = encoded(scene(random.Random(0)), "JPEG", quality=95)
    data = insert_segment(insert_segment(jpeg, 0xE1, more), 0xE1, exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert abs(decode(data, read_header(data)).astype(int) - upright).max() <= 1


@pytest.mark.parametrize("interlaced", [0, 1])
def test_a_png_of_too_few_rows(interlaced):
    data = raw_png(4, 3, 8, 2, b"\0\1\2\3" if interlaced else b"\0" + b"\x80" * 12, interlaced=interlaced)
    with pytest.raises(BadSample, match="end .* bytes too early"):
        decode(data, read_header(data))
    data = raw_png(1024, 65_000, 8, 6, b"\0\1\2\3\4", interlaced=interlaced)
    with pytest.raises(BadSample, match="too little data"):
        decode(data, read_header(data))


@pytest.mark.parametrize("progressive", [True, False])
def test_many_scans_of_a_large_jpeg(progressive):
    data = bytearray(encoded(scene(random.Random(0)), "JPEG", progressive=progressive))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[frame + 5 : frame + 9] = struct.pack(">HH", 8000, 8000)
    first = data.find(b"\xff\xda")
    scan = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + bytes(4)
    with pytest.raises(BadSample, match="in 400 scans"):
        read_header(bytes(data[:first]) + scan * 400 + b"\xff\xd9")


def test_a_side_has_its_limit():
    with pytest.raises(BadSample, match="too large: 70000 x 1 pixels"):
        read_header(raw_png(70_000, 1, 8, 0, b""))

"""JPEGs that libjpeg warns of: those with all their pixels decode, to exactly these; those that lost some do not."""

import collections
import io
import random
import time

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from support.damage import (
    frame_of,
    inserted,
    padded_end,
    padded_restarts,
    replaced,
    scan_of,
    with_jfif_version,
    with_scan_parameters,
)
from support.hostile import encoded, exif, insert_segment, scene

from lift_fast.data import dali, images
from lift_fast.data.check import check
from lift_fast.data.host import HostPipeline, load_images
from lift_fast.data.images import BadSample, decode, decode_box, is_regular, read_header
from lift_fast.data.jpeg import padded, repaired
from lift_fast.data.loading import DRAWS, Loading
from lift_fast.data.samples import Collection
from lift_fast.data.shards import Shards, ShardWriter

with_dali = pytest.mark.skipif(not dali.installed(), reason="DALI is not installed")


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Of each clean JPEG its pixels, mode and settings.
SOURCES = {
    "4:2:0": (scene(random.Random(1), 131, 97), "RGB", {}),
    "4:2:2": (scene(random.Random(2), 64, 48), "RGB", {"subsampling": 1}),
    "4:4:4": (scene(random.Random(3), 33, 70), "RGB", {"subsampling": 0}),
    "noise": (noise(80, 50), "RGB", {"quality": 95}),
    "grey": (scene(random.Random(4), 40, 30), "L", {}),
    "cmyk": (scene(random.Random(5), 40, 30), "CMYK", {}),
    "rgb": (scene(random.Random(6), 40, 30), "RGB", {"keep_rgb": True}),
    "optimised": (noise(50, 90), "RGB", {"optimize": True}),
    "progressive": (scene(random.Random(7), 90, 70), "RGB", {"progressive": True}),
    "progressive grey": (scene(random.Random(8), 40, 30), "L", {"progressive": True}),
    "restarts": (scene(random.Random(9), 100, 90), "RGB", {"restart_marker_rows": 1}),
    "restarts every block": (noise(70, 60), "RGB", {"restart_marker_blocks": 1, "subsampling": 1}),
    "progressive restarts": (noise(70, 60), "RGB", {"progressive": True, "restart_marker_rows": 1}),
    "turned": (scene(random.Random(10), 90, 60), "RGB", {"exif": exif(6)}),
    "1 x 1": (noise(1, 1), "RGB", {}),
    "one colour": (np.full((64, 64, 3), (10, 200, 90), np.uint8), "RGB", {}),
}
ZEROS, ONES = bytes(12), b"\xff\0" * 12


def clean(source, **more):
    pixels, mode, settings = SOURCES[source]
    return encoded(Image.fromarray(pixels).convert(mode), "JPEG", **{"quality": 90, **settings, **more})


def between(jpeg, extra):
    """A JPEG with bytes after each of its segments before the first scan's."""
    at = 4 + int.from_bytes(jpeg[4:6], "big")
    out = jpeg[:at]
    while at <= scan_of(jpeg)[0]:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        out += extra + jpeg[at:end]
        at = end
    return out + jpeg[at:]


DEVIATIONS = {
    "scan of zeros": with_scan_parameters,
    "scan of other numbers": lambda jpeg: with_scan_parameters(jpeg, b"\1\x3e\x12"),
    "zeros before the end": lambda jpeg: padded_end(jpeg, ZEROS),
    "ones before the end": lambda jpeg: padded_end(jpeg, ONES),
    "a sector of zeros before the end": lambda jpeg: padded_end(jpeg, bytes(512)),
    "zeros and fill bytes before the end": lambda jpeg: padded_end(jpeg, ZEROS + b"\xff\xff\xff"),
    "zeros before restarts": lambda jpeg: padded_restarts(jpeg, ZEROS),
    "ones before restarts": lambda jpeg: padded_restarts(jpeg, ONES),
    "a byte between segments": lambda jpeg: between(jpeg, b"\0"),
    "bytes between segments": lambda jpeg: between(jpeg, b"xyz"),
    "stuffed bytes between segments": lambda jpeg: between(jpeg, b"\xff\0a"),
    "a short segment": lambda jpeg: jpeg[:2] + b"\xff\xe5\0\6" + bytes(40) + jpeg[2:],
    "a segment that begins with 00": lambda jpeg: inserted(jpeg, frame_of(jpeg), b"\0\xe1\0\x0e<?xpacket   "),
    "jfif 2.01": lambda jpeg: with_jfif_version(jpeg, 2, 1),
    "jfif 0.0": lambda jpeg: with_jfif_version(jpeg, 0, 0),
    "a part of a profile": lambda jpeg: insert_segment(jpeg, 0xE2, b"ICC_PROFILE\0\3\1profile"),
    "a profile that begins at 0": lambda jpeg: insert_segment(jpeg, 0xE2, b"ICC_PROFILE\0\0\1profile"),
    "several": lambda jpeg: padded_end(between(with_jfif_version(with_scan_parameters(jpeg), 2, 1), b"ab"), ZEROS),
}


def applies(deviation, source):
    """Whether a JPEG has what deviates."""
    if deviation in ("scan of zeros", "scan of other numbers", "several") and "progressive" in source:
        return False
    if "jfif" in deviation or deviation == "several":
        return source not in ("cmyk", "rgb")
    return ("restarts" in source and "progressive" not in source) or "restarts" not in deviation


PAIRS = [(d, s) for d in DEVIATIONS for s in SOURCES if applies(d, s)]


def whole(data):
    return decode(data, read_header(data))


def by_pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def strictly(data):
    """What decoded before: the pixels of simplejpeg in its strict mode, or None."""
    try:
        return simplejpeg.decode_jpeg(data, strict=True)
    except ValueError:
        return None


@pytest.mark.parametrize("deviation, source", PAIRS)
def test_a_deviation_leaves_the_pixels_alone(deviation, source):
    """Line 7: these were refused. Equal to the clean JPEG's pixels and to Pillow's of the same bytes, at all scales."""
    original = clean(source)
    data = DEVIATIONS[deviation](original)
    assert data != original and strictly(data) is None
    assert (by_pillow(data) == by_pillow(original)).all()
    header, plain = read_header(data), read_header(original)
    assert (header.width, header.height, header.orientation) == (plain.width, plain.height, plain.orientation)
    pixels = decode(data, header)
    assert np.array_equal(pixels, decode(original, plain))
    if source not in ("cmyk", "turned"):
        assert np.array_equal(pixels, by_pillow(data))
    for size in (1, 5, 20):
        box = (0, 0, header.width, header.height)
        ours, theirs = decode_box(data, header, box, size), decode_box(original, plain, box, size)
        assert np.array_equal(ours[0], theirs[0]) and ours[1] == theirs[1]
    # Other decoders may read it differently: it is not given to DALI.
    assert not (header.plain and is_regular(data, header))
    assert header.plain is False or padded(data) or "profile" in deviation or deviation == "a short segment"


def test_clean_jpegs_are_not_looked_at_twice(monkeypatch):
    def looked(data):
        raise AssertionError("looked for deviations")

    monkeypatch.setattr(images, "repaired", looked)
    for source in SOURCES:
        header = read_header(clean(source))
        assert not header.deviates
        decode(clean(source), header)
        assert is_regular(clean(source), header)


@pytest.mark.parametrize("source", [s for s in SOURCES if "progressive" not in s])
def test_a_repaired_jpeg_needs_no_repair(source):
    better = repaired(DEVIATIONS["zeros before the end"](with_scan_parameters(clean(source))))
    assert better is not None and strictly(better) is not None
    assert repaired(better) == better


def test_padding_of_pixels_that_end_in_zeros():
    """Some of these end in a byte of zeros, which is no padding, before restart markers and before the end."""
    ends = collections.Counter()
    for number in range(200):
        pixels = np.full((32, 48, 3), 128, np.uint8)
        pixels[:, :40] = noise(40, 32, number)
        for settings in ({}, {"restart_marker_rows": 1}, {"restart_marker_blocks": 2}):
            original = encoded(pixels, "JPEG", **settings)
            data = padded_end(padded_restarts(original, ZEROS), ZEROS)
            assert np.array_equal(whole(data), whole(original))
            ends[original[-3] == 0] += 1
    assert ends[True] >= 8, ends


def test_the_orientation_survives_a_length_that_is_too_small():
    original = encoded(scene(random.Random(0)), "JPEG", exif=exif(6))
    at = original.find(b"\xff\xe1")
    for length in (8, 12, 20, 30):
        data = replaced(original, at + 2, length.to_bytes(2, "big"))
        assert read_header(data).orientation == 6
        assert np.array_equal(whole(data), whole(original))


# ---- what is refused as before

HARMFUL = {
    "cut and ended": lambda jpeg: jpeg[: (2 * scan_of(jpeg)[1] + len(jpeg)) // 3] + b"\xff\xd9",
    "without its end": lambda jpeg: jpeg[:-2],
    "a hole": lambda jpeg: jpeg[: scan_of(jpeg)[1] + 40] + jpeg[-60:],
    "its rest as zeros": lambda jpeg: jpeg[: len(jpeg) - 200] + bytes(198) + jpeg[-2:],
    "its rest as ones": lambda jpeg: jpeg[: len(jpeg) - 200] + b"\xff\0" * 99 + jpeg[-2:],
    "bytes left over": lambda jpeg: padded_end(jpeg, bytes(range(1, 40))),
    "one strange byte in the padding": lambda jpeg: padded_end(jpeg, bytes(20) + b"a" + bytes(20)),
}


@pytest.mark.parametrize("source", ["noise", "optimised", "restarts every block", "progressive restarts"])
@pytest.mark.parametrize("harm", HARMFUL)
@pytest.mark.parametrize("harmless", [None, *DEVIATIONS])
def test_a_harmless_warning_hides_no_harmful_one(harmless, harm, source):
    if harmless is not None and not applies(harmless, source):
        return
    original = clean(source)
    data = HARMFUL[harm](DEVIATIONS[harmless](original) if harmless else original)
    if "before the end" in (harmless or "") and harm in ("its rest as zeros", "its rest as ones", "a hole"):
        data = DEVIATIONS[harmless](HARMFUL[harm](original))
    with pytest.raises(BadSample, match="corrupt|truncated"):
        whole(data)
    with pytest.raises(BadSample, match="corrupt|truncated"):
        decode_box(data, read_header(data), (0, 0, *original_size(source)), 4)


def original_size(source):
    height, width = SOURCES[source][0].shape[:2]
    return width, height


@pytest.mark.parametrize("wrong", ["out of order", "missing"])
def test_restart_markers_that_do_not_fit(wrong):
    original = padded_restarts(clean("restarts every block"), ZEROS)
    at = original.find(b"\xff\xd3")
    data = replaced(original, at + 1, b"\xd5") if wrong == "out of order" else original[:at] + original[at + 2 :]
    with pytest.raises(BadSample, match="corrupt"):
        whole(data)


@pytest.mark.parametrize("extra", [b"ab" * 6, bytes(9) + b"\1", b"\xff\0\1" * 4, bytes(range(1, 100))])
def test_other_bytes_after_pixels_are_taken_for_damage(extra):
    for data in (padded_end(clean("noise"), extra), padded_restarts(clean("restarts"), extra)):
        with pytest.raises(BadSample, match="corrupt: .* extraneous bytes before marker"):
            whole(data)


def test_zeros_that_may_be_blocks_are_padding_after_a_byte_that_is_filled():
    """With tables in which zero bits are blocks without detail, the end of a scan that got out of step looks alike."""
    found = collections.Counter()
    for quality in range(10, 96):
        pixels = np.full((160, 64, 3), 255, np.uint8)
        pixels[:16] = scene(random.Random(1), 64, 16)
        original = encoded(pixels, "JPEG", quality=quality, optimize=True)
        assert original[-11:-3] == bytes(8)
        found[original[-3] & 1] += 1
        for padding in (ZEROS, ONES):
            data = padded_end(original, padding)
            if original[-3] & 1 or padding is ONES:
                assert np.array_equal(whole(data), whole(original))
            else:
                with pytest.raises(BadSample, match="extraneous bytes"):
                    whole(data)
    assert found[0] and found[1], found


def test_padding_within_progressive_jpegs():
    """Where a scan's pixels end like the padding, the two are not told apart; no other pixels come of it."""
    exact = 0
    for number in range(60):
        original = encoded(noise(40, 30, number), "JPEG", progressive=True, restart_marker_blocks=1 + number % 9)
        for padding in (ZEROS, ONES):
            try:
                assert np.array_equal(whole(padded_restarts(original, padding)), whole(original))
                exact += 1
            except BadSample:
                continue
    assert exact > 20


def test_the_parameters_of_a_scan_have_a_narrow_rule():
    """libjpeg-turbo's issue 778: a file with this warning decodes to wrong colours. Outside of baseline frames of one
    scan with all components the parameters mean something."""
    original = with_scan_parameters(clean("4:2:0"))
    scan = scan_of(original)[0]
    swapped = replaced(original, scan + 5, original[scan + 7 : scan + 9] + original[scan + 5 : scan + 7])
    cases = {
        "extended": replaced(original, frame_of(original) + 1, b"\xc1"),
        "progressive": with_scan_parameters(clean("progressive")),
        "progressive, called baseline": replaced(clean("progressive"), frame_of(clean("progressive")) + 1, b"\xc0"),
        "components in another order": swapped,
        "two scans": original[:-2] + original[scan:],
    }
    for data in cases.values():
        with pytest.raises(BadSample, match="corrupt"):
            whole(data)


def test_a_lost_segment_is_not_taken_for_bytes_between():
    """Of a segment whose first byte is damaged, or that the one before swallows in part, the rest looks like bytes
    between segments; without it the pixels would be others."""
    ycck = clean("cmyk")
    ycck = replaced(ycck, ycck.find(b"Adobe") + 11, b"\2")
    for original, marker in (
        (ycck, 0xEE),
        (clean("turned"), 0xE1),
        (clean("optimised"), 0xC4),
        (clean("optimised"), 0xDB),
        (clean("restarts"), 0xDD),
    ):
        at = original.find(bytes((0xFF, marker)))
        while 0 <= at < scan_of(original)[0]:
            with pytest.raises(BadSample, match="corrupt|not a picture"):
                whole(replaced(original, at, b"\x7f"))
            at = original.find(bytes((0xFF, marker)), at + 2)
    at = ycck.find(b"\xff\xee")
    before = ycck[:at] + b"\xff\xfe\0\x0acomment\0" + ycck[at:]
    assert np.array_equal(whole(before), whole(ycck))
    with pytest.raises(BadSample, match="corrupt"):
        whole(replaced(before, at + 3, b"\x10"))


def test_what_a_transfer_as_text_leaves_is_refused():
    """CR LF in place of LF: a table grows, and its end looks like bytes between segments."""
    original, frame = clean("noise"), frame_of(clean("noise"))
    original = replaced(original, original.find(b"\xff\xdb") + 20, b"\n")
    assert decode(original, read_header(original)).any()
    damaged = original[:frame].replace(b"\n", b"\r\n") + original[frame:]
    assert len(damaged) > len(original)
    with pytest.raises(BadSample, match="corrupt"):
        whole(damaged)


def test_an_unknown_transform_of_colours():
    """Adobe's byte for it has three values. Chroma that is subsampled is no RGB, so it is YCbCr, as libjpeg assumes."""
    for subsampling, kept in ((2, True), (1, True), (0, False)):
        jfif = clean("noise", subsampling=subsampling)
        without = jfif[:2] + jfif[20:]
        original = insert_segment(without, 0xEE, b"Adobe\0\x64\0\0\0\0\1")
        assert np.array_equal(whole(original), whole(jfif))
        data = insert_segment(without, 0xEE, b"Adobe\0\x64\0\0\0\0\x07")
        assert strictly(data) is None
        if kept:
            assert np.array_equal(whole(data), whole(jfif))
        else:
            with pytest.raises(BadSample, match="Unknown Adobe color transform"):
                whole(data)


@pytest.mark.parametrize(
    "filler", [b"\0", b"\xff", b"\xff\0", b"\xff\xd0", b"\0\0\xff\xd0", b"\xff\xda\0\x08\1\1\0\0\x3f\0"]
)
def test_a_large_strange_jpeg_takes_no_longer_than_its_bytes(filler):
    original = with_scan_parameters(clean("4:2:0"))
    data = inserted(original, scan_of(original)[1] + 20, filler * ((4 << 20) // len(filler)))
    began = time.perf_counter()
    with pytest.raises(BadSample):
        whole(data)
    assert time.perf_counter() - began < 5


# ---- damage at random


def small(rng):
    """A small JPEG of a random kind: its size, content, coding and segments."""
    width, height = rng.randint(8, 64), rng.randint(8, 64)
    pixels = scene(rng, width, height)
    match rng.randrange(5):
        case 0:
            pixels = noise(width, height, rng.randrange(1 << 30))
        case 1:
            pixels[:] = rng.randrange(256)
        case 2:
            pixels[height // 3 :] = rng.choice((0, 255, 200))
        case 3:
            pixels[:, : width // 2] = 255
    mode = rng.choice(("RGB", "RGB", "RGB", "L", "CMYK"))
    settings = {"quality": rng.choice((30, 75, 92)), "optimize": rng.random() < 0.5, "progressive": rng.random() < 0.3}
    if mode == "RGB":
        settings |= rng.choice(({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"keep_rgb": True}))
    if rng.random() < 0.3:
        settings[rng.choice(("restart_marker_rows", "restart_marker_blocks"))] = rng.randint(1, 3)
    if rng.random() < 0.3:
        settings["exif"] = exif(rng.randint(1, 8))
    if rng.random() < 0.2:
        settings["icc_profile"] = rng.randbytes(300)
    if rng.random() < 0.2:
        settings["comment"] = b"a comment"
    data = encoded(Image.fromarray(pixels).convert(mode), "JPEG", **settings)
    # Cameras write no JFIF segment.
    return data[:2] + data[20:] if data[3] == 0xE0 and rng.random() < 0.2 else data


def test_damage_to_a_byte_never_gives_other_pixels_than_before():
    """2 000 JPEGs, 10 single damaged bytes each: what decodes has exactly the pixels of the undamaged JPEG, or libjpeg
    does not warn of it, so that it decoded before, to the same pixels."""
    rng = random.Random(0)
    found = collections.Counter()
    for _ in range(2000):
        original = small(rng)
        wanted, scan = whole(original), scan_of(original)[1]
        for _ in range(10):
            first, last = rng.choice(((2, len(original)), (2, scan + 20), (len(original) - 20, len(original))))
            at = rng.randrange(first, min(last, len(original)))
            byte = rng.choice((original[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
            damaged = replaced(original, at, bytes((byte,)))
            try:
                header = read_header(damaged)
                pixels = decode(damaged, header)
            except BadSample:
                found["refused"] += 1
                continue
            if is_regular(damaged, header):
                found["as before"] += 1
                continue
            found["without a deviation"] += 1
            assert np.array_equal(pixels, wanted), (at, byte, original)
    assert found["refused"] > 5000 and found["without a deviation"] > 100, found


# ---- pipelines, checks and evaluation agree


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A tar of clean JPEGs, each followed by the same with a deviation, and at the end some that are damaged."""
    folder = tmp_path_factory.mktemp("deviations") / "data"
    pictures = []
    for deviation, source in PAIRS[::3]:
        pictures += [clean(source), DEVIATIONS[deviation](clean(source))]
    pictures += [HARMFUL[harm](with_scan_parameters(clean("noise"))) for harm in HARMFUL]
    with ShardWriter(folder) as writer:
        for number, picture in enumerate(pictures):
            writer.write(f"{number:04d}", picture, f"caption {number}", {}, "jpg")
    return Shards(folder)


def test_check_evaluation_and_training_agree(shards):
    good = len(shards) - len(HARMFUL)
    report = check(shards.folder, progress=False)
    assert report["bad"] == len(HARMFUL) and set(report["causes"]) == {"corrupt", "truncated"}
    pixels, samples, causes = load_images(shards, 24)
    assert samples == list(range(good)) and causes == report["causes"]
    assert torch.equal(pixels[::2], pixels[1::2])
    pipeline = HostPipeline(Collection([shards]), Loading(good, 24, min_crop_area=1.0, max_skipped=1.0))
    batches = iter(pipeline)
    assert sorted(next(batches).rows.tolist()) == list(range(good))
    batches.close()
    assert set(pipeline.skipped.causes) <= set(report["causes"])


@with_dali
@pytest.mark.parametrize("checked", [False, True])
def test_dali_gets_no_jpeg_that_deviates(shards, checked):
    good = range(len(shards) - len(HARMFUL))
    loading = Loading(len(good), 24, max_skipped=1.0, checked=checked)
    pipeline = dali.DaliPipeline(Collection([shards]), loading)
    for row in good:
        job = pipeline._job(row, np.full(DRAWS, 0.5))
        data = shards.image_bytes(row)
        header = read_header(data)
        # DALI ignores broken profiles; all else that deviates the host renders.
        if job.encoded.tobytes() == data:
            assert header.plain and (is_regular(data, header) or b"ICC_PROFILE" in data)
            assert row % 2 == 0 or checked
        else:
            assert job.by_host
    host = iter(HostPipeline(Collection([shards]), loading))
    batches = iter(pipeline)
    ours, theirs = next(batches), next(host)
    batches.close()
    host.close()
    if not checked:
        assert sorted(ours.rows.tolist()) == list(good) and torch.equal(ours.rows, theirs.rows)
        assert (ours.pixels.int() - theirs.pixels.int()).abs().double().mean() < 8


@with_dali
def test_dalis_evaluation_agrees(shards):
    pixels, samples, causes = dali.load_images(shards, 24)
    host = load_images(shards, 24)
    assert samples == host.samples and causes == host.causes
    assert (pixels.int() - host.pixels.int()).abs().double().mean(dim=(1, 2, 3)).max() < 2

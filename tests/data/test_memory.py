"""The memory that decoding takes: bounded for all threads together, and as much as headers say."""

import io
import os
import random
import threading
import time

import numpy as np
import pytest
from PIL import Image
from support.hostile import encoded, raw_png
from support.judged import judged

from lift_fast.data import images, memory
from lift_fast.data.check import check
from lift_fast.data.images import BadSample, decode, memory_for, read_header
from lift_fast.data.memory import Budget
from lift_fast.data.transforms import render_centre

MIB = 1 << 20


class Counted(Budget):
    """Keeps the most that was taken at once."""

    def __init__(self, most):
        super().__init__(most)
        self.now = self.peak = 0
        self.mine = threading.Lock()

    def _take(self, part):
        super()._take(part)
        with self.mine:
            self.now += part
            self.peak = max(self.peak, self.now)

    def _give(self, part):
        with self.mine:
            self.now -= part
        super()._give(part)


def in_threads(count, work):
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_threads_take_no_more_than_there_is():
    budget = Counted(100)

    def work(number):
        rng = random.Random(number)
        for _ in range(100):
            with budget.taken(rng.choice([1, 30, 60, 100, 500])), budget.taken(1000):
                if rng.random() < 0.1:
                    time.sleep(0.0001)

    in_threads(16, work)
    assert 60 <= budget.peak <= 100 and budget.now == 0 and budget._free == 100


def test_the_first_that_asks_is_the_first_that_gets():
    """A large part does not wait for ever while small ones come and go."""
    budget, order = Budget(100), []

    def large(_):
        with budget.taken(100):
            order.append("large")

    def small(_):
        with budget.taken(10):
            order.append("small")

    with budget.taken(50):
        threads = []
        for work, waiting in (large, 1), (small, 2):
            threads.append(threading.Thread(target=work, args=(0,)))
            threads[-1].start()
            while len(budget._waiting) < waiting:
                time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    assert order == ["large", "small"]


def test_an_error_gives_back_what_was_taken(monkeypatch):
    budget = Budget(100)
    for _ in range(3):
        with pytest.raises(ValueError), budget.taken(70):
            raise ValueError
    assert budget._free == 100

    def interrupt(event, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Event, "wait", interrupt)
    budget._take(70)
    with pytest.raises(KeyboardInterrupt), budget.taken(50):
        raise AssertionError
    assert budget._free == 30 and not budget._waiting
    budget._give(70)
    assert budget._free == 100


def test_a_forked_process_has_all_of_it():
    taken, done = threading.Event(), threading.Event()

    def hold():
        with memory.DECODING.taken(memory.DECODING.most):
            taken.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(30)
    try:
        child = os.fork()
        if not child:
            with memory.DECODING.taken(memory.DECODING.most):
                os._exit(0)
        until = time.monotonic() + 30
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
            time.sleep(0.001)
        assert ended == (child, 0)
    finally:
        done.set()
        thread.join()


def noise(mode, width, height):
    """An image of noise in its first rows; the rest packs well."""
    pixels = np.zeros((height, width, {"L": 1, "P": 1, "I;16": 1}.get(mode, len(mode))), np.uint8)
    pixels[:8] = np.frombuffer(random.Random(0).randbytes(pixels[:8].size), np.uint8).reshape(pixels[:8].shape)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
    image = Image.fromarray(pixels.squeeze(), "L" if mode == "P" else mode)
    if mode == "P":
        image = image.quantize(8)
    return image


LARGE = {
    "png": ("RGB", "PNG", {}),
    "png with alpha": ("RGBA", "PNG", {}),
    "png grey with alpha": ("LA", "PNG", {}),
    "png 16 bit grey": ("I;16", "PNG", {}),
    "png palette with a clear colour": ("P", "PNG", {"transparency": 3}),
    "gif with a clear colour": ("P", "GIF", {"transparency": 3}),
    "bmp": ("RGB", "BMP", {}),
    "webp": ("RGB", "WEBP", {"lossless": True, "quality": 0, "method": 0}),
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg grey progressive": ("L", "JPEG", {"progressive": True}),
    "jpeg progressive 4:4:4": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "jpeg progressive 4:2:0": ("RGB", "JPEG", {"progressive": True, "subsampling": 2}),
    "jpeg cmyk progressive": ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
}


@pytest.mark.parametrize("kind", LARGE)
def test_decoding_takes_the_memory_that_the_header_says(kind):
    mode, form, settings = LARGE[kind]
    data = encoded(noise(mode, 4096, 1500), form, **settings)  # more than one strip

    def work():
        assert decode(data, header).shape == (1500, 4096, 3)

    header = read_header(data)
    decode(encoded(noise(mode, 16, 16), form, **settings), read_header(encoded(noise(mode, 16, 16), form, **settings)))
    slack = len(data) + 8 * MIB
    assert judged(work, most=header.memory() + slack).outcome == "right answer"
    if form == "JPEG":
        with memory_for(header, (0, 0, 1024, 1024), 128):
            assert header.memory(8) <= header.memory() and images._factor(header, (0, 0, 1024, 1024), 128) == 8


@pytest.mark.parametrize("kind", [kind for kind in LARGE if "jpeg" not in kind and kind != "webp"])
def test_strips_make_the_same_pixels(kind, monkeypatch):
    mode, form, settings = LARGE[kind]
    data = encoded(noise(mode, 61, 100), form, **settings)
    whole = decode(data, read_header(data))
    monkeypatch.setattr(images, "_STRIP", 61 * 7)
    np.testing.assert_array_equal(decode(data, read_header(data)), whole)


def test_images_that_take_too_much_are_too_large():
    webp = bytearray(encoded(noise("RGB", 16, 16), "WEBP", lossless=True))
    webp[21:25] = (16382 | 4095 << 14).to_bytes(4, "little")  # 40 bytes, and 67 million pixels
    with pytest.raises(BadSample, match="16383 x 4096 pixels, which take more than 671088640 bytes") as error:
        read_header(bytes(webp))
    assert error.value.cause == "too large"
    webp[21:25] = (8191 | 4095 << 14).to_bytes(4, "little")
    assert read_header(bytes(webp)).width == 8192


def test_check_on_many_threads_stays_within_the_budget(tmp_path, monkeypatch):
    """The same on large images is in the campaign below."""
    side = 600
    png = raw_png(side, side, 8, 2, b"".join(b"\0" + bytes(3 * side - 1) + b"\1" for _ in range(side)))
    for number in range(24):
        (tmp_path / f"{number}.png").write_bytes(png)
        (tmp_path / f"{number}.txt").write_bytes(b"a")
    budget = Counted(3 * read_header(png).memory())
    monkeypatch.setattr(images, "DECODING", budget)
    assert check(tmp_path, threads=16, progress=False)["bad"] == 0
    assert budget.peak <= budget.most and budget.now == 0
    in_threads(8, lambda _: render_centre(png, read_header(png), 32))
    assert budget.peak <= budget.most and budget.now == 0


@pytest.mark.campaign
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_check_of_image_bombs_on_32_threads(tmp_path, mode):
    """A PNG of 200 kB with 67 million pixels took 1.4 GB, and each thread decoded one."""
    bomb = io.BytesIO()
    Image.new(mode, (65_535, 1024), "white").save(bomb, "PNG")
    (tmp_path / "0.png").write_bytes(bomb.getvalue())
    for number in range(1, 4):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    for number in range(4):
        (tmp_path / f"{number}.txt").write_bytes(b"a")
    # Of 1 GB, this process has some before.
    found = judged(lambda: check(tmp_path, threads=32, progress=False)["bad"], seconds=300, most=700 * MIB)
    assert found.value == 0

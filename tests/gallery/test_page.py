"""The gallery's page in a real browser, headless: types, clicks, drops, reads, and compares with lift_fast.load."""

import base64
import http.server
import io
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_gallery import MARKUP, PLAIN, make_demo, make_library, served

import lift_fast
from lift_fast.gallery.library import CAPTIONS, IMAGES
from lift_fast.inference import Model
from lift_fast.sugarcrepe import TASKS

selenium = pytest.importorskip("selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,900"
SENTENCE = "a red circle above two blue stars"
SECONDS = 30.0

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its chromedriver is installed")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.fixture(scope="module")
def models(demo):
    return {name: lift_fast.load(demo / name, device="cpu") for name in ("lift", "clip")}


@pytest.fixture(scope="module")
def server(demo):
    with served(make_library(demo)) as server:
        yield server


@pytest.fixture(scope="module")
def images_of(models, server):
    """Model -> the features of all images, which it computes itself."""
    library = server.library
    images = [library.image(number)[0] for number in range(len(library))]
    return {name: model.encode_image(images) for name, model in models.items()}


@pytest.fixture(scope="module")
def captions_of(models, server):
    return {name: model.encode_text(server.library.captions) for name, model in models.items()}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a user has it before them."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get("about:blank")
        driver.get_log("browser")
        driver.get(url)
        self.wait(lambda: self.all("#results .tile"))

    def all(self, selector, within=None):
        return (within or self.driver).find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector, within=None):
        return (within or self.driver).find_element(By.CSS_SELECTOR, selector)

    def script(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition):
        """Until condition() is true and nothing is being asked."""
        ends = time.monotonic() + SECONDS
        while not (condition() and not self.script("return document.body.hasAttribute('aria-busy')")):
            assert time.monotonic() < ends, self.one("body").text
            time.sleep(0.03)

    def type(self, text):
        field = self.one("#text")
        field.clear()
        field.send_keys(text + Keys.ENTER)
        self.wait(lambda: f"“{text}”" in self.status)

    @property
    def status(self):
        return self.one("#status").text

    def ranked(self, model):
        """[(number of the image, score as shown)] of a model, in order."""
        tiles = self.script(
            "return [...document.querySelectorAll(arguments[0])].map(tile => "
            "[Number(tile.dataset.number), tile.querySelector('.score').innerText])",
            f"article[aria-label='{model}'] .tile",
        )
        return [(number, score) for number, score in tiles]

    def row(self, name):
        return self.one(f"#sample button[data-row='{name}']")

    def cells(self, name):
        """{model: {side: score as shown}}, {model: the side that it prefers} of a row of the chosen image."""
        scores, prefers = {}, {}
        for cell in self.all(".cell", self.one(f".row:has(button[data-row='{name}'])")):
            model = cell.get_attribute("data-model")
            scores[model] = {
                side: self.one(".score", line).text
                for side in ("caption", "foil")
                for line in self.all(f".line.{side}", cell)
            }
            preferred = self.all(".preferred .side-name", cell)
            prefers[model] = preferred[0].text.split()[0] if preferred else None
        return scores, prefers


@pytest.fixture
def page(driver, server):
    page = Page(driver, server.url)
    yield page
    assert driver.get_log("browser") == []


def ranking(images_of, feature_of):
    """Model -> [(number, score)] of the images that are shown. feature_of: name of a model -> the query's feature."""
    found = {}
    for name, images in images_of.items():
        values, numbers = Model.similarity(feature_of(name), images)[0].sort(descending=True)
        found[name] = list(zip(numbers.tolist(), values.tolist(), strict=True))[:IMAGES]
    return found


def assert_shown(shown, expected):
    """As ranked, up to scores that look the same and may be in any order."""
    assert len(shown) == len(expected)
    scores = dict(expected)
    for (number, score), (_, value) in zip(shown, expected, strict=True):
        assert float(score) == pytest.approx(value, abs=6e-4)
        assert number not in scores or float(score) == pytest.approx(scores[number], abs=6e-4)
    assert len({number for number, _ in shown} & set(scores)) >= len(expected) - 1


def test_types_and_reads(page, models, images_of):
    assert page.one("h1").text == "lift-fast gallery"
    assert "9 images of plain (2 left out), 30 images of scenes, as seen by lift and clip" in page.one("#about").text
    page.type(SENTENCE)
    for name, expected in ranking(images_of, lambda name: models[name].encode_text(SENTENCE)).items():
        assert_shown(page.ranked(name), expected)
    assert "39 images ranked" in page.status
    page.wait(lambda: page.script("return [...document.images].filter(i => i.complete && i.naturalWidth).length > 20"))


def test_an_example_and_the_way_back(page, server):
    example = page.all("#examples button")[2].text
    assert example in server.library.captions
    page.all("#examples button")[2].click()
    page.wait(lambda: f"“{example}”" in page.status)
    assert page.one("#text").get_attribute("value") == example
    first = page.ranked("lift")
    page.type(SENTENCE)
    assert page.ranked("lift") != first
    page.driver.back()
    page.wait(lambda: f"“{example}”" in page.status)
    assert page.ranked("lift") == first
    page.driver.back()
    page.wait(lambda: page.one("#examples").is_displayed())
    assert page.one("#text").get_attribute("value") == ""
    page.driver.forward()
    page.wait(lambda: f"“{example}”" in page.status)
    page.driver.refresh()
    page.wait(lambda: page.all("#results .score") and page.ranked("lift") == first)


def test_clicks_an_image_and_a_foil(page, models, images_of, server):
    caption = server.library.items[PLAIN + 4].caption
    page.type(caption)
    page.driver.get(f"{server.url}#image={PLAIN + 4}")
    page.wait(lambda: page.one("#sample").is_displayed())
    page.type(caption)
    sample = server.library.sample(PLAIN + 4)
    image = {name: model.encode_image(server.library.image(PLAIN + 4)[0]) for name, model in models.items()}

    def score(name, text):
        return models[name].similarity(image[name], models[name].encode_text(text)).item()

    assert page.one(".words", page.row("caption")).text == caption
    assert len(page.all("#sample button[data-row]")) == 1 + len(TASKS)
    for index, foil in enumerate(sample["foils"]):
        scores, prefers = page.cells(index)
        for name in models:
            caption_score, foil_score = score(name, foil["caption"]), score(name, foil["foil"])
            assert float(scores[name]["caption"]) == pytest.approx(caption_score, abs=6e-4)
            assert float(scores[name]["foil"]) == pytest.approx(foil_score, abs=6e-4)
            if abs(caption_score - foil_score) > 1e-5:
                assert prefers[name] == ("caption" if caption_score > foil_score else "foil")

    before = {name: page.ranked(name) for name in models}
    index = next(i for i, foil in enumerate(sample["foils"]) if foil["task"] == "swap_att")
    foil = sample["foils"][index]
    assert "attributes swapped" in page.row(index).text and foil["caption"] in page.row(index).text
    page.row(index).click()
    page.wait(lambda: f"“{foil['foil']}”" in page.status)
    assert foil["foil"] in page.row(index).text and page.one(".tag", page.row(index)).text == "foil"
    assert page.row(index).get_attribute("aria-pressed") == "true"
    assert page.driver.switch_to.active_element == page.row(index)
    assert page.one("#text").get_attribute("value") == foil["foil"]
    words = [mark.text for mark in page.all("mark", page.row(index))]
    assert words and all(word in foil["foil"].split() for word in words)
    for name, expected in ranking(images_of, lambda name: models[name].encode_text(foil["foil"])).items():
        assert_shown(page.ranked(name), expected)
        shown = page.one(f"article[aria-label='{name}'] .rank").text
        rank = server.library.search_text(foil["foil"], PLAIN + 4)["models"][list(models).index(name)]["image"]["rank"]
        said, _, value = shown.partition(" · ")
        assert said.endswith(f"rank {rank} of 39")
        assert float(value) == pytest.approx(score(name, foil["foil"]), abs=6e-4)

    page.row(index).click()
    page.wait(lambda: f"“{foil['caption']}”" in page.status)
    assert page.one(".tag", page.row(index)).text == "caption"
    if foil["caption"] == caption:
        assert {name: page.ranked(name) for name in models} == before


def test_clicks_a_result(page, server):
    page.type(SENTENCE)
    tile = page.all("article[aria-label='clip'] .tile")[3]
    number = int(tile.get_attribute("data-number"))
    tile.click()
    page.wait(lambda: page.one("#sample").is_displayed())
    item = server.library.items[number]
    assert f"{item.set}, image {number}" in page.one("#sample").text
    current = page.all(".tile[aria-current]")
    assert current and {each.get_attribute("data-number") for each in current} == {str(number)}
    page.one("#sample .close").click()
    page.wait(lambda: not page.one("#sample").is_displayed())
    page.wait(lambda: page.driver.switch_to.active_element.get_attribute("data-number") == str(number))


DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], arguments[1], { type: arguments[2] }));
const target = document.querySelector("#results");
if (arguments[3] === "paste") {
  target.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
} else {
  for (const kind of arguments[3].split(" ")) {
    target.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}
"""


def photo() -> bytes:
    y, x = np.mgrid[0:150, 0:200]
    pixels = np.stack([x, 255 - y, (x * y) % 256], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def give(page, image, way, name="photo.jpg", kind="image/jpeg"):
    page.script(DROP, base64.b64encode(image).decode(), name, kind, way)


@pytest.mark.parametrize("way", ["dragenter dragover drop", "paste", "file", "drop without a type"])
def test_drops_an_image(page, models, images_of, captions_of, server, way, tmp_path):
    image = photo()
    if way == "file":
        (tmp_path / "photo.jpg").write_bytes(image)
        page.one("#file").send_keys(str(tmp_path / "photo.jpg"))
    elif way == "drop without a type":
        give(page, image, "drop", "photo", "")
    else:
        give(page, image, way)
    page.wait(lambda: "ranked for this image" in page.status)
    assert not page.one("#drop").is_displayed() and page.one("#preview").is_displayed()
    for name, expected in ranking(images_of, lambda name: models[name].encode_image(image)).items():
        assert_shown(page.ranked(name), expected)
        buttons = page.all(f"article[aria-label='{name}'] .captions button")
        assert len(buttons) == CAPTIONS
        captions = server.library.captions
        scores = Model.similarity(models[name].encode_image(image), captions_of[name])[0]
        best = scores.sort(descending=True).values[:CAPTIONS].tolist()
        for button, value in zip(buttons, best, strict=True):
            assert float(page.one(".score", button).text) == pytest.approx(value, abs=6e-4)
            score = scores[captions.index(page.one("span", button).text)].item()
            assert score == pytest.approx(value, abs=1e-4)


def test_from_an_image_to_a_caption_and_back_to_images(page, server):
    give(page, photo(), "drop")
    page.wait(lambda: "ranked for this image" in page.status)
    button = page.one(".captions button")
    caption = page.one("span", button).text
    button.click()
    page.wait(lambda: f"“{caption}”" in page.status)
    assert not page.one("#preview").is_displayed() and not page.all(".captions")
    page.one(".tile").click()
    page.wait(lambda: page.one("#sample").is_displayed())
    number = page.script("return document.querySelector('.tile[aria-current]').dataset.number")
    next(button for button in page.all("#sample .side button")).click()
    page.wait(lambda: "ranked for this image" in page.status)
    assert page.ranked("lift")[0] == (int(number), "1.000") == page.ranked("clip")[0]
    assert not page.one("#sample").is_displayed()


def test_images_that_are_refused(page):
    give(page, b"no image", "drop", kind="image/png")
    page.wait(lambda: "cannot be read" in page.status)
    file = io.BytesIO()
    Image.new("1", (10_000, 5000)).save(file, "PNG")
    give(page, file.getvalue(), "drop", kind="image/png")
    page.wait(lambda: "10000 x 5000 pixels; 16 million are taken at most" in page.status)
    assert "failed" in page.one("#status").get_attribute("class")
    page.script("searchImage(new Blob([new Uint8Array(20000001)]))")
    page.wait(lambda: "20.0 MB" in page.status)
    page.type(SENTENCE)
    assert "failed" not in page.one("#status").get_attribute("class")
    logged = page.driver.get_log("browser")  # one line for each answer that was no success
    assert len(logged) == 2 and all("api/image" in line["message"] for line in logged)


def test_keys(page):
    """No pointer is needed."""

    def press(key):
        webdriver.ActionChains(page.driver).send_keys(key).perform()
        return page.driver.switch_to.active_element.get_attribute("data-number")

    page.type(SENTENCE)
    page.script("document.activeElement.blur()")
    press("/")
    assert page.driver.switch_to.active_element == page.one("#text")
    order = [number for number, _ in page.ranked("lift")]
    tabs = [press(Keys.TAB) for _ in range(3)]  # search, image, and the first image that was found
    assert tabs == [None, None, str(order[0])]
    assert [press(key) for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)] == [
        str(order[place]) for place in (1, 2, 1)
    ]
    assert int(press(Keys.ARROW_DOWN)) in order[2:] and press(Keys.ARROW_UP) == str(order[1])
    press(Keys.ENTER)
    page.wait(lambda: page.one("#sample").is_displayed())
    press(Keys.ESCAPE)
    page.wait(lambda: not page.one("#sample").is_displayed())
    page.wait(lambda: page.driver.switch_to.active_element.get_attribute("data-number") == str(order[1]))


def test_texts_are_never_markup(page, server):
    page.type(MARKUP)
    page.driver.get(f"{server.url}#image=0")
    page.wait(lambda: page.one("#sample").is_displayed())
    page.type(MARKUP)
    assert page.one(".words", page.row("caption")).get_attribute("textContent").strip() == MARKUP
    assert MARKUP in page.status
    assert not page.all("#sample b, #results b:not(.rank b), img[src='x']")
    assert page.one("#sample .side img").get_attribute("alt") == MARKUP


@pytest.mark.parametrize("address", ["#image=99", "#image=-1", "#image=x", "#nonsense=%ff", "#text="])
def test_addresses_of_nothing(page, server, address):
    page.driver.get(server.url + address)
    page.wait(lambda: page.one("#examples").is_displayed())
    assert not page.one("#sample").is_displayed()


@pytest.mark.parametrize("width", [320, 390, 700, 768])
def test_a_phone(page, server, width):
    """Nothing reaches beyond the screen, and the second model begins on it."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.type(SENTENCE)
        clip = page.one("article[aria-label='clip']").rect
        assert clip["y"] < 844
        page.driver.get(f"{server.url}#image={PLAIN + 1}&text={SENTENCE}")
        page.wait(lambda: page.one("#sample").is_displayed())
        assert page.script("return document.documentElement.scrollWidth") <= width
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name(page):
    page.type(SENTENCE)
    page.one(".tile").click()
    page.wait(lambda: page.one("#sample").is_displayed())
    assert len(page.all("button, input")) > 2 * IMAGES
    for control in filter(lambda each: each.is_displayed(), page.all("button, input")):
        assert control.accessible_name.strip(), control.get_attribute("outerHTML")
    assert page.one("#status").get_attribute("role") == "status"


def test_dark_and_light(page):
    colours = []
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        colours.append(page.script("return getComputedStyle(document.body).backgroundColor"))
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    light, dark = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert light > 650 and dark < 120


ATTACK = """
const done = arguments[arguments.length - 1], url = arguments[0], found = [];
const load = (tag, path) => new Promise((resolve) => {
  const element = document.createElement(tag);
  element.onload = () => resolve(`${tag} loaded`);
  element.onerror = () => resolve(`${tag} refused`);
  element.src = url + path;
  document.body.append(element);
});
const ask = (path, options) => fetch(url + path, options).then(() => "answered", () => "refused");
const body = JSON.stringify({ text: "a" });
(async () => {
  found.push(await load("img", "image/1"), await load("script", "gallery.js"));
  found.push(await ask("api/gallery"), await ask("api/sample/1"), await ask("image/1"));
  found.push(await ask("api/text", { method: "POST", body, headers: { "Content-Type": "application/json" } }));
  found.push(await ask("api/text", { method: "POST", body, headers: { "Content-Type": "text/plain" } }));
  found.push(await ask("image/1", { mode: "no-cors" }));
  await ask("api/text", { method: "POST", mode: "no-cors", body }); // the answer cannot be read
  const frame = document.createElement("iframe");
  frame.onload = () => done(found);
  frame.src = url;
  document.body.append(frame);
})();
"""


def test_another_site_in_the_same_browser(driver, server, monkeypatch):
    """A page of another origin gets no image, no answer and no frame, and lets no model compute."""
    driver.get("about:blank")  # what the page before still asks for is answered first
    ends = time.monotonic() + SECONDS
    while server._free._value < server._free._initial_value and time.monotonic() < ends:
        time.sleep(0.05)
    computed = []
    for name in ("search_text", "search_image", "sample", "image"):
        monkeypatch.setattr(server.library, name, lambda *arguments: computed.append(arguments))

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>other</title><body>")

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        for name in ("127.0.0.1", "localhost"):
            driver.get(f"http://{name}:{other.server_port}/")
            driver.set_script_timeout(SECONDS)
            found = driver.execute_async_script(ATTACK, server.url)
            assert found == ["img refused", "script refused", *6 * ["refused"]]
            driver.switch_to.frame(0)
            assert not driver.find_elements(By.ID, "query")
        other.shutdown()
    assert computed == []

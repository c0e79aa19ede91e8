"""The report in a real browser, headless: nothing overflows, is cut or illegible, on wide and narrow screens, in light
and dark mode."""

import copy
import random
import shutil
from pathlib import Path

import pytest
from support.example_reports import MODELS, example_report, with_new_keys

from lift_fast.measure.report import write

selenium = pytest.importorskip("selenium")

from selenium import webdriver  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900"

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with its chromedriver is installed")

IMAGE = (  # two by one pixels
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAYAAAD0In+KAAAAEUlEQVR4nGP4z8DwHwQZYAwAR8oH+Rq28akAAAAASUVORK5CYII="
)
HOSTILE = (
    "</b></bdi></div></main><style>*{width:9999px!important}</style><h1 style='position:fixed;width:9999px'>x",
    "\u202eתמונה של חתול שחור על שולחן לבן \u2066 left to right",
    "word " * 400,
    "x" * 2000,
    "一" * 500,
    "e" + "\u0301" * 300,
)


def hostile(report: dict) -> dict:
    """The report with captions, names and texts that are long or odd."""
    rng = random.Random(0)
    for entry in report["examples"].values():
        for example in entry["images"] + entry["texts"] + entry["worst"]:
            example["caption"] = rng.choice(HOSTILE)
            for model in MODELS:
                if "first" in example.get(model, {}):
                    example[model]["first"] = rng.choice(HOSTILE)
    name = "a-set-with-a-name-of-" + "many_words_" * 8
    for model in MODELS:
        for part in ("retrieval", "first_caption", "zero_shot", "notes"):
            report[model][part][name] = report[model][part].pop("scenes")
        report[model]["composition"][name] = report[model]["composition"].pop("two captions")
        report[model]["notes"][name] = ["note " * 60, "n" * 300]
        report[model]["skipped"][name] = 3
        report[model]["curves"][name] = report[model]["curves"]["openmoji"]
        report[model]["config"]["data"] = ["/a/very/long/path" * 20, "y" * 200]
    report["lift"]["composition"][name]["ties"] = {"swap_obj": 41, "moved": 3}
    report["lift"]["encoder"] = {"name": "an/encoder-" + "with-a-long-name" * 8}
    report["examples"][name] = report["examples"].pop("scenes")
    report["data"][name] = report["data"].pop("scenes")
    report["command"] = "lift-fast report " + "--lift runs/" * 30
    return report


def lone(report: dict, model: str) -> dict:
    """The report of one run."""
    other = next(each for each in MODELS if each != model)
    found = {key: value for key, value in report.items() if key not in (other, "savings", "paper_scale", "published")}
    for entry in found["examples"].values():
        entry["worst"] = [example for example in entry["worst"] if example["model"] == model]
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Reports by name, as files."""
    full = with_new_keys(example_report(random.Random(5)))
    for entry in full["examples"].values():
        for example in entry["images"] + entry["worst"]:
            example["image"] = IMAGE
        for example in entry["texts"]:
            for model in MODELS:
                example[model]["images"] = 3 * [IMAGE]
    reports = {
        "two runs": full,
        "hostile": hostile(copy.deepcopy(full)),
        "one run": lone(copy.deepcopy(full), "lift"),
        "hostile run": lone(hostile(copy.deepcopy(full)), "clip"),
        "empty": {},
    }
    folder = tmp_path_factory.mktemp("pages")
    for name, report in reports.items():
        write(report, folder / name)
    return {name: folder / name / "report.html" for name in reports}


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


FIND = """
const found = {overflow: [], outside: [], cut: [], small: [], faint: [], overlap: [], unloaded: []};
const wide = innerWidth, scrolling = document.scrollingElement;
const name = e => e.tagName + '.' + (e.getAttribute('class') || '') + ' ' + (e.textContent || '').trim().slice(0, 40);
const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
if (scrolling.scrollWidth > wide) found.overflow.push([scrolling.scrollWidth, wide]);
for (const details of document.querySelectorAll('details')) details.open = true;
const inScroll = e => { for (; e; e = e.parentElement) if (scrolls(e)) return true; return false; };
for (const e of document.body.querySelectorAll('*')) {
  const box = e.getBoundingClientRect();
  const free = !(e.parentElement && inScroll(e.parentElement));
  if (free && (box.right > wide + .5 || box.left < -.5)) found.outside.push(name(e));
  const hides = ['hidden', 'clip'].includes(getComputedStyle(e).overflowX) && e.tagName != 'svg';
  if (hides && e.scrollWidth > e.clientWidth) found.cut.push(name(e));
}
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const luminance = c => { const l = c.slice(0, 3).map(linear);
  return .2126 * l[0] + .7152 * l[1] + .0722 * l[2]; };
const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length == 3 || c[3] > 0) return c; } return [255, 255, 255]; };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, e = node.parentElement;
  if (!node.data.trim()) continue;
  const range = document.createRange(); range.selectNodeContents(node);
  const box = range.getBoundingClientRect();
  if (!box.width) continue;
  const style = getComputedStyle(e), svg = e.closest('svg');
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  if (parseFloat(style.fontSize) * scale < 9) found.small.push([parseFloat(style.fontSize) * scale, name(e)]);
  const [a, b] = [luminance(rgb(svg ? style.fill : style.color)), luminance(ground(e))].sort((x, y) => x - y);
  if ((b + .05) / (a + .05) < 4.5) found.faint.push([(b + .05) / (a + .05), name(e)]);
  for (let around = e; around && around.tagName != 'MAIN' && !scrolls(around); around = around.parentElement) {
    if (getComputedStyle(around).display == 'inline' || (svg && around != svg && svg.contains(around))) continue;
    const outer = around.getBoundingClientRect();
    if (box.right > outer.right + 1 || box.left < outer.left - 1) {
      found.cut.push([name(around), node.data.trim().slice(0, 30)]);
      break;
    }
    if (around == svg && (box.bottom > outer.bottom + 1 || box.top < outer.top - 1)) found.cut.push(name(e));
  }
}
for (const svg of document.querySelectorAll('svg.chart')) {
  const boxes = [...svg.querySelectorAll('text')].map(t => [t.getBoundingClientRect(), t.textContent]);
  const meet = (p, q) => p.left < q.right && q.left < p.right && p.top + 2 < q.bottom && q.top + 2 < p.bottom;
  boxes.forEach(([p, x], i) => boxes.slice(i + 1).forEach(([q, y]) => { if (meet(p, q)) found.overlap.push([x, y]); }));
}
for (const image of document.images) if (!image.naturalWidth) found.unloaded.push(name(image));
return found;
"""


def shown(driver, page: Path, width: int, dark: bool) -> None:
    """Opens a page on a screen that is so wide, in dark or in light mode."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.as_uri())
    assert driver.execute_script("return innerWidth") == width


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 400, 320])
@pytest.mark.parametrize("name", ["two runs", "hostile", "one run", "hostile run", "empty"])
def test_nothing_overflows_is_cut_or_illegible(driver, pages, name, width, dark):
    driver.get_log("browser")
    shown(driver, pages[name], width, dark)
    found = driver.execute_script(FIND)
    assert not any(found.values()), {what: places[:8] for what, places in found.items() if places}
    assert driver.get_log("browser") == []  # no violation of the page's content policy


@pytest.mark.parametrize("dark", [False, True])
def test_the_mode_is_the_readers(driver, pages, dark):
    shown(driver, pages["two runs"], 1280, dark)
    colour = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colour == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
    photos = driver.execute_script("return [...document.images].map(image => getComputedStyle(image).backgroundColor)")
    assert photos and all(min(map(int, photo[4:-1].split(", "))) > 230 for photo in photos)  # on a light ground


@pytest.mark.parametrize(
    ("what", "rule"),
    [
        ("overflow", ".lead { width: 1500px; max-width: none }"),
        ("outside", "footer { position: relative; left: 700px }"),
        ("cut", ".tile div { width: 30px; overflow: hidden }"),
        ("cut", ".tile { width: 60px }"),
        ("cut", "svg .label { font-size: 60px }"),
        ("small", ".note { font-size: 8px }"),
        ("faint", ":root { --soft: #999 }"),
        ("overlap", "svg .tick { font-size: 60px }"),
    ],
)
def test_the_test_sees_it(driver, pages, what, rule):
    shown(driver, pages["two runs"], 1280, False)
    driver.execute_script("document.querySelector('style').append(arguments[0])", rule)
    assert driver.execute_script(FIND)[what]

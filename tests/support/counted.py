"""A model to be evaluated that takes no time and counts what it encodes, and a set that asks for everything."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from lift_fast.data.shards import ShardWriter
from lift_fast.eval.images import Pixels
from lift_fast.eval.subject import Subject
from lift_fast.nn import Lift
from lift_fast.sugarcrepe import TASKS
from lift_fast.text.encoder import NoTokens

from .hostile import encoded
from .ranks import SMALL

DIM = SMALL.text_dim


class Counted:
    """seen: the sizes of the batches of images. asked: the texts. Images are encoded by a small LIFT, texts as their
    hashes; one of dots alone has no tokens."""

    def __init__(self, seed: int = 0, image: str | None = "image", text: str | None = "text"):
        torch.manual_seed(seed)
        self.model, self.image, self.text = Lift(SMALL).eval(), image, text
        self.seen: list[int] = []
        self.asked: list[str] = []

    def encode_image(self, pixels):
        self.seen.append(len(pixels))
        return self.model.encode_image(pixels)

    def encode_text(self, texts):
        if empty := [i for i, text in enumerate(texts) if text and not text.strip(".")]:
            raise NoTokens(empty, f"no tokens in {texts[empty[0]]!r}")
        self.asked += texts
        rows = [np.frombuffer(hashlib.shake_128(text.encode()).digest(2 * DIM), "<i2") for text in texts]
        return F.normalize(torch.from_numpy(np.stack(rows).astype(np.float32)), dim=1)

    def again(self) -> tuple[int, int]:
        """The number of images, black ones for none included, and of texts since the last call."""
        counts = sum(self.seen), len(self.asked)
        self.seen, self.asked = [], []
        return counts

    @property
    def subject(self) -> Subject:
        return Subject(
            self.encode_image,
            self.encode_text,
            Pixels.of_size(16),
            torch.device("cpu"),
            image_identity=lambda: self.image,
            text_identity=lambda: self.text,
        )


def asking_set(folder: Path, count: int, per_shard: int = 100, seed: int = 0, broken=()) -> Path:
    """Writes `count` JPEGs and PNGs with two captions, foils and a class each; captions repeat now and then."""
    rng = random.Random(seed)
    with ShardWriter(folder, per_shard) as writer:
        for i in range(count):
            width, height = rng.randint(16, 40), rng.randint(16, 40)
            coarse = np.frombuffer(rng.randbytes(48), np.uint8).reshape(4, 4, 3)
            pixels = coarse[np.arange(height)[:, None] * 4 // height, np.arange(width)[None] * 4 // width]
            image = b"no picture" if i in broken else encoded(pixels, "JPEG" if i % 3 else "PNG")
            foils = {task: {"caption": f"caption {i}", "foil": f"{task} of {i}"} for task in TASKS}
            meta = {"composition": foils, "label": f"class {rng.randint(0, 6)}", "long": f"long caption {i // 2}"}
            writer.write(f"{i:04d}", image, f"caption {i}", meta)
    return folder


def figures(result: dict) -> str:
    """What evaluate returned, as text."""
    return json.dumps(result, sort_keys=True)

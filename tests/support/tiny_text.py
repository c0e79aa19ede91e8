"""Captions, an encoder that takes no time, and a worker that embeds with it, for the tests."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lift_fast.data.options import DataOptions
from lift_fast.data.sources import open_source
from lift_fast.ranks import Rank
from lift_fast.text.embed import embed_share
from lift_fast.text.encoder import NoTokens

DIM = 24


@dataclass
class Spec:
    name: str = "tiny"

    def as_dict(self):
        return {"name": self.name}


@dataclass
class TinyEncoder:
    """Encodes a caption as its hash.

    mixed: adds a little of the first caption of the batch, so that codes depend on the batch. Those of a real encoder
    do so too, because of rounding. A caption of "." alone has no tokens.
    """

    mixed: bool = True
    spec: Spec = field(default_factory=Spec)
    dim: int = DIM
    device: torch.device = torch.device("cpu")
    encoded: list[str] = field(default_factory=list)

    def encode(self, captions, batch_size=64, done=lambda count: None):
        if empty := [i for i, caption in enumerate(captions) if not caption.strip(".")]:
            raise NoTokens(empty, f"no tokens in {empty}")
        self.encoded += captions
        out = np.empty((len(captions), self.dim), dtype=np.float32)
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            out[start : start + len(batch)] = np.stack([self.vector(caption) for caption in batch])
            if self.mixed:
                out[start : start + len(batch)] += 0.1 * self.vector(f"{batch[0]} of {len(batch)}")
            done(len(batch))
        return torch.from_numpy(out)

    def vector(self, caption):
        return np.frombuffer(hashlib.shake_128(caption.encode()).digest(2 * self.dim), "<i2") / np.float32(1 << 15)


def keep_code_in(folder: Path, monkeypatch) -> None:
    """Has transformers copy the code of models into this folder, and forget what it imported from another."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    others = [place for place in sys.path if not (Path(place) / "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", others)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def captions_of(count, kinds):
    """`count` captions, of which at most `kinds` are different."""
    random = np.random.default_rng(count)
    return [f"caption number {i}" for i in random.integers(0, kinds, count)]


def write_lines(path: Path, captions) -> Path:
    lines = (json.dumps({"key": f"k{i}", "caption": caption}) for i, caption in enumerate(captions))
    path.write_text("".join(line + "\n" for line in lines))
    return path


def work(path, out, shard_rows, rank=0, world=1, codec="int8", skip_bad=False, conditioning=None):
    """Embeds one rank's share, without showing progress."""
    source = open_source(path, options=DataOptions(shard_rows=shard_rows, skip_bad=skip_bad))
    options = {"codec": codec, "conditioning": conditioning, "rank": Rank(rank, world)}
    return embed_share(source, out, TinyEncoder(), progress=False, **options)


def work_until(step, *arguments):
    """Runs work(*arguments) and kills its process with SIGKILL at a rename, or at the hard link by which a shard gets
    its name; both are numbered from 0.

    An even step kills it before number step / 2, an odd one after number (step - 1) / 2.
    """
    done = [0]

    def counted(give_name):
        def named(source, target):
            if Path(target).name == "conditioning.safetensors":
                return give_name(source, target)
            if done[0] == step / 2:
                os.kill(os.getpid(), signal.SIGKILL)
            give_name(source, target)
            if done[0] == (step - 1) / 2:
                os.kill(os.getpid(), signal.SIGKILL)
            done[0] += 1

        return named

    os.replace, os.link = counted(os.replace), counted(os.link)
    work(*arguments)


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["lift_fast.text.embed"])


def start(target, *arguments):
    """Starts a process that runs target. All but the first start quickly."""
    process = _SERVER.Process(target=target, args=arguments)
    process.start()
    return process

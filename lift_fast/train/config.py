"""Every setting of a training run; the command line is made from this class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are the paper's (arXiv 2506.04209, section 4) but for sizes that fit one small machine."""

    model: Literal["lift", "clip"]
    data: tuple[Path, ...]
    """Training sets, read as one: folders of tar shards, folders of pictures with parquet captions, CSV or JSONL."""
    out: Path
    """Folder the run is written to; must not exist."""
    cache: tuple[Path, ...] = ()
    """LIFT: one text cache for each data folder, in the same order."""
    pictures: tuple[Path, ...] = ()
    """Where the picture files lie, one folder for each --data; needed where they are not beside their captions."""
    preset: str = "tiny"
    text_dim: int | None = None
    """LIFT: output width of the head. Default: the caches'."""
    context: int = 77
    """CLIP: caption length in tokens."""
    field: str = "txt"
    """CLIP: caption to train on: txt, an entry of the .json, or a column. LIFT: the cache has chosen."""
    loss: Literal["contrastive", "cosine"] = "contrastive"
    steps: int = 200
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    warmup: int = 20
    """Steps of linear warm-up; then a cosine to zero."""
    clip_grad: float = 1.0
    """Largest norm of the gradient."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 autocasts; auto is bf16 where the processor multiplies it natively."""
    checkpointing: Literal["none", "mlp", "branches", "block"] = "none"
    """What the backward computes again rather than keeps: 9, 5, 2 or 1 widths of activations a token and layer."""
    fp8: bool = False
    """The image tower's (CLIP: both towers') linear layers multiply in float8; on GPUs since Ada and Hopper."""
    compile: bool = False
    """The image side goes through torch.compile."""
    graph: bool = False
    """The whole step is captured as a CUDA graph and replayed."""
    loader: Literal["auto", "host", "dali"] = "auto"
    """What decodes the pictures, to the same samples and crops. auto: DALI for a GPU where installed, else the host."""
    min_crop_area: float = 0.9
    """Random crops keep at least this part of a picture."""
    flip: float = 0.0
    """Probability of a mirrored picture."""
    colour: float = 0.0
    """Brightness, contrast and saturation are each scaled by 1 - colour to 1 + colour."""
    shuffle_buffer: int | None = None
    """Shuffle the shards, and windows of so many samples: reads a shard at a time. Default: all samples of an epoch."""
    max_skipped: float = 0.1
    """Share of bad samples above which training stops."""
    checked: bool = False
    """lift-fast data check has decoded every picture: DALI need not have each one read strictly by the host first."""
    seed: int = 0
    """Same seed, same machine: the same losses (on a GPU up to the order in which its atomics add)."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.model == "lift" and len(self.cache) != len(self.data):
            raise ConfigError(
                f"LIFT needs one --cache for each --data: got {len(self.cache)} for {len(self.data)}; "
                "make one with: lift-fast embed"
            )
        if self.pictures and len(self.pictures) != len(self.data):
            raise ConfigError(f"one --pictures for each --data, or none: got {len(self.pictures)} for {len(self.data)}")
        if self.model == "clip" and self.cache:
            raise ConfigError("CLIP trains its own text tower; leave out --cache")
        if self.model == "clip" and self.loss == "cosine":
            raise ConfigError(
                "the cosine loss has no negatives: with a trained text tower it collapses; use contrastive"
            )
        least_of = {"steps": 1, "batch_size": 1, "context": 3, "warmup": 0, "weight_decay": 0, "eps": 0, "seed": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed must be below 2**63, not {self.seed}")
        for name in ("lr", "clip_grad", "min_crop_area"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "min_crop_area", "flip", "colour", "max_skipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, not {getattr(self, name)}")

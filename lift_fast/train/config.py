"""The settings of a training run. The options of `lift-fast train`, and their groups in its help, are these classes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..data.options import DataOptions
from ..errors import ConfigError

# The keys of nn.PRESETS, repeated because that package imports torch.
PresetName = Literal[
    "tiny", "vit-ti16", "vit-s16", "vit-b16", "vit-b32", "vit-l16", "vit-l14", "vit-h14", "vit-so400m14"
]

# Scores of an evaluation that --keep-best may name; r1 is the mean of the next two.
SCORES = ("r1", "t2i_r1", "i2t_r1", "composition", "zero_shot_top1")


@dataclass(frozen=True)
class RunSettings:
    """What is trained, on what."""

    model: Literal["lift", "clip"]
    data: tuple[Path, ...]
    """Training sets, read as one: each a folder or a file of any layout in docs/data.md."""
    out: Path
    """Folder of the run. The same command again goes on from its newest checkpoint."""
    cache: tuple[Path, ...] = ()
    """LIFT: one text cache for each --data, in the same order."""
    pictures: tuple[Path, ...] = ()
    """Folders of the image files, one for each --data; needed when they are not where the captions are."""
    field: str = "txt"
    """CLIP: caption to train on: txt, an entry of the .json, or a column. For LIFT the cache decides."""
    steps: int = 200
    batch_size: int = 256
    """Samples of a step, of all ranks together; a multiple of the number of ranks."""
    seed: int = 0
    """The same seed on the same machine gives the same losses (on a GPU up to the order in which atomics add)."""
    resume: bool = False
    """Only go on with a run: an error where --out has none."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model and its loss."""

    preset: PresetName = "tiny"
    """Sizes of the towers: tiny is the demo's, vit-b16 the paper's."""
    text_dim: int | None = None
    """LIFT: output width of the head. Default: the dim of the caches, which it must equal."""
    context: int = 77
    """CLIP: caption length in tokens."""
    loss: Literal["contrastive", "cosine"] = "contrastive"
    """contrastive: CLIP's loss over all pairs of the batch. cosine (LIFT only): positives alone, without negatives."""
    init_from: Path | None = None
    """Weights to start from: a run of lift-fast, or an image tower of open_clip, timm, Hugging Face or the authors."""
    lock: Literal["none", "tower"] = "none"
    """tower: train without changing the image tower, as LiT does (arXiv 2111.07991); usually with --init-from."""
    unlocked_blocks: int = 0
    """--lock tower: the number of last blocks that are trained all the same."""
    patch_dropout: float = 0.0
    """Fraction of an image's patches that are left out at random while training (FLIP, arXiv 2212.00794)."""
    patch_dropout_steps: int | None = None
    """Steps with patch dropout; those after them see all patches. Default: all steps leave patches out."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Largest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up: a cosine to zero, or constant until the cool-down."""
    warmup: int = 20
    """Steps of linear warm-up of the learning rate."""
    cooldown: int = 0
    """--schedule constant: the number of last steps, in which the learning rate falls linearly to zero."""
    layer_decay: float = 1.0
    """Factor on the learning rate of each block of a tower relative to the next one; 1: the same for all."""
    weight_decay: float = 0.2
    """Gains, biases and the logit scale are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip_grad: float = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    ema: float = 0.0
    """Decay a step of an exponential moving average of the weights, which the run then ends with; 0: none."""
    spike: float | None = None
    """A loss above this many times the median of the last 100 is a spike. Default: only NaN and infinity are."""
    on_spike: Literal["stop", "skip"] = "stop"
    """A spike ends the run, or its step changes no weights and is counted. Either way its samples are listed."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How images are decoded, cropped and ordered."""

    loader: Literal["auto", "host", "dali"] = "auto"
    """What decodes the images, to the same samples and crops. auto: DALI on a GPU if it is installed, else the host."""
    min_crop_area: float = 0.9
    """The smallest area of a random crop, as a fraction of the image."""
    flip: float = 0.0
    """Probability of mirroring an image."""
    colour: float = 0.0
    """Brightness, contrast and saturation are each scaled by a factor from 1 - colour to 1 + colour."""
    shuffle_buffer: int | None = None
    """Shuffle shards, and samples within windows of this size, to read shard by shard. Default: shuffle all samples."""
    max_skipped: float = 0.1
    """Fraction of bad samples above which training stops."""
    checked: bool = False
    """Every image has passed lift-fast data check, so the host need not check each one before DALI decodes it."""


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Device, precision, and what trades memory for time."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: a GPU if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: autocast to bfloat16. auto: bf16 if the processor multiplies it natively, else fp32."""
    checkpointing: Literal["none", "mlp", "branches", "block"] = "none"
    """Activation recomputation level: the levels store 9, 5, 2 and 1 times the width per token and layer."""
    fp8: bool = False
    """Multiply in float8 in the linear layers of the image tower (CLIP: of both towers); GPUs since Ada and Hopper."""
    compile: bool = False
    """Compile the image tower with torch.compile."""
    graph: bool = False
    """Capture the whole step as a CUDA graph and replay it."""
    micro_batch: int | None = None
    """Images that a rank takes through the tower at once, with the gradients of the whole batch (arXiv 2101.06983).
    Default: all. Costs one more forward and saves the memory of the others."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several ranks: ddp keeps all weights on each; fsdp (FSDP2) shards weights, gradients and optimizer over them."""
    threads: int | None = None
    """CPU threads of a rank. Default: its share of the machine's cores."""
    timeout: float = 600.0
    """Seconds that ranks wait for one that has died or fallen behind before they end with an error."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints, from which the same command goes on, and evaluation on the way."""

    save_minutes: float | None = 10.0
    """Minutes between checkpoints; None: --save-every alone decides."""
    save_every: int | None = None
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps are kept for good."""
    save_weights: bool = False
    """Beside each checkpoint write OUT/weights/STEP, which lift-fast eval takes while the run goes on."""
    eval_data: dict[str, Path] = field(default_factory=dict)
    """Held-out sets to evaluate on, as eval takes them: --eval-data DIR, or names and folders of several: --eval-data
    openmoji DIR scenes DIR."""
    eval_pictures: tuple[Path, ...] = ()
    """Folders of the image files, one for each --eval-data; needed when they are not where the captions are."""
    eval_field: tuple[str, ...] = ()
    """Captions of the held-out sets, several for several captions of an image. Default: those that the run is trained
    on, or txt in a set that does not have them."""
    eval_templates: Path | None = None
    """Prompts of zero-shot classification: a file with one a line, {} standing for the class; or imagenet, the 80."""
    eval_classnames: Path | None = None
    """Names of the classes: a file with one a line, or with a label or class folder before it; or imagenet."""
    eval_every: int | None = None
    """Steps between evaluations; the weights of the last step are evaluated, too. The scores are in metrics.jsonl."""
    keep_best: str = "auto"
    """Score by which the best of the evaluated weights are kept in OUT/weights/best: SET/SCORE, or SCORE alone for the
    mean over the sets. SCORE is r1 (the mean of t2i_r1 and i2t_r1), t2i_r1, i2t_r1, composition or zero_shot_top1.
    auto: r1, where no set has captions zero_shot_top1, else composition. none: keep none."""


@dataclass(frozen=True)
class TrainConfig(CheckpointSettings, MachineSettings, ImageSettings, OptimizerSettings, ModelSettings, RunSettings):
    """Settings of a training run. The defaults are the paper's (arXiv:2506.04209, section 4), except that preset, steps
    and batch_size fit one small machine.

    options: how the data sets are read. LIFT: where they have the default, those that a cache records are used.

    model, data, out, cache and pictures may be given by position, the others by name.
    """

    options: DataOptions = field(default_factory=DataOptions, kw_only=True)

    def __post_init__(self) -> None:
        """Raises ConfigError when a setting is out of range or does not go with the model."""
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
                "the cosine loss has no negatives, so it collapses with a trained text tower; use contrastive"
            )
        if self.loss == "contrastive" and self.batch_size == 1:
            raise ConfigError(
                "the contrastive loss of a batch of 1 is always 0, since a sample's negatives are the rest of its "
                "batch; batch_size must be at least 2"
            )
        self._check_combinations()
        minimum = {"steps": 1, "batch_size": 1, "context": 3, "warmup": 0, "weight_decay": 0, "eps": 0, "seed": 0}
        minimum |= {"cooldown": 0, "unlocked_blocks": 0, "keep_last": 1, "micro_batch": 1, "threads": 1}
        minimum |= {"save_every": 1, "keep_every": 1, "eval_every": 1, "patch_dropout_steps": 1}
        for name, least in minimum.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed must be below 2**63, not {self.seed}")
        for name in ("lr", "clip_grad", "min_crop_area", "layer_decay", "timeout", "save_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("beta1", "beta2", "min_crop_area", "flip", "colour", "max_skipped", "layer_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("ema", "patch_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and less than 1, not {getattr(self, name)}")
        if self.spike is not None and not self.spike > 1:
            raise ConfigError(f"spike must be above 1, not {self.spike}")

    def _check_combinations(self) -> None:
        """Raises ConfigError for settings that do not go together."""
        if self.cooldown and self.schedule != "constant":
            raise ConfigError("--cooldown ends a constant schedule; add --schedule constant, or leave it out")
        if self.warmup + self.cooldown > self.steps and self.cooldown:
            raise ConfigError(
                f"warmup {self.warmup} and cooldown {self.cooldown} take more than the {self.steps} steps"
            )
        if self.unlocked_blocks and self.lock == "none":
            raise ConfigError("--unlocked-blocks are the blocks that --lock tower leaves; add it, or leave them out")
        if self.patch_dropout_steps is not None and not self.patch_dropout:
            raise ConfigError("--patch-dropout-steps needs --patch-dropout")
        if self.graph and self.micro_batch is not None:
            raise ConfigError("--graph captures a step of one piece; leave out --micro-batch or --graph")
        if self.graph and self.patch_dropout_steps is not None:
            raise ConfigError("--graph captures one shape, and --patch-dropout-steps changes it; leave one out")
        if self.graph and self.parallel == "fsdp":
            raise ConfigError("--graph works in one process, --parallel fsdp in several; leave one out")
        if bool(self.eval_data) != (self.eval_every is not None):
            raise ConfigError("--eval-data and --eval-every go together: give both, or neither")
        if not isinstance(self.eval_data, dict):
            raise ConfigError("eval_data names the held-out sets: {name: path}")
        if self.eval_pictures and len(self.eval_pictures) != len(self.eval_data):
            raise ConfigError(
                f"one --eval-pictures for each --eval-data, or none: got {len(self.eval_pictures)} for "
                f"{len(self.eval_data)}"
            )
        self._check_best()

    def _check_best(self) -> None:
        """Raises ConfigError for a score that no evaluation of this run may have."""
        name, score = best_of(self.keep_best)
        if score not in ("auto", "none", *SCORES) or (name is not None and score not in SCORES):
            raise ConfigError(
                f"--keep-best is auto, none, SCORE or SET/SCORE, where SCORE is {', '.join(SCORES)}; not "
                f"{self.keep_best!r}"
            )
        if score in SCORES and not self.eval_data:
            raise ConfigError("--keep-best goes by the scores of an evaluation; add --eval-data and --eval-every")
        if name is not None and name not in self.eval_data:
            raise ConfigError(f"--keep-best {self.keep_best}: no set of --eval-data is called {name!r}")


def best_of(keep_best: str) -> tuple[str | None, str]:
    """The set and the score that --keep-best names; None for all sets."""
    name, slash, score = keep_best.rpartition("/")
    return (name if slash else None), score

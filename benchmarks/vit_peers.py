"""Shared by bench_vit and bench_step: other implementations of the tower, training steps with them, and measurement.

Every peer has our tower's sizes and random weights, is in training mode and runs under the same autocast. "torch
modules" is open_clip's tower written with torch's own modules; the towers of open_clip, timm and Hugging Face are
measured if they are installed. The layer norm of "torch modules" returns its input's dtype, as open_clip's does, so the
residual stream is bfloat16 under autocast, as in our tower. In those of timm and Hugging Face it has the dtype that
these libraries give it.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lift_fast.measure.memory import LiveBytes
from lift_fast.measure.time import interleaved_ms
from lift_fast.nn import VitConfig
from lift_fast.nn.models import INITIAL_LOGIT_SCALE, MAX_LOGIT_SCALE

from .bench_contrastive import open_clip as clip_loss
from .harness import Suite
from .launches import launches, registers
from .pairs import DTYPES, one_line

OURS, TORCH, AUTHORS = "lift_fast", "torch modules", "authors' step"
COMPILED = " compiled"  # after a rival's name

Call = Callable[[], object]
Row = dict[str, Any]


class LayerNorm(nn.LayerNorm):
    """open_clip's: returns its input's dtype. wide: computes in float32, as every layer norm under CUDA's autocast."""

    wide = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() if self.wide else x).to(x.dtype)


class Block(nn.Module):
    """open_clip's ResidualAttentionBlock; x is [batch, tokens, width]."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-5):
        super().__init__()
        self.ln_1 = LayerNorm(width, eps)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = LayerNorm(width, eps)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """open_clip's VisionTransformer with the settings of LIFT's authors.

    Pixels [batch, 3, H, W] -> features [batch, width].
    """

    def __init__(self, config: VitConfig, checkpointing: bool = False):
        super().__init__()
        width = config.width
        self.checkpointing = checkpointing
        self.conv = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(config.tokens, width))
        self.ln_pre = LayerNorm(width, config.norm_eps)
        sizes = width, config.heads, config.hidden, config.norm_eps
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.layers))
        self.ln_post = LayerNorm(width, config.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.ln_post(x)[:, 1:].mean(dim=1)


def _open_clip(config: VitConfig) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    sizes = config.image_size, config.patch_size, config.width, config.layers, config.heads
    tower = VisionTransformer(*sizes, config.hidden / config.width, output_dim=config.width, pool_type="avg")
    tower.proj = None
    return tower


def _timm(config: VitConfig) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        global_pool="avg",
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=config.hidden / config.width,
        pre_norm=True,
    )


class _HuggingFace(nn.Module):
    def __init__(self, config: VitConfig):
        super().__init__()
        from transformers import ViTConfig, ViTModel

        sizes = ViTConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.hidden,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        self.model = ViTModel(sizes, add_pooling_layer=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state[:, 1:].mean(dim=1)


TOWERS: dict[str, Callable[[VitConfig], nn.Module]] = {
    TORCH: Tower,
    "open_clip": _open_clip,
    "timm": _timm,
    "huggingface": _HuggingFace,
}


def installed_peers(note: Callable[[str], None]) -> dict[str, Callable[[VitConfig], nn.Module]]:
    """The TOWERS whose libraries are installed; a note for each of the others."""
    tiny = VitConfig(image_size=16, patch_size=16, width=8, layers=1, heads=1)
    found = {}
    for name, build in TOWERS.items():
        try:
            build(tiny)
            found[name] = build
        except Exception as error:  # not installed, or a version with other arguments
            note(f"{name}: {one_line(error)}")
    return found


class PeerLift(nn.Module):
    """A tower with LIFT's head and the dense loss: (pixels, text [batch, text_dim]) -> loss."""

    def __init__(self, tower: nn.Module, width: int, text_dim: int):
        super().__init__()
        self.visual = tower
        self.head = nn.Sequential(nn.Linear(width, text_dim), nn.GELU(), nn.Linear(text_dim, text_dim))
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        image = F.normalize(self.head(self.visual(pixels)), dim=-1)
        return clip_loss(image, F.normalize(text, dim=-1), self.logit_scale.exp())


def peer_step(
    model: PeerLift, optimizer: torch.optim.Optimizer, where: str, dtype: torch.dtype, compile: bool = False
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A plain training step without a host sync: (pixels, text) -> (loss, norm of the gradient)."""
    loss_of = torch.compile(model, dynamic=False) if compile else model
    parameters = list(model.parameters())

    def step(pixels: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(where, dtype):
            loss = loss_of(pixels, text)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return loss.detach(), norm

    return step


def adamw(model: nn.Module, lr: float | Tensor = 1e-4, **options: Any) -> torch.optim.AdamW:
    """AdamW with the settings of LIFT's authors; gains, biases and the logit scale have no weight decay."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    not_decayed = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": not_decayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, **options)


def native_dtype(where: str) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    native = where == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in rows: a key of DTYPES."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def autocast(where: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to bfloat16, or none for float32."""
    return torch.autocast(where, torch.bfloat16, enabled=dtype != torch.float32)


def forward_backward(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    parameters: Iterable[Tensor],
    dtype: torch.dtype,
) -> Call:
    """A call that runs fn(*inputs) under autocast to dtype and its backward from fixed random gradients.

    The backward computes the gradients of the inputs and parameters that need one.
    """
    leaves = [t for t in (*inputs, *parameters) if t.requires_grad]
    where = inputs[0].device.type
    upstream: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        with autocast(where, dtype):
            out = fn(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        if not upstream:
            upstream.extend(torch.randn_like(out) for out in outs)
        return torch.autograd.grad(outs, leaves, upstream)

    return call


def measure(
    suite: Suite,
    case: Mapping[str, Any],
    builds: Mapping[str, Callable[[], Call]],
    where: str,
    rates: Mapping[str, float],
    *,
    spend: float | None = None,
    most: float | None = None,
    also: Callable[[str, Mapping[str, Row]], Row] | None = None,
) -> dict[str, Row]:
    """Builds the rivals, calls each twice, times them in turn, and adds and returns a row for each.

    rates: column -> amount of work in one call; the column gets the amount per second. spend: seconds for the timing.
    most: limit in seconds; nothing is measured if the time of the first rival's first call shows that all would take
    longer. also: from a rival's name and all rows, further columns of its row, or new values for columns that it has.
    On a GPU a rival's peak memory is all that it allocates while it is built and called, including its weights. A rival
    that fails gets a note and no row.
    """
    name = ", ".join(str(value) for value in case.values())
    if suite.over():
        suite.note(f"out of time: not measured: {name}")
        return {}
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if spend is None:
        spend = (8.0 if where == "cpu" else 2.0) * (1 if suite.quick else 3)
    rows: dict[str, Row] = {}
    for group in _groups(builds, where):
        kernels: dict[str, dict[str, dict[str, int]]] = {}
        found = _timed(suite, name, group, where, spend, most, kernels)
        rows |= {what: {**case, "what": what, **row} for what, row in found.items()}
        for what in found:
            row = rows[what]
            row |= {column: amount / row["median_ms"] * 1e3 for column, amount in rates.items()}
            row["peak_mib"] = row.pop("peak_mib")  # the last column
            if also:
                row |= also(what, rows)
            work = {"bytes": rates.get("gb_per_s", 0) * 1e9, "flops": rates.get("tflop_per_s", 0) * 1e12}
            launched = kernels.get(what, {})
            more = {"kernels": launched or None, "registers": registers(launched)}
            suite.add(row, **more, **{kind: amount for kind, amount in work.items() if amount})
    return rows


def _groups(builds: Mapping[str, Callable[[], Call]], where: str) -> list[dict[str, Callable[[], Call]]]:
    """Groups of rivals that are timed in turn: on a GPU compiled ones form a second group, as compiling takes long."""
    compiled = {what: build for what, build in builds.items() if where == "cuda" and COMPILED in what}
    plain = {what: build for what, build in builds.items() if what not in compiled}
    return [group for group in (plain, compiled) if group]


def _timed(
    suite: Suite,
    name: str,
    builds: Mapping[str, Callable[[], Call]],
    where: str,
    spend: float,
    most: float | None,
    kernels: dict[str, dict[str, dict[str, int]]],
) -> dict[str, Row]:
    """The figures of each rival that can be built and called. On a GPU its launches are added to `kernels`."""
    calls: dict[str, Call] = {}
    seconds: dict[str, float] = {}
    peaks: dict[str, float | None] = {}
    for what, build in builds.items():
        if suite.over():
            suite.note(f"out of time: not measured: {what}: {name}")
            continue
        try:
            with _peak(where) as peak:
                call = build()
                if where == "cuda" and COMPILED not in what:
                    with launches() as kernels[what]:
                        call()
                for _ in range(1 if most and not calls else 2):
                    begun = time.perf_counter()
                    call()
                    if where == "cuda":
                        torch.cuda.synchronize()
                    elapsed = time.perf_counter() - begun
        except Exception as error:  # a rival may raise anything; the remaining ones are measured
            suite.note(f"{what}: {name}: {one_line(error)}")
            call = None  # frees its model
            gc.collect()
            if where == "cuda":
                torch.cuda.empty_cache()
            continue
        calls[what], seconds[what], peaks[what] = call, elapsed, peak[0] if peak else None
        if most and elapsed * 5 * len(builds) > most:  # five calls of each: two first, at least three timed
            suite.note(f"would take more than {most:.0f} s: not measured: {name}")
            return {}
    if not calls:
        return {}

    repeats = max(suite.least, min(4 * suite.repeats, int(spend / sum(seconds.values()))))
    try:
        timings = interleaved_ms(calls, repeats, 0, where)
    except torch.OutOfMemoryError as error:
        suite.note(f"timing: {name}: {one_line(error)}")
        return {}
    return {
        what: {
            "device": where,
            "threads": torch.get_num_threads() if where == "cpu" else None,
            "repeats": repeats,
            "median_ms": median,
            "spread_ms": spread,
            "peak_mib": peaks[what],
        }
        for what, (median, spread) in timings.items()
    }


def faster(rows: Mapping[str, Row], what: str, than: str) -> float | None:
    """How many times faster `what` is than `than`; None if either was not measured."""
    return rows[than]["median_ms"] / rows[what]["median_ms"] if what in rows and than in rows else None


def fastest(rows: Mapping[str, Row], names: Callable[[str], bool]) -> str:
    """The name of the fastest row that `names` accepts; "" if there is none."""
    return min(filter(names, rows), key=lambda what: rows[what]["median_ms"], default="")


@contextmanager
def _peak(where: str) -> Iterator[list[float]]:
    """A list that on a GPU gets, at the end, the peak of allocated MiB above those at the start; empty on a CPU."""
    found: list[float] = []
    if where != "cuda":
        yield found
        return
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    found.append((torch.cuda.max_memory_allocated() - before) / 2**20)


def kept_widths(fn: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> float:
    """Memory that autograd keeps for the backward of fn(x), x [batch, tokens, width], in units of x's size.

    Each storage counts once and weights do not count. Activations are recognized by sizes that are multiples of the
    number of tokens, which therefore should be a prime.
    """
    sizes: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() // t.element_size() % x.shape[1] == 0:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(x.device.type, dtype):
        fn(x)
    return sum(sizes.values()) / (x.numel() * dtype.itemsize)


def fake_peak(build: Callable[[VitConfig], nn.Module], config: VitConfig, batch: int, wide: bool = False) -> int:
    """Peak bytes of a training step of a tower alone, from fake tensors.

    The loss is the mean of the features and the optimizer fused AdamW. bfloat16 autocast follows the CPU's rules, which
    leave a bfloat16 residual stream as it is. wide: layer norms compute in float32, as under CUDA's autocast, which
    keeps a float32 input of each. Parameters, gradients, moments and pixels count.
    """
    live = LiveBytes()
    with FakeTensorMode(), live:
        model = build(config)
        for module in model.modules():
            if isinstance(module, LayerNorm):
                module.wide = wide
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():  # the first step allocates the moments
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        pixels = torch.empty(batch, 3, config.image_size, config.image_size)
        live.peak = live.now
        with autocast("cpu", torch.bfloat16):
            loss = model(pixels).float().mean()
        loss.backward()
        optimizer.step()
    return live.peak

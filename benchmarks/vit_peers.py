"""What bench_vit and bench_step share: the towers of others, whole steps around them, and how they are measured.

Every peer has our tower's sizes and random weights, is in training mode and runs under the same autocast. "torch
modules" is open_clip's tower written with torch's own modules; open_clip's, timm's and Hugging Face's own are there
where they are installed. As open_clip's, the layer norm of "torch modules" returns its input's dtype, so that the
residual stream is bfloat16 under autocast, as ours is. timm's and Hugging Face's is what those make it.
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
from .pairs import DTYPES

OURS, TORCH, AUTHORS = "lift_fast", "torch modules", "authors' step"
COMPILED = " compiled"  # after a rival's name

Call = Callable[[], object]
Row = dict[str, Any]


class LayerNorm(nn.LayerNorm):
    """open_clip's: returns its input's dtype. wide: computes in float32, as CUDA's autocast has it everywhere."""

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
    """open_clip's VisionTransformer as LIFT's authors set it: pixels [batch, 3, H, W] -> features [batch, width]."""

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


def peers_here(note: Callable[[str], None]) -> dict[str, Callable[[VitConfig], nn.Module]]:
    """Those of TOWERS that are installed."""
    tiny = VitConfig(image_size=16, patch_size=16, width=8, layers=1, heads=1)
    found = {}
    for name, build in TOWERS.items():
        try:
            build(tiny)
            found[name] = build
        except Exception as error:  # not installed, or another version's arguments
            note(f"{name}: {in_a_line(error)}")
    return found


class PeerLift(nn.Module):
    """A tower, LIFT's head and the dense loss: (pixels, text [batch, text_dim]) -> the loss."""

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
    """A plain training step (pixels, text) -> (loss, gradient's norm): nothing in it waits for the device."""
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
    """As LIFT's authors set it; gains, biases and the logit scale are not decayed."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    free = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, **options)


def native_dtype(where: str) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    native = where == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def named(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def autocast(where: str, dtype: torch.dtype) -> torch.autocast:
    """To dtype; off for float32."""
    return torch.autocast(where, torch.bfloat16, enabled=dtype != torch.float32)


def forward_backward(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    parameters: Iterable[Tensor],
    dtype: torch.dtype,
) -> Call:
    """A call of fn(*inputs) and its backward from fixed random gradients, for the inputs and parameters that need one,
    under autocast to dtype."""
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
    """Builds the rivals, calls each twice, times them in turn; adds and returns a row for each.

    rates: column -> how much of it a call does, for a column of so much a second. On a GPU a rival's peak memory is
    all that it allocates, its weights included, while it is built and called. What fails is noted and has no row.
    spend: seconds for the timing. most: seconds; if all would take longer, which the first rival's first call shows,
    nothing is measured. also: from a rival's name and all rows, more of its columns, or others in their place.
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
    for part in _parts(builds, where):
        kernels: dict[str, dict[str, dict[str, int]]] = {}
        found = _timed(suite, name, part, where, spend, most, kernels)
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


def _parts(builds: Mapping[str, Callable[[], Call]], where: str) -> list[dict[str, Callable[[], Call]]]:
    """What is timed in turn. On a GPU what torch compiles comes after all else has its rows: compiling takes long."""
    compiled = {what: build for what, build in builds.items() if where == "cuda" and COMPILED in what}
    plain = {what: build for what, build in builds.items() if what not in compiled}
    return [part for part in (plain, compiled) if part]


def _timed(
    suite: Suite,
    name: str,
    builds: Mapping[str, Callable[[], Call]],
    where: str,
    spend: float,
    most: float | None,
    kernels: dict[str, dict[str, dict[str, int]]],
) -> dict[str, Row]:
    """The figures of each that can be built and called; kernels gets what each launches, on a GPU."""
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
        except Exception as error:  # theirs, of any kind; the others go on
            suite.note(f"{what}: {name}: {in_a_line(error)}")
            call = None  # it may hold a model
            gc.collect()
            if where == "cuda":
                torch.cuda.empty_cache()
            continue
        calls[what], seconds[what], peaks[what] = call, elapsed, peak[0] if peak else None
        if most and elapsed * 5 * len(builds) > most:  # two calls, three timed
            suite.note(f"would take more than {most:.0f} s: not measured: {name}")
            return {}
    if not calls:
        return {}

    repeats = max(suite.least, min(4 * suite.repeats, int(spend / sum(seconds.values()))))
    try:
        timings = interleaved_ms(calls, repeats, 0, where)
    except torch.OutOfMemoryError as error:
        suite.note(f"timing: {name}: {in_a_line(error)}")
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
    """How many times; None where one of the two was not measured."""
    return rows[than]["median_ms"] / rows[what]["median_ms"] if what in rows and than in rows else None


def fastest(rows: Mapping[str, Row], names: Callable[[str], bool]) -> str:
    """The fastest of the rows whose name is wanted; "" where there is none."""
    return min(filter(names, rows), key=lambda what: rows[what]["median_ms"], default="")


@contextmanager
def _peak(where: str) -> Iterator[list[float]]:
    """On a GPU a list that gets the MiB allocated at the peak, above those before; elsewhere it stays empty."""
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


def in_a_line(error: Exception) -> str:
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0][:160]}"


def kept_widths(fn: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> float:
    """What autograd keeps of fn(x), x [batch, tokens, width], in units of x: each storage once, weights aside.

    Activations are told from weights by their sizes, which the number of tokens divides; it should be a prime.
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
    """Bytes at the peak of a step of a tower alone (the features' mean as its loss, fused AdamW), from fake tensors.

    bfloat16 autocast by the CPU's rules, which leave a bfloat16 residual stream as it is; wide: with layer norms in
    float32, of which CUDA's autocast keeps a float32 input each. Parameters, gradients, moments and pixels count.
    """
    live = LiveBytes()
    with FakeTensorMode(), live:
        model = build(config)
        for module in model.modules():
            if isinstance(module, LayerNorm):
                module.wide = wide
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():  # the moments are made at the first step
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

"""FLOPs and memory of LIFT and CLIP compared, computed for any preset and batch on any machine."""

from collections.abc import Sequence

from ..errors import ConfigError
from ..nn import Preset, preset
from ..ops.block import Checkpointing
from .flops import clip_flops, lift_flops, saved
from .memory import peak_training_memory
from .paper import SAVINGS, WHY

# (checkpointing, batch) of the rows where no batch is given; the last is the paper's regime.
REGIMES: tuple[tuple[Checkpointing, int], ...] = (("none", 256), ("none", 2048), ("block", 256), ("block", 2048))
CONTEXTS = (16, 32, 64, 77, 128, 192, 256, 323)


def paper_scale(
    preset_name: str = "vit-b16", contexts: Sequence[int] = (77, 128), batch_size: int | None = None
) -> dict:
    """The report's `paper_scale`: what LIFT saves at each of CLIP's `contexts`, with the paper's figures.

    FLOPs are of one sample's forward, LIFT's head included. Memory is the peak in bytes of a bf16 training step,
    without and with activation checkpointing, at batches of 256 and 2 048 or at `batch_size` alone. The entries
    `n77`, … take memory from the paper's regime (checkpointing, the largest batch), and the paper's figures where
    it gives any (77 and 128 of vit-b16), else None.

    Raises ConfigError for an unknown preset, for empty `contexts`, and for a context below 1.
    """
    base = preset(preset_name)
    if not contexts or min(contexts) < 1:
        raise ConfigError(f"contexts must be caption lengths of at least 1 token, not {list(contexts)}")
    regimes = REGIMES if batch_size is None else (("none", batch_size), ("block", batch_size))
    lift = lift_flops(base)
    # LIFT never sees a token, so its peak is the same for all contexts.
    lift_memory = {
        (checkpointing, size): peak_training_memory("lift", base, size, checkpointing=checkpointing)
        for checkpointing, size in regimes
    }
    rows, entries = [], {}
    for context in contexts:
        at_length = base.with_context(context)
        clip = clip_flops(at_length)
        for checkpointing, size in regimes:
            lift_bytes = lift_memory[checkpointing, size]
            clip_bytes = peak_training_memory("clip", at_length, size, checkpointing=checkpointing)
            rows.append(
                {
                    "context": context,
                    "checkpointing": checkpointing,
                    "batch_size": size,
                    "flops_saved": saved(lift, clip),
                    "memory_saved": 1 - lift_bytes / clip_bytes,
                    "lift_memory_bytes": lift_bytes,
                    "clip_memory_bytes": clip_bytes,
                    "lift_flops": lift.total,
                    "clip_flops": clip.total,
                }
            )
        paper = SAVINGS.get(context) if preset_name == "vit-b16" else None
        entries[f"n{context}"] = {
            "flops_saved": saved(lift, clip),
            "memory_saved": rows[-1]["memory_saved"],
            "paper_flops_saved": paper.flops if paper else None,
            "paper_memory_saved": paper.memory if paper else None,
        }
    return {
        "preset": preset_name,
        "batch_size": regimes[-1][1],
        "regime": "activation checkpointing, bf16 autocast, AdamW",
        **entries,
        "rows": rows,
        "why": WHY,
    }


def cost_against_length(base: Preset, contexts: Sequence[int] = CONTEXTS, text_dim: int | None = None) -> list[dict]:
    """The report's `cost_against_length`: training FLOPs a sample (forward and backward) by caption length.

    The milliseconds are None: compare_runs (runs.py) measures them, with a real cache and real captions.
    """
    lift = lift_flops(base, text_dim, training=True).total
    return [
        {
            "context": context,
            "lift_flops": lift,
            "clip_flops": clip_flops(base.with_context(context), training=True).total,
            "lift_text_ms": None,
            "clip_text_ms": None,
        }
        for context in contexts
    ]


def format_table(scale: dict) -> str:
    """The figures of `paper_scale` as a table for the terminal."""
    lines = [
        f"{scale['preset']}: forward FLOPs of a sample, and peak memory of a bf16 training step",
        "n      checkpointing batch      LIFT     CLIP  saved        LIFT       CLIP  saved",
    ]
    for row in scale["rows"]:
        lines.append(
            f"{row['context']:<6} {row['checkpointing']:>11} {row['batch_size']:>7}  "
            f"{row['lift_flops'] / 1e9:>7.2f}G {row['clip_flops'] / 1e9:>7.2f}G {row['flops_saved']:>6.1%}  "
            f"{row['lift_memory_bytes'] / 2**30:>6.2f} GiB {row['clip_memory_bytes'] / 2**30:>6.2f} GiB "
            f"{row['memory_saved']:>6.1%}"
        )
    for name, entry in scale.items():
        if isinstance(entry, dict) and entry["paper_flops_saved"] is not None:
            lines.append(
                f"the paper at n={name[1:]}: {entry['paper_flops_saved']:.1%} of FLOPs, "
                f"{entry['paper_memory_saved']:.1%} of memory"
            )
    return "\n".join([*lines, scale["why"]])

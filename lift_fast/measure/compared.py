"""compare.json: what `lift-fast compare` measures of two runs, as the report reads it."""

from typing import Any, TypedDict

from .. import foreign
from ..errors import DataError
from ..foreign import Count

_AGAIN = "make it with: lift-fast compare --lift … --clip … --json"


class _Run(TypedDict, total=False):
    flops_per_sample: Count
    peak_memory_bytes: Count
    peak_memory_from: str
    step_ms: float
    text_ms_per_step: float
    text_ms_by_context: dict[str, float]
    embed_ms_per_caption: float | None


class _Runs(TypedDict):
    lift: _Run
    clip: _Run


class _Context(TypedDict):
    context: Count


class _Length(_Context, total=False):
    lift_flops: Count
    clip_flops: Count
    lift_text_ms: float | None
    clip_text_ms: float | None


class _ScaleRow(TypedDict, total=False):
    context: Count
    checkpointing: str
    batch_size: Count
    flops_saved: float
    memory_saved: float
    lift_memory_bytes: Count
    clip_memory_bytes: Count
    lift_flops: Count
    clip_flops: Count


class _Scale(TypedDict, total=False):
    preset: str
    batch_size: Count
    regime: str
    why: str
    rows: list[_ScaleRow]


class _Compared(TypedDict):
    runs: _Runs
    savings: dict[str, float]
    paper_scale: _Scale
    cost_against_length: list[_Length]


def check_compared(content: Any) -> None:
    """Validates the content of compare.json. Raises DataError for one that compares no runs, or is not as
    `lift-fast compare` writes it."""
    if isinstance(content, dict) and "runs" not in content:
        raise DataError(f"this compare.json measured no runs; {_AGAIN}")
    try:
        foreign.check(content, _Compared)
        for name, entry in content["paper_scale"].items():
            if isinstance(entry, dict):  # by caption length
                foreign.check(entry, dict[str, float | None], name)
    except ValueError as error:
        raise DataError(f"this compare.json is not as lift-fast compare writes it ({error}); {_AGAIN}") from error

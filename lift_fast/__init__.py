"""lift-fast: contrastive image training against text embedded once (LIFT, arXiv 2506.04209), and its fused ops.

`lift_fast.load` opens a trained model. Nothing else is imported here: `from lift_fast.ops.pairs.contrastive import
contrastive` takes what it names.
"""

from typing import TYPE_CHECKING, Any

from . import former_paths as former_paths

if TYPE_CHECKING:
    from .inference import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":  # imported when it is used: it needs torch
        from .inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

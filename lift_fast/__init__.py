"""lift-fast: contrastive image training against text embedded once (LIFT, arXiv 2506.04209), and its fused ops.

Nothing is imported here: `from lift_fast.ops.pairs.contrastive import contrastive` takes what it names.
"""

from . import former_paths as former_paths

__version__ = "0.1.0"

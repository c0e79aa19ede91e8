"""Target torch-export: the encoders as graphs of torch.export, which torch loads without lift-fast."""

import io
from pathlib import Path

import torch

from ..inference import Model
from .plain import about, programs


def write(model: Model, out: Path) -> list[str]:
    """Writes image_encoder.pt2, pixels float32 [batch, 3, H, W] -> features [batch, dim] of unit length; of CLIP also
    text_encoder.pt2, tokens int64 [batch, context] -> features.
    """
    for name, program in programs(model).items():
        file = io.BytesIO()  # torch aborts the process when the disk of a path is full
        torch.export.save(program, file)
        (out / f"{name}.pt2").write_bytes(file.getbuffer())
    return [f"written by torch {torch.__version__}; an older torch may not read it", *about(model, out)]


def use(model: Model) -> str:
    """The lines that run the image encoder without lift-fast."""
    size = model.preprocess.image_size
    return f"""\
import torch

encode_image = torch.export.load("FOLDER/image_encoder.pt2").module()
features = encode_image(torch.zeros(4, 3, {size}, {size}))  # normalised pixels -> [4, dim], of unit length
"""

"""Target onnx: the encoders as ONNX graphs, for onnxruntime and the compilers that take ONNX."""

import logging
import warnings
from pathlib import Path

import torch

from ..errors import BackendError
from ..inference import Model
from .plain import about, programs

OPSET = 18
_MOST_BYTES = 2_000_000_000  # of weights in the graph's own file, which must stay below 2 GiB

ZERO_SHOT = """\
import json
import numpy as np
import onnxruntime
from PIL import Image

paths = ["image.jpg"]
settings = json.load(open("FOLDER/lift_fast.json"))["run"]["preprocessing"]
classes = np.load("FOLDER/classes.npz")  # of: lift-fast export … --names cat dog
encoder = onnxruntime.InferenceSession("FOLDER/image_encoder.onnx")


def pixels(path):
    image = Image.open(path).convert("RGB")
    size, short = settings["image_size"], min(image.size)
    image = image.resize([settings["resize_size"] * side // short for side in image.size], Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    image = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return ((image / 255 - settings["mean"]) / settings["std"]).transpose(2, 0, 1).astype(np.float32)


(features,) = encoder.run(None, {"pixels": np.stack([pixels(path) for path in paths])})
logits = classes["logit_scale"] * features @ classes["weights"].T
for path, row in zip(paths, logits):
    print(path, dict(zip(classes["names"].tolist(), np.exp(row - np.logaddexp.reduce(row)).round(3).tolist())))
"""


def write(model: Model, out: Path) -> list[str]:
    """Writes image_encoder.onnx, pixels float32 [batch, 3, H, W] -> features [batch, dim] of unit length; of CLIP also
    text_encoder.onnx, tokens int64 [batch, context] -> features. Made by torch's dynamo exporter, with opset OPSET.
    Weights of more than 2 GB lie next to the graph, in image_encoder.onnx.data.

    Raises BackendError when onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BackendError(f"{error.name} is not installed; install it with: pip install 'lift-fast[onnx]'") from error
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that torchvision, which is not needed, is missing
    try:
        for name, program in programs(model).items():
            (given,) = program.graph_signature.user_inputs
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of torch about its own code
                made = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=[given],
                    output_names=["features"],
                    dynamic_shapes=({0: "batch"},),  # its name: the program says that it is dynamic
                    verbose=False,
                )
            assert made is not None
            for part in (made.model, made.model.graph, *made.model.graph):
                part.metadata_props.clear()  # the names of torch's modules and of source files
            large = sum(tensor.nbytes for tensor in program.state_dict.values()) > _MOST_BYTES
            made.save(out / f"{name}.onnx", external_data=large)
    finally:
        logger.setLevel(level)
    return [f"ONNX, opset {OPSET}", *about(model, out)]


def use(model: Model) -> str:
    """A zero-shot classifier without torch."""
    return ZERO_SHOT

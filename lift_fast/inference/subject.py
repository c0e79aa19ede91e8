"""A Model as evaluation takes it."""

from ..eval.images import Pixels
from ..eval.subject import Subject
from .model import Model


def subject_of(model: Model) -> Subject:
    """What lift_fast.eval.run.evaluate takes of a model. Raises CacheError as Model.conditioning."""
    made = model.preprocess
    model.conditioning  # noqa: B018 - reads its file, so that an error comes before any work
    return Subject(
        encode_image=lambda pixels: model.module.encode_image(pixels.to(model.dtype)),  # type: ignore[operator]
        encode_text=lambda texts: model.encode_text(texts).cpu(),
        pixels=Pixels(made.image_size, made.resize_size, made.mean, made.std),
        device=model.device,
        description=model.description,
    )

"""Target sentence-transformers: a folder that SentenceTransformer loads, without code of its own.

It is a Router with a list of that library's modules for each kind of input, and a Normalize for both:

    image   CLIPVisionModel or ViTModel, the last norm, the mean over the patches, and the head or projection
    text    the frozen encoder and its pooling, and conditioning as a Normalize and two Dense; CLIP's text tower and
            its projection

Pooling has no mean without the class token. It gives the mean over all P + 1 tokens and the class token, from which
the linear layer after it makes ((P + 1) · mean - class) / P. LayerNorm works on "sentence_embedding" and Pooling on
"token_embeddings"; a Dense with the identity copies one to the other.

If the cache's vectors are rotated (t -> R t), the image side is rotated back: the head's last layer becomes R⁻¹ W and
R⁻¹ b. So texts are the encoder's own vectors, or those as conditioned, and all cosines are the same.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import foreign
from ..cache import Rotation
from ..errors import BackendError, ConfigError
from ..inference import Model
from ..nn import Clip, Lift
from ..nn.weights import whole_hf
from ..text.encoder import Encoder
from ..text.repository import first_line
from ..text.spec import EncoderSpec, without_path
from ..text.tokenizer import ClipTokenizer
from .hf import PREPROCESSING, TOKENS, text_config, vision_config, write_preprocessor

_FILES = whole_hf.SENTENCE_TRANSFORMERS
_IMAGE, _TEXT = Path(_FILES.image).parent, Path(_FILES.text).parent
_POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken"}  # ours -> Pooling's
_EPS = 1e-5  # of the LayerNorm module
# Texts that the text side is tried with, and by how much a unit vector may be off, by dtype of the encoder.
_TRIAL = ("a dog", "a photo of two small red dogs in the park", "Zwölf Hühner, 東京 & café", "a long caption, " * 300)
_APART = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.05}


def write(model: Model, out: Path) -> list[str]:
    """Writes the modules, and lift_head.safetensors, from which the model can be read back.

    Raises BackendError when sentence-transformers is not installed; ConfigError for a tower whose last norm or tokens
    its modules do not compute; EncoderError when the text encoder cannot be loaded.
    """
    library = _library()
    module = model.module
    assert isinstance(module, Lift | Clip)
    weights = {name: save(tensors, {"format": "pt"}) for name, tensors in whole_hf.save(module, _FILES).items()}
    with tempfile.TemporaryDirectory(dir=out) as made, _quiet():
        parts = Path(made)
        for name, data in weights.items():
            (parts / name).parent.mkdir(exist_ok=True)
            (parts / name).write_bytes(data)
        routes = {"image": _image_side(library, model, parts / _IMAGE)}
        prompt = ""
        if isinstance(module, Clip):
            routes["text"], remarks = _clip_text(library, module, parts / _TEXT), [TOKENS]
        else:
            text, prompt, remarks = _lift_text(library, model, parts / _TEXT)
            routes |= {"text": text} if text else {}
            if model.description.get("rotation"):
                remarks.append("the cache's rotation is undone, of images and texts alike: their cosines are as before")
        whole = library.SentenceTransformer(
            modules=[library.Router(routes, default_route=list(routes)[-1]), library.Normalize()],
            device="cpu",
            prompts={name: prompt for name in ("caption", "query", "document")},
            default_prompt_name="caption" if prompt else None,
        )
        whole.save(str(out), create_model_card=False)
    # Under the names that every version of transformers reads.
    for name, data in weights.items():
        (out / name).write_bytes(data)
    write_preprocessor(model.preprocess, out / _IMAGE)
    if whole_hf.layout_of(module.visual.config) == "hf_vit":  # without a pooler, for which there are no weights
        file = out / _IMAGE / "sentence_bert_config.json"
        settings = foreign.read_json(file) | {"model_kwargs": {"add_pooling_layer": False}}
        file.write_text(json.dumps(settings, indent=4), encoding="utf-8")
    if "text" in routes:
        remarks.append(
            "a call of encode takes images or texts: sentence-transformers mixes them with batch_size=1 only"
        )
    return [PREPROCESSING, *remarks]


def use(model: Model) -> str:
    """The lines that encode with sentence-transformers."""
    return """\
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER", trust_remote_code=False)
images = model.encode([Image.open("image.jpg")])
if model.supports("text"):
    texts = model.encode(["a photo of a dog", "a photo of a cat"])
    print(model.similarity(images, texts))
"""


def _image_side(library: Any, model: Model, folder: Path) -> list[Any]:
    """The modules from an image to the features, not normalised. Writes the files of transformers into `folder`."""
    module = model.module
    assert isinstance(module, Lift | Clip)
    visual, config = module.visual, module.visual.config
    width, patches = config.width, config.grid**2
    vision_config(visual).save_pretrained(folder)
    write_preprocessor(model.preprocess, folder)
    normalised = whole_hf.layout_of(config) == "hf_vit"  # ViTModel's tokens are
    if not normalised and not math.isclose(config.norm_eps, _EPS, rel_tol=1e-6):
        raise ConfigError(
            f"norm_eps is {config.norm_eps}, and the LayerNorm of sentence-transformers has {_EPS}; export to hf"
        )
    average = config.pool == "avg"
    norm_first = average and not config.norm_after_pool and not normalised
    given = "sentence_embedding" if norm_first else "token_embeddings"
    modules = [_transformer(library, folder, "image", "last_hidden_state", given)]
    norm = library.LayerNorm(width)
    norm.norm.load_state_dict(visual.ln_post.state_dict())
    if norm_first:
        modules += [norm, _dense(library, torch.eye(width), output="token_embeddings")]
    modules.append(library.Pooling(width, ("cls", "mean") if average else "cls"))
    first = (module.head.fc_1 if isinstance(module, Lift) else module.visual_projection).weight.double()
    one = torch.eye(width, dtype=torch.float64)
    mean = torch.cat([-one / patches, one * (patches + 1) / patches], dim=1)  # [width, 2 · width]
    if not (norm_first or normalised):
        modules += [*([_dense(library, mean)] if average else []), norm]
    elif average:
        first = first @ mean
    if isinstance(module, Clip):
        return [*modules, _dense(library, first)]
    second, bias = module.head.fc_2.weight.double(), module.head.fc_2.bias.double()
    if model.description.get("rotation"):
        rotation = Rotation.from_dict(model.description["rotation"], len(bias))
        second, bias = rotation.undo(second.T).T, rotation.undo(bias)
    return [*modules, _dense(library, first, module.head.fc_1.bias, nn.GELU()), _dense(library, second, bias)]


def _lift_text(library: Any, model: Model, folder: Path) -> tuple[list[Any], str, list[str]]:
    """The modules from a text to the frozen encoder's vector, as conditioned if it is, its prompt, and what to say of
    them.

    There are no modules where sentence-transformers does not give the vectors that the encoder gives lift-fast: its
    vectors of a few texts are compared.
    """
    entry = model.description.get("encoder")
    if not entry:
        return [], "", ["only images can be encoded: the run names no text encoder"]
    spec = EncoderSpec.of_dict(entry)
    only = f"only images can be encoded: the vectors of {without_path(spec.name)}"
    if spec.trust_remote_code:
        return [], "", [f"{only} come from code of its repository, which it may not run"]
    encoder = Encoder(spec, download=model.download_encoder)
    if encoder.pooling not in _POOLINGS:
        return [], "", [f"{only} are no pooling of its hidden states"]
    assert isinstance(model.module, Lift)
    taken, of = model.module.head.fc_2.out_features, "the image features"
    if model.conditioning is not None:
        taken, of = model.conditioning.source_dim, "those that are conditioned"
    if encoder.dim != taken:
        return [], "", [f"{only} have {encoder.dim} numbers, and {of} {taken}"]
    expected = encoder.encode(_TRIAL)
    pooling = library.Pooling(encoder.dim, _POOLINGS[encoder.pooling])
    if model.conditioning is not None:
        encoder.model.float()  # a Dense is float32, and takes nothing else
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    del encoder
    options = {"model_max_length": spec.max_length, "padding_side": spec.padding}
    try:
        tower = _transformer(library, folder, "text", "last_hidden_state", "token_embeddings", **options)
        tried = library.SentenceTransformer(modules=[tower, pooling, library.Normalize()], device="cpu")
        found = tried.encode([spec.prompt + text for text in _TRIAL], convert_to_tensor=True).float()
    except Exception as error:  # of many types: a class or configuration that AutoModel does not load
        return [], "", [f"{only} do not come from sentence-transformers ({first_line(error)})"]
    apart = float(torch.linalg.vector_norm(found - expected, dim=1).max())
    if not apart <= _APART[spec.dtype]:
        return [], "", [f"{only} are others in sentence-transformers (by {apart:.1g}): it adds no end token, or pads"]
    modules = [tower, pooling]
    remark = f"texts get the vectors of {without_path(spec.name)}, which is in the folder, under its own licence"
    if (conditioning := model.conditioning) is not None:
        # The mean is subtracted first, by a layer of its own: a bias after the product would be less exact, as the
        # deviations are far smaller than the mean.
        centred = _dense(library, torch.eye(conditioning.source_dim), -conditioning.mean)
        modules += [library.Normalize(), centred, _dense(library, conditioning.weight())]
        remark += ", as conditioned"
    return modules, spec.prompt, [remark]


def _clip_text(library: Any, module: Clip, folder: Path) -> list[Any]:
    """The modules from a text to CLIP's features, not normalised."""
    projection = module.text_projection
    text_config(module.text.config, projection.out_features).save_pretrained(folder)
    ClipTokenizer(module.text.config.context).save(folder)
    tower = _transformer(library, folder, "text", "pooler_output", "sentence_embedding")
    return [tower, _dense(library, projection.weight)]


def _transformer(library: Any, folder: Path, kind: str, given: str, output: str, **options: Any) -> Any:
    """The module of a model of transformers. given: the field of its output that becomes the feature `output`.
    options: of its tokenizer."""
    modality = {kind: {"method": "forward", "method_output_name": given}}
    local = {"trust_remote_code": False, "local_files_only": True}
    return library.Transformer(
        str(folder),
        modality_config=modality,
        module_output_name=output,
        model_kwargs=dict(local),
        config_kwargs=dict(local),
        processor_kwargs=local | options,
    )


def _dense(
    library: Any, weight: Tensor, bias: Tensor | None = None, activation: Any = None, output: str | None = None
) -> Any:
    """A linear layer: weight [out, in] and bias [out]; activation after it. output: the feature that it writes."""
    layer = library.Dense(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        activation_function=activation or nn.Identity(),
        module_output_name=output,
    )
    layer.linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def _library() -> SimpleNamespace:
    """The modules of sentence-transformers. Raises BackendError."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import modules
    except ImportError as error:  # or it is older
        raise BackendError(
            "sentence-transformers 5.4 or newer writes this export; install it with: pip install -U "
            "sentence-transformers"
        ) from error
    names = ("Dense", "LayerNorm", "Normalize", "Pooling", "Router", "Transformer")
    return SimpleNamespace(SentenceTransformer=SentenceTransformer, **{name: getattr(modules, name) for name in names})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and warnings of transformers, while it loads and saves the model's parts."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

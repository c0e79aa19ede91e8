"""The encoders in plain torch, over the same weights: no op of lift-fast, so that other runtimes take the graph.

They compute what `nn.Vit`, `nn.Lift` and `nn.Clip` define, for inference only, and images of the tower's own size.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inference import Model
from ..nn import Clip, Lift
from ..nn.transformer import Block, Transformer
from ..nn.vit import Vit
from ..text.tokenizer import ClipTokenizer
from .hf import TOKENS

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class ImageEncoder(nn.Module):
    """Normalised pixels [batch, 3, image_size, image_size] -> features [batch, dim] of unit length."""

    def __init__(self, model: Lift | Clip):
        super().__init__()
        self.visual = model.visual
        self.projection = model.head if isinstance(model, Lift) else model.visual_projection

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.projection(_tower(self.visual, pixels)), dim=-1)


class TextEncoder(nn.Module):
    """Token ids int64 [batch, context] of a Clip -> features [batch, dim] of unit length."""

    def __init__(self, model: Clip):
        super().__init__()
        self.text, self.projection = model.text, model.text_projection

    def forward(self, tokens: Tensor) -> Tensor:
        text = self.text
        x = text.token_embedding(tokens) + text.positional_embedding
        x = _blocks(text.transformer, x)
        ends = tokens.argmax(dim=1)[:, None, None].expand(-1, 1, x.shape[2])
        return F.normalize(self.projection(_layernorm(text.ln_final, x.gather(1, ends)[:, 0])), dim=-1)


def programs(model: Model) -> dict[str, torch.export.ExportedProgram]:
    """The graphs of a model's encoders, whose batch may be of any size: "image_encoder", of CLIP also "text_encoder".

    They name no source files, so that what is saved says nothing of this machine.
    """
    module, size = model.module, model.preprocess.image_size
    assert isinstance(module, Lift | Clip)
    encoders: dict[str, tuple[nn.Module, Tensor]] = {
        "image_encoder": (ImageEncoder(module), torch.zeros(2, 3, size, size))
    }
    if isinstance(module, Clip):
        tokens = torch.zeros(2, module.text.config.context, dtype=torch.int64)
        encoders["text_encoder"] = TextEncoder(module), tokens
    found = {}
    for name, (encoder, example) in encoders.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about its own code
            program = torch.export.export(encoder.eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        found[name] = program
    return found


def about(model: Model, out: Path) -> list[str]:
    """Writes what goes with the graphs into `out`: of CLIP the tokenizer. Returns what holds for all graphs."""
    module, size = model.module, model.preprocess.image_size
    said = [f"the graphs are float32; the batch is free, images are {size} x {size}"]
    if isinstance(module, Clip):
        context = module.text.config.context
        ClipTokenizer(context).save(out)
        return [*said, f"the text encoder takes token ids, int64 [batch, {context}]; {TOKENS}"]
    return [*said, "the text encoder is not in the folder; classes.npz, with --names, has the features of class names"]


def _tower(visual: Vit, pixels: Tensor) -> Tensor:
    config = visual.config
    x = visual.patch_embed(pixels).flatten(2).transpose(1, 2)
    if config.class_token:
        x = torch.cat([visual.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
    x = x + visual.positional_embedding
    x = _blocks(visual.transformer, _layernorm(visual.ln_pre, x) if config.pre_norm else x)
    if config.norm_after_pool or config.pool == "cls":
        return _layernorm(visual.ln_post, visual.pooled(x))
    return visual.pooled(_layernorm(visual.ln_post, x))


def _blocks(transformer: Transformer, x: Tensor) -> Tensor:
    activate = _ACTIVATIONS[transformer.activation]
    for block in transformer.blocks:
        assert isinstance(block, Block)
        qkv = block.qkv(_layernorm(block.ln_1, x)).unflatten(2, (3, transformer.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [batch, heads, tokens, head_dim] each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=transformer.causal)
        x = x + block.proj(attended.transpose(1, 2).flatten(2))
        x = x + block.fc_2(activate(block.fc_1(_layernorm(block.ln_2, x))))
    return x


def _layernorm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

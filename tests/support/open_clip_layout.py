"""open_clip's image tower and LIFT's authors' head, independent of lift_fast: their keys, and their features."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lift_fast.nn import VitConfig

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def random_state(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {key: 0.3 * torch.randn(shape, dtype=dtype) for key, shape in shapes.items()}


WIDTH, LAYERS, MLP, PATCH, GRID = 128, 2, 200, 4, 3  # two heads with a head_dim of 64, as load assumes
CONFIG = VitConfig(PATCH * GRID, PATCH, WIDTH, LAYERS, heads=2, mlp_dim=MLP)


def open_clip_shapes(prefix: str = "visual.", pre_norm: bool = True) -> dict[str, tuple[int, ...]]:
    shapes = {
        "class_embedding": (WIDTH,),
        "positional_embedding": (GRID**2 + 1, WIDTH),
        "conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    if pre_norm:
        shapes |= {"ln_pre.weight": (WIDTH,), "ln_pre.bias": (WIDTH,)}
    for n in range(LAYERS):
        block = {
            "ln_1.weight": (WIDTH,),
            "ln_1.bias": (WIDTH,),
            "attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "attn.in_proj_bias": (3 * WIDTH,),
            "attn.out_proj.weight": (WIDTH, WIDTH),
            "attn.out_proj.bias": (WIDTH,),
            "ln_2.weight": (WIDTH,),
            "ln_2.bias": (WIDTH,),
            "mlp.c_fc.weight": (MLP, WIDTH),
            "mlp.c_fc.bias": (MLP,),
            "mlp.c_proj.weight": (WIDTH, MLP),
            "mlp.c_proj.bias": (WIDTH,),
        }
        shapes |= {f"transformer.resblocks.{n}.{key}": shape for key, shape in block.items()}
    shapes |= {"ln_post.weight": (WIDTH,), "ln_post.bias": (WIDTH,)}
    return {prefix + key: shape for key, shape in shapes.items()}


CLIP_TEXT = {
    "positional_embedding": (9, 16),
    "text_projection": (16, 20),
    "transformer.resblocks.0.ln_1.weight": (16,),
    "transformer.resblocks.0.attn.in_proj_weight": (48, 16),
    "token_embedding.weight": (60, 16),
    "ln_final.weight": (16,),
    "ln_final.bias": (16,),
}
CUSTOM_TEXT = {f"text.{key}": shape for key, shape in CLIP_TEXT.items()} | {"logit_bias": ()}

LIFT_HEAD = {
    "mlp_projector.projector.0.weight": (24, WIDTH),
    "mlp_projector.projector.0.bias": (24,),
    "mlp_projector.projector.2.weight": (24, 24),
    "mlp_projector.projector.2.bias": (24,),
}


@torch.no_grad()
def open_clip_features(state, pixels, *, prefix="visual.", activation="gelu", pool="cls", ln_after=False, eps=1e-5):
    s = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), s[f"{name}.weight"], s[f"{name}.bias"], eps)

    x = F.conv2d(pixels, s["conv1.weight"], stride=PATCH).flatten(2).permute(0, 2, 1)
    x = torch.cat([s["class_embedding"].expand(len(x), 1, -1), x], dim=1) + s["positional_embedding"]
    if "ln_pre.weight" in s:
        x = norm(x, "ln_pre")
    for n in range(LAYERS):
        block = f"transformer.resblocks.{n}"
        attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=pixels.dtype)
        attention.load_state_dict({key: s[f"{block}.attn.{key}"] for key in attention.state_dict()})
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.linear(norm(x, f"{block}.ln_2"), s[f"{block}.mlp.c_fc.weight"], s[f"{block}.mlp.c_fc.bias"])
        x = x + F.linear(ACTIVATIONS[activation](y), s[f"{block}.mlp.c_proj.weight"], s[f"{block}.mlp.c_proj.bias"])
    if not ln_after:
        x = norm(x, "ln_post")
    x = x[:, 0] if pool == "cls" else x[:, 1:].mean(dim=1)
    return norm(x, "ln_post") if ln_after else x


@torch.no_grad()
def lift_features(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The image features of LIFT's authors' model, not normalised: tower, mean over the patches, head."""
    x = open_clip_features(state, pixels, pool="avg")
    if "visual.proj" in state:
        x = x @ state["visual.proj"]
    first, second = (f"mlp_projector.projector.{n}" for n in (0, 2))
    x = F.gelu(F.linear(x, state[f"{first}.weight"], state[f"{first}.bias"]))
    return F.linear(x, state[f"{second}.weight"], state[f"{second}.bias"])

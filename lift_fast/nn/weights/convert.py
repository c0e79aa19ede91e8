"""State dict to tower and back, by the tables of layouts.py."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops.transformer.contract import Activation
from ..config import VitConfig
from ..head import Head
from ..vit import Vit
from .files import read, told
from .layouts import HEADS, REFUSED, TABLES, Layout, Names

# The fields of VitConfig that no shape shows.
_CONVENTIONS = ("heads", "activation", "norm_eps", "pool", "norm_after_pool", "patch_dropout")


@dataclass(frozen=True)
class Loaded:
    """What a state dict held of an image tower."""

    visual: Vit
    layout: Layout
    projection: Tensor | None
    """Into the joint space, [dim, width] in every layout: Clip's visual_projection.weight."""
    head: Head | None
    logit_scale: Tensor | None
    left_out: tuple[str, ...]
    """Keys of other parts: the text tower, a classifier, a pooler."""


def load(
    source: Mapping[str, Tensor] | str | Path,
    layout: Layout | None = None,
    *,
    config: VitConfig | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    activation: Activation | None = None,
    norm_eps: float | None = None,
    pool: Literal["avg", "cls"] | None = None,
    norm_after_pool: bool | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Loaded:
    """The image tower of a state dict, or of a file or folder (`read`), as new tensors of dtype (None: their own).

    Sizes come from the shapes, layout from the keys. What they do not say comes from the arguments, or else from
    config, the folder's configuration, or the layout's defaults (docs/weights.md). With another image_size, or
    config's, positions are interpolated. Raises ConfigError for a key that is missing, unknown or of another shape.
    """
    state = source if isinstance(source, Mapping) else read(source)
    odd = [key for key, tensor in state.items() if not isinstance(tensor, Tensor)]
    if odd:
        raise ConfigError(f"not tensors: {_listed(odd)}; load takes a model's state dict")
    names, prefix = _recognised(state, layout)
    conventions = {} if isinstance(source, Mapping) else told(source)
    conventions |= {key: getattr(config, key) for key in _CONVENTIONS} if config else {}
    given = {"heads": heads, "activation": activation, "norm_eps": norm_eps, "pool": pool}
    given |= {"norm_after_pool": norm_after_pool}
    conventions |= {key: value for key, value in given.items() if value is not None}
    found = _config(state, names, prefix, conventions)
    if config:
        _same_sizes(found, config)
        image_size = image_size or config.image_size

    take = _Take(state, dtype)
    with torch.device("meta"):
        visual = Vit(found)
    tensors = {}
    for name, parameter in visual.named_parameters():
        keys = [prefix + key for key in names.keys(name)]
        rows, *others = parameter.shape
        bare = name == "positional_embedding" and _bare(state[keys[0]], found)
        rows -= bare
        leading = (1,) * names.leading.get(name, 0)
        tensors[name] = take(keys, (*leading, rows // len(keys), *others), (rows, *others))
        if bare:  # the class token has no position: one that adds nothing
            tensors[name] = torch.cat([torch.zeros_like(tensors[name][:1]), tensors[name]])
    width, projection, logit_scale = found.width, None, None
    key = names.projection_key(prefix)
    if key is not None and key in state:
        width = state[key].shape[-1 if names.transposed else 0] if state[key].dim() else 0
        there = (found.width, width) if names.transposed else (width, found.width)
        projection = take([key], there)
        projection = projection.T.contiguous() if names.transposed else projection
    head = _head(state, names, width, found.activation, take)
    key = names.logit_scale
    if key is not None and key in state:
        logit_scale = take([key], (1,) * min(1, state[key].dim()), ())
    left_out = tuple(key for key in state if key not in take.keys and names.is_other(prefix, key))
    unknown = [key for key in state if key not in take.keys and key not in set(left_out)]
    take.check(unknown, names, prefix)

    visual.load_state_dict(tensors, assign=True)
    if image_size and image_size != found.image_size:
        visual.resize(image_size)
    return Loaded(visual.requires_grad_(), names.layout, projection, head, logit_scale, left_out)


def save(
    visual: Vit,
    layout: Layout,
    *,
    projection: Tensor | None = None,
    head: Head | None = None,
    logit_scale: Tensor | None = None,
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tower's state dict in another layout, as new tensors of the tower's dtypes; projection is [dim, width].

    into: the state dict of the model that it is for. It decides between spellings of one layout (prefixes, transformers
    4 and 5), and its other keys are kept, so that the answer suits load_state_dict(strict=True). Without it the keys
    are the layout's most usual, and only those of what is given. Raises ConfigError for a tower that the layout's
    models do not compute, and for what `into` has no place for.
    """
    if into is None:
        names = min(_tables(layout), key=lambda table: len(_unfit(table, visual.config)))
        prefix = next(iter(names.prefixes))
    else:
        names, prefix = _recognised(into, layout)
    unfit = _unfit(names, visual.config)
    if unfit:
        which = f"no model of {layout} computes" if into is None else "the model of `into` does not compute"
        raise ConfigError(f"{which} this tower: {', '.join(unfit)}")
    state: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = dict(visual.named_parameters())
    positions = names.keys("positional_embedding")[0]
    if into is not None and prefix + positions in into and _bare(into[prefix + positions], visual.config):
        # No position for the class token there: it goes into the token.
        first = ours["positional_embedding"][0]
        ours |= {"class_embedding": ours["class_embedding"] + first}
        ours |= {"positional_embedding": ours["positional_embedding"][1:]}
    for name, tensor in ours.items():
        keys = names.keys(name)
        for key, piece in zip(keys, tensor.chunk(len(keys)) if len(keys) > 1 else (tensor,), strict=True):
            state[prefix + key] = piece[(None,) * names.leading.get(name, 0)]
    if projection is not None:
        if projection.dim() != 2 or projection.shape[1] != visual.config.width:
            raise ConfigError(f"projection must be [dim, {visual.config.width}], not {list(projection.shape)}")
        key = _place(names.projection_key(prefix), layout, "projection")
        state[key] = projection.T if names.transposed else projection
    if logit_scale is not None:
        state[_place(names.logit_scale, layout, "logit_scale")] = logit_scale
    if head is not None:
        _check_head(visual.config.activation)
        for name, tensor in head.named_parameters():
            state[_place(names.head_keys().get(name), layout, "head")] = tensor
    state = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    if into is None:
        return state
    for key in state.keys() & into.keys():
        if state[key].numel() == into[key].numel() == 1:
            state[key] = state[key].reshape(into[key].shape)  # logit_scale: [] or [1]
    parts = {names.projection_key(prefix), names.logit_scale, *names.head_keys().values()}
    kept = {*state, *parts, *(key for key in into if names.is_other(prefix, key))}
    problems = {
        "keys that `into` has not": [key for key in state if key not in into],
        "keys that only `into` has": [k for k in into if k not in kept],
        "other shapes than `into`'s": [key for key in state if key in into and state[key].shape != into[key].shape],
    }
    found = [f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ConfigError(f"this tower is not the one of `into`; {'; '.join(found)}")
    return {key: state.get(key, tensor) for key, tensor in into.items()}


class _Take:
    """Takes tensors from a state dict, keeps account of the keys, and complains once, of all of them."""

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype | None):
        self.state, self.dtype = state, dtype
        self.keys: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def __call__(self, keys: list[str], there: tuple[int, ...], ours: tuple[int, ...] | None = None) -> Tensor:
        """The tensors at keys, each of the shape `there`, one below the other, new, in the shape `ours`."""
        ours = there if ours is None else ours
        self.keys |= set(keys)
        missing = [key for key in keys if key not in self.state]
        wrong = []
        for key in set(keys) - set(missing):
            tensor = self.state[key]
            if tensor.shape != there:
                wrong.append(f"{key} {list(tensor.shape)}, not {list(there)}")
            elif not tensor.is_floating_point() or tensor.layout != torch.strided:
                wrong.append(f"{key} {tensor.dtype}, {tensor.layout}, not plain floating-point numbers")
        self.missing += missing
        self.wrong += wrong
        if missing or wrong:
            return torch.empty(ours, device="meta")  # check will raise
        pieces = [self.state[key].detach() for key in keys]
        tensor = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(ours)
        return tensor.to(self.dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)

    def check(self, unknown: list[str], names: Names, prefix: str) -> None:
        """Raises ConfigError unless every key was there, of its shape, and known."""
        problems = {"missing": self.missing, "of another shape or kind": self.wrong, "unknown": unknown}
        found = [f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys]
        if found:
            raise ConfigError(
                f"not the image tower of {names.layout} (under the prefix {prefix!r}); {'; '.join(found)}. "
                "Name another layout, or leave out the keys that are not the tower's"
            )


def _config(state: Mapping[str, Tensor], names: Names, prefix: str, conventions: Mapping[str, Any]) -> VitConfig:
    """The tower's, of its shapes and the conventions that are known. Raises ConfigError."""
    tower = [key for key in state if key.startswith(prefix) and not names.is_other(prefix, key)]
    for pattern, what in REFUSED.items():
        shown = [key for key in tower if re.search(pattern, key)]
        if shown:
            raise ConfigError(f"this tower does not compute {what}, which the weights need: {_listed(shown)}")

    def key(name: str) -> str:
        return prefix + names.keys(name)[0]

    def has(convention: str, name: str) -> bool:
        return names.fixed[convention] if convention in names.fixed else key(name) in state

    needed = [key(name) for name in ("patch_embed.weight", "positional_embedding", "transformer.blocks.0.fc_1.weight")]
    missing = [k for k in needed if k not in state]
    if missing:
        raise ConfigError(f"not the image tower of {names.layout}; missing: {_listed(missing)}")
    patch, positions, fc_1 = (state[k] for k in needed)
    if patch.dim() != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3] or positions.dim() < 2:
        shapes = f"{needed[0]} {list(patch.shape)}, {needed[1]} {list(positions.shape)}"
        raise ConfigError(f"not [width, 3, patch_size, patch_size] for square patches, and positions: {shapes}")
    width, rows, mlp_dim = patch.shape[0], positions.shape[-2], fc_1.shape[0] if fc_1.dim() else 0
    fc_2 = state.get(key("transformer.blocks.0.fc_2.weight"))
    if fc_2 is not None and fc_2.dim() == 2 and fc_2.shape[1] * 2 == mlp_dim:
        raise ConfigError(f"this tower does not compute SwiGLU, whose halves are one matrix in {needed[2]}")
    class_token = has("class_token", "class_embedding")
    grid = math.isqrt(max(0, rows - class_token))
    if grid < 1 or grid**2 != rows - class_token:
        grid = math.isqrt(rows)
        if grid < 1 or grid**2 != rows or not names.bare_positions:
            token = "and one, for the class token" if class_token else f"(there is no {key('class_embedding')})"
            raise ConfigError(f"{needed[1]}: {rows} positions; square pictures have a square number {token}")
    blocks = re.compile(re.escape(prefix + names.blocks).replace(r"\{n\}", r"(\d+)"))
    if "heads" not in conventions and width not in HEADS and width % 64:
        raise ConfigError(f"how many heads a tower of width {width} has is not to be seen: say heads=")
    said = {name: value for name, value in names.fixed.items() if name in _CONVENTIONS}
    said = {"heads": HEADS.get(width, width // 64), "pool": "cls" if class_token else "avg"} | said
    return VitConfig(
        image_size=grid * patch.shape[2],
        patch_size=patch.shape[2],
        width=width,
        layers=len({m[1] for m in map(blocks.match, tower) if m}),
        mlp_dim=None if mlp_dim == 4 * width else mlp_dim,
        class_token=class_token,
        patch_bias=has("patch_bias", "patch_embed.bias"),
        pre_norm=has("pre_norm", "ln_pre.weight"),
        **(said | dict(names.defaults) | dict(conventions)),
    )


def _recognised(state: Mapping[str, Tensor], layout: Layout | None) -> tuple[Names, str]:
    """The table that most of its marks speak for, and the prefix under which they lie. Raises ConfigError."""
    best, most = None, 0
    for names in _tables(layout):
        for prefix in names.prefixes:
            marks = [prefix + key for key in names.marks()]
            count = sum(key in state for key in [*marks, *names.head_keys().values()])
            if marks[0] in state and count > most:
                best, most = (names, prefix), count
    if best is None:
        wanted = sorted({prefix + names.marks()[0] for names in _tables(layout) for prefix in names.prefixes})
        raise ConfigError(
            f"not an image tower of {layout or 'any layout that is known'}: none of {', '.join(wanted)} is there. "
            f"The keys are {_listed(state) or 'none'}"
        )
    return best


def _tables(layout: Layout | None) -> list[Names]:
    if layout is not None and layout not in get_args(Layout):
        raise ConfigError(f"no layout {layout!r}; there are: {', '.join(get_args(Layout))}")
    return [names for names in TABLES if layout in (None, names.layout)]


def _unfit(names: Names, config: VitConfig) -> list[str]:
    """The fields in which a tower is not what the layout's models are."""
    free = {"norm_after_pool"} if config.pool == "cls" else set()  # it makes no difference to the class token
    fixed = [(name, value) for name, value in names.fixed.items() if name not in free]
    return [
        f"{name} is {getattr(config, name)!r}, not {value!r}" for name, value in fixed if getattr(config, name) != value
    ]


def _same_sizes(found: VitConfig, config: VitConfig) -> None:
    """Raises ConfigError where config says other shapes than were found."""
    is_, wanted = (replace(c, image_size=c.patch_size, mlp_dim=c.hidden) for c in (found, config))
    names = [f.name for f in fields(VitConfig) if f.name not in _CONVENTIONS]
    other = [n for n in names if getattr(is_, n) != getattr(wanted, n)]
    if other:
        pairs = (f"{n} is {getattr(is_, n)}, not {getattr(wanted, n)}" for n in other)
        raise ConfigError(f"the weights are not those of config's tower: {', '.join(pairs)}")


def _bare(positions: Tensor, config: VitConfig) -> bool:
    """Whether positions are the patches' alone, and the tower has a class token."""
    return config.class_token and positions.shape[-2] == config.grid**2


def _head(state: Mapping[str, Tensor], names: Names, width: int, activation: str, take: _Take) -> Head | None:
    keys = names.head_keys()
    if not any(key in state for key in keys.values()):
        return None
    _check_head(activation)
    bias = state.get(keys["fc_1.bias"])
    with torch.device("meta"):
        head = Head(width, 0 if bias is None else bias.numel())
    tensors = {name: take([keys[name]], tuple(parameter.shape)) for name, parameter in head.named_parameters()}
    head.load_state_dict(tensors, assign=True)
    return head.requires_grad_()


def _check_head(activation: str) -> None:
    """Raises ConfigError: where LIFT's authors build their tower with another activation, so is their head."""
    if activation != "gelu":
        raise ConfigError(f"this head computes gelu, not the tower's {activation}, as its authors' would; leave it out")


def _place(key: str | None, layout: Layout, what: str) -> str:
    if key is None:
        raise ConfigError(f"{layout} has no place for {what}")
    return key


def _listed(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

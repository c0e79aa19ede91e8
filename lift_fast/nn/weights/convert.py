"""Converts state dicts to a tower and back, by the tables of layouts.py."""

import math
import re
import warnings
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
from ..tensors import FLOATS, unusable
from ..vit import Vit
from .files import config_fields, read
from .layouts import HEADS, NOT_COMPUTED, OPENAI, TABLES, Layout, LayoutTable

# The fields of VitConfig that cannot be read from the shapes.
_CONVENTIONS = ("heads", "activation", "norm_eps", "pool", "norm_after_pool", "patch_dropout")


@dataclass(frozen=True)
class Loaded:
    """An image tower, and the other parts of a state dict that lift-fast has a place for."""

    visual: Vit
    layout: Layout
    projection: Tensor | None
    """The matrix into the joint space, [dim, width] for every layout, as Clip's visual_projection.weight."""
    head: Head | None
    """LIFT's head."""
    logit_scale: Tensor | None
    """The logarithm of the logit scale, of shape []."""
    left_out: tuple[str, ...]
    """The keys that were not loaded: of a text tower, a classifier or a pooler."""


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
    """Loads the image tower of a state dict, or of a file or folder that `read` accepts, as new tensors.

    layout: None to recognise it by the keys. dtype: None to keep each tensor's own. Sizes are read from the shapes.
    heads, activation, norm_eps, pool and norm_after_pool, which shapes do not show, come from the arguments, else from
    config, else from the folder's configuration file, else from the layout's defaults (docs/weights.md). config: the
    expected configuration, whose sizes must be those found. image_size: if it, or config's, is another one than the
    weights', positions are interpolated.

    Warns where the activation was not given in any of these ways and the layout's weights are published with two.
    Raises ConfigError for a key that is missing, unknown or of another shape, for a model that this tower does not
    compute, for a layout, file or setting that is not valid, and for weights of a file that are not finite.
    """
    state = source if isinstance(source, Mapping) else read(source)
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ConfigError(f"not tensors: {_listed(other)}; load takes a model's state dict")
    table, prefix = _recognised(state, layout)
    conventions = {} if isinstance(source, Mapping) else config_fields(source)
    conventions |= {key: getattr(config, key) for key in _CONVENTIONS} if config else {}
    given = {"heads": heads, "activation": activation, "norm_eps": norm_eps, "pool": pool}
    given |= {"norm_after_pool": norm_after_pool}
    conventions |= {key: value for key, value in given.items() if value is not None}
    found = _config(state, table, prefix, conventions)
    if config:
        _check_sizes(found, config)
        image_size = image_size or config.image_size

    take = _Taker(state, dtype)
    with torch.device("meta"):
        visual = Vit(found)
    tensors = {}
    for name, parameter in visual.named_parameters():
        keys = [prefix + key for key in table.keys(name)]
        rows, *columns = parameter.shape
        patches_only = name == "positional_embedding" and _patches_only(state[keys[0]], found)
        rows -= patches_only
        leading = (1,) * table.leading_ones.get(name, 0)
        tensors[name] = take(keys, (*leading, rows // len(keys), *columns), (rows, *columns))
        if patches_only:  # the class token has no position in the state dict: give it one of zeros
            tensors[name] = torch.cat([torch.zeros_like(tensors[name][:1]), tensors[name]])
    width, projection, logit_scale = found.width, None, None
    key = table.projection_key(prefix)
    if key is not None and key in state:
        width = state[key].shape[-1 if table.transposed else 0] if state[key].dim() else 0
        projection = take([key], (found.width, width) if table.transposed else (width, found.width))
        projection = projection.T.contiguous() if table.transposed else projection
    head = _head(state, table, width, found.activation, take)
    key = table.logit_scale
    if key is not None and key in state:
        logit_scale = take([key], (1,) * min(1, state[key].dim()), ())
    left_out = tuple(key for key in state if key not in take.keys and table.is_other_part(prefix, key))
    unknown = [key for key in state if key not in take.keys and key not in set(left_out)]
    take.check(unknown, table, prefix)
    # A state dict that the caller made may hold anything that its numbers can be.
    if not isinstance(source, Mapping) and (problem := unusable({key: state[key] for key in take.keys})):
        raise ConfigError(f"{source}: {problem}; these weights have diverged or are damaged, take others")

    visual.load_state_dict(tensors, assign=True)
    if image_size and image_size != found.image_size:
        visual.resize(image_size)
    return Loaded(visual.requires_grad_(), table.layout, projection, head, logit_scale, left_out)


def save(
    visual: Vit,
    layout: Layout,
    *,
    projection: Tensor | None = None,
    head: Head | None = None,
    logit_scale: Tensor | None = None,
    into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The tower's state dict in another layout, as new tensors of the tower's dtypes.

    projection: [dim, width]; head, logit_scale: also saved, in layouts that have them. into: the state dict of the
    target model. It selects among a layout's variants (prefixes, transformers 4 or 5), and its keys that are not the
    tower's are kept, so that the result is valid for load_state_dict(strict=True). Without it the keys are those of the
    layout's most usual variant, and only of the parts that are passed.

    Raises ConfigError for a tower that the layout's models do not compute, and for a part that the layout, or `into`,
    does not have.
    """
    if into is None:
        table = min(_tables(layout), key=lambda table: len(_unsupported(table, visual.config)))
        prefix = next(iter(table.prefixes))
    else:
        table, prefix = _recognised(into, layout)
    unsupported = _unsupported(table, visual.config)
    if unsupported:
        which = f"no model of {layout} computes" if into is None else "the model of `into` does not compute"
        raise ConfigError(f"{which} this tower: {', '.join(unsupported)}")
    state: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = dict(visual.named_parameters())
    positions = table.keys("positional_embedding")[0]
    if into is not None and prefix + positions in into and _patches_only(into[prefix + positions], visual.config):
        # The other model has no position for the class token: add it to the token itself.
        first = ours["positional_embedding"][0]
        ours |= {"class_embedding": ours["class_embedding"] + first}
        ours |= {"positional_embedding": ours["positional_embedding"][1:]}
    for name, tensor in ours.items():
        keys = table.keys(name)
        for key, piece in zip(keys, tensor.chunk(len(keys)) if len(keys) > 1 else (tensor,), strict=True):
            state[prefix + key] = piece[(None,) * table.leading_ones.get(name, 0)]
    if projection is not None:
        if projection.dim() != 2 or projection.shape[1] != visual.config.width:
            raise ConfigError(f"projection must be [dim, {visual.config.width}], not {list(projection.shape)}")
        key = _checked_key(table.projection_key(prefix), layout, "projection")
        state[key] = projection.T if table.transposed else projection
    if logit_scale is not None:
        state[_checked_key(table.logit_scale, layout, "logit_scale")] = logit_scale
    if head is not None:
        if table.head_activation:
            _check_head(visual.config.activation)
        for name, tensor in head.named_parameters():
            state[_checked_key(table.head_keys().get(name), layout, "head")] = tensor
    state = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    if into is None:
        return state
    for key in state.keys() & into.keys():
        if state[key].numel() == into[key].numel() == 1:
            state[key] = state[key].reshape(into[key].shape)  # logit_scale: [] or [1]
    parts = {table.projection_key(prefix), table.logit_scale, *table.head_keys().values()}
    kept = {*state, *parts, *(key for key in into if table.is_other_part(prefix, key))}
    problems = {
        "keys that `into` does not have": [key for key in state if key not in into],
        "keys that only `into` has": [key for key in into if key not in kept],
        "other shapes than `into`'s": [key for key in state if key in into and state[key].shape != into[key].shape],
    }
    found = [f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ConfigError(f"this tower is not the one of `into`; {'; '.join(found)}")
    return {key: state.get(key, tensor) for key, tensor in into.items()}


class _Taker:
    """Takes tensors from a state dict, and records the keys and the problems, which `check` reports all at once."""

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype | None):
        self.state, self.dtype = state, dtype
        self.keys: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def __call__(self, keys: list[str], theirs: tuple[int, ...], ours: tuple[int, ...] | None = None) -> Tensor:
        """A new tensor: those at `keys`, each of shape `theirs`, concatenated along dim 0, in the shape `ours`."""
        ours = theirs if ours is None else ours
        self.keys |= set(keys)
        missing = [key for key in keys if key not in self.state]
        wrong = []
        for key in set(keys) - set(missing):
            tensor = self.state[key]
            if tensor.shape != theirs:
                wrong.append(f"{key} {list(tensor.shape)}, not {list(theirs)}")
            elif tensor.dtype not in FLOATS or tensor.layout != torch.strided:
                wrong.append(f"{key} {tensor.dtype}, {tensor.layout}, not plain floating-point numbers")
        self.missing += missing
        self.wrong += wrong
        if missing or wrong:
            return torch.empty(ours, device="meta")  # `check` will raise
        pieces = [self.state[key].detach() for key in keys]
        tensor = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(ours)
        return tensor.to(self.dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)

    def check(self, unknown: list[str], table: LayoutTable, prefix: str) -> None:
        """Raises ConfigError if a key was missing, had another shape or dtype, or is unknown."""
        problems = {"missing": self.missing, "of another shape or kind": self.wrong, "unknown": unknown}
        found = [f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys]
        if found:
            raise ConfigError(
                f"not the image tower of {table.layout} (under the prefix {prefix!r}); {'; '.join(found)}. "
                "Name another layout, or leave out the keys that are not the tower's"
            )


def _config(state: Mapping[str, Tensor], table: LayoutTable, prefix: str, conventions: Mapping[str, Any]) -> VitConfig:
    """The tower's configuration, from its shapes and from `conventions`: values of fields that shapes do not show.

    Raises ConfigError.
    """
    tower = [key for key in state if key.startswith(prefix) and not table.is_other_part(prefix, key)]
    for pattern, what in NOT_COMPUTED.items():
        matching = [key for key in tower if re.search(pattern, key)]
        if matching:
            raise ConfigError(f"this tower does not compute {what}, which the weights need: {_listed(matching)}")

    def key(name: str) -> str:
        return prefix + table.keys(name)[0]

    def has(convention: str, name: str) -> bool:
        return table.fixed[convention] if convention in table.fixed else key(name) in state

    needed = [key(name) for name in ("patch_embed.weight", "positional_embedding", "transformer.blocks.0.fc_1.weight")]
    missing = [k for k in needed if k not in state]
    if missing:
        raise ConfigError(f"not the image tower of {table.layout}; missing: {_listed(missing)}")
    patch, positions, fc_1 = (state[k] for k in needed)
    if patch.dim() != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3] or positions.dim() < 2:
        shapes = f"{needed[0]} {list(patch.shape)}, {needed[1]} {list(positions.shape)}"
        raise ConfigError(
            "the patch embedding is not [width, 3, patch_size, patch_size] for square patches, or the positions have "
            f"less than two dimensions: {shapes}"
        )
    width, rows, mlp_dim = patch.shape[0], positions.shape[-2], fc_1.shape[0] if fc_1.dim() else 0
    fc_2 = state.get(key("transformer.blocks.0.fc_2.weight"))
    if fc_2 is not None and fc_2.dim() == 2 and fc_2.shape[1] * 2 == mlp_dim:
        raise ConfigError(f"this tower does not compute SwiGLU, whose two matrices are joined in {needed[2]}")
    class_token = has("class_token", "class_embedding")
    grid = math.isqrt(max(0, rows - class_token))
    if grid < 1 or grid**2 != rows - class_token:
        grid = math.isqrt(rows)
        if grid < 1 or grid**2 != rows or not table.patches_only:
            token = "plus one for the class token" if class_token else f"(there is no {key('class_embedding')})"
            raise ConfigError(f"{needed[1]}: {rows} positions; a square image has a square number of them, {token}")
    blocks = re.compile(re.escape(prefix + table.blocks).replace(r"\{n\}", r"(\d+)"))
    if "heads" not in conventions and width not in HEADS and width % 64:
        raise ConfigError(f"the weights do not show how many heads a tower of width {width} has; pass heads=")
    fixed = {name: value for name, value in table.fixed.items() if name in _CONVENTIONS}
    if OPENAI <= state.keys():
        conventions = {"activation": "quick_gelu", **conventions}
    elif table.other_activation and "activation" not in conventions:
        taken = table.defaults["activation"]
        warnings.warn(
            f"these weights do not show whether their activation is {taken} or {table.other_activation}; {taken} is "
            f'taken. Pass activation="{taken}" or activation="{table.other_activation}" to nn.weights.load, or load '
            "the weights by a folder whose configuration says it (open_clip_config.json, config.json)",
            stacklevel=3,
        )
    known = {"heads": HEADS.get(width, width // 64), "pool": "cls" if class_token else "avg"} | fixed
    return VitConfig(
        image_size=grid * patch.shape[2],
        patch_size=patch.shape[2],
        width=width,
        layers=len({m[1] for m in map(blocks.match, tower) if m}),
        mlp_dim=None if mlp_dim == 4 * width else mlp_dim,
        class_token=class_token,
        patch_bias=has("patch_bias", "patch_embed.bias"),
        pre_norm=has("pre_norm", "ln_pre.weight"),
        **(known | dict(table.defaults) | dict(conventions)),
    )


def _recognised(state: Mapping[str, Tensor], layout: Layout | None) -> tuple[LayoutTable, str]:
    """The table and the prefix with the most marks among the keys. Raises ConfigError when no first mark is there."""
    best, most = None, 0
    for table in _tables(layout):
        for prefix in table.prefixes:
            marks = [prefix + key for key in table.marks()]
            count = sum(key in state for key in [*marks, *table.head_keys().values()])
            if marks[0] in state and count > most:
                best, most = (table, prefix), count
    if best is None:
        wanted = sorted({prefix + table.marks()[0] for table in _tables(layout) for prefix in table.prefixes})
        raise ConfigError(
            f"not an image tower of {layout or 'any known layout'}: it has none of the keys {', '.join(wanted)}. "
            f"Its keys are {_listed(state) or 'none'}"
        )
    return best


def _tables(layout: Layout | None) -> list[LayoutTable]:
    if layout is not None and layout not in get_args(Layout):
        raise ConfigError(f"no layout {layout!r}; there are: {', '.join(get_args(Layout))}")
    return [table for table in TABLES if layout in (None, table.layout)]


def _unsupported(table: LayoutTable, config: VitConfig) -> list[str]:
    """The fields whose values the layout's models do not support, in words."""
    free = {"norm_after_pool"} if config.pool == "cls" else set()  # without effect on the class token
    fixed = [(name, value) for name, value in table.fixed.items() if name not in free]
    return [
        f"{name} is {getattr(config, name)!r}, not {value!r}" for name, value in fixed if getattr(config, name) != value
    ]


def _check_sizes(found: VitConfig, config: VitConfig) -> None:
    """Raises ConfigError when the sizes that were found, without the image size, are not config's."""
    found, config = (replace(c, image_size=c.patch_size, mlp_dim=c.hidden) for c in (found, config))
    names = [f.name for f in fields(VitConfig) if f.name not in _CONVENTIONS]
    differences = [
        f"{name} is {getattr(found, name)}, not {getattr(config, name)}"
        for name in names
        if getattr(found, name) != getattr(config, name)
    ]
    if differences:
        raise ConfigError(f"the weights are not those of config's tower: {', '.join(differences)}")


def _patches_only(positions: Tensor, config: VitConfig) -> bool:
    """Whether positions has none for the class token of a tower that has one."""
    return config.class_token and positions.shape[-2] == config.grid**2


def _head(state: Mapping[str, Tensor], table: LayoutTable, width: int, activation: str, take: _Taker) -> Head | None:
    keys = table.head_keys()
    if not any(key in state for key in keys.values()):
        return None
    if table.head_activation:
        _check_head(activation)
    bias = state.get(keys["fc_1.bias"])
    with torch.device("meta"):
        head = Head(width, 0 if bias is None else bias.numel())
    tensors = {name: take([keys[name]], tuple(parameter.shape)) for name, parameter in head.named_parameters()}
    head.load_state_dict(tensors, assign=True)
    return head.requires_grad_()


def _check_head(activation: str) -> None:
    """Raises ConfigError unless the tower's activation is gelu: LIFT's authors use one activation for tower and head,
    and our head computes gelu."""
    if activation != "gelu":
        raise ConfigError(
            f"this head computes gelu, and LIFT's authors' head computes the tower's activation, {activation}; leave "
            "the head out"
        )


def _checked_key(key: str | None, layout: Layout, what: str) -> str:
    """The key. Raises ConfigError when the layout has none for this part."""
    if key is None:
        raise ConfigError(f"{layout} has no place for {what}; leave it out")
    return key


def _listed(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

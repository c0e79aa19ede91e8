"""Training on several ranks: the model in DDP or FSDP2, and the few figures that ranks share in a step.

Each rank takes its part of the global batch through its towers; the loss exchanges texts (ops/pairs/exchange.py).
Every rank's loss is that of the whole batch, and its gradients are those of the sum over the ranks' losses
(gather_with_grad), of which DDP and FSDP2 take the mean: the gradient of one process with the whole batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.pixels import normalise
from ..nn import Clip, Lift
from ..nn.transformer import Transformer
from ..ranks import Rank


class Towers(nn.Module):
    """The towers and the logit scale of a model in one forward, so that DDP and FSDP2 see every use of a parameter.

    towers(pixels, kept, tokens) -> (features, scale). pixels: uint8 [rows, H, W, 3], or floats [rows, 3, H, W] that are
    normalised already. kept: the patches to keep, as of Vit. tokens: of a Clip, int64 [rows, context]. features: of the
    images [rows, dim], of a Clip followed by those of the texts, [rows, 2 * dim], not normalised; scale:
    exp(logit_scale). compiled: the image tower goes through torch.compile(fullgraph=True).
    """

    def __init__(self, model: Lift | Clip, compiled: bool = False):
        super().__init__()
        self.model = model
        self.encode_image = torch.compile(model.encode_image, fullgraph=True) if compiled else model.encode_image

    def forward(
        self, pixels: Tensor, kept: Tensor | None = None, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        features = self.encode_image(normalise(pixels) if pixels.dtype == torch.uint8 else pixels, kept)
        if tokens is not None:
            assert isinstance(self.model, Clip)
            features = torch.cat([features, self.model.encode_text(tokens)], dim=1)
        return features, self.model.logit_scale.exp()


def spread(
    model: Lift | Clip, how: Literal["ddp", "fsdp"], rank: Rank, device: torch.device, compiled: bool = False
) -> nn.Module:
    """The Towers of a model as `rank` trains them: as they are on a single rank, else in DDP or FSDP2.

    With "fsdp" the parameters of the model become DTensors, but for its logit scale: a scalar cannot be sharded, and
    the loss gives it the same gradient on all ranks. compiled: the image tower goes through torch.compile; with "fsdp"
    each block, since FSDP2 gathers a block's weights before it.
    """
    if how == "ddp" or rank.world == 1:
        towers = Towers(model, compiled)
        if rank.world == 1:
            return towers
        index = None if device.type == "cpu" else [device]
        return nn.parallel.DistributedDataParallel(towers, device_ids=index, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    towers = Towers(model)
    mesh = init_device_mesh(device.type, (rank.world,))
    for transformer in (module for module in model.modules() if isinstance(module, Transformer)):
        for block in transformer.blocks:
            if compiled:
                block.compile(fullgraph=True)
            fully_shard(block, mesh=mesh)
    # Else gathered weights would stay after a forward without gradients, where changes of the shards do not reach them.
    fully_shard(towers, mesh=mesh, reshard_after_forward=True, ignored_params={model.logit_scale})
    return towers


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scales the gradients down to a norm of `most`, over all shards; returns their norm before, a scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [gradient for gradient in gradients if is_sharded(gradient)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, most)
    plain = [gradient for gradient in gradients if not is_sharded(gradient)]
    norms = whole({str(i): nn.utils.get_total_norm(part) for i, part in enumerate((sharded, plain)) if part})
    norm = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    for is_part in (True, False):
        nn.utils.clip_grads_with_norm_([p for p in parameters if is_sharded(p) is is_part], most, norm)
    return norm


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank has a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with those that are sharded put together, on every rank. A collective where any is sharded."""
    return {name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)() for name, tensor in tensors.items()}


@contextmanager
def mixed_updates(sharded: bool) -> Iterator[None]:
    """Within it DTensors and plain tensors that are the same on all ranks may meet in one operation."""
    if not sharded:
        yield
        return
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication():
        yield


def mean_over_ranks(value: Tensor, rank: Rank) -> Tensor:
    """The mean of a scalar over the ranks."""
    if rank.world > 1:
        dist.all_reduce(value)
        value /= rank.world
    return value


def sum_over_ranks(values: Sequence[float], rank: Rank, device: torch.device) -> Tensor | list[float]:
    """The sums of a few numbers over the ranks, float64 on the device, without waiting for it; `values` on one rank."""
    if rank.world == 1:
        return list(values)
    total: Any = torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)
    dist.all_reduce(total)
    return total

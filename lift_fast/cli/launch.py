"""What a command does as one of several ranks, as torchrun starts them: its own GPU, its share of the cores."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..ranks import Rank


def settle(device: str, rank: "Rank") -> "torch.device":
    """The device that --device names, for this rank; and from now on torch computes on the rank's share of the cores.

    cuda without a number, or auto where there are GPUs, is the GPU of the rank's number on its machine. The number of
    threads is left as it is on the only rank of a machine, and where OMP_NUM_THREADS is above 1: torchrun sets 1.

    Raises ConfigError as pick_device does.
    """
    import torch

    from ..data.reading import cpu_count
    from ..devices import pick_device

    if rank.local_world > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, cpu_count() // rank.local_world))
    found = pick_device(device)
    if rank.world > 1 and found.type == "cuda":
        if found.index is None:
            found = pick_device(f"cuda:{rank.local}")
        torch.cuda.set_device(found)
    return found

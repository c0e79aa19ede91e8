"""The host pipeline: pictures decoded, cropped and resized on CPU threads, for machines without DALI.

What a batch holds depends on the seed alone: not on the number of threads, nor on which model asks. LIFT and CLIP so
see the same pictures in the same order, and DALI's pipeline (dali.py) the same samples and crops.
"""

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .images import read_header
from .loading import Batch, Pipeline
from .pixels import laid_out
from .samples import BadSample, Samples
from .transforms import render, render_centre, view_of


class HostPipeline(Pipeline):
    """A Pipeline on the CPU. The pixels lie in pinned memory where there is a GPU.

    `loading.ahead` batches are decoded while the model works on one: for a GPU. On the CPU both would fight for the
    same cores, so 0 is faster there.
    """

    def __iter__(self) -> Generator[Batch, None, None]:
        for made in self._assembled(self._render, self.loading.ahead):
            self._place = made.after
            yield Batch(self._finished(made.items), made.rows)

    def _render(self, row: int, draws: np.ndarray) -> np.ndarray:
        data = self.data.image_bytes(row)
        header = read_header(data)
        return render(data, header, view_of(header.width, header.height, draws, self.loading), self.loading.image_size)

    def _finished(self, pictures: list[np.ndarray]) -> Tensor:
        """uint8 pictures as one tensor of the dtype and layout that were asked for."""
        size = self.loading.image_size
        pixels = torch.empty((len(pictures), size, size, 3), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        np.stack(pictures, out=pixels.numpy())
        return laid_out(pixels, self.loading.dtype, self.loading.layout)


def load_images(data: Samples, image_size: int) -> tuple[Tensor, list[int]]:
    """Every picture of a set for evaluation: uint8 [n, size, size, 3] and the samples they belong to.

    Bad samples are left out. Raises DataError when no picture decodes.
    """

    def rendered(sample: int) -> np.ndarray | None:
        try:
            encoded = data.image_bytes(sample)
            return render_centre(encoded, read_header(encoded), image_size)
        except BadSample:
            return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode") as pool:
        found = {i: pixels for i, pixels in enumerate(pool.map(rendered, range(len(data)))) if pixels is not None}
    if not found:
        raise DataError(f"{data.folder}: not one picture decodes")
    return torch.from_numpy(np.stack(list(found.values()))), list(found)

"""The host pipeline: decodes, crops and resizes images on CPU threads, for machines without DALI.

A batch depends on the seed alone: not on the number of threads, nor on the model that is trained. So LIFT and CLIP see
the same images in the same order, and the DALI pipeline (dali.py) makes the same samples and crops.
"""

from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .images import read_header
from .loading import Batch, Loaded, Pipeline
from .pixels import laid_out
from .reading import cpu_count
from .samples import BadSample, Samples
from .skipped import in_words
from .transforms import render, render_centre, view_of


class HostPipeline(Pipeline):
    """A Pipeline on the CPU. Pixels lie in pinned memory on a machine with a GPU.

    `loading.ahead` batches are decoded while the model works on one. That helps a model on a GPU; a model on the CPU
    would compete with it for the same cores, so 0 is faster there.
    """

    def __iter__(self) -> Generator[Batch, None, None]:
        for made in self._assembled(self._render, self.loading.ahead):
            self._reach(made)
            yield Batch(self._stacked(made.items), made.rows)

    def _render(self, row: int, draws: np.ndarray) -> np.ndarray:
        data = self.data.image_bytes(row)
        header = read_header(data)
        return render(data, header, view_of(header.width, header.height, draws, self.loading), self.loading.image_size)

    def _stacked(self, images: list[np.ndarray]) -> Tensor:
        """uint8 images [size, size, 3] -> one tensor in the dtype and layout of the settings."""
        size = self.loading.image_size
        pixels = torch.empty((len(images), size, size, 3), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        np.stack(images, out=pixels.numpy())
        return laid_out(pixels, self.loading.dtype, self.loading.layout)


def load_images(data: Samples, image_size: int, resize_size: int | None = None) -> Loaded:
    """Decodes all images of a set for evaluation: uint8 [n, size, size, 3], and the numbers of their samples.

    resize_size: of the shorter side before the centre crop; default: image_size.

    Leaves bad samples out and counts them by cause. Raises DataError when no image decodes.
    """

    def rendered(sample: int) -> np.ndarray | BadSample:
        try:
            encoded = data.image_bytes(sample)
            return render_centre(encoded, read_header(encoded), image_size, resize_size)
        except BadSample as error:
            return error

    images: list[np.ndarray] = []
    samples: list[int] = []
    causes: Counter[str] = Counter()
    with ThreadPoolExecutor(cpu_count(), thread_name_prefix="decode") as pool:
        for sample, made in enumerate(pool.map(rendered, range(len(data)))):
            if isinstance(made, BadSample):
                causes[made.cause] += 1
            else:
                images.append(made)
                samples.append(sample)
    if not images:
        raise DataError(f"{data.folder}: no image decodes ({in_words(causes)})")
    return Loaded(torch.from_numpy(np.stack(images)), samples, dict(causes.most_common()))

"""The DALI pipeline: the samples, crops and colours of the host pipeline, decoded by NVIDIA DALI on a GPU or the CPU.

    threads:  bytes -> header -> view -> a plain JPEG as it is, any other image rendered at its final size as PPM
    DALI:     decode the box -> resize -> colours -> mirror, normalise, lay out -> torch, without a copy

DALI gets only what it reads like every other decoder: plain JPEGs without damage, and PPM. The host renders all other
images, and those of a batch on which DALI fails nevertheless; rows and views stay the same.

DALI silently accepts damaged JPEGs: libjpeg's warnings go to stderr, and half of an image may be grey. So the host
first decodes each JPEG strictly at an eighth of its size, which is little more than reading its entropy code, where
damage shows. This is done once a run for each sample, and not at all with Loading.checked. The host also renders JPEGs
that deviate from the standard without harm (jpeg.py), which another decoder may read differently.

Without a GPU DALI only decodes and the host resizes: DALI's antialiased bicubic resize takes longer on the CPU than
everything else together.
"""

import warnings
from collections import Counter, deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendError, DataError
from .images import Box, is_regular, read_header
from .jpeg import padded
from .loading import Assembled, Batch, Loaded, Loading, Pipeline
from .pixels import MEAN, STD, laid_out
from .reading import cpu_count
from .samples import BadSample, Collection, Samples
from .skipped import RowSet, in_words
from .transforms import centre_of, recoloured, render, render_centre, resize, view_of

_RESIZES_ON_CPU = False  # True is slow; tests set it to run the GPU's graph on the CPU
_EVALUATION_BATCH = 64
_NO_CHANGE = (1.0, 1.0, 1.0)  # factors of brightness, contrast, saturation


@dataclass(frozen=True)
class _Job:
    """What DALI has to do with one image: decode `box`, resize it to `resized` (height, width), and keep the square of
    image_size from `corner` (top, left). by_host: `encoded` is a PPM that the host has rendered."""

    encoded: np.ndarray
    box: Box
    resized: tuple[int, int]
    corner: tuple[int, int] = (0, 0)
    flip: bool = False
    colour: tuple[float, float, float] | None = None
    by_host: bool = False


class DaliPipeline(Pipeline):
    """The batches of HostPipeline, row for row, decoded by DALI: on the CPU, or on GPU `device_id`.

    Pixels differ from the host's by rounding in the resize (docs/data.md compares both with Pillow), by the decoder on
    a GPU, and where the host decodes a large JPEG at a reduced size, which DALI does not. A batch lies on the GPU that
    made it, ready for torch's current stream, and stays valid as long as it is referenced.

    Raises BackendError when DALI is not installed and, while iterating, when it does not run on that device or fails
    on images that the host has rendered.
    """

    def __init__(self, data: Collection, loading: Loading, device_id: int | None = None):
        _dali()
        super().__init__(data, loading)
        self.device_id = device_id
        # Rows of JPEGs that were looked at: as they should be, or not and therefore rendered by the host.
        self._intact, self._irregular = RowSet(len(data)), RowSet(len(data))
        self._refused: set[int] = set()  # rows that the host renders because DALI failed on their batch

    def __iter__(self) -> Generator[Batch, None, None]:
        while True:
            try:
                yield from self._batches()
            except _Failure as failure:
                self._leave_to_host(failure)

    def _batches(self) -> Generator[Batch, None, None]:
        """Yields batches from the pipeline's position. Raises _Failure when DALI fails; batches in flight are lost."""
        source = self._assembled(self._job, self.loading.ahead)
        running: deque[Assembled[_Job]] = deque()
        dali = _Decoder(self.loading, self.device_id)
        try:
            while True:
                running.append(next(source))
                try:
                    dali.put(running[-1].items)
                    if len(running) <= self.loading.ahead:
                        continue
                    pixels = dali.get()
                except Exception as error:
                    raise _Failure(list(running), error) from error
                made = running.popleft()
                self._reach(made)
                yield Batch(pixels, made.rows)
        finally:
            source.close()
            dali.close()

    def _job(self, row: int, draws: np.ndarray) -> _Job:
        data, size = self.data.image_bytes(row), self.loading.image_size
        header = read_header(data)
        view = view_of(header.width, header.height, draws, self.loading)
        if not header.plain or row in self._irregular or row in self._refused:
            return _finished(render(data, header, view, size))
        if row not in self._intact:
            if padded(data) if self.loading.checked else not is_regular(data, header):
                self._irregular.add(row)
                return _finished(render(data, header, view, size))
            self._intact.add(row)  # a race between threads may lose it: that JPEG is looked at once more
        return _Job(np.frombuffer(data, np.uint8), view.box, (size, size), flip=view.flip, colour=view.colour)

    def _leave_to_host(self, failure: "_Failure") -> None:
        """Has the host render the batch that failed from now on: the first in flight with images for DALI to decode."""
        for made in failure.running:
            rows = {row for row, job in zip(made.rows.tolist(), made.items, strict=True) if not job.by_host}
            if rows:
                why = f"the host renders its {len(rows)} images from now on: {_reason(failure.error)}"
                warnings.warn(f"DALI failed on a batch; {why}", stacklevel=3)
                self._refused |= rows
                return
        raise BackendError(f"DALI fails on uncompressed images; use the host loader: {_reason(failure.error)}")


class _Failure(Exception):
    """DALI raised `error` while these batches were in flight; the first of them was due."""

    def __init__(self, running: list[Assembled[_Job]], error: Exception):
        self.running, self.error = running, error


class _Decoder:
    """One DALI pipeline: takes batches of jobs and returns their pixels in order, with loading.ahead batches in flight.

    Callers put 1 + loading.ahead batches before they get the first, then put one for each that they get. corners: jobs
    set `corner`, since they keep only a part of the resized box.
    """

    def __init__(self, loading: Loading, device_id: int | None, corners: bool = False):
        self.loading, self.device_id, self.corners = loading, device_id, corners
        self.resizes = device_id is not None or _RESIZES_ON_CPU
        # Keeps the inputs, which DALI reads in place, of the batches in flight and of the last one returned: a GPU may
        # still read that one.
        self._running: deque[tuple[list[_Job], dict[str, Any]]] = deque()
        self._last: dict[str, Any] = {}
        self._started = False
        self._pool = None if self.resizes else ThreadPoolExecutor(loading.threads, thread_name_prefix="resize")
        try:
            self._pipe = self._graph()
        except RuntimeError as error:
            where = "the CPU" if device_id is None else f"GPU {device_id}"
            raise BackendError(f"DALI does not run on {where}; use the host loader: {_reason(error)}") from error

    def put(self, jobs: list[_Job]) -> None:
        """Starts a batch of at most loading.batch_size jobs."""
        inputs: dict[str, Any] = {
            "encoded": [job.encoded for job in jobs],
            "anchor": np.array([job.box[:2] for job in jobs], np.int32),
            "shape": np.array([job.box[2:] for job in jobs], np.int32),
        }
        if self.resizes:
            colours = np.array([job.colour or _NO_CHANGE for job in jobs], np.float32)
            inputs |= {
                "resized": np.array([job.resized for job in jobs], np.float32),
                "corner": np.array([job.corner for job in jobs], np.int32),
                "flip": np.array([job.flip for job in jobs], np.int32),
                **{name: colours[:, i].copy() for i, name in enumerate(("brightness", "contrast", "saturation"))},
            }
        for name in self._inputs:
            self._pipe.feed_input(name, inputs[name])
        self._running.append((jobs, inputs))
        # DALI's first run starts as many batches as its queue holds.
        if self._started or len(self._running) > self.loading.ahead:
            self._pipe.schedule_run()
            self._started = True

    def get(self) -> Tensor:
        """Returns the pixels of the oldest batch in flight, in the form of Batch.pixels. Raises DALI's errors."""
        if self.device_id is None:
            (decoded,) = self._pipe.outputs()
        else:
            # Bound to torch's stream: the stream waits for DALI, and DALI reuses the memory in the stream's order.
            (decoded,) = self._pipe.outputs(cuda_stream=torch.cuda.current_stream(self.device_id))
        jobs, self._last = self._running.popleft()
        if self._pool is None:
            return torch.from_dlpack(decoded.as_tensor()).to(self.loading.dtype)
        size = self.loading.image_size
        pixels = np.empty((len(jobs), size, size, 3), np.uint8)

        def finish(i: int) -> None:
            (top, left), image = jobs[i].corner, resize(np.asarray(decoded[i]), *jobs[i].resized)
            image = image[top : top + size, left : left + size]
            if jobs[i].flip:
                image = image[:, ::-1]
            colour = jobs[i].colour
            pixels[i] = recoloured(image, *colour) if colour else image

        list(self._pool.map(finish, range(len(jobs))))
        return laid_out(torch.from_numpy(pixels), self.loading.dtype, self.loading.layout)

    def close(self) -> None:
        """Frees DALI's threads and memory; batches that were returned stay valid."""
        self._pipe = None
        self._running.clear()
        self._last = {}
        if self._pool is not None:
            self._pool.shutdown()

    def _graph(self) -> Any:
        """Builds the DALI pipeline, and notes the names of its inputs."""
        dali, loading = _dali(), self.loading
        fn, types = dali.fn, dali.types
        self._inputs: list[str] = []

        def given(name: str) -> Any:
            self._inputs.append(name)
            return fn.external_source(name=name, no_copy=True)

        @dali.pipeline_def(
            batch_size=loading.batch_size,
            num_threads=loading.threads,
            device_id=self.device_id,
            prefetch_queue_depth=1 + loading.ahead,
        )
        def graph() -> Any:
            # Chroma is upsampled as by libjpeg-turbo. Threads are not pinned: other ranks' would get the same cores.
            on_gpu = {"device": "mixed", "jpeg_fancy_upsampling": True, "affine": False}
            where = {"device": "cpu"} if self.device_id is None else on_gpu
            pixels = fn.decoders.image_slice(
                given("encoded"), given("anchor"), given("shape"), axis_names="WH", adjust_orientation=False, **where
            )
            if not self.resizes:
                return pixels
            pixels = fn.resize(pixels, size=given("resized"), interp_type=types.INTERP_CUBIC, antialias=True)
            if self.corners:
                pixels = fn.slice(pixels, start=given("corner"), shape=[loading.image_size] * 2, axes=[0, 1])
            if loading.colour:
                names = ("brightness", "contrast", "saturation")
                pixels = fn.color_twist(pixels, **{name: given(name) for name in names})
            levels = loading.dtype == torch.uint8
            if levels and loading.layout == "NHWC" and not loading.flip:
                return pixels
            half = loading.dtype == torch.float16
            return fn.crop_mirror_normalize(
                pixels,
                mirror=given("flip") if loading.flip else 0,
                dtype=types.UINT8 if levels else types.FLOAT16 if half else types.FLOAT,
                output_layout=loading.layout[1:],
                mean=[0.0] if levels else [255 * level for level in MEAN],
                std=[1.0] if levels else [255 * level for level in STD],
            )

        pipe = graph()
        pipe.build()
        return pipe


def load_images(data: Samples, image_size: int, device_id: int | None = None, resize_size: int | None = None) -> Loaded:
    """As host.load_images, decoded by DALI: uint8 [n, size, size, 3] on the CPU or GPU `device_id`, and sample numbers.

    The host renders the images on which DALI fails. Raises BackendError without DALI, DataError when no image decodes.
    """
    threads = cpu_count()
    loading = Loading(min(_EVALUATION_BATCH, len(data)), image_size, threads=threads)
    parts: list[Tensor] = []
    samples: list[int] = []
    causes: Counter[str] = Counter()

    def centred(sample: int) -> _Job | BadSample:
        try:
            return _centred(data.image_bytes(sample), image_size, resize_size)
        except BadSample as error:
            return error

    dali = _Decoder(loading, device_id, corners=True)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            for start in range(0, len(data), loading.batch_size):
                chunk = range(start, min(start + loading.batch_size, len(data)))
                jobs: dict[int, _Job] = {}
                for sample, job in zip(chunk, pool.map(centred, chunk), strict=True):
                    if isinstance(job, BadSample):
                        causes[job.cause] += 1
                    else:
                        jobs[sample] = job
                if not jobs:
                    continue
                try:
                    dali.put(list(jobs.values()))
                    parts.append(dali.get())
                except RuntimeError as error:
                    warnings.warn(f"DALI failed on images, which the host renders: {_reason(error)}", stacklevel=2)
                    dali.close()
                    dali = _Decoder(loading, device_id, corners=True)
                    dali.put([_by_host(job, image_size, resize_size) for job in jobs.values()])
                    parts.append(dali.get())
                samples += jobs
    finally:
        dali.close()
    if not samples:
        raise DataError(f"{data.folder}: no image decodes ({in_words(causes)})")
    return Loaded(torch.cat(parts), samples, dict(causes.most_common()))


def _centred(data: bytes, size: int, resize_size: int | None) -> _Job:
    """The job that makes render_centre's pixels of an image. Raises BadSample."""
    header = read_header(data)
    if not header.plain or not is_regular(data, header):
        return _finished(render_centre(data, header, size, resize_size))
    return _Job(np.frombuffer(data, np.uint8), *centre_of(header.width, header.height, size, resize_size))


def _by_host(job: _Job, size: int, resize_size: int | None) -> _Job:
    """A job of _centred's rendered by the host."""
    data = job.encoded.tobytes()
    return job if job.by_host else _finished(render_centre(data, read_header(data), size, resize_size))


def _finished(pixels: np.ndarray) -> _Job:
    """A job for an image that the host has rendered, uint8 [height, width, 3]: as PPM, which DALI only copies."""
    height, width = pixels.shape[:2]
    encoded = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height) + pixels.tobytes(), np.uint8)
    return _Job(encoded, (0, 0, width, height), (height, width), by_host=True)


def _reason(error: Exception) -> str:
    """DALI's error message without its stack of operators."""
    return str(error).rpartition("encountered:")[2].strip()


def _dali() -> Any:
    """Imports nvidia.dali. Raises BackendError when it is not installed."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise BackendError(
            f"DALI is not installed ({error}): pip install 'lift-fast[dali]', or use the host loader"
        ) from error
    return nvidia.dali


def wanted(loader: str, on_gpu: bool) -> bool:
    """Whether the loader "auto", "host" or "dali" means DALI: "auto" does for a GPU, where DALI is installed."""
    return loader == "dali" or (loader == "auto" and on_gpu and installed())


def installed() -> bool:
    """Whether DALI is installed."""
    try:
        _dali()
    except BackendError:
        return False
    return True

"""A simulated GPU for rehearsal.py: `install()` gives torch.cuda one device with the properties of an H100.

Tensors on it are `Pretended`: they are in host memory and report cuda:0 as their device. PyTorch's operations on small
tensors are computed on the CPU. A result of more than COMPUTED bytes is not computed, so that real sizes take no time:
it gets addresses, and no memory until it is written. It reads as zeros, and so does the result of torch.empty. An
allocation beyond MEMORY fails as it would on the GPU.

As on a GPU, these are errors: an operation on tensors of both host and device, NumPy on a tensor of the device, and a
host sync under torch.cuda.set_sync_debug_mode("error") or during a capture.

All of it is in Python: for PyTorch's dispatcher these are CPU tensors of a subclass. Therefore autocast follows the
CPU's lists, autograd runs in the calling thread, and streams, events and graphs are stubs.
"""

import contextlib
import functools
import mmap
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

NAME = "rehearsal (no GPU)"
CAPABILITY = (9, 0)
MEMORY = 80 << 30
MULTIPROCESSORS = 132
SHARED = 232448  # largest shared memory of a thread block, in bytes
GPU = torch.device("cuda", 0)
COMPUTED = 1 << 20  # an operation is computed if none of its tensors has more bytes than this
PRODUCT = 1 << 27  # a matrix product is computed if it has no more FLOPs than this
READ_BACK = 1 << 30  # most bytes that may be copied to the host at once


class TooLarge(Exception):
    """The values of a tensor are needed, and it is too large for them to have been computed."""


# Memory -------------------------------------------------------------------------------------------------------------


class _Pages(mmap.mmap):
    """Addresses that take memory only when they are written. live, peak: bytes allocated on the device."""

    live = peak = 0
    pinned: "weakref.WeakSet[_Pages]" = weakref.WeakSet()

    def __new__(cls, size: int) -> "_Pages":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        pages = super().__new__(cls, -1, max(1, size), flags=flags)
        pages.size = 0
        return pages

    def count(self) -> None:
        """Counts the pages as memory of the device until they are freed."""
        if _Pages.live + len(self) > MEMORY:
            wanted = f"Tried to allocate {len(self) / 2**30:.2f} GiB, and {_Pages.live / 2**30:.2f} GiB are in use"
            raise torch.OutOfMemoryError(f"CUDA out of memory. {wanted} of the {MEMORY >> 30} GiB of a rehearsal.")
        self.size = len(self)
        _Pages.live += self.size
        _Pages.peak = max(_Pages.peak, _Pages.live)

    def __del__(self) -> None:
        _Pages.live -= self.size


def _allocate(like: Tensor, pinned: bool = False) -> Tensor:
    """A host tensor like `like` (which may be on "meta") in pages of its own: memory of the device, or pinned."""
    extent = sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) + 1 if like.numel() else 0
    pages = _Pages(extent * like.element_size())
    if pinned:
        _Pages.pinned.add(pages)
    else:
        pages.count()
    flat = torch.frombuffer(pages, dtype=torch.uint8)
    pages.address = flat.data_ptr()
    flat = flat[: extent * like.element_size()].view(like.dtype)
    return flat.as_strided(like.shape, like.stride())


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _is_pinned(t: Tensor) -> bool:
    at = t.untyped_storage().data_ptr()
    return any(pages.address <= at < pages.address + len(pages) for pages in _Pages.pinned)


# Tensors ------------------------------------------------------------------------------------------------------------


class Pretended(torch.Tensor):
    """A tensor in host memory that reports cuda:0 as its device."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: GPU)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def get_device(self) -> int:
        return 0

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        pass

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor")
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({list(self.shape)}, {self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)


def _pretend(host: Tensor) -> Tensor:
    return torch.Tensor._make_subclass(Pretended, host)


# Operations that accept tensors of host and device together: copies and indexing.
_MIXING = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "set_"}
# Operations that sync the host with the device, to read values or because a shape depends on them.
_SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_consecutive", "equal"}


def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operation that has a tensor on the device among its arguments."""
    if func.namespace == "lift_fast":  # our custom ops: their Python code must see Pretended tensors
        key = torch._C.DispatchKey
        has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")
        return func._op_dk(key.CUDA if has_cuda else key.CompositeExplicitAutograd, *args)
    name = func._schema.name.split("::")[1]
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    _check_devices(func, name, tensors)
    if name in _SYNCS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
        _sync(func.name())
    to = kwargs.get("device")
    if to is not None and torch.device(to).type == "cuda":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with torch._C._DisableTorchDispatch():
        if to is not None and torch.device(to).type == "meta":
            return func(*args, **kwargs)
        if kwargs.pop("pin_memory", None):
            kwargs["pin_memory"] = False
        out = _emulated(func, name, tensors, args, kwargs)
    given = {id(t) for t in tensors}
    return tree_map(lambda t: _pretend(t) if isinstance(t, Tensor) and id(t) not in given else t, out)


def _emulated(func: Any, name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:
    """The result on the host. If it is large, or the CPU has no such operation, it is allocated and not computed."""
    if func.is_view:
        return func(*args, **kwargs)
    if name in ("mm", "bmm", "addmm", "baddbmm") and "dtype" in func._overloadname:
        return _widening(name, args, kwargs)
    on_cpu = torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CPU")
    if not on_cpu or max(map(_bytes, tensors)) > COMPUTED or _flops(name, args) > PRODUCT:
        return _shaped(func, args, kwargs)
    if name in GROWS and _bytes(like := _on_meta(func, args, kwargs)) > COMPUTED:
        return _allocate(like)
    out = func(*args, **kwargs)
    return out.zero_() if name in ("empty_like", "new_empty", "new_empty_strided") else out


# Operations whose result may be much larger than their arguments.
GROWS = {"repeat", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}


def _flops(name: str, args: tuple) -> int:
    if name in ("mm", "bmm", "_scaled_mm"):
        return 2 * args[0].numel() * args[1].shape[-1]
    if name in ("addmm", "baddbmm"):
        return 2 * args[1].numel() * args[2].shape[-1]
    return 0


def _on_meta(func: Any, args: tuple, kwargs: dict) -> Any:
    def to_meta(t: Any) -> Any:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t

    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("meta")}
    try:
        return func(*tree_map(to_meta, args), **tree_map(to_meta, kwargs))
    except NotImplementedError as error:  # the shape depends on values, or the operation has no shape function
        raise TooLarge(f"{func.name()} of tensors this large") from error


def _shaped(func: Any, args: tuple, kwargs: dict) -> Any:
    """A result of the right shapes, not computed. Tensors that the operation writes to stay unchanged."""
    schema = func._schema
    outs = _on_meta(func, args, kwargs)
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    sets = [set(r.alias_info.before_set) if r.alias_info else set() for r in schema.returns]
    written = [
        next(
            (given.get(a.name) for a in schema.arguments if a.alias_info and wanted & set(a.alias_info.before_set)),
            None,
        )
        for wanted in sets
    ]

    def allocated(of: Any, into: Any) -> Any:
        if into is not None:
            return into
        if isinstance(of, list | tuple):
            return type(of)(allocated(one, None) for one in of)
        if not isinstance(of, Tensor):
            return of
        small = _bytes(of) <= COMPUTED
        return torch.empty_strided(of.shape, of.stride(), dtype=of.dtype).zero_() if small else _allocate(of)

    if len(schema.returns) == 1:
        return allocated(outs, written[0])
    return tuple(allocated(of, into) for of, into in zip(outs, written, strict=True)) if schema.returns else None


def _widening(name: str, args: tuple, kwargs: dict) -> Tensor:
    """Products with an out_dtype: mm(a, b, out_dtype), addmm(c, a, b, out_dtype) and their forms with `out`."""
    kwargs = dict(kwargs)
    out = kwargs.pop("out", None)
    *operands, wide = [*args, *([kwargs.pop("out_dtype")] if "out_dtype" in kwargs else [])]
    if _flops(name, tuple(operands)) <= PRODUCT and max(t.numel() for t in operands) * wide.itemsize <= COMPUTED:
        found = getattr(torch, name)(*(t.to(wide) for t in operands), **kwargs)
        return found if out is None else out.copy_(found)
    if out is not None:
        return out
    shape = (*operands[-2].shape[:-1], operands[-1].shape[-1])
    return _allocate(torch.empty(shape, dtype=wide, device="meta"))


def _check_devices(func: Any, name: str, tensors: list[Tensor]) -> None:
    """Raises RuntimeError for tensors of host and device, except in a backward, where autograd makes host zeros."""
    if name in _MIXING or torch._C._current_graph_task_id() != -1:
        return
    if any(t.dim() and not isinstance(t, Pretended) and t.device.type == "cpu" for t in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )


_sync_state = SimpleNamespace(mode=0, capturing=False)  # mode: of torch.cuda.set_sync_debug_mode


def _sync(what: str) -> None:
    """Called where the host syncs with the device. Raises RuntimeError where torch or a capture would."""
    if _sync_state.capturing:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
    if _sync_state.mode == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation ({what})")


class _Moved(torch.autograd.Function):
    """Copies values to the device or back, and gradients in the other direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_device: bool, non_blocking: bool) -> Tensor:
        ctx.back, ctx.non_blocking = not to_device, non_blocking
        if not non_blocking:
            _sync("a copy between host and device")
        with torch._C._DisableTorchDispatch():
            if to_device:
                return _pretend(_allocate(x) if _bytes(x) > COMPUTED else x.clone())
            if _bytes(x) > READ_BACK:
                raise TooLarge(f"{_bytes(x) / 2**20:.0f} MiB of values would be copied to the host")
            return torch.Tensor._make_subclass(torch.Tensor, x.clone())

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        on_device = isinstance(g[0], Pretended)
        return (g[0] if on_device == ctx.back else _Moved.apply(g[0], ctx.back, ctx.non_blocking)), None, None


def _simulated(device: Any) -> bool:
    """Whether this is the simulated device and no fake tensors are being made."""
    if device is None or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return False
    if isinstance(device, int):
        return True
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device.type == "cuda"


def _default_device() -> torch.device | None:
    """The device of the innermost `with torch.device(...)`; None outside of one."""
    modes = reversed(torch.overrides._get_current_function_mode_stack())
    return next((mode.device for mode in modes if isinstance(mode, torch.utils._device.DeviceContext)), None)


def _to(original: Callable) -> Callable:
    """Tensor.to, with the simulated device."""

    def to(
        self: Tensor,
        *args: Any,
        device: Any = None,
        dtype: Any = None,
        other: Any = None,
        non_blocking: bool = False,
        copy: bool = False,
        memory_format: Any = torch.preserve_format,
    ) -> Tensor:
        if args and isinstance(args[0], Tensor) or other is not None:
            other, args = (args[0], args[1:]) if other is None else (other, args)
            device, dtype = other.device, other.dtype
        elif args and isinstance(args[0], torch.dtype):
            dtype, args = args[0], args[1:]
        elif args:
            device, args = args[0], args[1:]
            if args and (args[0] is None or isinstance(args[0], torch.dtype)):
                dtype, args = args[0], args[1:]
        if args:
            non_blocking = args[0]
            copy = args[1] if len(args) > 1 else copy
        on_device, to_device = isinstance(self, Pretended), _simulated(device)
        dtype = self.dtype if dtype is None else dtype
        plain = type(self) in (torch.Tensor, torch.nn.Parameter) and self.device.type == "cpu"
        if not on_device and not (to_device and plain):
            device = self.device if device is None else device
            return original(self, device, dtype, non_blocking, copy, memory_format=memory_format)
        self = original(self, dtype, False, copy, memory_format=memory_format)
        if device is None or on_device == to_device:
            return self
        if torch.device(device).type not in ("cpu", "cuda"):
            return torch.empty_strided(self.shape, self.stride(), dtype=dtype, device=device)
        return _Moved.apply(self, to_device, non_blocking)

    return functools.wraps(original)(to)


def _factory(original: Callable) -> Callable:
    """torch.empty and similar functions, with the simulated device."""
    named = original.__name__
    values = named in ("tensor", "as_tensor", "asarray")
    like = named.endswith("_like")

    @functools.wraps(original)
    def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        of = args[0] if like or values else None
        where = _default_device() if device is None and not isinstance(of, Tensor) else device
        if isinstance(of, Pretended) and like:
            if device is None or _simulated(device):
                return original(*args, **kwargs)
            args = (torch.empty_strided(of.shape, of.stride(), dtype=of.dtype), *args[1:])
        if not _simulated(where):
            made = original(*args, **kwargs, **({} if device is None else {"device": device}))
            return made.pin_memory() if pin_memory else made
        wanted = kwargs.pop("requires_grad", False)
        if values:
            return original(*args, device="cpu", **kwargs).to(GPU).requires_grad_(wanted)
        meta = original(*args, device="meta", **{name: of for name, of in kwargs.items() if name != "generator"})
        host = _allocate(meta) if _bytes(meta) > COMPUTED else original(*args, device="cpu", **kwargs)
        if named.startswith("empty") and _bytes(meta) <= COMPUTED:
            host.zero_()  # so that every rehearsal has the same values
        return _pretend(host).requires_grad_(wanted)

    return make


FACTORIES = (
    "empty empty_like empty_strided zeros zeros_like ones ones_like full full_like rand rand_like randn randn_like "
    "randint randint_like randperm arange range linspace logspace eye tensor as_tensor asarray scalar_tensor"
).split()
METHODS = "new_empty new_zeros new_ones new_full new_tensor new_empty_strided".split()


def _new(original: Callable) -> Callable:
    """Tensor.new_empty and similar methods, with the simulated device."""

    @functools.wraps(original)
    def make(self: Tensor, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if isinstance(self, Pretended):
            made = original(self, *args, **kwargs)
            return made if device is None or _simulated(device) else made.to(device)
        if _simulated(device):
            return original(self, *args, **kwargs).to(GPU)
        return original(self, *args, **kwargs, **({} if device is None else {"device": device}))

    return make


def _install_tensors() -> None:
    for name in FACTORIES:
        setattr(torch, name, _factory(getattr(torch, name)))
    for name in METHODS:
        setattr(Tensor, name, _new(getattr(Tensor, name)))
    Tensor.to = _to(Tensor.to)
    Tensor.cuda = lambda self, device=None, non_blocking=False, memory_format=torch.preserve_format: self.to(
        device=GPU if device is None else device, non_blocking=non_blocking, memory_format=memory_format
    )
    Tensor.cpu = lambda self, memory_format=torch.preserve_format: self.to(device="cpu", memory_format=memory_format)
    Tensor.pin_memory = lambda self, device=None: self if _is_pinned(self) else _allocate(self, pinned=True).copy_(self)
    is_pinned = Tensor.is_pinned
    Tensor.is_pinned = lambda self, device=None: type(self) is Tensor and (_is_pinned(self) or is_pinned(self))
    # module.to("cuda") keeps its Parameter objects, as on a GPU: swapping makes them Pretended in place.
    torch.__future__.set_swap_module_params_on_conversion(True)

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> "Generator":
            return super().__new__(cls, "cpu" if _simulated(device) else device)

    torch.Generator = Generator
    grouped = torch._C._group_tensors_by_device_and_dtype

    def group(tensors: Any, *rest: Any) -> Any:
        on_device = any(isinstance(t, Pretended) for t in tree_flatten(tensors)[0])
        return {(GPU if on_device else device, dtype): of for (device, dtype), of in grouped(tensors, *rest).items()}

    torch._C._group_tensors_by_device_and_dtype = group
    # Autograd makes host zeros for outputs without a gradient; they move to the device with the other tensors.
    backward = torch.autograd.function.BackwardCFunction
    apply = backward.apply

    def applied(self: Any, *gradients: Any) -> Any:
        if any(isinstance(g, Pretended) for g in (*gradients, *self.saved_tensors)):
            gradients = tuple(_pretend(g) if type(g) is Tensor else g for g in gradients)
        return apply(self, *gradients)

    backward.apply = applied


# torch.cuda ---------------------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, device: Any = None, priority: int = 0, cuda_stream: int = 1, **_: Any):
        self.device, self.device_index, self.cuda_stream, self.priority = GPU, 0, cuda_stream, priority

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    """Its times are host times."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any):
        self.timing, self.at = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        if not (self.timing and end.timing and self.at and end.at):
            raise RuntimeError("Both events must be recorded, and created with enable_timing=True")
        return max(1e-3, (end.at - self.at) * 1e3)

    def query(self) -> bool:
        return True

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CUDAGraph:
    def __init__(self, keep_graph: bool = False):
        self.captured = False

    def capture_begin(self, *_: Any, **__: Any) -> None:
        _sync_state.capturing = True

    def capture_end(self) -> None:
        _sync_state.capturing, self.captured = False, True

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("the graph was replayed before anything was captured")

    def reset(self) -> None:
        self.captured = False

    def pool(self) -> tuple[int, int]:
        return (0, 0)


_main = Stream(cuda_stream=0)
_current = [_main]


@contextlib.contextmanager
def _stream(stream: Stream | None) -> Iterator[None]:
    _current.append(stream or _current[-1])
    try:
        yield
    finally:
        _current.pop()


@contextlib.contextmanager
def _graph(cuda_graph: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    cuda_graph.capture_begin()
    try:
        yield
    finally:
        cuda_graph.capture_end()


class _Device:
    """torch.cuda.device and device_of."""

    def __init__(self, *_: Any):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def _set_sync_debug_mode(mode: int | str) -> None:
    _sync_state.mode = ["default", "warn", "error"].index(mode) if isinstance(mode, str) else mode


def _install_cuda() -> None:
    properties = SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, multi_processor_count=MULTIPROCESSORS,
        L2_cache_size=50 << 20, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=SHARED,
        shared_memory_per_multiprocessor=228 << 10, regs_per_multiprocessor=65536, warp_size=32,
        max_threads_per_multi_processor=2048, clock_rate=1_980_000, memory_clock_rate=2_619_000, memory_bus_width=5120,
        is_integrated=0, is_multi_gpu_board=0, gcnArchName="",
    )  # fmt: skip
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True, "_is_in_bad_fork": False,
        "get_device_name": NAME, "get_device_capability": CAPABILITY, "get_device_properties": properties,
        "is_bf16_supported": True, "is_tf32_supported": True, "get_arch_list": ["sm_90"], "default_stream": _main,
        "get_sync_debug_mode": 0, "initial_seed": 0, "graph_pool_handle": (0, 0), "current_blas_handle": 0,
        "memory_reserved": 0, "max_memory_reserved": 0, "memory_summary": "", "utilization": 0, "temperature": 0,
        "get_rng_state": state, "get_rng_state_all": [state], "can_device_access_peer": False, "exchange_device": 0,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "is_current_stream_capturing": False, "ipc_collect": None,
    }  # fmt: skip
    cuda: Any = torch.cuda
    for name, answer in answers.items():
        setattr(cuda, name, _answering(answer))
    for name in (
        "init _lazy_init _lazy_call set_device synchronize empty_cache reset_max_memory_allocated set_stream "
        "reset_accumulated_memory_stats manual_seed manual_seed_all seed seed_all set_rng_state set_rng_state_all "
        "set_per_process_memory_fraction _check_capability _check_cubins"
    ).split():
        setattr(cuda, name, _answering(None))
    cuda.is_current_stream_capturing = lambda: _sync_state.capturing
    cuda.memory_allocated = lambda device=None: _Pages.live
    cuda.max_memory_allocated = lambda device=None: _Pages.peak
    cuda.reset_peak_memory_stats = lambda device=None: setattr(_Pages, "peak", _Pages.live)
    cuda.mem_get_info = lambda device=None: (MEMORY - _Pages.live, MEMORY)
    cuda.memory_stats = lambda device=None: defaultdict(int)
    cuda.set_sync_debug_mode, cuda.get_sync_debug_mode = _set_sync_debug_mode, lambda: _sync_state.mode
    cuda.current_stream = lambda device=None: _current[-1]
    cuda.stream, cuda.Stream, cuda.Event, cuda.ExternalStream = _stream, Stream, Event, Stream
    cuda.CUDAGraph, cuda.graph, cuda.device, cuda.device_of = CUDAGraph, _graph, _Device, _Device
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _answering(None))
    torch.compile = _compile

    # autocast on "cuda" also turns it on for the CPU, where the tensors really are.
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def entered(self: Any) -> Any:
        if self.device == "cuda":
            self.host = torch.autocast("cpu", dtype=self.fast_dtype, enabled=self._enabled)
            self.host.__enter__()
        return enter(self)

    def left(self: Any, *error: Any) -> Any:
        found = leave(self, *error)
        if self.device == "cuda":
            self.host.__exit__(*error)
        return found

    torch.autocast.__enter__, torch.autocast.__exit__ = entered, left


def _answering(answer: Any) -> Callable:
    """A function that returns `answer`; a new one for each name, because torch's compiler distinguishes them."""
    return lambda *_, **__: answer


def _compile(model: Any = None, **_: Any) -> Any:
    return (lambda given: given) if model is None else model


def install() -> None:
    """Replaces functions of torch and torch.cuda, so that there is one device; the process keeps them to its end."""
    _install_cuda()
    _install_tensors()

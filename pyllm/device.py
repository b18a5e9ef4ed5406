"""The GPU: whether there is one to use, its memory, stream and graphs. The only importer of ``cuda.core`` (1.x).

Nothing here is imported by the CPU's engine. :func:`unavailable` says why there is no usable GPU, :func:`open_device`
gives it or raises `CudaUnavailable`; both go through one guard, which makes ``Device(0)`` the first call of
``cuda.core``: without a driver, some others would leave a lock held and the next call would never return.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import tensor
from pyllm.errors import CudaUnavailable, InsufficientMemoryError
from pyllm.isa import default_threads
from pyllm.tensor import DTYPES, DeviceArray, Shared

OLDEST = (8, 0)  # compute capability that the kernels are compiled for
STAGING_BYTES = 32 << 20  # of page-locked memory, twice: one piece is filled while the other is on its way
STAGING_THREADS = 8  # that fill a piece, at most: one by itself is slower than the bus


def unavailable() -> str | None:
    """Why no GPU can be used here, in a sentence that says what to do; None where one can."""
    try:
        open_device()
    except CudaUnavailable as error:
        return str(error)
    return None


@functools.cache
def open_device() -> Device:
    """GPU 0, made current in this thread; `CudaUnavailable` where it cannot be used."""
    try:
        from pyllm import _cuda
    except ImportError as error:
        if "_cuda" not in str(error):
            raise CudaUnavailable(f"pyllm's CUDA module cannot be loaded: {error}") from error
        raise CudaUnavailable(
            "this build of pyllm has no CUDA kernels: install it on a machine with nvcc, with PYLLM_CUDA=on"
        ) from None
    needed, found = _cuda.RUNTIME_VERSION, _cuda.driver_version()
    if found == 0:
        raise CudaUnavailable("no NVIDIA driver was found: install one that supports CUDA " + _version(needed))
    if found // 1000 < needed // 1000:
        raise CudaUnavailable(
            f"the NVIDIA driver is too old: it supports CUDA {_version(found)}, these kernels need "
            f"{needed // 1000}.0 or later: update the driver, or build pyllm with an older nvcc"
        )
    try:
        from cuda.core import Device as CoreDevice
        from cuda.core import __version__ as core_version
    except ImportError as error:
        raise CudaUnavailable(f"cuda-python 1.x is not installed ({error}): pip install 'pyllm[cuda]'") from error
    if core_version.startswith("0."):
        raise CudaUnavailable(f"cuda-core 1.0 or later is needed, {core_version} found: pip install 'pyllm[cuda]'")
    try:
        core = CoreDevice(0)
        core.set_current()
        capability = tuple(core.compute_capability)
    except Exception as error:  # whatever cuda.core raises means the same here
        raise CudaUnavailable(f"no usable NVIDIA GPU was found: {error}") from error
    if capability < OLDEST:
        raise CudaUnavailable(
            f"{core.name} has compute capability {capability[0]}.{capability[1]}: the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]} or later (Ampere)"
        )
    return Device(core, _cuda)


class Device:
    """A GPU with one stream, on which all its copies and kernels run in order. `kernels` is `pyllm._cuda`.

    With PYLLM_PDL=off a kernel starts when the one before it has ended, and not while it still runs.

    Threads may share it. What one of them records goes to a stream of its own, so that the others' work, and memory
    that is freed meanwhile, stay out of the graph.
    """

    def __init__(self, core: Any, kernels: Any) -> None:
        self.kernels = kernels
        self._core = core
        self._stream = core.create_stream()
        self._thread = threading.local()  # `current`: the device is that of the thread; `builder`: of what it records
        self._staging: list[NDArray[np.uint8]] = []
        self._loading = threading.Lock()  # held while `_staging` is in use
        self._graphs = threading.RLock()  # held while `_recordings` and `_lent` are in use, and while all streams wait
        self._recordings = 0  # of all threads
        self._lent: list[object] = []  # what is let go of when nothing is recorded
        kernels.let_launches_overlap(_switch("PYLLM_PDL"))
        self.name = str(core.name)
        self.multiprocessors = int(core.properties.multiprocessor_count)

    @property
    def has_wgmma(self) -> bool:
        """Whether the kernels of Hopper alone are to be used: it has them, and PYLLM_WGMMA is not "off"."""
        self._ready()
        return _switch("PYLLM_WGMMA") and bool(self.kernels.has_wgmma())

    @property
    def stream(self) -> int:
        """Address of the stream, as the launchers of `pyllm._cuda` take it."""
        self._ready()
        return int(self._lane.handle)

    def synchronize(self) -> None:
        """Wait for all that the stream was given; raises what went wrong in it."""
        self._ready()
        self._stream.sync()

    def let_go(self, owner: object) -> None:
        """Keep `owner` until every stream of the process, those of other libraries too, has done what it was given.

        This waits for them; but while a thread records a graph, which such a wait would break, `owner` is kept until
        the recording has ended.
        """
        with self._graphs:
            if self._recordings:
                self._lent.append(owner)
            else:
                self._ready()
                self._core.sync()

    # Memory

    def memory(self) -> tuple[int, int]:
        """Bytes that can be taken, those that the pool keeps included, and all."""
        self._ready()
        free, total = self.kernels.memory_info()
        pool = getattr(self._core.memory_resource, "attributes", None)  # None where the driver has no pools
        kept = 0 if pool is None else pool.reserved_mem_current - pool.used_mem_current
        return int(free) + int(kept), int(total)

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Memory for an array of a dtype of :data:`pyllm.tensor.DTYPES`; what it holds is undefined.

        It comes from the driver's pool, in the order of the stream. Raises `InsufficientMemoryError`, and
        `RuntimeError` while this thread records: a graph keeps no memory.
        """
        if np.dtype(dtype) not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(DTYPES.values())}, got {dtype}")
        if self.recording:
            raise RuntimeError("memory cannot be taken while a graph is recorded: take it before, or from an arena")
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._ready()
        try:
            buffer = self._core.allocate(max(count, 1), stream=self._stream)
        except Exception as error:
            if "OUT_OF_MEMORY" not in str(error).upper():
                raise
            free, total = self.memory()
            raise InsufficientMemoryError(
                f"not enough memory on {self.name}: needed {count / 1e9:.3f} GB, free {free / 1e9:.3f} of "
                f"{total / 1e9:.3f} GB. Lower max_model_len (--ctx-size), kv_cache_bytes or max_num_batched_tokens, "
                "choose a smaller model, or free memory that other programs hold"
            ) from error
        raw = self.kernels.Array(int(buffer.handle), list(shape), DTYPES[np.dtype(dtype)], owner=buffer)
        return DeviceArray(self, raw)

    def zeros(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """The same, of zeros."""
        array = self.empty(shape, dtype)
        if array.nbytes:
            array.raw.owner.fill(0, stream=self._stream)
        return array

    def pinned(self, count: int) -> NDArray[np.uint8]:
        """`count` bytes of page-locked memory on the host, between which and the GPU copies run by themselves."""
        from cuda.core import LegacyPinnedMemoryResource

        self._ready()
        return np.asarray(_Pinned(LegacyPinnedMemoryResource().allocate(max(count, 1)), count))

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """A copy of a numpy array on the GPU; the array may be changed once this returns."""
        source = np.asarray(array, order="C")
        if source.nbytes < STAGING_BYTES:
            target = self.empty(source.shape, source.dtype)
            self.write(target, source)
            return target

        def piece(first: int, rows: NDArray[Any]) -> None:
            rows[...] = source[first : first + len(rows)]

        return self.load(source.shape, source.dtype, piece)

    def load(self, shape: Sequence[int], dtype: Any, write: Callable[[int, NDArray[Any]], None]) -> DeviceArray:
        """An array [N, ...] on the GPU of what ``write(first, rows)`` puts into `rows`, its rows from `first` on.

        They lie in page-locked memory; while one piece is written, by several threads, the one before is on its way.
        """
        target, threads = self.empty(shape, dtype), min(STAGING_THREADS, default_threads())

        def write_together(first: int, rows: NDArray[Any]) -> None:
            share = -(-len(rows) // threads)
            parts = range(0, len(rows), share)
            list(pool.map(lambda at: write(first + at, rows[at : at + share]), parts))  # raises what a thread did

        if target.nbytes:
            with self._loading, ThreadPoolExecutor(threads) as pool:
                self._load(target, write_together)
        return target

    def _load(self, target: DeviceArray, write: Callable[[int, NDArray[Any]], None]) -> None:
        shape, dtype, row = target.shape, target.dtype, target.nbytes // len(target)
        if not self._staging or self._staging[0].nbytes < row:
            self._staging = [self.pinned(max(STAGING_BYTES, row)) for _ in range(2)]
        count = self._staging[0].nbytes // row
        sent: list[Any] = [None, None]
        for turn, first in enumerate(range(0, shape[0], count)):
            half, rows = turn % 2, min(count, shape[0] - first)
            if sent[half] is not None:
                sent[half].sync()
            memory = self._staging[half][: rows * row].view(dtype).reshape(rows, *shape[1:])
            write(first, memory)
            self.send(target[first : first + rows], memory)
            sent[half] = self.record()
        self.synchronize()

    def write(self, target: DeviceArray, source: Any) -> None:
        """Copy an array of the same shape and dtype, from the GPU or the host, into contiguous memory."""
        if target.shape != tuple(source.shape) or target.dtype != source.dtype:
            raise ValueError(
                f"write: expected {list(target.shape)} of {target.dtype}, got {list(source.shape)} of {source.dtype}"
            )
        if isinstance(source, DeviceArray):
            self._ready()
            if target.nbytes:
                _buffer_of(target).copy_from(_buffer_of(source), stream=self._lane)
            return
        source = np.asarray(source, order="C")
        self.send(target, source)
        self.synchronize()

    def send(self, target: DeviceArray, source: NDArray[Any]) -> None:
        """Copy contiguous memory of the host that stays as it is until what follows in the stream was waited for."""
        self._ready()
        if target.nbytes:
            _buffer_of(target).copy_from(_host_buffer(source), stream=self._lane)

    def fetch(self, target: NDArray[Any], source: DeviceArray) -> None:
        """Copy to contiguous memory of the host; it is there once the stream was waited for."""
        self._ready()
        if target.nbytes:
            _buffer_of(source).copy_to(_host_buffer(target), stream=self._lane)

    def read(self, array: DeviceArray) -> NDArray[Any]:
        """A copy on the host, after all that was launched before."""
        if not array.contiguous:  # all elements with what lies between them, then the elements alone
            reach = sum((length - 1) * stride for length, stride in zip(array.shape, array.raw.strides, strict=True))
            flat = self.read(array.view(0, [reach + 1]))
            strides = [stride * flat.itemsize for stride in array.raw.strides]
            return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, array.shape, strides))
        target = np.empty(array.shape, array.dtype)
        self.fetch(target, array)
        self.synchronize()
        return target

    def from_dlpack(self, other: Any) -> DeviceArray:
        """A view of another library's array on this GPU, such as a tensor of torch, without a copy.

        The array is given back once the view is gone and the stream has done all that it was given until then, for its
        owner may hand the memory out again at once.
        """
        self._ready()
        on_gpu = other.__dlpack_device__()[0] == 2
        capsule = other.__dlpack__(stream=self.stream) if on_gpu else other.__dlpack__()
        raw = self.kernels.from_dlpack(capsule, tensor.DEVICE_KIND, 0)
        lent = Shared(raw.owner, lambda owner: self.synchronize())
        return DeviceArray(self, lent.array(self.kernels, raw))

    # Events and graphs

    def record(self) -> Any:
        """An event of cuda.core at this point of the stream; its ``sync()`` waits for all before it."""
        self._ready()
        return self._stream.record()

    def begin_graph(self) -> None:
        """From here what this thread gives the stream is recorded, not run."""
        if self.recording:
            raise RuntimeError("begin_graph: expected no graph that this thread records already: end or drop it first")
        self._ready()
        builder = self._core.create_graph_builder()
        with self._graphs:
            self._recordings += 1
        try:
            builder.begin_building()
        except BaseException:
            self._close(builder)
            raise
        self._thread.builder = builder

    def end_graph(self) -> Any:
        """The graph of what was given since :meth:`begin_graph`, a ``cuda.core`` Graph, ready to run.

        However it ends, nothing is recorded any more.
        """
        builder = self._take_builder()
        try:
            graph = builder.end_building().complete()
        finally:
            self._close(builder)
        graph.upload(self._stream)
        return graph

    def drop_graph(self) -> None:
        """End a recording that failed, if there is one."""
        if not self.recording:
            return
        builder = self._take_builder()
        with suppress(Exception):  # what failed in it is known already, and ends it too
            builder.end_building()
        self._close(builder)

    @property
    def recording(self) -> bool:
        """Whether this thread records a graph."""
        return self._builder is not None

    def replay(self, graph: Any) -> None:
        """Run a graph."""
        self._ready()
        graph.launch(self._stream)

    def _take_builder(self) -> Any:
        """Take the builder: what follows is not recorded any more."""
        builder, self._thread.builder = self._builder, None
        return builder

    def _close(self, builder: Any) -> None:
        """Close the builder of a recording that has ended, and let go of what waited for the last one."""
        try:
            builder.close()
        finally:
            with self._graphs:
                self._recordings -= 1
                if self._lent and not self._recordings:
                    self._core.sync()
                    self._lent = []

    @property
    def _builder(self) -> Any:
        """That of the graph which this thread records."""
        return getattr(self._thread, "builder", None)

    @property
    def _lane(self) -> Any:
        """The stream that work of this thread is given to: that of its recording while there is one."""
        builder = self._builder
        return self._stream if builder is None else builder.stream

    def _ready(self) -> None:
        """Make the device current in this thread."""
        if not getattr(self._thread, "current", False):
            self._core.set_current()
            self._thread.current = True


def _switch(name: str) -> bool:
    """Whether a variable of the environment is on, as it is unless it is set to "off"."""
    asked = os.environ.get(name, "on")
    if asked not in ("on", "off"):
        raise ValueError(f"{name}: expected on or off, got {asked!r}")
    return asked == "on"


class _Pinned:
    """Page-locked memory as numpy takes it; the array keeps this, and this the memory."""

    def __init__(self, buffer: Any, count: int) -> None:
        self._buffer = buffer
        self.__array_interface__ = {
            "version": 3,
            "shape": (count,),
            "typestr": "|u1",
            "data": (int(buffer.handle), False),
        }


def _host_buffer(array: NDArray[Any]) -> Any:
    """A numpy array's memory as cuda.core takes it."""
    from cuda.core import Buffer

    return Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)


def _buffer_of(array: DeviceArray) -> Any:
    """The memory of a contiguous array on the GPU as cuda.core takes it."""
    from cuda.core import Buffer

    if not array.contiguous:
        raise ValueError(f"copy: expected contiguous memory, got {array} with strides {array.raw.strides}")
    return Buffer.from_handle(array.raw.pointer, array.nbytes, owner=array.raw.owner)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"

"""The GPU: whether there is one to use, and memory on it. The only importer of cuda-python (``cuda.core`` 1.x).

Nothing here is imported by the CPU's engine. :func:`unavailable` says why there is no usable GPU, :func:`open_device`
gives it or raises `CudaUnavailable`; both go through one guard, which makes ``Device(0)`` the first call of
``cuda.core``: without a driver, some others would leave a lock held and the next call would never return.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pyllm.errors import CudaUnavailable, InsufficientMemoryError

if TYPE_CHECKING:
    from pyllm import _cuda

OLDEST = (8, 0)  # compute capability that the kernels are compiled for
DTYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.int32): "int32",
    np.dtype(np.uint32): "uint32",
    np.dtype(np.int64): "int64",
    np.dtype(np.uint8): "uint8",
}


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
    except ImportError as error:
        raise CudaUnavailable(f"cuda-python 1.x is not installed ({error}): pip install 'pyllm[cuda]'") from error
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
    return Device(core)


class Device:
    """A GPU with one stream, on which all its copies and kernels run in order."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._stream = core.create_stream()
        self.name = str(core.name)
        self.multiprocessors = int(core.properties.multiprocessor_count)

    @property
    def stream(self) -> int:
        """Address of the stream, as the launchers of `pyllm._cuda` take it."""
        return int(self._stream.handle)

    def synchronize(self) -> None:
        """Wait for all that the stream was given; raises what went wrong in it."""
        self._stream.sync()

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> _cuda.Array:
        """Memory for an array of one of `DTYPES`; what it holds is undefined."""
        from pyllm import _cuda

        if np.dtype(dtype) not in DTYPES:
            raise TypeError(f"dtype: expected one of {', '.join(DTYPES.values())}, got {dtype}")
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        try:
            buffer = self._core.allocate(max(count, 1), stream=self._stream)
        except Exception as error:
            if "OUT_OF_MEMORY" not in str(error).upper():
                raise
            raise InsufficientMemoryError(f"not enough GPU memory: {count} bytes could not be had: {error}") from error
        return _cuda.Array(int(buffer.handle), list(shape), DTYPES[np.dtype(dtype)], owner=buffer)

    def upload(self, array: NDArray[Any]) -> _cuda.Array:
        """A copy of a numpy array on the GPU; it is there before this returns."""
        source = np.ascontiguousarray(array)
        target = self.empty(source.shape, source.dtype)
        if source.nbytes:
            target.owner.copy_from(_host_buffer(source), stream=self._stream)
            self.synchronize()
        return target

    def download(self, array: _cuda.Array) -> NDArray[Any]:
        """A copy of an array that :meth:`empty` or :meth:`upload` made, after all that was launched before."""
        dtype = next(d for d, name in DTYPES.items() if name == array.dtype)
        target = np.empty(array.shape, dtype)
        if target.nbytes:
            array.owner.copy_to(_host_buffer(target), stream=self._stream)
        self.synchronize()
        return target


def _host_buffer(array: NDArray[Any]) -> Any:
    """A numpy array's memory as cuda.core takes it."""
    from cuda.core import Buffer

    return Buffer.from_handle(array.ctypes.data, array.nbytes, owner=array)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"

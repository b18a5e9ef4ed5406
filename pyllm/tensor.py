"""Arrays in the memory of a GPU, with as much of numpy's face as the engine needs, and no arithmetic."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pyllm import _cuda
    from pyllm.device import Device

DTYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
    np.dtype(np.int32): "int32",
    np.dtype(np.uint32): "uint32",
    np.dtype(np.int64): "int64",
    np.dtype(np.uint8): "uint8",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
DEVICE_KIND = 2  # DLPack's number for memory of a CUDA device


class Shared:
    """Keeps memory that two libraries share until ``let_go(owner)`` has waited, or keeps it for as long itself.

    DLPack's deleter names no stream, and a stream that was named when the memory was lent may be gone by then: whoever
    gives the memory back has to know by itself that nothing works on it any more.
    """

    def __init__(self, owner: object, let_go: Callable[[object], None]) -> None:
        self._owner, self._let_go = owner, let_go

    def array(self, kernels: Any, raw: _cuda.Array) -> _cuda.Array:
        """`raw` again, as a view that this keeps."""
        return kernels.Array(raw.pointer, raw.shape, raw.dtype, strides=raw.strides, owner=self)  # type: ignore[no-any-return]

    def __del__(self) -> None:
        """Wait; then what was kept goes."""
        if not sys.is_finalizing():
            self._let_go(self._owner)


class DeviceArray:
    """A view of GPU memory: `shape`, `dtype` (float32, bfloat16, int32, uint32, int64 or uint8) and strides.

    `raw` is what the launchers of `pyllm._cuda` take; it keeps the memory. All work on the memory goes through the one
    stream of `device`. ``numpy.asarray(x)`` copies it to the host; bfloat16 stays bfloat16. It goes to torch, cupy and
    jax without a copy through DLPack, and where the dtype has a name there through ``__cuda_array_interface__``.

    `host`, where not None, is the array on the host that its content comes from (:meth:`pyllm.ops.Ops.stage`).
    """

    __slots__ = ("device", "dtype", "host", "raw", "shape")

    def __init__(self, device: Device, raw: _cuda.Array, host: NDArray[Any] | None = None) -> None:
        self.device, self.raw, self.host = device, raw, host
        self.shape: tuple[int, ...] = raw.shape
        self.dtype: np.dtype[Any] = BY_NAME[raw.dtype]

    def __repr__(self) -> str:
        """Shape and dtype."""
        return f"DeviceArray({list(self.shape)}, {self.raw.dtype})"

    def __len__(self) -> int:
        """Length of the first dimension."""
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether elements lie side by side in the order of numpy."""
        if self.size == 0:
            return True
        step = 1
        for length, stride in zip(reversed(self.shape), reversed(self.raw.strides), strict=True):
            if length != 1 and stride != step:
                return False
            step *= length
        return True

    # Views

    def view(self, offset: int, shape: Sequence[int], strides: Sequence[int] | None = None) -> DeviceArray:
        """Elements from the one `offset` behind the first on; contiguous where strides are None."""
        pointer = self.raw.pointer + offset * self.dtype.itemsize
        raw = self.device.kernels.Array(pointer, list(shape), self.raw.dtype, strides=strides, owner=self.raw.owner)
        return DeviceArray(self.device, raw)

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view of another shape; what is not contiguous may have its last dimension split or its last two joined."""
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        known = math.prod(length for length in shape if length >= 0)
        new = tuple(self.size // max(known, 1) if length < 0 else length for length in shape)
        if math.prod(new) != self.size:
            raise ValueError(f"reshape: expected {self.size} elements as {self.shape} has, got shape {shape}")
        if self.contiguous:
            return self.view(0, new)
        rows = self.raw.strides[0]
        if new[:1] != self.shape[:1] or not self.view(0, self.shape[1:], self.raw.strides[1:]).contiguous:
            raise ValueError(f"reshape: {self.shape} with strides {self.raw.strides} cannot be viewed as {new}")
        inner = np.cumprod([1, *reversed(new[2:])])[::-1].tolist()
        return self.view(0, new, [rows, *inner])

    def __getitem__(self, index: Any) -> DeviceArray:
        """Views by an integer, a slice of step 1 or a tuple of these; with a list of integers a copy of the rows."""
        if isinstance(index, list | np.ndarray):
            rows = self.device.empty((len(index), *self.shape[1:]), self.dtype)
            for to, row in enumerate(index):
                rows[to] = self[int(row)]
            return rows
        parts = index if isinstance(index, tuple) else (index,)
        offset, shape, strides = 0, [], []
        for axis, (length, stride) in enumerate(zip(self.shape, self.raw.strides, strict=True)):
            part = parts[axis] if axis < len(parts) else slice(None)
            if isinstance(part, slice):
                start, stop, step = part.indices(length)
                if step != 1:
                    raise IndexError(f"index: expected slices of step 1, got {part}")
                shape.append(max(stop - start, 0))
                strides.append(stride)
            else:
                start = int(part) + (length if part < 0 else 0)
                if not 0 <= start < length:
                    raise IndexError(f"index: expected at most {length - 1} in dimension {axis}, got {part}")
            offset += start * stride
        return self.view(offset, shape, strides)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write `value`, an array of the same shape and dtype on the GPU or on the host."""
        self.device.write(self[index], value)

    # Copies

    def copy(self) -> DeviceArray:
        """A contiguous copy in memory of its own."""
        twin = self.device.empty(self.shape, self.dtype)
        self.device.write(twin, self)
        return twin

    def numpy(self) -> NDArray[Any]:
        """A copy on the host, after all that was launched before."""
        return self.device.read(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The same, for numpy."""
        host = self.numpy()
        return host if dtype is None else host.astype(dtype, copy=False)

    # Exchange

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Version 3; AttributeError for bfloat16, for which it has no name."""
        if self.raw.dtype == "bfloat16":
            raise AttributeError("__cuda_array_interface__ has no bfloat16: use DLPack")
        strides = None if self.contiguous else tuple(s * self.dtype.itemsize for s in self.raw.strides)
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.raw.pointer, False),
            "strides": strides,
            "stream": self.device.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        """Kind of device and its number."""
        return DEVICE_KIND, 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule for ``from_dlpack`` of another library.

        What was given to our stream is done when this returns, unless `stream` is -1. Once the other library drops the
        array, which it may do while its kernels still read it, the memory is freed after all streams have been waited
        for. ``__cuda_array_interface__`` has no such sign: who takes an array through it keeps it until then.
        """
        if dl_device is not None and tuple(dl_device) != self.__dlpack_device__():
            raise BufferError(f"dl_device: expected {self.__dlpack_device__()}, got {dl_device}")
        if copy:
            raise BufferError("copy: expected None or False: make one with copy()")
        if stream != -1:
            self.device.synchronize()
        lent = Shared(self.raw.owner, self.device.let_go)
        return self.device.kernels.to_dlpack(lent.array(self.device.kernels, self.raw), DEVICE_KIND, 0)

"""Memory of a GPU as :class:`pyllm.cuda_ops.CudaOps` uses it: arenas, arrays that go there with a step, results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.device import Device
from pyllm.ops import Stage
from pyllm.sampling import SAMPLE_ROW
from pyllm.tensor import DTYPES, DeviceArray

PIECE = 256  # bytes that arrays in one block of memory begin at
SLOTS = 32  # small arrays on their way to the host


class DeviceArena:
    """One block of GPU memory, laid out once per recorded step: outputs are taken in order and given back by mark."""

    def __init__(self, memory: DeviceArray) -> None:
        self.memory = memory
        self.used = 0

    def take(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """The next elements, as an array of that shape."""
        count = math.prod(shape) * dtype.itemsize
        start, self.used = self.used, self.used + -(-count // PIECE) * PIECE
        if self.used > self.memory.nbytes:
            raise MemoryError(f"arena: {self.used} bytes needed, {self.memory.nbytes} laid out")
        return typed(self.memory, start, shape, dtype)


class DeviceStage(Stage):
    """Arrays of the host in one block, page-locked if it is `lasting`, and their copies in one block of the GPU's."""

    def __init__(self, device: Device, arrays: Sequence[Any], lasting: bool) -> None:
        places, total = [], 0
        for array in arrays:
            places.append(total)
            total += -(-(array.nbytes if isinstance(array, np.ndarray) else 0) // PIECE) * PIECE
        self._device, self._lasting = device, lasting
        self._sent: Any = None
        self._memory = device.pinned(total) if lasting else np.empty(total, np.uint8)
        self._block = device.empty([total], np.uint8)
        host: list[Any] = []
        placed: list[Any] = []
        for array, start in zip(arrays, places, strict=True):
            if not isinstance(array, np.ndarray):
                host.append(array)
                placed.append(array)
                continue
            mine = self._memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            mine[...] = array
            raw = array.dtype == SAMPLE_ROW
            shape = (*array.shape, SAMPLE_ROW.itemsize) if raw else array.shape
            there = typed(self._block, start, shape, np.dtype(np.uint8) if raw else array.dtype)
            there.host = mine
            host.append(mine)
            placed.append(there)
        super().__init__(host, placed)

    def send(self) -> None:
        """Copy all arrays to the GPU."""
        if not self._lasting:
            self._device.write(self._block, self._memory)
            return
        self._device.send(self._block, self._memory)
        self._sent = self._device.record()

    def wait(self) -> None:
        """Wait until the copy has been made, so that the arrays may be changed."""
        if self._sent is not None:
            self._sent.sync()


class Pending:
    """What a kernel wrote, on its way to the host."""

    def __init__(self, memory: NDArray[Any], event: Any) -> None:
        self._memory, self._event = memory, event

    def wait(self) -> NDArray[Any]:
        """The array, once it is there."""
        self._event.sync()
        return self._memory


class Mailbox:
    """Small arrays on their way to the host, through page-locked memory in turns."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slots = device.pinned(0).reshape(SLOTS, 0)
        self._next = 0

    def fetch(self, array: DeviceArray) -> Pending:
        """Begin to bring an array to the host. It must be taken before the next but `SLOTS` is."""
        if array.nbytes > self._slots.shape[1]:  # what was fetched before keeps its memory
            room = -(-array.nbytes // PIECE) * PIECE
            self._slots = self._device.pinned(SLOTS * room).reshape(SLOTS, room)
        memory = self._slots[self._next][: array.nbytes].view(array.dtype).reshape(array.shape)
        self._next = (self._next + 1) % SLOTS
        self._device.fetch(memory, array)
        return Pending(memory, self._device.record())


def typed(memory: DeviceArray, start: int, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
    """Bytes of `memory` from `start` on as an array."""
    raw = memory.device.kernels.Array(memory.raw.pointer + start, list(shape), DTYPES[dtype], owner=memory.raw.owner)
    return DeviceArray(memory.device, raw)

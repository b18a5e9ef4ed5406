"""What kernel tests share: ISA levels, arrays in guarded frames, the tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu

Array = NDArray[Any]

ISAS: list[str] = _cpu.available_isas()
# Around every vector width, around the unrolled loops, primes, and sizes of real models.
DIMS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 67, 127, 129, 257, 768, 1000, 2053]


@contextmanager
def at_isa(name: str) -> Iterator[None]:
    """Kernels at this ISA level inside the block."""
    before = _cpu.active_isa()
    _cpu.set_isa(name)
    assert _cpu.active_isa() == name
    try:
        yield
    finally:
        _cpu.set_isa(before)


class Framed:
    """An array inside larger memory: misaligned by `offset` elements, `gap` between rows, all of it guarded.

    What lies around the array is NaN for floats, so that a value read there shows; `check` compares it.
    """

    def __init__(self, values: Array, offset: int = 1, gap: int = 3) -> None:
        *lead, last = values.shape
        rows = lead[0] if lead else 1
        width = int(np.prod(values.shape[1:], dtype=np.int64)) if lead else last
        pad = 64 // values.itemsize
        memory = np.empty(pad + offset + rows * (width + gap) + pad, values.dtype)
        memory.fill(np.nan if values.dtype.kind in "fV" else -77)
        inside = np.zeros(memory.shape, bool)
        grid = slice(pad + offset, pad + offset + rows * (width + gap))
        inside[grid].reshape(rows, width + gap)[:, :width] = True
        view = memory[grid].reshape(rows, width + gap)[:, :width]
        item = values.itemsize
        strides = (view.strides[0], *(item * int(np.prod(values.shape[i + 1 :])) for i in range(1, values.ndim)))
        self.array: Array = np.lib.stride_tricks.as_strided(
            view, values.shape, strides if lead else (item,), writeable=True
        )
        self.array[...] = values
        self._memory, self._inside, self._before = memory, inside, memory.tobytes()

    def check(self) -> None:
        """Nothing outside the array has been written."""
        before = np.frombuffer(self._before, np.uint8).reshape(self._memory.size, -1)
        now = self._memory.view(np.uint8).reshape(self._memory.size, -1)
        assert np.array_equal(before[~self._inside], now[~self._inside]), "wrote outside the array"


def assert_close(actual: Array, oracle: Array, naive: Array) -> None:
    """err(kernel) <= 2 err(naive float32) + 4 eps max|oracle|, and the same places are not numbers."""
    assert actual.dtype == np.float32
    assert oracle.dtype == np.float64
    if not oracle.size:
        return
    finite = np.isfinite(oracle)
    assert np.array_equal(np.isnan(actual), np.isnan(oracle))
    scale = float(np.abs(oracle[finite]).max(initial=0.0))
    allowed = 2 * float(np.abs(naive - oracle)[finite].max(initial=0.0)) + 4 * float(np.finfo(np.float32).eps) * scale
    error = float(np.abs(actual - oracle)[finite].max(initial=0.0))
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

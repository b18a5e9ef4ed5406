"""Rounding a weight to integers in groups, with scales that leave the least squared error.

Each group tries several scales; the integers that a scale gives have a best scale of their own (least squares), so what
is compared is the error after it. With `importance`, the mean square of each input's activations, the error is that of
the layer's output for inputs that are not correlated, instead of that of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.quantization.tensor import F32, QuantizedTensor

CHUNK = 1 << 16  # weights rounded at a time: several float32 copies of them fit a core's second-level cache
DAMPING = 0.01  # of the mean importance, given to every input: calibration text does not show all there is
SMALLEST = 2.0**-24  # the least float16 above 0
ENDS = {  # where the extreme value of a group is tried: from short of the range's long end to well beyond it, clipped
    4: (7, 7.5, 8, 8.5, 9, 9.5, 10, 11, 12.5),
    8: (126.5, 127, 127.5, 128, 128.5, 129, 131, 135, 142),
}


@dataclass(frozen=True)
class RoundingError:
    """Sums of squares over a weight: of the weight itself, of its rounding error, and of the error that scales of
    max|w| / (2^(bits - 1) - 1) would leave (round to nearest). With importance, each square is weighted by it."""

    weight: float = 0.0
    error: float = 0.0
    nearest: float = 0.0

    def __add__(self, other: RoundingError) -> RoundingError:
        """Of two weights together."""
        return RoundingError(self.weight + other.weight, self.error + other.error, self.nearest + other.nearest)

    @property
    def relative(self) -> float:
        """Root of the mean squared error over that of the weight."""
        return float(np.sqrt(self.error / self.weight)) if self.weight else 0.0

    @property
    def relative_nearest(self) -> float:
        """The same for round to nearest."""
        return float(np.sqrt(self.nearest / self.weight)) if self.weight else 0.0


def quantize(
    weight: NDArray[Any],
    bits: int,
    group_size: int,
    scale_dtype: Any,
    importance: F32 | None = None,
    threads: int = 1,
) -> tuple[QuantizedTensor, RoundingError]:
    """Round a finite weight [N, K] of any float dtype to 4 or 8 bits, symmetric; `importance` is [K], not negative.

    `group_size` divides K; 0 is one group for a row. Scales may be negative: the largest value of a group then lies
    at the end of the range that holds one integer more. Where kernels have scales of 16 bits, float32 ones are numbers
    that float16 holds.
    """
    outputs, inputs = weight.shape
    size = group_size or inputs
    if inputs % size:
        raise ValueError(f"groups of {size} do not divide {inputs} inputs")
    root = None if importance is None else _root(importance).reshape(-1, size).T
    held = np.dtype(np.float16 if group_size and scale_dtype == np.float32 else scale_dtype)
    values = np.empty((outputs, inputs * bits // 8), np.uint8)
    scales = np.empty((outputs, inputs // size), scale_dtype)

    def work(rows: slice) -> RoundingError:
        count = rows.stop - rows.start
        groups = np.ascontiguousarray(weight[rows].astype(np.float32).reshape(-1, size).T)
        with np.errstate(over="ignore"):  # squares of numbers that no trained weight has
            chunk = _Chunk(groups, bits, held, None if root is None else np.tile(root, count))
        scales[rows] = chunk.scale.reshape(count, -1)
        integers = chunk.integers.astype(np.int8).T.reshape(count, inputs).view(np.uint8) + np.uint8(1 << (bits - 1))
        values[rows] = integers if bits == 8 else integers[:, ::2] | integers[:, 1::2] << 4
        return chunk.error

    with ThreadPoolExecutor(threads) as pool:  # numpy lets other threads run while it computes
        error = sum(pool.map(work, _chunks(outputs, inputs)), RoundingError())
    return QuantizedTensor(bits, inputs, group_size, values, scales), error


def _chunks(outputs: int, inputs: int) -> Iterator[slice]:
    step = max(1, CHUNK // inputs)
    return (slice(at, min(at + step, outputs)) for at in range(0, outputs, step))


def _root(importance: F32) -> F32:
    """Square roots, scaled to a mean of 1 and damped."""
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return np.ones_like(importance)
    root: F32 = np.sqrt(importance / np.float32(mean) + np.float32(DAMPING), dtype=np.float32)
    return root


class _Chunk:
    """Groups x [g, M], one in a column, so that numpy's loops run along many groups: `integers` [g, M], `scale` [M]."""

    def __init__(self, x: F32, bits: int, dtype: np.dtype[Any], root: F32 | None) -> None:
        self.x, self.top, self.root = x, 1 << (bits - 1), root
        self.weighted = x if root is None else x * root
        self.integers, self.scratch = np.empty_like(x), np.empty_like(x)
        high, low = x.max(axis=0), x.min(axis=0)
        extreme = np.where(high > -low, high, low)
        best = _narrowed(self._search(extreme, ENDS[bits]), dtype)
        nearest = _narrowed(np.abs(extreme) / np.float32(self.top - 1), dtype)
        error, of_nearest = self._squared_errors(best), self._squared_errors(nearest)
        self.scale = np.where(error <= of_nearest, best, nearest)  # what is stored is not quite what was searched
        self._round(self.scale.astype(np.float32))
        sums = (self._dot(self.weighted, self.weighted), np.minimum(error, of_nearest), of_nearest)
        self.error = RoundingError(*(float(squares.sum(dtype=np.float64)) for squares in sums))

    def _search(self, extreme: F32, ends: tuple[float, ...]) -> F32:
        """The best scale [M] of those that put the extreme value to one of `ends`."""
        best_gain, best_scale = np.full(extreme.shape, -1, np.float32), np.ones(extreme.shape, np.float32)
        for end in ends:
            q = self._round(extreme / np.float32(-end))
            if self.root is not None:
                q *= self.root
            xq, qq = self._dot(self.weighted, q), self._dot(q, q)
            qq[qq == 0] = 1
            scale = xq / qq  # the best one for these integers,
            gain = xq * scale  # and by how much it lowers the squared error
            better = gain > best_gain
            np.copyto(best_gain, gain, where=better)
            np.copyto(best_scale, scale, where=better)
        return best_scale

    def _round(self, scale: F32) -> F32:
        with np.errstate(divide="ignore"):
            inverse = np.divide(1, scale, dtype=np.float32)
        inverse[~np.isfinite(inverse)] = 0  # a group of zeros, or next to it
        q = np.multiply(self.x, inverse, out=self.integers)
        np.rint(q, out=q)
        return np.clip(q, -self.top, self.top - 1, out=q)

    def _squared_errors(self, scale: NDArray[Any]) -> F32:
        wide = scale.astype(np.float32)
        error = self._round(wide) * wide
        error -= self.x
        if self.root is not None:
            error *= self.root
        return self._dot(error, error)

    def _dot(self, a: F32, b: F32) -> F32:
        """Of columns: [M]."""
        result: F32 = np.multiply(a, b, out=self.scratch).sum(axis=0)
        return result


def _narrowed(scale: F32, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Scales as they are stored: never 0, always finite."""
    limit = np.float32(65504 if dtype == np.float16 else 3e38)
    narrow = np.clip(scale, -limit, limit).astype(dtype)
    narrow[narrow == 0] = SMALLEST
    return narrow

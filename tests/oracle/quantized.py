"""References of integer weights: what they stand for, how rows of x are rounded, and their product in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 512  # inner elements of x that share a scale


@dataclass
class Integers:
    """Weights (values - zeros) * scales: values [N, K] unsigned, scales and zeros [N, groups]."""

    dtype: str
    group_size: int
    values: Array
    scales: Array
    zeros: Array | None

    @property
    def stored(self) -> Array:
        """Values as `pack_quantized` takes them: int4 two a byte, the lower column in the low nibble."""
        if self.dtype == "int8":
            return self.values
        even = np.zeros((self.values.shape[0], -(-self.values.shape[1] // 2) * 2), np.uint8)
        even[:, : self.values.shape[1]] = self.values
        return even[:, ::2] | even[:, 1::2] << 4

    def spread(self, of_groups: Array) -> Array:
        """One number for each group as one for each weight."""
        k = self.values.shape[1]
        return np.repeat(of_groups, self.group_size or max(k, 1), axis=1)[:, :k]

    @property
    def weights(self) -> Array:
        """What they stand for, in float32: one multiplication, rounded once."""
        middle = 128 if self.dtype == "int8" else 8
        zeros: Any = middle if self.zeros is None else self.spread(self.zeros).astype(np.int32)
        return (self.values.astype(np.int32) - zeros).astype(np.float32) * self.spread(self.scales).astype(np.float32)


def random_integers(
    rng: np.random.Generator, n: int, k: int, dtype: str, group_size: int, scale_dtype: Any, zeros: bool
) -> Integers:
    """All values that the dtype has, the lowest included."""
    top = 256 if dtype == "int8" else 16
    groups = -(-k // group_size) if group_size else 1
    return Integers(
        dtype,
        group_size,
        rng.integers(0, top, (n, k)).astype(np.uint8),
        rng.normal(0, 0.01, (n, groups)).astype(scale_dtype),
        rng.integers(0, top, (n, groups)).astype(np.uint8) if zeros else None,
    )


def rounded(x: Array) -> Array:
    """x [T, K] as the matmul sees it, in float64: multiples of max|x| / 127 of each block of a row."""
    result = np.empty(x.shape, np.float64)
    for start in range(0, x.shape[1], BLOCK):
        piece = x[:, start : start + BLOCK]
        largest = np.abs(piece).max(axis=1, keepdims=True)
        inverse = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
        steps = np.rint(piece * inverse).astype(np.float64)
        result[:, start : start + piece.shape[1]] = steps * (largest / np.float32(127)).astype(np.float64)
    return result


def matmul(x: Array, w: Integers) -> Array:
    """x w^T with x rounded: x [T, K] -> float64 [T, N]."""
    middle = 128 if w.dtype == "int8" else 8
    zeros: Any = middle if w.zeros is None else w.spread(w.zeros).astype(np.float64)
    exact = (w.values.astype(np.float64) - zeros) * w.spread(w.scales).astype(np.float64)
    return rounded(x) @ exact.T

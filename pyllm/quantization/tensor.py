"""A quantized weight in the one form that every stored layout is brought to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
F32 = NDArray[np.float32]

KERNEL_GROUPS = (128, 64, 32)  # sizes that the kernels have, largest first


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [N, K] as ``(value - zero) * scale``, G groups to a row, without any loss from what was stored.

    values: uint8, offset-binary; 8 bits [N, K], 4 bits [N, ceil(K / 2)], two in a byte, the low half first.
    scales: [N, G] float16, bfloat16 or float32.
    zeros: uint8 [N, G]; None is 8 or 128 everywhere.
    group_size: inputs that share a scale; 0 is all of a row (G = 1). The last group may be short.
    order: int32 [K], the group of each input where neighbours do not share one (GPTQ's activation order).
    """

    bits: int
    inputs: int
    group_size: int
    values: Bytes
    scales: NDArray[Any]
    zeros: Bytes | None = None
    order: NDArray[np.int32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.inputs

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """Outputs `start` to `stop`, as views."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return replace(self, values=self.values[start:stop], scales=self.scales[start:stop], zeros=zeros)

    def dequantize(self) -> F32:
        """The weight, float32 [N, K]: exact for scales of 16 bits, else rounded once."""
        scales = self.scales.astype(np.float32)
        zeros = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros.astype(np.float32)
        weight = _integers(self.values, self.bits, self.inputs).astype(np.float32)
        if self.group_size == 0:
            weight -= zeros
            weight *= scales
            return weight
        group = self.order if self.order is not None else np.arange(self.inputs) // self.group_size
        if self.zeros is None:
            weight -= zeros
        else:
            weight -= np.take(zeros, group, axis=1)
        weight *= np.take(scales, group, axis=1)
        return weight

    def for_kernels(self) -> QuantizedTensor | None:
        """The same weight with a group size and scales that the kernels have; None where there is no exact way.

        A group of 256 is two of 128 with the same scale, and so on; 8 bits may have one scale to a row. Scales of 32
        bits must fit 16. Activation order has no such form: it would have to reorder what the layer is given.
        """
        if self.order is not None:
            return None
        scales = self.scales
        if self.group_size == 0 and self.bits == 8 and self.zeros is None:
            return replace(self, scales=scales.astype(np.float32, copy=False))
        if scales.dtype == np.float32:
            narrow = _fitting_16_bits(scales)
            if narrow is None:
                return None
            scales = narrow
        if self.group_size in KERNEL_GROUPS:
            return replace(self, scales=scales)
        size = next((size for size in KERNEL_GROUPS if self.group_size % size == 0), None)  # 0 becomes the largest
        if size is None:
            return None
        count = -(-self.inputs // size)
        times = self.group_size // size or count
        zeros = None if self.zeros is None else np.repeat(self.zeros, times, axis=1)[:, :count]
        return replace(self, group_size=size, scales=np.repeat(scales, times, axis=1)[:, :count], zeros=zeros)


def _integers(values: Bytes, bits: int, inputs: int) -> Bytes:
    """[N, K], one in a byte."""
    if bits == 8:
        return values
    halves = np.empty((values.shape[0], values.shape[1], 2), np.uint8)
    np.bitwise_and(values, 15, out=halves[:, :, 0])
    np.right_shift(values, 4, out=halves[:, :, 1])
    return halves.reshape(values.shape[0], 2 * values.shape[1])[:, :inputs]


def _fitting_16_bits(scales: F32) -> NDArray[Any] | None:
    """The same numbers in float16 or bfloat16, if one of them holds them all."""
    import ml_dtypes

    with np.errstate(over="ignore"):
        for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
            narrow = scales.astype(dtype)
            if np.array_equal(narrow.astype(np.float32), scales):
                return narrow
    return None

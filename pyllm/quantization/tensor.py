"""A quantized weight in the one form that every stored layout is brought to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
F32 = NDArray[np.float32]

KERNEL_GROUPS = (128, 64, 32)  # sizes that the kernels have, largest first


@dataclass(frozen=True)
class KernelForm:
    """What tells apart the kinds of integer matrices that kernels have: weights of one kind can be packed together."""

    bits: int
    group_size: int
    scale_dtype: str
    zeros: bool

    @property
    def dtype(self) -> str:
        """As packed matrices name it."""
        return f"int{self.bits}"


def kernel_form(bits: int, group_size: int, scale_dtype: str, zeros: bool) -> KernelForm | None:
    """The form for a weight of this kind: groups of 256 are two of 128 with one scale, and so on; 8 bits may have one
    scale to a row. None where groups are no multiple of those that kernels have."""
    if group_size == 0 and bits == 8 and not zeros:
        return KernelForm(bits, 0, "float32", zeros)
    size = next((size for size in KERNEL_GROUPS if group_size % size == 0), None)  # 0 becomes the largest
    if size is None:
        return None
    return KernelForm(bits, size, "float16" if scale_dtype == "float32" else scale_dtype, zeros)


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

    def rows(self, place: slice | NDArray[np.intp]) -> QuantizedTensor:
        """These outputs: views where they are a slice."""
        zeros = None if self.zeros is None else self.zeros[place]
        return replace(self, values=self.values[place], scales=self.scales[place], zeros=zeros)

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

        Scales of 32 bits must be numbers that 16 bits hold. Activation order has no such form: it would have to reorder
        what the layer is given.
        """
        form = kernel_form(self.bits, self.group_size, str(self.scales.dtype), self.zeros is not None)
        if form is None or self.order is not None:
            return None
        scales = _held(self.scales, form.scale_dtype)
        if scales is None and form.scale_dtype == "float16":
            scales = _held(self.scales, "bfloat16")
        if scales is None:
            return None
        if form.group_size == self.group_size:
            return replace(self, scales=np.require(scales, requirements=["C", "A"]))
        count = -(-self.inputs // form.group_size)
        times = self.group_size // form.group_size or count
        zeros = None if self.zeros is None else np.repeat(self.zeros, times, axis=1)[:, :count]
        scales = np.repeat(scales, times, axis=1)[:, :count]
        return replace(self, group_size=form.group_size, scales=scales, zeros=zeros)


def in_one_form(tensors: Sequence[QuantizedTensor]) -> tuple[KernelForm, list[QuantizedTensor]] | None:
    """Weights that are to be packed together, in the form that kernels have for all of them; None without one."""
    forms = [tensor.for_kernels() for tensor in tensors]
    same = [tensor for tensor in forms if tensor is not None]
    kinds = {(tensor.bits, tensor.group_size, str(tensor.scales.dtype)) for tensor in same}
    if len(same) < len(tensors) or len(kinds) != 1:
        return None
    zeros = any(tensor.zeros is not None for tensor in same)
    if zeros:  # those that have none get the middle: the same weight
        same = [tensor if tensor.zeros is not None else _with_zeros(tensor) for tensor in same]
    bits, group_size, dtype = kinds.pop()
    return KernelForm(bits, group_size, dtype, zeros), same


def _with_zeros(tensor: QuantizedTensor) -> QuantizedTensor:
    return replace(tensor, zeros=np.full(tensor.scales.shape, 1 << (tensor.bits - 1), np.uint8))


def _integers(values: Bytes, bits: int, inputs: int) -> Bytes:
    """[N, K], one in a byte."""
    if bits == 8:
        return values
    halves = np.empty((values.shape[0], values.shape[1], 2), np.uint8)
    np.bitwise_and(values, 15, out=halves[:, :, 0])
    np.right_shift(values, 4, out=halves[:, :, 1])
    return halves.reshape(values.shape[0], 2 * values.shape[1])[:, :inputs]


def _held(scales: NDArray[Any], dtype: str) -> NDArray[Any] | None:
    """The same numbers in this dtype; None if it does not hold them all."""
    with np.errstate(over="ignore"):
        held = scales.astype(dtype, copy=False)
    return held if held is scales or np.array_equal(held.astype(np.float32), scales) else None

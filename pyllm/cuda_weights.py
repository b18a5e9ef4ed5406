"""Weights on a GPU: row-major matrices in bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pyllm.device import Device
from pyllm.tensor import DeviceArray

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)


class DeviceMatrix:
    """Weights [N, K] on the GPU, row-major; gated: [2N, K], rows of gate and up in turn.

    `order` [N], where not None, says which row of the weights each row here is: a matrix of
    :meth:`pyllm.cuda_ops.CudaOps.pack_qkv`, for :meth:`pyllm.cuda_ops.CudaOps.queries` alone.
    """

    def __init__(self, values: DeviceArray, gated: bool, order: NDArray[np.intp] | None = None) -> None:
        self.values, self.gated, self.order = values, gated, order
        rows, columns = values.shape
        self.shape = (rows // 2 if gated else rows, columns)
        self.dtype, self.nbytes = values.dtype, values.nbytes
        self._bias: tuple[DeviceArray, DeviceArray | None, DeviceArray] | None = None

    def bias(self, bias: DeviceArray | None, up: DeviceArray | None = None) -> DeviceArray | None:
        """A bias as the kernels read it, made at its first use: that of gate and `up` in turn, or in `order`."""
        if bias is None or (up is None and self.order is None):
            return bias
        if self._bias is None or self._bias[0] is not bias or self._bias[1] is not up:
            host = bias.numpy()
            host = host[self.order] if up is None else np.stack([host, up.numpy()], axis=1).reshape(-1)
            self._bias = bias, up, bias.device.upload(host)
        return self._bias[2]


def load_matrix(device: Device, weights: Sequence[Any], dtype: str | None, gate: Any = None) -> DeviceMatrix:
    """weights[i] [Ni, K], stacked, as "bfloat16" or "float32" (default: the first one's); gated with `gate` [N, K]."""
    kind, shape = _kind(weights, dtype), _stacked(weights)
    if gate is None:
        return DeviceMatrix(device.load(shape, kind, partial(_copy_rows, weights)), False)

    def write_pairs(first: int, pairs: NDArray[Any]) -> None:
        pairs[:, 0] = gate[first : first + len(pairs)]
        _copy_rows(weights, first, pairs[:, 1])

    pairs = device.load((shape[0], 2, shape[1]), kind, write_pairs)
    return DeviceMatrix(pairs.reshape(-1, pairs.shape[2]), True)


def load_qkv(device: Device, weights: Sequence[Any], dtype: str | None, head_size: int, half: int) -> DeviceMatrix:
    """The weights of queries, keys and values with neighbours that are rotated together, (0, half), (1, half + 1), ...
    of each head; in their own order where the kernels that want this do not take them."""
    kind, shape = _kind(weights, dtype), _stacked(weights)
    if kind != BFLOAT16 or shape[1] % 8 or head_size % 2:
        return load_matrix(device, weights, dtype)
    order = np.arange(shape[0])
    heads = order[: len(weights[0]) + len(weights[1])].reshape(-1, head_size)
    heads[:, : 2 * half] = np.stack([heads[:, :half], heads[:, half : 2 * half]], axis=2).reshape(len(heads), -1)

    def write(first: int, rows: NDArray[Any]) -> None:
        _take_rows(weights, order[first : first + len(rows)], rows)

    return DeviceMatrix(device.load(shape, kind, write), False, order)


def _kind(weights: Sequence[Any], dtype: str | None) -> np.dtype[Any]:
    """What weights are held as."""
    to = dtype or str(weights[0].dtype)
    if to not in ("float32", "bfloat16"):
        raise TypeError(f"dtype: expected float32 or bfloat16 on a GPU, got {to}")
    return BFLOAT16 if to == "bfloat16" else FLOAT32


def _stacked(weights: Sequence[Any]) -> tuple[int, int]:
    """Shape of weights [Ni, K] that are stacked."""
    return sum(weight.shape[0] for weight in weights), weights[0].shape[1]


def _copy_rows(weights: Sequence[Any], first: int, rows: NDArray[Any]) -> None:
    """Rows of the stacked weights, from row `first` on."""
    start = 0
    for weight in weights:
        low, high = max(first, start), min(first + len(rows), start + len(weight))
        if low < high:
            rows[low - first : high - first] = weight[low - start : high - start]
        start += len(weight)


def _take_rows(weights: Sequence[Any], index: NDArray[np.intp], rows: NDArray[Any]) -> None:
    """Rows of the stacked weights that `index` names."""
    start = 0
    for weight in weights:
        mine = (index >= start) & (index < start + len(weight))
        rows[mine] = weight[index[mine] - start]
        start += len(weight)

"""What a layout stores for one weight, and the word packing that the layouts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = Mapping[str, Array]  # ending of the stored name -> tensor

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Part:
    """One stored tensor of a weight: dtypes as safetensors names them, and shapes, any of which will do."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False


def unpack_words(words: Array, bits: int) -> NDArray[np.uint8]:
    """int32 [A, B] -> uint8 [A, B * 32 / bits]: the values of each word, lowest bits first."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    values = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=values[..., 0])
    np.right_shift(data, 4, out=values[..., 1])
    return values.reshape(data.shape[0], 2 * data.shape[1])


def words_to_values(words: Array, bits: int, inputs: int) -> NDArray[np.uint8]:
    """int32 [N, words of a row] as the bytes of `QuantizedTensor.values`: a view where the words lie together."""
    return np.ascontiguousarray(words).view(np.uint8)[:, : -(-inputs * bits // 8)]


def zeros_or_none(zeros: NDArray[np.uint8], middle: int) -> NDArray[np.uint8] | None:
    """Zero points, or None where all of them are the middle of the range: then the weight is symmetric."""
    return None if np.all(zeros == middle) else np.ascontiguousarray(zeros)


def order_or_none(order: Array | None, inputs: int, group_size: int) -> NDArray[np.int32] | None:
    """The group of each input, or None where neighbours share one (also said by -1 everywhere)."""
    if order is None or np.all(order == -1):
        return None
    plain = np.zeros(inputs, np.int32) if group_size == 0 else np.arange(inputs, dtype=np.int32) // group_size
    return None if np.array_equal(order, plain) else np.asarray(order, np.int32)

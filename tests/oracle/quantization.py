"""How quantized weights are stored, one value at a time, and what they stand for, in float64.

A weight [N, K] is `values` (0 to 2^bits - 1), `zeros` [N, G] and `scales` [N, G]; input k belongs to group `order[k]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs in a word, lowest bits first


@dataclass(frozen=True)
class Weight:
    bits: int
    group_size: int  # 0: all of a row
    values: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    order: np.ndarray

    def dequantized(self) -> np.ndarray:
        n, k = self.values.shape
        result = np.empty((n, k), np.float64)
        for column in range(k):
            group = self.order[column]
            offsets = self.values[:, column].astype(np.int64) - self.zeros[:, group]
            result[:, column] = offsets * self.scales[:, group].astype(np.float64)
        return result


def random_weight(rng, n, k, bits, group_size, *, symmetric, dtype, shuffled=False) -> Weight:
    groups = -(-k // group_size) if group_size else 1
    order = np.arange(k) // group_size if group_size else np.zeros(k, np.int64)
    middle = 1 << (bits - 1)
    return Weight(
        bits,
        group_size,
        rng.integers(0, 1 << bits, (n, k)),
        np.full((n, groups), middle) if symmetric else rng.integers(0, 1 << bits, (n, groups)),
        (rng.uniform(0.5, 2, (n, groups)) * 2.0 ** rng.integers(-9, -4, (n, groups))).astype(dtype),
        rng.permutation(order) if shuffled else order,
    )


def words(values: np.ndarray, bits: int, places=None) -> np.ndarray:
    """[A, B] -> int32 [A, ceil(B * bits / 32)]; bits of a word that holds fewer values are 0."""
    per_word = 32 // bits
    places = places or range(per_word)
    packed = np.zeros((values.shape[0], -(-values.shape[1] // per_word)), np.uint64)
    for row in range(values.shape[0]):
        for word in range(packed.shape[1]):
            for shift, place in enumerate(places):
                at = word * per_word + place
                if at < values.shape[1]:
                    packed[row, word] |= np.uint64(int(values[row, at]) << (bits * shift))
    return packed.astype(np.uint32).view(np.int32)


def pack_quantized(weight: Weight, *, symmetric: bool) -> dict[str, np.ndarray]:
    parts = {
        "weight_packed": words(weight.values, weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": np.array(weight.values.shape, np.int64),
    }
    if not symmetric:
        parts["weight_zero_point"] = np.ascontiguousarray(words(weight.zeros.T, weight.bits).T)
    return parts


def int_quantized(weight: Weight, *, symmetric: bool) -> dict[str, np.ndarray]:
    parts = {"weight": (weight.values - 128).astype(np.int8), "weight_scale": weight.scales}
    if not symmetric:
        parts["weight_zero_point"] = (weight.zeros - 128).astype(np.int8)
    return parts


def gptq(weight: Weight, *, version: int = 1) -> dict[str, np.ndarray]:
    stored_zeros = (weight.zeros - (version == 1)) % (1 << weight.bits)
    return {
        "qweight": np.ascontiguousarray(words(weight.values, weight.bits).T),
        "qzeros": words(stored_zeros.T, weight.bits),
        "scales": np.ascontiguousarray(weight.scales.T),
        "g_idx": weight.order.astype(np.int32),
    }


def awq(weight: Weight) -> dict[str, np.ndarray]:
    return {
        "qweight": words(weight.values.T, 4, AWQ_ORDER),
        "qzeros": words(weight.zeros.T, 4, AWQ_ORDER),
        "scales": np.ascontiguousarray(weight.scales.T),
    }

"""The "gemm" layout of AWQ: words along the outputs, eight outputs to a word in the order 0 2 4 6 1 3 5 7.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.quantization.part import FLOATS, Arrays, Part, unpack_words, words_to_values, zeros_or_none
from pyllm.quantization.scheme import Scheme
from pyllm.quantization.tensor import QuantizedTensor

PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # of outputs 0 to 7 in a word


def parts(scheme: Scheme, outputs: int, inputs: int) -> dict[str, Part]:
    """What is stored for a weight [outputs, inputs]."""
    groups, words = scheme.groups(inputs), -(-outputs // 8)
    return {
        "qweight": Part(("I32",), ((inputs, words),)),
        "qzeros": Part(("I32",), ((groups, words),)),
        "scales": Part(FLOATS, ((groups, outputs),)),
    }


def unpack(scheme: Scheme, outputs: int, inputs: int, stored: Arrays) -> QuantizedTensor:
    """Words along the outputs become words along the inputs."""
    zeros = unpack_words(stored["qzeros"], 4).reshape(scheme.groups(inputs), -1, 8)[:, :, PLACE]
    return QuantizedTensor(
        bits=4,
        inputs=inputs,
        group_size=scheme.group_size,
        values=words_to_values(_turn(stored["qweight"])[:outputs], 4, inputs),
        scales=np.ascontiguousarray(stored["scales"].T),
        zeros=zeros_or_none(zeros.reshape(scheme.groups(inputs), -1)[:, :outputs].T, scheme.zero),
    )


def _turn(words: NDArray[Any]) -> NDArray[np.uint32]:
    """int32 [K, W], 8 outputs of one input in a word -> uint32 [8 W, K / 8], 8 inputs of one output in a word.

    Each 8 x 8 square of half bytes is transposed by exchanging ever smaller blocks between words.
    """
    inputs, width = words.shape
    blocks = np.zeros((-(-inputs // 8), 8, width), np.uint32)
    blocks.reshape(-1, width)[:inputs] = words.view(np.uint32)
    for distance, low in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        shift, keep = np.uint32(4 * distance), np.uint32(low)
        pairs = blocks.reshape(len(blocks), 4 // distance, 2, distance, width)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        change = ((first >> shift) ^ second) & keep
        second ^= change
        first ^= change << shift
    turned: NDArray[np.uint32] = blocks[:, PLACE].transpose(2, 1, 0).reshape(8 * width, -1)
    return turned

"""The layout of GPTQ: words along the inputs, a column per output; zero points less one in its first version.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
"""

from __future__ import annotations

import numpy as np

from pyllm.quantization.part import FLOATS, Arrays, Part, order_or_none, unpack_words, words_to_values, zeros_or_none
from pyllm.quantization.scheme import Layout, Scheme
from pyllm.quantization.tensor import QuantizedTensor


def parts(scheme: Scheme, outputs: int, inputs: int) -> dict[str, Part]:
    """What is stored for a weight [outputs, inputs]."""
    groups = scheme.groups(inputs)
    return {
        "qweight": Part(("I32",), ((-(-inputs // scheme.per_word), outputs),)),
        "qzeros": Part(("I32",), ((groups, -(-outputs // scheme.per_word)),)),
        "scales": Part(FLOATS, ((groups, outputs),)),
        "g_idx": Part(("I32",), ((inputs,),), optional=True),
    }


def unpack(scheme: Scheme, outputs: int, inputs: int, stored: Arrays) -> QuantizedTensor:
    """Words are transposed whole. A zero point of 0 less one is stored as the highest value, and wraps back."""
    zeros = unpack_words(stored["qzeros"], scheme.bits)[:, :outputs]
    if scheme.layout is Layout.GPTQ:
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << scheme.bits) - 1)
    return QuantizedTensor(
        bits=scheme.bits,
        inputs=inputs,
        group_size=scheme.group_size,
        values=words_to_values(stored["qweight"].T, scheme.bits, inputs),
        scales=np.ascontiguousarray(stored["scales"].T),
        zeros=zeros_or_none(zeros.T, scheme.zero),
        order=order_or_none(stored.get("g_idx"), inputs, scheme.group_size),
    )

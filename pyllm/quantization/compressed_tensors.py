"""The layouts of compressed-tensors: integers in 32-bit words along the inputs, or plain int8."""

from __future__ import annotations

import numpy as np

from pyllm.quantization.part import FLOATS, Arrays, Part, order_or_none, unpack_words, words_to_values, zeros_or_none
from pyllm.quantization.scheme import Scheme
from pyllm.quantization.tensor import QuantizedTensor


def packed_parts(scheme: Scheme, outputs: int, inputs: int) -> dict[str, Part]:
    """pack-quantized: offset-binary values, rows padded to whole words; zero points packed along the outputs."""
    groups = scheme.groups(inputs)
    parts = {
        "weight_packed": Part(("I32",), ((outputs, -(-inputs // scheme.per_word)),)),
        "weight_scale": _scale_part(scheme, outputs, groups),
        "weight_shape": Part(("I64", "I32"), ((2,),)),
        "weight_g_idx": Part(("I32",), ((inputs,),), optional=True),
    }
    if not scheme.symmetric:
        parts["weight_zero_point"] = Part(("I32",), ((-(-outputs // scheme.per_word), groups),))
    return parts


def unpack_packed(scheme: Scheme, outputs: int, inputs: int, stored: Arrays) -> QuantizedTensor:
    """Values are a view of the file; its words hold them in the order of ours."""
    zeros = None
    if not scheme.symmetric:
        values = unpack_words(stored["weight_zero_point"].T, scheme.bits)
        zeros = zeros_or_none(values[:, :outputs].T, scheme.zero)
    groups = scheme.groups(inputs)
    return QuantizedTensor(
        bits=scheme.bits,
        inputs=inputs,
        group_size=scheme.group_size,
        values=words_to_values(stored["weight_packed"], scheme.bits, inputs),
        scales=np.broadcast_to(stored["weight_scale"].reshape(-1, groups), (outputs, groups)),
        zeros=zeros,
        order=order_or_none(stored.get("weight_g_idx"), inputs, scheme.group_size),
    )


def int_parts(scheme: Scheme, outputs: int, inputs: int) -> dict[str, Part]:
    """int-quantized: signed bytes."""
    groups = scheme.groups(inputs)
    parts = {"weight": Part(("I8",), ((outputs, inputs),)), "weight_scale": _scale_part(scheme, outputs, groups)}
    if not scheme.symmetric:
        parts["weight_zero_point"] = Part(("I8",), _scale_part(scheme, outputs, groups).shapes)
    return parts


def unpack_int(scheme: Scheme, outputs: int, inputs: int, stored: Arrays) -> QuantizedTensor:
    """Signed becomes offset-binary by its highest bit."""
    groups = scheme.groups(inputs)

    def per_group(name: str) -> np.ndarray:
        return np.broadcast_to(stored[name].reshape(-1, groups), (outputs, groups))

    zeros = None
    if not scheme.symmetric:
        zeros = zeros_or_none(per_group("weight_zero_point").view(np.uint8) ^ np.uint8(128), scheme.zero)
    return QuantizedTensor(
        bits=8,
        inputs=inputs,
        group_size=scheme.group_size,
        values=stored["weight"].view(np.uint8) ^ np.uint8(128),
        scales=per_group("weight_scale"),
        zeros=zeros,
    )


def _scale_part(scheme: Scheme, outputs: int, groups: int) -> Part:
    return Part(FLOATS, ((), (1,), (1, 1)) if scheme.per_tensor else ((outputs, groups),))

"""What convert writes for a quantized weight, and what it says of it in config.json: compressed-tensors' own terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.quantization import Layout, QuantizedTensor, Scheme
from pyllm.safetensors_writer import Shape


def part_shapes(scheme: Scheme, outputs: int, inputs: int, dtype: np.dtype[Any]) -> dict[str, Shape]:
    """The stored parts of a weight [outputs, inputs]; `dtype` is that of the scales."""
    return {
        "weight_packed": Shape(np.dtype(np.int32), (outputs, inputs // scheme.per_word)),
        "weight_scale": Shape(dtype, (outputs, scheme.groups(inputs))),
        "weight_shape": Shape(np.dtype(np.int64), (2,)),
    }


def parts(tensor: QuantizedTensor) -> dict[str, NDArray[Any]]:
    """Their values: words are our bytes, four at a time."""
    return {
        "weight_packed": tensor.values.view(np.int32),
        "weight_scale": tensor.scales,
        "weight_shape": np.array(tensor.shape, np.int64),
    }


def quantization_config(scheme: Scheme, ignored: Sequence[str]) -> dict[str, Any]:
    """For config.json; `ignored` are the linear modules that are not quantized."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if scheme.group_size else "channel",
        "group_size": scheme.group_size or None,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": Layout.PACK_QUANTIZED.value,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }

"""Layer norm and RMS norm from their formulas, in the precision of the input."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def norm(x: Array, weight: Array | None, bias: Array | None, kind: str, eps: float) -> Array:
    """Over the last dimension of x; kind is "layer" or "rms"."""
    eps = x.dtype.type(eps)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    if weight is not None:
        y = y * weight.astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return np.asarray(y)

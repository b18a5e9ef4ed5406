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


def norm_backward(dy: Array, x: Array, weight: Array | None, kind: str, eps: float) -> tuple[Array, Array, Array]:
    """dx, and dweight and dbias summed over all but the last dimension, in the precision of x."""
    eps = x.dtype.type(eps)
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    normal = x * scale
    g = dy if weight is None else dy * weight.astype(x.dtype)
    dx = g - normal * (g * normal).mean(-1, keepdims=True)
    if kind == "layer":
        dx = dx - g.mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return dx * scale, (dy * normal).sum(rows), dy.sum(rows)

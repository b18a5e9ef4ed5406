"""float64 reference of the matmul kernel, written from the formula."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from oracle.activation import activation as activated

Array = NDArray[Any]


def matmul(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    gate: Array | None = None,
    bias_up: Array | None = None,
    residual: Array | None = None,
    activation: str | None = None,
    round_x: bool = False,
) -> Array:
    """``act(x w^T + bias) + residual``, or gated ``act(x gate^T + bias) * (x w^T + bias_up) + residual``, in float64.

    x [T, K], w and gate [N, K] of any dtype -> float64 [T, N]. `round_x` rounds x to bfloat16 first, as the instruction
    sets with bfloat16 dot products do.
    """
    x = (x.astype(ml_dtypes.bfloat16) if round_x else x).astype(np.float64)
    first = x @ (w if gate is None else gate).astype(np.float64).T
    first = first if bias is None else first + bias
    y = first if activation is None else activated(first, activation)
    if gate is not None:
        up = x @ w.astype(np.float64).T
        y = y * (up if bias_up is None else up + bias_up)
    return y if residual is None else y + residual


def matmul_dx(dy: Array, w: Array) -> Array:
    """The gradient of x from that of ``x w^T``: dy [T, N], w [N, K] -> float64 [T, K]."""
    return np.asarray(dy.astype(np.float64) @ w.astype(np.float64))


def matmul_dw(dy: Array, x: Array) -> Array:
    """The gradient of w from that of ``x w^T``: dy [T, N], x [T, K] -> float64 [N, K]."""
    return np.asarray(dy.astype(np.float64).T @ x.astype(np.float64))

"""AdamW from its formula, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def hyper(rate: float, beta1: float, beta2: float, eps: float, step: int, scale: float = 1.0) -> Array:
    """The scalars of step `step`, counted from 1."""
    return np.array([rate, beta1, beta2, eps, 1 - beta1**step, 1 - beta2**step, scale])


def adamw(params: Array, grads: Array, m: Array, v: Array, scalars: Array, decay: float) -> tuple[Array, Array, Array]:
    """The new params, m and v, of float64 arrays."""
    rate, beta1, beta2, eps, correction1, correction2, scale = scalars
    g = grads * scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    params = params * (1 - rate * decay)
    return params - rate * (m / correction1) / (np.sqrt(v / correction2) + eps), m, v

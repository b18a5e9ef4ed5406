"""Rotary position embedding from its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def rope_angles(positions: Array, inv_freq: Array, scaling: float) -> tuple[Array, Array]:
    """Cosines and sines [T, half], float64, of the float32 angles positions * inv_freq [T, half] or [half]."""
    angle = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    return np.cos(angle) * scaling, np.sin(angle) * scaling


def rope(x: Array, cos: Array, sin: Array) -> Array:
    """Channels (i, i + half) of x [T, heads, E] turned by the angles whose cosines and sines [T, half] are given."""
    half = cos.shape[1]
    c, s = cos[:, None, :], sin[:, None, :]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=-1)

"""Pooling of sequences from its formula, in the precision of the input."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def pool(x: Array, starts: Array, kind: str) -> Array:
    """x [T, D] -> [B, D]; `kind` is a value of pyllm.spec.Pooling; 0 for sequences without rows."""
    out = np.zeros((len(starts) - 1, x.shape[1]), x.dtype)
    for y, (first, end) in zip(out, pairwise(starts), strict=True):
        if first < end:
            rows = x[first:end]
            y[:] = {"last": rows[-1], "cls": rows[0], "mean": rows.mean(0), "max": rows.max(0)}[kind]
    return out

"""Scaled sums from their formula."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def axpby(x: Array, a: float, y: Array | None = None, b: float = 1.0) -> Array:
    """``a x + b y`` in the precision of x, without y ``a x``."""
    scaled = x.dtype.type(a) * x
    return np.asarray(scaled if y is None else scaled + x.dtype.type(b) * y)

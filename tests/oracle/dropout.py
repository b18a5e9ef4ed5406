"""Which elements dropout keeps, from the description of the generator, on Python's integers and numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _cpu

Array = NDArray[Any]


def kept(rate: float, seed: int, site: int, row: int, columns: int, head: int = 0) -> Array:
    """bool [columns] of one row.

    In attention heads count from 1 and columns are positions of keys; other arrays are head 0.
    """
    start, twist, _, _ = _cpu.philox4x32([row, head, site, 1], [seed & 0xFFFFFFFF, seed >> 32])
    h = np.arange(columns, dtype=np.uint32) + np.uint32(start)
    h = ((h ^ (h >> np.uint32(16))) * np.uint32(0x21F0AAAD)) ^ np.uint32(twist)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0xD35A2D97)
    h = h ^ (h >> np.uint32(15))
    return (h >> np.uint32(8)).astype(np.float64) > np.float64(np.float32(np.float32(rate) * 2.0**24 - 0.5))


def mask(shape: tuple[int, int], rate: float, seed: int, site: int) -> Array:
    """bool [R, D] for the dropout of an array."""
    return np.array([kept(rate, seed, site, r, shape[1]) for r in range(shape[0])]).reshape(shape)

"""Half-precision conversions of the vector type, through the kernels that use them, over every value."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from oracle.harness import ISAS, at_isa

from pyllm.ops import Ops

OPS = Ops(threads=2)
HALVES: list[Any] = [np.float16, ml_dtypes.bfloat16]
ALL = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def rows(values: np.ndarray, dim: int) -> np.ndarray:
    """`values` as [n, dim], the last row filled up with zeros, so that counted tails are covered."""
    padded = np.zeros(-(-values.size // dim) * dim, values.dtype)
    padded[: values.size] = values
    return padded.reshape(-1, dim)


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, but for a NaN's payload."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(actual), nan)
    assert np.array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [64, 61])
def test_widening_is_exact(isa: str, dtype: Any, dim: int) -> None:
    table = rows(ALL.view(dtype), dim)
    tokens = np.arange(table.shape[0], dtype=np.int32)
    with at_isa(isa):
        assert_same_bits(OPS.embedding(tokens, table), table.astype(np.float32))
        assert_same_bits(OPS.embedding(tokens, OPS.pack(table)), table.astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_rounds_to_nearest_even(isa: str, dtype: Any) -> None:
    """Every value, the middle between each pair of neighbours, and the float32 numbers on both sides of it."""
    values = ALL.view(dtype).astype(np.float32)
    finite = np.unique(values[np.isfinite(values)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    past = np.float32(np.finfo(np.float16).max) * np.linspace(1, 1.01, 101, dtype=np.float32)
    random = np.random.default_rng(9).integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32)
    every = [values, middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf), past, -past, random]
    table = rows(np.concatenate(every), 61)
    tokens = np.arange(table.shape[0], dtype=np.int32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = table.astype(dtype).astype(np.float32)
    with at_isa(isa):
        assert_same_bits(OPS.embedding(tokens, OPS.pack(table, dtype=np.dtype(dtype).name)), expected)

"""Rounding to integers: the search never loses to round-to-nearest, and what it reports is what it does."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.quantization.rounding import quantize

SCALES: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32]


def nearest(weight: np.ndarray, bits: int, size: int, dtype: Any) -> np.ndarray:
    """Round to nearest with a scale of max|w| / (2^(bits - 1) - 1) for each group, stored in `dtype`, in float64."""
    groups = weight.astype(np.float64).reshape(-1, size)
    scale = np.abs(groups).max(axis=1, keepdims=True) / ((1 << (bits - 1)) - 1)
    scale = scale.astype(dtype).astype(np.float64)
    scale[scale == 0] = 1
    return (np.rint(groups / scale) * scale).reshape(weight.shape)


def relative(weight: np.ndarray, rounded: np.ndarray, importance: np.ndarray | float = 1.0) -> float:
    wide = weight.astype(np.float64)
    return float(np.sqrt((importance * (wide - rounded) ** 2).sum() / (importance * wide**2).sum()))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([0, 32, 64]),
    dtype=st.sampled_from(SCALES),
    rows=st.integers(1, 33),
    groups=st.integers(1, 4),
    tail=st.sampled_from([2.0, 5.0, 50.0]),
    seed=st.integers(0, 1 << 30),
)
def test_error_is_what_is_reported_and_below_round_to_nearest(
    bits: int, group: int, dtype: Any, rows: int, groups: int, tail: float, seed: int
) -> None:
    weight = np.random.default_rng(seed).standard_t(tail, (rows, 64 * groups)).astype(np.float32) * 0.02
    tensor, error = quantize(weight, bits, group, dtype)
    assert tensor.scales.dtype == dtype
    assert tensor.zeros is None
    assert np.all(tensor.scales.astype(np.float32) != 0)
    ours = relative(weight, tensor.dequantize())
    held = np.float16 if dtype == np.float32 and group else dtype
    plain = relative(weight, nearest(weight, bits, group or weight.shape[1], held))
    assert error.relative == pytest.approx(ours, rel=1e-4)
    assert error.relative_nearest == pytest.approx(plain, rel=2e-3)
    assert ours <= error.relative_nearest * 1.0001


def test_gain_on_normal_weights() -> None:
    weight = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32)
    for group, most in ((32, 0.86), (64, 0.86), (128, 0.85)):
        _, error = quantize(weight, 4, group, np.float16)
        assert error.relative < most * error.relative_nearest


def test_importance_moves_the_error_to_where_it_matters_least() -> None:
    random = np.random.default_rng(2)
    weight = random.standard_normal((128, 256)).astype(np.float32)
    importance = random.lognormal(0, 2, 256).astype(np.float32)
    blind, _ = quantize(weight, 4, 64, np.float16)
    seeing, error = quantize(weight, 4, 64, np.float16, importance)
    after = relative(weight, seeing.dequantize(), importance)
    assert after < 0.9 * relative(weight, blind.dequantize(), importance)
    assert error.relative == pytest.approx(after, rel=0.05)  # but for the damping


def test_threads_do_not_change_the_result() -> None:
    weight = np.random.default_rng(3).standard_normal((700, 512)).astype(np.float32)
    one, error = quantize(weight, 4, 64, np.float16)
    two, same = quantize(weight, 4, 64, np.float16, threads=2)
    np.testing.assert_array_equal(one.values, two.values)
    np.testing.assert_array_equal(one.scales, two.scales)
    assert error == same


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", SCALES)
def test_extreme_groups(bits: int, dtype: Any) -> None:
    """Zeros, the least and the greatest numbers: scales stay finite and not 0, zeros stay zeros."""
    weight = np.zeros((6, 64), np.float32)
    weight[1, 5] = 1e-30
    weight[2] = 1e-8
    weight[3, ::2] = 1e38
    weight[4, 3] = -5
    weight[5] = 3
    tensor, error = quantize(weight, bits, 32, dtype)
    assert np.all(np.isfinite(tensor.scales.astype(np.float32)))
    assert np.all(tensor.scales.astype(np.float32) != 0)
    assert np.all(tensor.dequantize()[0] == 0)
    np.testing.assert_allclose(tensor.dequantize()[4:], weight[4:], rtol=0.01)
    assert error.weight > 0


def test_unused_inputs() -> None:
    weight = np.random.default_rng(4).standard_normal((8, 64)).astype(np.float32)
    for importance in (np.zeros(64, np.float32), np.repeat(np.float32([0, 1]), 32)):
        tensor, _ = quantize(weight, 4, 32, np.float16, importance)
        assert relative(weight, tensor.dequantize()) < 0.12


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="groups of 32 do not divide 48 inputs"):
        quantize(np.ones((2, 48), np.float32), 4, 32, np.float16)

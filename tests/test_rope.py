"""Rotary angles and rotation against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.harness import ISAS, Framed, assert_close, at_isa
from oracle.rope import rope, rope_angles

from pyllm.ops import Ops

OPS = Ops(threads=2)
RNG = np.random.default_rng(11)


def frequencies(half: int, rows: int = 1) -> np.ndarray:
    base = 10000.0 ** -(np.arange(half) / max(half, 1))
    return np.stack([base / (r + 1) for r in range(rows)]).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_angles_match_formula(isa: str) -> None:
    for half in (0, 1, 2, 8, 17, 32, 64, 128):
        for rows in (0, 1, 16, 17, 50):
            positions = RNG.integers(0, 1_000_000, rows).astype(np.int32)
            table = RNG.integers(0, 3, rows).astype(np.int32)
            inv_freq = frequencies(half, 3)
            with at_isa(isa):
                cos, sin = OPS.rope_angles(positions, inv_freq, table, 1.25)
                first = OPS.rope_angles(positions, inv_freq)
            expected = rope_angles(positions, inv_freq[table], 1.25)
            for actual, oracle in zip((cos, sin), expected, strict=True):
                assert np.abs(actual - oracle).max(initial=0) <= 1.25 * 2**-23
            for actual, oracle in zip(first, rope_angles(positions, inv_freq[0], 1.0), strict=True):
                assert np.abs(actual - oracle).max(initial=0) <= 2**-24 * 1.01


@pytest.mark.parametrize("isa", ISAS)
def test_rotation_matches_formula(isa: str) -> None:
    for size in (1, 2, 3, 8, 16, 33, 64, 80, 128, 256):
        for half in {size // 2, size // 4, 0}:
            for rows, heads in ((0, 2), (1, 3), (17, 5), (40, 1)):
                positions = RNG.integers(0, 5000, rows).astype(np.int32)
                cos, sin = OPS.rope_angles(positions, frequencies(half))
                start = RNG.normal(size=(rows, heads * size)).astype(np.float32)
                x = Framed(start, offset=size % 7)
                with at_isa(isa):
                    assert OPS.rope(x.array, cos, sin, size) is x.array
                x.check()
                heads_of = start.reshape(rows, heads, size)
                oracle = rope(heads_of.astype(np.float64), cos.astype(np.float64), sin.astype(np.float64))
                assert_close(x.array.reshape(oracle.shape), oracle, rope(heads_of, cos, sin))
                assert np.array_equal(x.array.reshape(oracle.shape), rope(heads_of, cos, sin))  # the same roundings


@pytest.mark.parametrize("isa", ISAS)
def test_inverse_rotates_back(isa: str) -> None:
    """The inverse is the rotation by minus the angle, times the scaling: what takes gradients back."""
    for size, half in ((2, 1), (16, 8), (33, 10), (64, 32), (256, 128)):
        cos, sin = OPS.rope_angles(RNG.integers(0, 5000, 17).astype(np.int32), frequencies(half), scaling=1.25)
        start = RNG.normal(size=(17, 3 * size)).astype(np.float32)
        x = start.copy()
        with at_isa(isa):
            assert OPS.rope(x, cos, sin, size, inverse=True) is x
        assert np.array_equal(x.reshape(17, 3, size), rope(start.reshape(17, 3, size), cos, -sin))


def test_rotation_of_heads_in_a_fused_buffer() -> None:
    fused = RNG.normal(size=(9, 3 * 40 + 1)).astype(np.float32)
    before = fused.copy()
    cos, sin = OPS.rope_angles(np.arange(9, dtype=np.int32), frequencies(10))
    OPS.rope(fused[:, 40:80], cos, sin, 20)
    expected = rope(before[:, 40:80].reshape(9, 2, 20), cos, sin).reshape(9, 40)
    assert np.array_equal(fused[:, 40:80], expected)
    fused[:, 40:80] = before[:, 40:80]
    assert np.array_equal(fused, before)


def test_refuses_bad_arguments() -> None:
    positions, inv_freq = np.zeros(3, np.int32), frequencies(4, 2)
    with pytest.raises(TypeError, match=r"positions: expected int32\[any\], got int64\[3\]"):
        OPS.rope_angles(positions.astype(np.int64), inv_freq)
    with pytest.raises(ValueError, match=r"positions\[1\]: expected >= 0, got -2"):
        OPS.rope_angles(np.array([0, -2, 0], np.int32), inv_freq)
    with pytest.raises(ValueError, match=r"table\[2\]: expected a row of inv_freq in \[0, 2\), got 2"):
        OPS.rope_angles(positions, inv_freq, np.array([0, 1, 2], np.int32))
    with pytest.raises(ValueError, match="scaling: expected a finite number"):
        OPS.rope_angles(positions, inv_freq, None, float("nan"))
    with pytest.raises(ValueError, match="at least one row"):
        OPS.rope_angles(positions, inv_freq[:0])
    cos, sin = OPS.rope_angles(positions, inv_freq)
    x = np.zeros((3, 16), np.float32)
    with pytest.raises(ValueError, match=r"cos: expected at most head_size / 2 = 3 columns, got 4"):
        OPS.rope(x[:, :14], cos, sin, 7)
    with pytest.raises(ValueError, match="multiple of head_size = 12"):
        OPS.rope(x, cos, sin, 12)
    for size in (0, 257):
        with pytest.raises(ValueError, match=f"head_size: expected 1 to 256, got {size}"):
            OPS.rope(x, cos, sin, size)
    with pytest.raises(ValueError, match="rows without gaps"):
        OPS.rope(x, np.zeros((3, 8), np.float32)[:, :4], sin, 8)
    with pytest.raises(ValueError, match="read-only"):
        OPS.rope(np.frombuffer(bytes(3 * 64), np.float32).reshape(3, 16), cos, sin, 8)

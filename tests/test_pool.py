"""Pooling of sequences and its gradient against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.harness import DIMS, ISAS, Framed, assert_close, at_isa
from oracle.pool import pool

from pyllm.ops_training import TrainingOps
from pyllm.spec import Pooling

OPS = TrainingOps(threads=2)
RNG = np.random.default_rng(41)
LENGTHS = [(), (0,), (1,), (5, 0, 1, 17), (3, 64, 2)]


def case(lengths: tuple[int, ...], dim: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return RNG.normal(size=(starts[-1], dim)).astype(np.float32), starts


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", Pooling)
def test_matches_formula(isa: str, kind: Pooling) -> None:
    for dim in DIMS:
        for lengths in LENGTHS:
            x, starts = case(lengths, dim)
            given, out = Framed(x, offset=dim % 5), Framed(np.zeros((len(lengths), dim), np.float32))
            with at_isa(isa):
                OPS.pool(given.array, starts, kind, out=out.array)
            out.check()
            assert_close(out.array, pool(x.astype(np.float64), starts, kind.value), pool(x, starts, kind.value))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", Pooling)
def test_gradient_is_the_slope(isa: str, kind: Pooling) -> None:
    """The change of the pooled rows along a direction, which in float64 is exact but for rounding."""
    for dim in (1, 7, 33, 257, 600):
        x, starts = case((4, 0, 1, 9), dim)
        dy = Framed(RNG.normal(size=(4, dim)).astype(np.float32)).array
        direction = RNG.normal(size=x.shape)
        dx = Framed(np.full(x.shape, np.nan, np.float32))
        with at_isa(isa):
            assert OPS.pool_backward(dx.array, dy, starts, kind, x) is dx.array
        dx.check()
        moved = [pool(x + step * direction, starts, kind.value) for step in (1e-6, -1e-6)]
        slope = ((moved[0] - moved[1]) / 2e-6 * dy).sum(0)
        assert np.allclose((dx.array * direction).sum(0), slope, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_alone_and_on_any_threads(isa: str) -> None:
    x, starts = case((3, 1, 40, 8), 515)
    for kind in Pooling:
        with at_isa(isa):
            whole = TrainingOps(threads=1).pool(x, starts, kind)
            assert TrainingOps(threads=3).pool(x, starts, kind).tobytes() == whole.tobytes()
            for b in range(4):
                rows = x[starts[b] : starts[b + 1]]
                alone = OPS.pool(rows, np.array([0, len(rows)], np.int32), kind)
                assert alone.tobytes() == whole[b].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_shows(isa: str) -> None:
    for at in range(3):
        x = np.ones((3, 40), np.float32)
        x[at] = np.nan
        with at_isa(isa):
            for kind in (Pooling.MAX, Pooling.MEAN):
                assert np.isnan(OPS.pool(x, np.array([0, 3], np.int32), kind)).all()


def test_of_equal_maxima_the_first_has_the_gradient() -> None:
    x, starts = np.ones((3, 2), np.float32), np.array([0, 3], np.int32)
    dx = OPS.pool_backward(np.empty((3, 2), np.float32), np.full((1, 2), 5, np.float32), starts, Pooling.MAX, x)
    assert dx.tolist() == [[5, 5], [0, 0], [0, 0]]


def test_bad_arguments() -> None:
    x, starts = case((2, 3), 8)
    for wrong, message in (
        ([1, 2, 5], r"starts\[0\]: expected 0, got 1"),
        ([0, 3, 2], r"starts\[2\]: expected at least 3, the one before, got 2"),
        ([0, 2, 4], r"starts\[2\]: expected 5, the rows of x, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.pool(x, np.array(wrong, np.int32), Pooling.MEAN)
    with pytest.raises(ValueError, match="pooling: expected 0"):
        OPS.context.pool(np.empty((2, 8), np.float32), x, starts, 4)
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        OPS.pool(x, starts, Pooling.MEAN, out=x[:2])
    with pytest.raises(TypeError, match="x: expected a numpy array"):
        OPS.pool_backward(np.empty((5, 8), np.float32), x[:2].copy(), starts, Pooling.MAX)

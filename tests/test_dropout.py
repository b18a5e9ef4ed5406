"""Dropout: the mask of the generator's description, its rate, and the same mask on the gradient."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.dropout import mask
from oracle.harness import DIMS, ISAS, Framed, at_isa

from pyllm.ops_training import TrainingOps

OPS = TrainingOps(threads=2)
RNG = np.random.default_rng(29)
SEED = np.array([0xFEDCBA9876543210], np.uint64)


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_matches_description(isa: str) -> None:
    for dim in DIMS:
        for rows, rate in ((0, 0.1), (1, 0.9), (7, 0.3)):
            x, residual = Framed(random(rows, dim), offset=dim % 5), Framed(random(rows, dim), offset=2).array
            out = Framed(np.zeros((rows, dim), np.float32), offset=3)
            kept = mask((rows, dim), rate, int(SEED[0]), 3)
            expected = np.where(kept, x.array * (np.float32(1) / (np.float32(1) - np.float32(rate))), np.float32(0))
            with at_isa(isa):
                OPS.dropout(x.array, rate, SEED, 3, out=out.array)
                out.check()
                assert np.array_equal(out.array, expected)
                assert np.array_equal(OPS.dropout(x.array, rate, SEED, 3, residual=residual), expected + residual)
                OPS.dropout(x.array, rate, SEED, 3, out=x.array)
                x.check()
            assert np.array_equal(x.array, expected)


def test_rate_and_independence() -> None:
    """Elements are kept at 1 - rate, independently of neighbours, of other rows, seeds and sites."""
    ones = np.ones((512, 1024), np.float32)
    other = np.array([1], np.uint64)
    for rate in (0.01, 0.1, 0.5, 0.9):
        kept = OPS.dropout(ones, rate, SEED, 0) != 0
        deviation = np.sqrt(rate * (1 - rate) / kept.size)
        assert abs(kept.mean() - (1 - rate)) < 5 * deviation
        for axis in (0, 1):
            spread = np.sqrt(rate * (1 - rate) / kept.shape[axis])
            assert abs(kept.mean(axis) - (1 - rate)).max() < 5.5 * spread
        expected = (1 - rate) ** 2
        both = np.sqrt(expected * (1 - expected) / kept.size)
        masks = [OPS.dropout(ones, rate, SEED, 1) != 0, OPS.dropout(ones, rate, other, 0) != 0]
        masks += [np.roll(kept, step, axis) for axis in (0, 1) for step in (1, 2, 16)]
        for other_mask in masks:
            assert abs((kept & other_mask).mean() - expected) < 5.5 * both


@pytest.mark.parametrize("isa", ISAS)
def test_gradient_has_the_same_mask(isa: str) -> None:
    x, dy = random(40, 77), random(40, 77)
    with at_isa(isa):
        y, dx = OPS.dropout(x, 0.4, SEED, 1), OPS.dropout(dy, 0.4, SEED, 1)
        assert np.array_equal(y == 0, dx == 0)
        assert abs((y * dy).sum(dtype=np.float64) - (x * dx).sum(dtype=np.float64)) < 1e-4
        assert np.array_equal(OPS.dropout(x, 0.0, SEED, 1), x)


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_threads_and_graph(isa: str) -> None:
    x, seed, ops = random(301, 257), SEED.copy(), TrainingOps(threads=2)
    with at_isa(isa):
        ops.begin_recording()
        out = ops.dropout(x, 0.25, seed, 2)
        graph = ops.end_recording()
        for value in (5, 6):
            seed[0] = value
            ops.replay(graph)
            for threads in (1, 3):
                assert TrainingOps(threads).dropout(x, 0.25, seed, 2).tobytes() == out.tobytes()


def test_bad_arguments() -> None:
    x = random(2, 8)
    for changes, error, message in (
        ({"rate": 1.0}, ValueError, "rate: expected at least 0 and below 1, got 1"),
        ({"rate": -0.1}, ValueError, "rate: expected at least 0"),
        ({"seed": np.zeros(1, np.int64)}, TypeError, r"seed: expected uint64\[1\]"),
        ({"site": 2**31}, ValueError, "site: expected 0 to"),
        ({"rate": "a"}, TypeError, r"dropout: expected \(rate, seed, site\)"),
        ({"out": random(2, 7)}, ValueError, "out: expected"),
        ({"residual": random(3, 8)}, ValueError, "residual: expected"),
    ):
        with pytest.raises(error, match=message):
            OPS.dropout(**({"x": x, "rate": 0.5, "seed": SEED, "site": 0} | changes))

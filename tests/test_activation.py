"""Activation functions against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.activation import activation, slope
from oracle.harness import DIMS, ISAS, Framed, assert_close, at_isa

from pyllm.ops import Ops
from pyllm.ops_training import TrainingOps
from pyllm.spec import Activation

OPS = TrainingOps(threads=2)
RNG = np.random.default_rng(6)
KINDS = list(Activation)
# What each is at infinity and minus infinity, and its slope at infinity; at minus infinity that is 0.
LIMITS = {
    Activation.TANH: (1, -1, 0),
    Activation.SIGMOID: (1, 0, 0),
    Activation.RELU_SQUARED: (np.inf, 0, np.inf),
}


def values(*shape: int) -> np.ndarray:
    return RNG.normal(0, 3, shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_formula(isa: str, kind: Activation) -> None:
    for dim in DIMS[:-3]:
        for rows in (0, 1, 3):
            x = Framed(values(rows, dim), offset=dim % 5)
            up = Framed(values(rows, dim), offset=2)
            out = Framed(np.zeros((rows, dim), np.float32), offset=3)
            oracle = activation(x.array.astype(np.float64), kind.value)
            naive = activation(x.array, kind.value)
            with at_isa(isa):
                OPS.activation(x.array, kind, out=out.array)
                assert_close(out.array, oracle, naive)
                OPS.activation(x.array, kind, up=up.array, out=out.array)
                assert_close(out.array, oracle * up.array, naive * up.array)
                out.check()
                OPS.activation(x.array, kind, up=up.array, out=x.array)  # in place
                x.check()
                assert np.array_equal(x.array, out.array)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_range(isa: str, kind: Activation) -> None:
    """Small errors relative to each value, from denormals to the largest numbers."""
    x = np.concatenate([np.linspace(-12, 12, 20001), np.geomspace(1e-40, 3e38, 2001), -np.geomspace(1e-40, 3e38, 2001)])
    x = x.astype(np.float32)[None]
    with at_isa(isa):
        y = OPS.activation(x, kind)
    # Held where the function is 0 in float32.
    oracle = activation(np.maximum(x.astype(np.float64), -200), kind.value)
    finite = np.abs(oracle) <= np.finfo(np.float32).max
    assert np.array_equal(np.isfinite(y), finite)
    near, far = finite & (x > -5), x <= -5
    assert np.all(np.abs(y[near] - oracle[near]) <= 2.5e-6 * np.abs(oracle[near]) + 1e-44)
    assert np.abs(y[far] - oracle[far]).max() < 2e-7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_special_values(isa: str, kind: Activation) -> None:
    x = np.array([[np.nan, np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0, 89.0, -89.0]], np.float32)
    with at_isa(isa):
        y = OPS.activation(x, kind)[0]
    high, low, _ = LIMITS.get(kind, (np.inf, 0, 1))
    assert np.isnan(y[0])
    assert y[1] == high
    assert y[3] == (np.float32(3e38) if kind not in LIMITS else high)
    assert y[2] == y[4] == low
    assert y[5] == y[6] == (0.5 if kind is Activation.SIGMOID else 0)
    assert y[7] == {Activation.RELU_SQUARED: 89**2}.get(kind, min(high, 89))
    assert abs(y[8] - low) < 1e-36


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_anywhere(isa: str, kind: Activation) -> None:
    """A value's result hangs neither on its place in the row nor on the threads."""
    x = values(201, 331)
    with at_isa(isa):
        whole = Ops(threads=1).activation(x, kind)
        assert whole.tobytes() == Ops(threads=3).activation(x, kind).tobytes()
        for start, count in ((0, 1), (1, 5), (13, 33), (300, 31)):
            part = OPS.activation(x[:, start : start + count], kind)
            assert part.tobytes() == whole[:, start : start + count].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_slope_against_central_differences(kind: Activation) -> None:
    x = np.linspace(-5, 5, 200)  # not at 0, where relu has none
    step = 1e-6
    difference = (activation(x + step, kind.value) - activation(x - step, kind.value)) / (2 * step)
    assert np.abs(difference - slope(x, kind.value)).max() < 1e-8


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_matches_formula(isa: str, kind: Activation) -> None:
    for dim in DIMS[:-3]:
        for rows in (0, 1, 3):
            pre, dy = Framed(values(rows, dim), offset=dim % 5), Framed(values(rows, dim), offset=2)
            out = Framed(np.zeros((rows, dim), np.float32), offset=3)
            wide = pre.array.astype(np.float64)
            with at_isa(isa):
                OPS.activation_backward(dy.array, pre.array, kind, out=out.array)
                assert_close(out.array, dy.array * slope(wide, kind.value), dy.array * slope(pre.array, kind.value))
                out.check()
                for place in (pre, dy):  # in place
                    kept = place.array.copy()
                    OPS.activation_backward(dy.array, pre.array, kind, out=place.array)
                    place.check()
                    assert np.array_equal(place.array, out.array)
                    place.array[...] = kept


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_gated_backward_matches_formula(isa: str, kind: Activation) -> None:
    for dim in DIMS[:-3]:
        pre, dy = Framed(values(3, 2 * dim), offset=dim % 5), Framed(values(3, dim), offset=2)
        out = Framed(np.zeros((3, 2 * dim), np.float32), offset=3)

        def gradients(pre: np.ndarray, dy: np.ndarray = dy.array, dim: int = dim) -> np.ndarray:
            gate, up = pre[:, :dim], pre[:, dim:]
            return np.hstack([dy * up * slope(gate, kind.value), dy * activation(gate, kind.value)])

        with at_isa(isa):
            OPS.activation_backward(dy.array, pre.array, kind, gated=True, out=out.array)
            assert_close(out.array, gradients(pre.array.astype(np.float64)), gradients(pre.array))
            out.check()
            assert np.array_equal(out.array[:, dim:], dy.array * OPS.activation(pre.array[:, :dim], kind))
            OPS.activation_backward(dy.array, pre.array, kind, gated=True, out=pre.array)
            pre.check()
            assert np.array_equal(pre.array, out.array)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_slope_over_the_whole_range(isa: str, kind: Activation) -> None:
    x = np.concatenate([np.linspace(-12, 12, 20001), np.geomspace(1e-40, 3e38, 2001), -np.geomspace(1e-40, 3e38, 2001)])
    x = x.astype(np.float32)[None]
    with at_isa(isa):
        got = OPS.activation_backward(np.ones_like(x), x, kind)
    wide = x.astype(np.float64)
    want = slope(wide if kind is Activation.RELU_SQUARED else np.clip(wide, -200, 200), kind.value)
    finite = np.abs(want) <= np.finfo(np.float32).max
    assert np.array_equal(np.isfinite(got), finite)
    assert (np.abs(got[finite] - want[finite]) / np.maximum(np.abs(want[finite]), 1)).max() < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_slope_of_special_values(isa: str, kind: Activation) -> None:
    x = np.array([[np.inf, -np.inf, 120.0, -120.0, 3e38, -3e38, np.nan]], np.float32)
    with at_isa(isa):
        got = OPS.activation_backward(np.ones_like(x), x, kind)[0]
    high = LIMITS.get(kind, (np.inf, 0, 1))[2]
    assert got[:6].tolist() == [high, 0, min(high, 240), 0, high, 0]
    assert kind is Activation.RELU or np.isnan(got[6])


@pytest.mark.parametrize("isa", ISAS)
def test_backward_gives_the_same_bits_anywhere(isa: str) -> None:
    pre, dy = values(201, 331), values(201, 331)
    with at_isa(isa):
        whole = TrainingOps(threads=1).activation_backward(dy, pre, Activation.GELU_TANH)
        assert whole.tobytes() == TrainingOps(threads=3).activation_backward(dy, pre, Activation.GELU_TANH).tobytes()
        for start, count in ((0, 1), (1, 5), (13, 33), (300, 31)):
            cut = slice(start, start + count)
            part = OPS.activation_backward(dy[:, cut], pre[:, cut], Activation.GELU_TANH)
            assert part.tobytes() == whole[:, cut].tobytes()


def test_bad_arguments() -> None:
    x = values(3, 8)
    with pytest.raises(ValueError, match="up: expected float32"):
        OPS.activation(x, Activation.SILU, up=values(3, 7))
    with pytest.raises(TypeError, match="x: expected float32"):
        OPS.activation(x.astype(np.float16), Activation.SILU)
    with pytest.raises(ValueError, match="activation: expected 0 to 8, got 9"):
        OPS.context.activation(x, x, None, 9)
    with pytest.raises(ValueError, match=r"pre: expected float32\[3, 16\], got float32\[3, 8\]"):
        OPS.activation_backward(x, x, Activation.SILU, gated=True)
    with pytest.raises(ValueError, match="out: expected memory that is not that of dy"):
        both = values(3, 16)
        OPS.activation_backward(both[:, :8], values(3, 16), Activation.SILU, gated=True, out=both)
    with pytest.raises(ValueError, match=r"out: .*overlaps pre in part"):
        line = values(1, 30)[0]
        OPS.activation_backward(x, line[:24].reshape(3, 8), Activation.SILU, out=line[1:25].reshape(3, 8))

"""Activation functions against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.activation import activation
from oracle.harness import DIMS, ISAS, Framed, assert_close, at_isa

from pyllm.ops import Ops
from pyllm.spec import Activation

OPS = Ops(threads=2)
RNG = np.random.default_rng(6)
KINDS = list(Activation)


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
    oracle = activation(np.maximum(x.astype(np.float64), -200), kind.value)  # held where the function is 0 in float32
    near = x > -5
    assert np.all(np.abs(y - oracle)[near] <= 2.5e-6 * np.abs(oracle)[near] + 1e-44)
    assert np.abs(y - oracle)[~near].max() < 2e-7


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_special_values(isa: str, kind: Activation) -> None:
    x = np.array([[np.nan, np.inf, -np.inf, 0.0, -0.0, 89.0, -89.0, 3e38, -3e38]], np.float32)
    with at_isa(isa):
        y = OPS.activation(x, kind)[0]
    assert np.isnan(y[0])
    assert y[1] == np.inf
    assert y[2] == y[3] == y[4] == y[8] == 0
    assert y[5] == 89
    assert abs(y[6]) < 1e-36
    assert y[7] == np.float32(3e38)


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


def test_bad_arguments() -> None:
    x = values(3, 8)
    with pytest.raises(ValueError, match="up: expected float32"):
        OPS.activation(x, Activation.SILU, up=values(3, 7))
    with pytest.raises(TypeError, match="x: expected float32"):
        OPS.activation(x.astype(np.float16), Activation.SILU)
    with pytest.raises(ValueError, match="activation: expected 0 to 4, got 9"):
        OPS.context.activation(x, x, None, 9)

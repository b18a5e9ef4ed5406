"""Scaled sums against their formula in float64, in place and not, and their gradients on a tape."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.axpby import axpby
from oracle.harness import DIMS, ISAS, Framed, assert_close, at_isa

from pyllm.ops import Arena
from pyllm.ops_training import TrainingOps
from pyllm.tape import Tape, TapeMemory

OPS = TrainingOps(threads=2)
RNG = np.random.default_rng(31)


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_matches_formula(isa: str) -> None:
    for dim in DIMS:
        for rows, a, b in ((0, 1.0, 1.0), (1, -0.75, 2.5), (7, 7.4833148, 1.0)):
            x, y = (Framed(random(rows, dim), offset=dim % 5 + i) for i in range(2))
            out = Framed(np.zeros((rows, dim), np.float32), offset=3)
            wide = [v.array.astype(np.float64) for v in (x, y)]
            with at_isa(isa):
                OPS.axpby(x.array, a, out=out.array)
                assert np.array_equal(out.array, x.array * np.float32(a))
                OPS.axpby(x.array, a, y.array, b, out=out.array)
                assert_close(out.array, axpby(wide[0], a, wide[1], b), axpby(x.array, a, y.array, b))
                out.check()
                for place in (x, y):  # in place
                    kept = place.array.copy()
                    OPS.axpby(x.array, a, y.array, b, out=place.array)
                    place.check()
                    assert np.array_equal(place.array, out.array)
                    place.array[...] = kept


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_anywhere(isa: str) -> None:
    x, y = random(201, 331), random(201, 331)
    with at_isa(isa):
        whole = TrainingOps(threads=1).axpby(x, 1.3, y, -0.4)
        assert whole.tobytes() == TrainingOps(threads=3).axpby(x, 1.3, y, -0.4).tobytes()
        for start, count in ((0, 1), (1, 5), (13, 33), (300, 31)):
            cut = slice(start, start + count)
            assert OPS.axpby(x[:, cut], 1.3, y[:, cut], -0.4).tobytes() == whole[:, cut].tobytes()


def test_gradients_on_a_tape() -> None:
    """Of z = 3 x - 2 y and w = 0.5 z + 4 x, where x is used twice and parts of y are views: w's gradient is ones."""
    memory = TapeMemory(Arena(1 << 12), None, Arena(1 << 12))
    tape = Tape(OPS, memory, {})
    values = [tape._new((5, 7)) for _ in range(2)]
    for value in values:
        value[...] = random(5, 7)
    x, y = values
    z = tape.axpby(x, 3.0, y, -2.0)
    w = tape.axpby(z, 0.5, x, 4.0, out=z)
    assert np.allclose(w, 0.5 * (3 * x - 2 * y) + 4 * x, rtol=1e-6)
    dw, _ = tape._target(tape._view(w))
    dw.fill(1.0)
    tape.backward()
    assert np.array_equal(tape._incoming(tape._view(x)), np.full((5, 7), 5.5, np.float32))
    assert np.array_equal(tape._incoming(tape._view(y)), np.full((5, 7), -1.0, np.float32))


def test_bad_arguments() -> None:
    x = random(3, 8)
    for changes, message in (
        ({"y": random(3, 7)}, r"y: expected float32\[3, 8\], got float32\[3, 7\]"),
        ({"out": random(2, 8)}, r"out: expected float32\[3, 8\]"),
        ({"a": float("inf")}, "a: expected a finite number, got inf"),
        ({"y": x, "b": float("nan")}, "b: expected a finite number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.axpby(**({"x": x, "a": 1.0} | changes))
    line = random(1, 30)[0]
    with pytest.raises(ValueError, match="out: expected y itself or memory of its own"):
        OPS.axpby(x, 1.0, line[:24].reshape(3, 8), out=line[1:25].reshape(3, 8))

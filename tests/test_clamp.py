"""Values kept between limits against their formula, and their gradients."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.clamp import clamp, clamp_backward
from oracle.harness import DIMS, ISAS, Framed, at_isa

from pyllm.ops_training import TrainingOps

OPS = TrainingOps(threads=2)
RNG = np.random.default_rng(32)
LIMIT = 0.7


@pytest.mark.parametrize("isa", ISAS)
def test_matches_formula(isa: str) -> None:
    with at_isa(isa):
        for dim in DIMS:
            for rows in (0, 1, 7):
                values, dy = (RNG.normal(size=(rows, dim)).astype(np.float32) for _ in range(2))
                values.reshape(-1)[:5] = [np.nan, np.inf, -np.inf, LIMIT, -0.0][: values.size]
                x, dx = Framed(values, offset=dim % 5), Framed(dy, offset=3)
                assert OPS.clamp(x.array, LIMIT) is x.array
                OPS.clamp_backward(dx.array, x.array, LIMIT)
                x.check()
                dx.check()
                np.testing.assert_array_equal(x.array, clamp(values, LIMIT))
                np.testing.assert_array_equal(dx.array, clamp_backward(dy, values, np.float32(LIMIT)))


def test_bad_arguments() -> None:
    x = np.ones((3, 8), np.float32)
    for limit in (0.0, -1.0, float("inf"), float("nan")):
        for call in (lambda: OPS.clamp(x, limit), lambda: OPS.clamp_backward(x.copy(), x, limit)):  # noqa: B023
            with pytest.raises(ValueError, match="limit: expected a finite number above 0, got"):
                call()
    with pytest.raises(ValueError, match="dx: expected memory of its own"):
        OPS.clamp_backward(x, x, 1.0)
    with pytest.raises(ValueError, match=r"dx: expected float32\[3, 8\], got float32\[3, 7\]"):
        OPS.clamp_backward(np.ones((3, 7), np.float32), x, 1.0)

"""Values kept between limits, at the width of q, k and v of a 1B model. Data stays in the caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import sized

from pyllm.ops import Ops

DIM = sized(6144, 200)


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("peer", ["pyllm", "numpy"])
def test_clamp(benchmark: Any, record: Any, ops: Ops, peer: str, rows: int) -> None:
    x = np.random.default_rng(0).normal(size=(rows, DIM)).astype(np.float32)
    expected = np.clip(x, -0.5, 0.5)
    if peer == "pyllm":
        benchmark(ops.clamp, x, 0.5)
    else:
        benchmark(lambda: np.clip(x, -0.5, 0.5, out=x))
    record(bytes=2 * x.nbytes, elements=x.size)
    np.testing.assert_array_equal(x, expected)

"""Scaled sums at the width of a 1B model. Data stays in the caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import sized

from pyllm.ops import Ops

DIM = sized(2048, 200)


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("peer", ["pyllm", "numpy", "torch"])
def test_axpby(benchmark: Any, record: Any, ops: Ops, threads: int, peer: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(rows, DIM)).astype(np.float32) for _ in range(2))
    if peer == "pyllm":
        out = benchmark(ops.axpby, x, 3.5, y, 0.5, np.empty_like(x))
    elif peer == "numpy":
        out = benchmark(lambda: np.float32(3.5) * x + np.float32(0.5) * y)
    else:
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        a, b = torch.from_numpy(x), torch.from_numpy(y)
        out = benchmark(lambda: 3.5 * a + 0.5 * b).numpy()
    record(bytes=3 * x.nbytes, elements=x.size)
    np.testing.assert_allclose(out, 3.5 * x + 0.5 * y, rtol=1e-5, atol=1e-6)

"""Norms: one row as in decode and 512 as in prefill, at the width of a 1B model. Data stays in the caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyllm.ops import Ops
from pyllm.spec import NormKind

DIM = 2048


def numpy_norm(x: np.ndarray, weight: np.ndarray, kind: NormKind) -> np.ndarray:
    if kind is NormKind.LAYER:
        x = x - x.mean(-1, keepdims=True)
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * weight)


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("kind", list(NormKind))
@pytest.mark.parametrize("peer", ["pyllm", "numpy", "torch"])
def test_norm(benchmark: Any, record: Any, ops: Ops, threads: int, peer: str, kind: NormKind, rows: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(rows, DIM)).astype(np.float32), rng.normal(size=DIM).astype(np.float32)
    if peer == "pyllm":
        out = np.empty_like(x)
        y = benchmark(ops.norm, x, weight, kind=kind, eps=1e-5, out=out)
    elif peer == "numpy":
        y = benchmark(numpy_norm, x, weight, kind)
    else:
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        function = torch.nn.functional.layer_norm if kind is NormKind.LAYER else torch.nn.functional.rms_norm
        a, w = torch.from_numpy(x), torch.from_numpy(weight)
        y = benchmark(function, a, (DIM,), w, eps=1e-5).numpy()
    record(bytes=2 * x.nbytes + weight.nbytes)
    np.testing.assert_allclose(y, numpy_norm(x.astype(np.float64), weight, kind), rtol=1e-4, atol=1e-5)

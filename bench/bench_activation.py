"""Activations and the gated product, at the feed-forward width of a 1B model. Data stays in the caches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from conftest import sized

from pyllm.ops import Ops
from pyllm.spec import Activation

DIM = sized(8192, 200)


def numpy_activation(x: np.ndarray, kind: Activation) -> np.ndarray:
    if kind is Activation.SILU:
        return np.asarray(x / (1 + np.exp(-x)))
    if kind is Activation.QUICK_GELU:
        return np.asarray(x / (1 + np.exp(-1.702 * x)))
    if kind is Activation.SIGMOID:
        return np.asarray(1 / (1 + np.exp(-x)))
    if kind is Activation.TANH:
        return np.tanh(x)
    if kind is Activation.RELU:
        return np.maximum(x, 0)
    if kind is Activation.RELU_SQUARED:
        return np.asarray(np.maximum(x, 0) ** 2)
    if kind is Activation.GELU_TANH:
        return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
    erf = np.vectorize(math.erf, otypes=[x.dtype])
    return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))))


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("peer", ["pyllm", "numpy", "torch"])
def test_gated_activation(
    benchmark: Any, record: Any, ops: Ops, threads: int, peer: str, kind: Activation, rows: int
) -> None:
    rng = np.random.default_rng(0)
    x, up = (rng.normal(size=(rows, DIM)).astype(np.float32) for _ in range(2))
    if peer == "pyllm":
        out = np.empty_like(x)
        y = benchmark(ops.activation, x, kind, up=up, out=out)
    elif peer == "numpy":
        if kind is Activation.GELU_ERF:
            pytest.skip("numpy has no erf")
        y = benchmark(lambda: numpy_activation(x, kind) * up)
    else:
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        f = torch.nn.functional
        functions = {
            Activation.SILU: f.silu,
            Activation.RELU: f.relu,
            Activation.GELU_ERF: f.gelu,
            Activation.GELU_TANH: lambda v: f.gelu(v, approximate="tanh"),
            Activation.TANH: torch.tanh,
            Activation.SIGMOID: torch.sigmoid,
            Activation.QUICK_GELU: lambda v: v * torch.sigmoid(1.702 * v),
            Activation.RELU_SQUARED: lambda v: f.relu(v).square(),
        }
        function = functions[kind]
        a, b = torch.from_numpy(x), torch.from_numpy(up)
        y = benchmark(lambda: function(a) * b).numpy()
    record(bytes=3 * x.nbytes, elements=x.size)
    np.testing.assert_allclose(y, numpy_activation(x.astype(np.float64), kind) * up, rtol=1e-4, atol=2e-6)

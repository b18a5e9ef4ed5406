"""AdamW and the norm of gradients over the parameters of GPT-2 124M, against the read bandwidth: ours, numpy and torch.

A write counts as a read: what memory takes of both together is at best what it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Record, sized

from pyllm import _cpu
from pyllm.ops_training import TrainingOps

COUNT = sized(124 << 20, 64 * 96 * 2)
WIDTH = sized(1024, 96)  # of the narrow copy


def arrays() -> list[Any]:
    """params, grads, m and v on huge pages."""
    block = np.random.default_rng(0).standard_normal(1 << 12, np.float32) * np.float32(0.02)
    result = []
    for i in range(4):
        a = _cpu.allocate(COUNT * 4).view(np.float32)
        a.reshape(-1, min(COUNT, 1 << 12))[...] = (block * block if i == 3 else block)[: min(COUNT, 1 << 12)]
        result.append(a)
    return result


def hyper() -> Any:
    return np.array([1e-4, 0.9, 0.999, 1e-8, 0.1, 0.001, 1.0])


@pytest.mark.parametrize("variant", ["float32", "clear", "narrow", "torch"])
def test_adamw(variant: str, threads: int, benchmark: Any, record: Record) -> None:
    params, grads, m, v = arrays()
    ops = TrainingOps(threads)
    extra = {"clear": 4, "narrow": 2}.get(variant, 0)
    record(bytes=COUNT * (28 + extra), elements=COUNT, by="torch" if variant == "torch" else "ours")
    if variant == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        parameter = torch.nn.Parameter(torch.from_numpy(params))
        parameter.grad = torch.from_numpy(grads)
        benchmark(torch.optim.AdamW([parameter], lr=1e-4, fused=True).step)
        return
    narrow = _cpu.PackedMatrix(COUNT // WIDTH, WIDTH, "bfloat16") if variant == "narrow" else None
    before = params[:1000].astype(np.float64)
    step: Callable[[], None] = lambda: ops.adamw(  # noqa: E731
        params, grads, m, v, hyper(), 0.1, narrow=narrow, clear=variant == "clear"
    )
    benchmark(step)
    assert np.isfinite(params[:1000]).all() and not np.array_equal(params[:1000], before)


@pytest.mark.parametrize("by", ["ours", "numpy", "torch"])
def test_square_norm(by: str, threads: int, benchmark: Any, record: Record) -> None:
    x = arrays()[1]
    record(bytes=x.nbytes, elements=COUNT, by=by)
    out = np.zeros(1)
    if by == "ours":
        ops = TrainingOps(threads)

        def norm() -> float:
            out[0] = 0
            ops.square_norm(out, x)
            return float(out[0])
    elif by == "numpy":

        def norm() -> float:
            return float(np.dot(x, x))
    else:
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        tensor = torch.from_numpy(x)

        def norm() -> float:
            return float(torch.linalg.vector_norm(tensor)) ** 2

    got = benchmark(norm)
    want = float((x[: 1 << 12].astype(np.float64) ** 2).sum()) * (COUNT / min(COUNT, 1 << 12))
    assert abs(got - want) <= (1e-6 if by == "ours" else 1e-2) * want

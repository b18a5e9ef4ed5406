"""The gradients of matmul in the shapes of GPT-2 and of small models, beside the forward: ours and torch.

Held against the multiply-add peak; dW also reads and writes the gradient once, which counts where rows are few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Record, sized
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops_training import TrainingOps

Array = NDArray[Any]

SHAPES = sized(
    [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50257), (128, 384), (384, 1152)], [(96, 130)]
)  # K, N
ROWS = sized([256, 1024], [65])
MOST_ROWS_OF_HEAD = 256  # losses are taken a piece of the rows at a time
PRODUCTS = ["forward", "dx", "dw"]


@dataclass
class Case:
    """x [T, K], dy [T, N], w [N, K]."""

    x: Array
    dy: Array
    w: Array
    threads: int


def ours(case: Case, product: str, dtype: str) -> Callable[[], Array]:
    ops = TrainingOps(case.threads)
    w = ops.pack(case.w, dtype=dtype)
    if product == "forward":
        y = np.empty_like(case.dy)
        return lambda: ops.matmul(case.x, w, out=y)
    if product == "dx":
        dx = np.empty_like(case.x)
        return lambda: ops.matmul_dx(case.dy, w, out=dx)
    dw = _cpu.PackedMatrix(*case.w.shape, "float32")

    def accumulate() -> Array:
        ops.matmul_dw(dw, case.dy, case.x)
        return dw.flat

    return accumulate


def torch(case: Case, product: str, dtype: str) -> Callable[[], Array]:
    library = pytest.importorskip("torch")
    library.set_num_threads(case.threads)
    x, dy, w = (library.from_numpy(a).to(getattr(library, dtype)) for a in (case.x, case.dy, case.w))
    if product == "forward":
        return lambda: library.nn.functional.linear(x, w)
    if product == "dx":
        return lambda: dy @ w
    dw = library.zeros_like(w)
    return lambda: dw.addmm_(dy.T, x)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("by", [ours, torch])
def test_products(
    by: Callable[[Case, str, str], Callable[[], Array]],
    product: str,
    dtype: str,
    rows: int,
    shape: tuple[int, int],
    threads: int,
    benchmark: Any,
    record: Record,
) -> None:
    k, n = shape
    if n > 50000 and rows > MOST_ROWS_OF_HEAD:
        pytest.skip("more rows than the head is given at once")
    if by is ours and product == "dw" and dtype != "float32":
        pytest.skip("dW is float32 whatever the weights are")
    rng = np.random.default_rng(5)
    x, dy, w = (rng.standard_normal(s, np.float32) for s in ((rows, k), (rows, n), (n, k)))
    w = w.astype(ml_dtypes.bfloat16).astype(np.float32)
    case = Case(x, dy, w, threads)
    record(
        bytes=4 * (rows * (n + k)) + n * k * (8 if product == "dw" else 4),
        operations=2 * rows * n * k,
        product=product,
        weights=dtype,
        by=by.__name__,
    )
    call = by(case, product, dtype)
    result = benchmark(call)
    if by is not ours or product == "dw":  # what was run many times over has a sum of many in it
        return
    want = x @ w.T if product == "forward" else dy @ w
    assert np.abs(result - want).max() <= (1e-3 if dtype == "float32" else 2e-2) * np.abs(want).max()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_dw_is_right(shape: tuple[int, int], threads: int) -> None:
    k, n = shape
    rng = np.random.default_rng(6)
    x, dy = rng.standard_normal((65, k), np.float32), rng.standard_normal((65, n), np.float32)
    ops, dw = TrainingOps(threads), _cpu.PackedMatrix(n, k, "float32")
    ops.matmul_dw(dw, dy, x)
    want = dy.T @ x
    assert np.abs(ops.unpack(dw) - want).max() <= 1e-4 * np.abs(want).max()

"""matmul over packed weights in the shapes of GPT-2 and a 1B llama: ours, numpy and, where installed, torch.

One row reads all weights, so it is held against the read bandwidth; each call takes the next of several copies that
together exceed the caches. Many rows are held against the multiply-add peak. Results are compared with numpy's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Record, sized
from numpy.typing import NDArray

from pyllm import _cpu
from pyllm.ops import Ops

Array = NDArray[Any]
Multiply = Callable[[Array, int], Array]  # of x and the number of the copy -> x w^T

SHAPES = sized([(2048, 8192), (8192, 2048), (2048, 3072), (768, 50257), (2048, 128256)], [(96, 130)])  # K, N
ROWS = [1, 2, 4, 8, 16, 32, sized(512, 65)]
DTYPES = ["float32", "float16", "bfloat16"]
COLD_BYTES = sized(512 << 20, 1 << 16)  # what one pass over the copies reads at least, so that no cache holds it
MOST_BYTES = 1100 << 20  # float32 weights of the largest head


@dataclass
class Case:
    """Weights as [N, K] and how often they must be copied so that no cache holds them all."""

    weights: Array
    copies: int
    want: Array
    x: Array


def make_case(k: int, n: int, rows: int, dtype: str) -> Case:
    rng = np.random.default_rng(5)
    block = rng.standard_normal((min(n, 512), k), np.float32).astype(dtype)
    weights = np.tile(block, (-(-n // len(block)), 1))[:n]
    x = rng.standard_normal((rows, k), np.float32)
    used = x.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else x
    want = np.tile(used @ block.astype(np.float32).T, (1, -(-n // len(block))))[:, :n]
    copies = max(1, -(-COLD_BYTES // weights.nbytes)) if rows <= max(ROWS[:-1]) else 1
    return Case(weights, copies, want, x)


def ours(case: Case, ops: Ops) -> Multiply:
    packed = [ops.pack(case.weights) for _ in range(case.copies)]
    out = np.empty(case.want.shape, np.float32)
    return lambda x, copy: ops.matmul(x, packed[copy], out=out)


def numpy(case: Case, ops: Ops) -> Multiply:
    if case.weights.dtype != np.float32:
        pytest.skip("numpy multiplies float32 only")
    copies = [case.weights.copy() for _ in range(case.copies)]
    return lambda x, copy: x @ copies[copy].T


def torch(case: Case, ops: Ops) -> Multiply:
    library = pytest.importorskip("torch")
    library.set_num_threads(ops.threads)
    bits = case.weights.view(np.uint16) if case.weights.dtype == ml_dtypes.bfloat16 else case.weights
    weights = library.from_numpy(bits.copy())
    if case.weights.dtype == ml_dtypes.bfloat16:
        weights = weights.view(library.bfloat16)
    copies = [weights.clone() for _ in range(case.copies)]
    return lambda x, copy: library.nn.functional.linear(library.from_numpy(x).to(weights.dtype), copies[copy])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", [ours, numpy, torch])
def test_matmul(
    by: Callable[[Case, Ops], Multiply],
    dtype: str,
    rows: int,
    shape: tuple[int, int],
    ops: Ops,
    benchmark: Any,
    record: Record,
) -> None:
    k, n = shape
    weight_bytes = n * k * (4 if dtype == "float32" else 2)
    if weight_bytes > MOST_BYTES:
        pytest.skip("more memory than a benchmark should take")
    case = make_case(k, n, rows, dtype)
    multiply = by(case, ops)
    copy = itertools.cycle(range(case.copies))
    # Where there are no bfloat16 dot products, bfloat16 weights are multiplied in float32, and float16 always.
    peak = "bfloat16" if dtype == "bfloat16" and "bf16" in _cpu.active_isa() else "float32"
    record(
        dtype=peak,
        bytes=weight_bytes + 4 * rows * (k + n),
        operations=2 * rows * n * k,
        weights=dtype,
        by=by.__name__,
    )
    result = benchmark(lambda: multiply(case.x, next(copy)))
    got = np.asarray(result if isinstance(result, np.ndarray) else result.float())
    tolerance = 1e-3 if by is ours else 5e-2  # torch rounds x, and the result, to the dtype of the weights
    assert np.abs(got - case.want).max() <= tolerance * np.abs(case.want).max()

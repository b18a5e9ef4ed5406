"""matmul over packed weights in the shapes of GPT-2 and a 1B llama: ours, numpy and, where installed, torch.

One row reads all weights, so it is held against the read bandwidth; each call takes the next of several copies that
together exceed the caches. Many rows are held against the multiply-add peak. Results are compared with numpy's. Gate
and up of the llama are one product, with what follows them.
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
from pyllm.ops import GROUP_SIZES, Ops
from pyllm.spec import Activation

Array = NDArray[Any]
Multiply = Callable[[Array, int], Array]  # of x and the number of the copy -> x w^T

GPT2 = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (768, 50257)]  # K, N
LLAMA_1B = [(2048, 3072), (2048, 2048), (2048, 8192), (8192, 2048), (2048, 128256)]
SHAPES = sized([*GPT2, *LLAMA_1B], [(96, 130)])
GATED = sized((2048, 8192), (96, 130))
SMALLER = np.float32(1 / 32)  # x of gated products: gates are then near 1, as those of models
ROWS = [1, 2, 4, 8, 16, 32, sized(512, 65)]
DTYPES = ["float32", "float16", "bfloat16", "int8", "int8/32", "int4", "int4/32", "int4/128"]  # /: elements of a group
COLD_BYTES = sized(512 << 20, 1 << 16)  # what one pass over the copies reads at least, so that no cache holds it
MOST_BYTES = 1100 << 20  # float32 weights of the largest head


@dataclass
class Case:
    """Weights as [N, K] and how often they must be copied so that no cache holds them all."""

    dtype: str
    group_size: int | None
    weights: Array
    copies: int
    want: Array
    x: Array


def make_case(k: int, n: int, rows: int, weights_as: str) -> Case:
    dtype, _, group = weights_as.partition("/")
    integers = dtype.startswith("int")
    rng = np.random.default_rng(5)
    block = rng.standard_normal((min(n, 512), k), np.float32).astype("bfloat16" if integers else dtype)
    weights = np.tile(block, (-(-n // len(block)), 1))[:n]
    x = rng.standard_normal((rows, k), np.float32)
    used = x.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else x
    want = np.tile(used @ block.astype(np.float32).T, (1, -(-n // len(block))))[:, :n]
    packed_bytes = weight_bytes(n, k, dtype, int(group or 0))
    copies = max(1, -(-COLD_BYTES // packed_bytes)) if rows <= max(ROWS[:-1]) else 1
    return Case(dtype, int(group) if group else None, weights, copies, want, x)


def weight_bytes(n: int, k: int, dtype: str, group: int) -> int:
    """Bytes of the packed matrix."""
    return _cpu.packed_bytes(n, k, dtype, group_size=group or GROUP_SIZES.get(dtype, 0))


def ours(case: Case, ops: Ops) -> Multiply:
    packed = [ops.pack(case.weights, dtype=case.dtype, group_size=case.group_size) for _ in range(case.copies)]
    out = np.empty(case.want.shape, np.float32)
    return lambda x, copy: ops.matmul(x, packed[copy], out=out)


def numpy(case: Case, ops: Ops) -> Multiply:
    if case.dtype != "float32":
        pytest.skip("numpy multiplies float32 only")
    copies = [case.weights.copy() for _ in range(case.copies)]
    return lambda x, copy: x @ copies[copy].T


def torch(case: Case, ops: Ops) -> Multiply:
    if case.dtype.startswith("int"):
        pytest.skip("torch's linear has no such weights")
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
    name, _, group = dtype.partition("/")
    size = weight_bytes(n, k, name, int(group or 0))
    if size > MOST_BYTES:
        pytest.skip("more memory than a benchmark should take")
    case = make_case(k, n, rows, dtype)
    multiply = by(case, ops)
    copy = itertools.cycle(range(case.copies))
    # Where there are no bfloat16 dot products, bfloat16 weights are multiplied in float32, and float16 always.
    integers = name in ("int8", "int4")
    peak = "int8" if integers else "bfloat16" if dtype == "bfloat16" and "bf16" in _cpu.active_isa() else "float32"
    record(
        dtype=peak,
        bytes=size + 4 * rows * (k + n),
        operations=2 * rows * n * k,
        weights=dtype,
        by=by.__name__,
    )
    result = benchmark(lambda: multiply(case.x, next(copy)))
    got = np.asarray(result if isinstance(result, np.ndarray) else result.float())
    # Integers are rounded weights and rounded x; torch rounds x, and the result, to the dtype of the weights.
    tolerance = {"int8": 2e-2, "int4": 0.2}.get(name, 1e-3) if by is ours else 5e-2
    assert np.abs(got - case.want).max() <= tolerance * np.abs(case.want).max()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_matmul(dtype: str, rows: int, ops: Ops, benchmark: Any, record: Record) -> None:
    """silu(x gate^T) * (x up^T)."""
    k, n = GATED
    name, _, group = dtype.partition("/")
    case = make_case(k, n, rows, dtype)
    x = case.x * SMALLER
    copies = -(-case.copies // 2)
    kind: dict[str, Any] = {"dtype": case.dtype, "group_size": case.group_size}
    packed = itertools.cycle([ops.pack(case.weights, gate=case.weights, **kind) for _ in range(copies)])
    integers = name in ("int8", "int4")
    record(
        dtype="int8" if integers else "bfloat16" if dtype == "bfloat16" and "bf16" in _cpu.active_isa() else "float32",
        bytes=2 * weight_bytes(n, k, name, int(group or 0)) + 4 * rows * (k + n),
        operations=4 * rows * n * k,
        weights=dtype,
    )
    out = np.empty((rows, n), np.float32)
    benchmark(lambda: ops.matmul(x, next(packed), activation=Activation.SILU, out=out))
    product = case.want * SMALLER
    want = product / (1 + np.exp(-product)) * product
    tolerance = {"int8": 4e-2, "int4": 0.4}.get(name, 2e-3)
    assert np.abs(out - want).max() <= tolerance * np.abs(want).max()

"""Steps: kernels by themselves as shares of their roofs, over weights and caches that no L2 holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from gpu.process import Check, Row
from gpu.timing import device, guarded, noise, row_of, seconds_of, torch_gpu, torch_product

DECODE_ROWS = (1, 4, 8, 16, 64)
DECODE = {"1B qkv": (3072, 2048), "1B gate+up": (16384, 2048), "1B down": (2048, 8192),
          "8B down": (4096, 14336), "1B head": (128256, 2048)}  # fmt: skip
PRODUCTS = [(4096, 4096, 4096), (8192, 8192, 8192), (512, 4096, 4096), (2048, 4096, 4096)]
ATTENTIONS, LENGTH = [(64, 32, 8), (128, 32, 8)], 2048  # channels of a head, heads, heads of keys; tokens
CACHED = 256 << 20  # bytes of weights, or of caches, beyond any L2
BOUND = 1e-2  # relative error of bfloat16


def decode(check: Check) -> Row:
    """Products of few rows."""
    shapes, batches, cached = DECODE, DECODE_ROWS, CACHED
    if check.emulated:
        shapes, batches, cached = {"tiny": (16, 64), "long": (16, 14336)}, (1, 8), 4096
    measures = {
        f"decode {name}": functools.partial(decoding, *shape, batches, cached) for name, shape in shapes.items()
    }
    return {"rows": rows_of(check.emulated, measures)}


def products(check: Check) -> Row:
    """Products of prompts."""
    shapes = [(32, 16, 64)] if check.emulated else PRODUCTS
    measures = {f"product {m}x{n}x{k}": functools.partial(product, m, n, k) for m, n, k in shapes}
    return {"rows": rows_of(check.emulated, measures)}


def attention(check: Check) -> Row:
    """Attention of prompts and of decoding."""
    shapes, length, cached = ([(64, 2, 1)], 64, 4096) if check.emulated else (ATTENTIONS, LENGTH, CACHED)
    measures = {f"attention E={shape[0]}": functools.partial(attending, *shape, length, cached) for shape in shapes}
    return {"rows": rows_of(check.emulated, measures)}


def rows_of(emulated: bool, measures: dict[str, Any]) -> Iterator[Row]:
    """The rows of ``measure(gpu, ops, name)`` of each name, and of those that fail what went wrong."""
    from pyllm.cuda_ops import CudaOps

    with device(emulated) as gpu:
        ops = CudaOps(gpu)
        for name, measure in measures.items():
            yield from guarded(name, lambda name, measure=measure: measure(gpu=gpu, ops=ops, name=name))


def decoding(n: int, k: int, batches: tuple[int, ...], cached: int, *, gpu: Any, ops: Any, name: str) -> Iterator[Row]:
    """Products of few rows with weights [n, k], in turns over copies of at least `cached` bytes together; an error
    where some of their columns are wrong."""
    from pyllm.cuda_weights import DeviceMatrix

    copies = max(2, -(-cached // (n * k * 2)))
    weights = [DeviceMatrix(noise(gpu, (n, k), 0.02, bfloat16), False) for _ in range(copies)]
    columns = sorted({0, n // 3, n - 1})
    some = weights[0].values[columns].numpy()
    for batch in batches:
        x, y = noise(gpu, (batch, k), 1, bfloat16), gpu.empty((batch, n), np.float32)
        took = seconds_of(gpu, lambda i, x=x, y=y: ops.matmul(x, weights[i % copies], out=y), copies)
        compare(y.numpy()[:, columns], x.numpy(), some, f"columns {columns}, {batch} rows")
        yield row_of(name, "GB/s", n * k * 2 / took / 1e9, batch=batch, us=took * 1e6)


def product(m: int, n: int, k: int, *, gpu: Any, ops: Any, name: str) -> Iterator[Row]:
    """The product of a prompt, and torch's; an error where some of its rows are wrong."""
    from pyllm.cuda_weights import DeviceMatrix

    w = DeviceMatrix(noise(gpu, (n, k), 0.02, bfloat16), False)
    x, y = noise(gpu, (m, k), 1, bfloat16), gpu.empty((m, n), bfloat16)
    took = seconds_of(gpu, lambda _: ops.matmul(x, w, out=y), 3)
    some = sorted({0, m // 3, m - 1})
    compare(y[some].numpy(), x[some].numpy(), w.values.numpy(), f"rows {some}")
    torch = torch_gpu()
    torchs = {} if torch is None else {"torch": torch_product(torch, m, n, k)}
    yield row_of(name, "TFLOP/s", 2 * m * n * k / took / 1e12, us=took * 1e6, **torchs)


def compare(y: Any, x: Any, w: Any, which: str) -> None:
    """RuntimeError where y is not x w^T within bfloat16's error."""
    expected = x.astype("f4") @ w.astype("f4").T
    error = float(np.linalg.norm(y.astype("f4") - expected) / np.linalg.norm(expected))
    if not error <= BOUND:
        raise RuntimeError(f"{which} are wrong: relative error {error:.3g}, expected at most {BOUND}")


def attending(
    size: int, heads: int, kv_heads: int, length: int, cached: int, *, gpu: Any, ops: Any, name: str
) -> Iterator[Row]:
    """Attention of a prompt of `length` tokens, and of one token after so many; caches of `cached` bytes take turns."""
    blocks = length // 64
    copies = max(2, -(-cached // (2 * length * kv_heads * size * 2)))
    caches = [noise(gpu, (blocks, kv_heads, 2, 64 * size), 1, bfloat16) for _ in range(copies)]
    table, end = gpu.upload(np.arange(blocks, dtype=np.int32)[None]), gpu.upload(np.array([length], np.int32))
    for rows in (length, 1):
        q, out = noise(gpu, (rows, heads * size), 1, bfloat16), gpu.empty((rows, heads * size), bfloat16)
        starts = ops.stage([np.array([0, rows], np.int32)])
        starts.send()

        def launch(i: int, q: Any = q, out: Any = out, starts: Any = starts.placed[0]) -> None:
            ops.attention(q, caches[i % copies], starts, end, table, head_size=size, scale=size**-0.5, out=out)

        took = seconds_of(gpu, launch, copies)
        if rows == 1:
            yield row_of(f"{name} decode at {length}", "GB/s", caches[0].nbytes / took / 1e9, us=took * 1e6)
        else:
            work = 2 * rows * rows * heads * size  # half of the scores are masked
            yield row_of(f"{name} prompt of {length}", "TFLOP/s", work / took / 1e12, us=took * 1e6)

"""Writing the keys and values of a step into the paged cache, at the Llama-3.2-1B shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pyllm import _cpu
from pyllm.ops import Ops

GROUPS, SIZE, PAGE = 8, 64, 64
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("by", ["pyllm", "numpy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 512])
def test_kv_write(benchmark: Any, record: Callable[..., None], ops: Ops, tokens: int, dtype: np.dtype, by: str) -> None:
    blocks = (tokens + PAGE - 1) // PAGE
    cache = _cpu.allocate(blocks * GROUPS * 2 * PAGE * SIZE * dtype.itemsize).view(dtype).reshape(blocks, GROUPS, 2, -1)
    k, v = (RNG.normal(size=(tokens, GROUPS * SIZE)).astype(np.float32) for _ in range(2))
    slots = np.arange(tokens, dtype=np.int64)
    block, at = slots // PAGE, slots % PAGE
    pair = 1 if dtype == np.float32 else 2
    keys = cache[:, :, 0].reshape(blocks, GROUPS, PAGE // 16, SIZE // pair, 16, pair)
    values = cache[:, :, 1].reshape(blocks, GROUPS, PAGE // pair, SIZE, pair)
    heads_k, heads_v = (a.reshape(tokens, GROUPS, SIZE).astype(dtype) for a in (k, v))

    def numpy_write() -> None:
        keys[block, :, at // 16, :, at % 16] = k.astype(dtype).reshape(tokens, GROUPS, SIZE // pair, pair)
        values[block, :, at // pair, :, at % pair] = v.astype(dtype).reshape(tokens, GROUPS, SIZE)

    call = numpy_write if by == "numpy" else lambda: ops.kv_write(cache, k, v, slots, SIZE)
    call()
    assert np.array_equal(keys[block, :, at // 16, :, at % 16].reshape(heads_k.shape), heads_k)
    assert np.array_equal(values[block, :, at // pair, :, at % pair], heads_v)
    record(bytes=2 * k.nbytes + 2 * k.size * dtype.itemsize, by=by, state="in cache")
    benchmark(call)

"""Row lookups from a GPT-2-sized table, packed and plain, which lies in memory and not in the caches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import sized

from pyllm.ops import Ops

VOCAB, DIM = sized(50257, 1000), 768


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("peer", ["pyllm packed", "pyllm plain", "numpy", "torch"])
def test_embedding(benchmark: Any, record: Any, ops: Ops, threads: int, peer: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, DIM)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, rows).astype(np.int32)
    if peer == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        a, i = torch.from_numpy(table), torch.from_numpy(tokens)
        y = benchmark(torch.nn.functional.embedding, i, a).numpy()
    elif peer == "numpy":
        y = benchmark(lambda: table[tokens])
    else:
        y = benchmark(ops.embedding, tokens, ops.pack(table) if peer == "pyllm packed" else table)
    record(bytes=2 * rows * DIM * 4)
    assert np.array_equal(y, table[tokens])

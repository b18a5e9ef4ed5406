"""Rotary embedding of the query heads of a prompt, at the Llama-3.2-1B shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyllm.ops import Ops

HEADS, SIZE = 32, 64
RNG = np.random.default_rng(0)


def numpy_rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate x [T, heads, E] in place."""
    half = cos.shape[1]
    a, b = x[..., :half].copy(), x[..., half:].copy()
    x[..., :half] = a * cos[:, None] - b * sin[:, None]
    x[..., half:] = b * cos[:, None] + a * sin[:, None]
    return x


@pytest.mark.parametrize("by", ["pyllm", "numpy", "torch"])
@pytest.mark.parametrize("tokens", [1, 512])
def test_rope(benchmark: Any, record: Callable[..., None], ops: Ops, threads: int, tokens: int, by: str) -> None:
    inv_freq = (10000.0 ** -(np.arange(SIZE // 2) / (SIZE // 2))).astype(np.float32)[None]
    cos, sin = ops.rope_angles(np.arange(tokens, dtype=np.int32), inv_freq)
    start = RNG.normal(size=(tokens, HEADS * SIZE)).astype(np.float32)
    x = start.copy()
    heads = x.reshape(tokens, HEADS, SIZE)
    call: Callable[[], Any]
    if by == "numpy":
        call = lambda: numpy_rope(heads, cos, sin)  # noqa: E731
    elif by == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        t, c, s = (torch.from_numpy(a) for a in (heads, np.tile(cos, 2)[:, None], np.tile(sin, 2)[:, None]))
        turned = lambda: torch.cat([-t[..., SIZE // 2 :], t[..., : SIZE // 2]], -1)  # noqa: E731
        call = lambda: t.copy_(t * c + turned() * s)  # noqa: E731
    else:
        call = lambda: ops.rope(x, cos, sin, SIZE)  # noqa: E731
    expected = numpy_rope(start.copy().reshape(heads.shape), cos, sin)
    call()
    assert np.abs(heads - expected).max() < 1e-6
    record(bytes=2 * x.nbytes, operations=3 * x.size, by=by, state="in cache")
    benchmark(call)


def test_rope_angles(benchmark: Any, record: Callable[..., None], ops: Ops) -> None:
    positions = np.arange(512, dtype=np.int32)
    inv_freq = (10000.0 ** -(np.arange(SIZE // 2) / (SIZE // 2))).astype(np.float32)[None]
    record(bytes=2 * 4 * positions.size * inv_freq.size, state="in cache")
    cos, sin = benchmark(ops.rope_angles, positions, inv_freq)
    angle = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    assert np.abs(cos - np.cos(angle)).max() < 1e-7
    assert np.abs(sin - np.sin(angle)).max() < 1e-7

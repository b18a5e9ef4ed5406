"""Gradients of attention: batches as a small model trains on, heads of GPT-2 and others; the forward beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import sized

from pyllm.ops_training import TrainingOps

PAGE = 64
RNG = np.random.default_rng(0)
#        sequences, tokens of each, heads, key/value heads, head size
SHAPES = sized(
    [(4, 64, 12, 12, 64), (4, 256, 12, 12, 64), (1, 1024, 12, 12, 64), (4, 256, 8, 8, 32), (4, 256, 8, 2, 64)],
    [(2, 65, 4, 2, 16)],
)


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> tuple[np.ndarray, ...]:
    """dq, dk, dv of one sequence and one head [S, E], in float64, by the formula."""
    q, k, v, dout = (a.astype(np.float64) for a in (q, k, v, dout))
    scale = q.shape[1] ** -0.5
    score = np.where(np.tri(len(q), dtype=bool), q @ k.T * scale, -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = dout @ v.T
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return ds @ k, ds.T @ q, p.T @ dout


@pytest.mark.parametrize("by", ["pyllm-forward", "pyllm", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_attention_backward(
    benchmark: Any, record: Callable[..., None], threads: int, shape: tuple[int, ...], by: str
) -> None:
    """`torch` is its forward and backward pass together, as its backward cannot be run alone again and again."""
    sequences, tokens, heads, groups, size = shape
    rows, pages = sequences * tokens, (tokens + PAGE - 1) // PAGE
    q, dout = (RNG.normal(size=(rows, heads * size)).astype(np.float32) for _ in range(2))
    k, v = (RNG.normal(size=(rows, groups * size)).astype(np.float32) for _ in range(2))
    products = 2 * size * sequences * heads * tokens * (tokens + 1) / 2
    if by == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        split = lambda a, n: torch.from_numpy(a).reshape(sequences, tokens, n, size).transpose(1, 2)  # noqa: E731
        parts = [split(a, n).contiguous().requires_grad_() for a, n in ((q, heads), (k, groups), (v, groups))]
        cotangent = split(dout, heads).contiguous()

        def call() -> Any:
            out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=heads > groups)
            return torch.autograd.grad(out, parts, cotangent)

        record(operations=7 * products, by=by, state="forward and backward")
        gradients = [g.transpose(1, 2).reshape(rows, -1).numpy() for g in benchmark.pedantic(call, rounds=7)]
    else:
        ops = TrainingOps(threads)
        cache = np.zeros((sequences * pages, groups, 2, PAGE * ((size + 15) // 16 * 16)), np.float32)
        tables = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        starts = (np.arange(sequences + 1) * tokens).astype(np.int32)
        lengths = np.full(sequences, tokens, np.int32)
        at = np.arange(rows, dtype=np.int64)
        ops.kv_write(cache, k, v, at // tokens * pages * PAGE + at % tokens, size)
        options = {"head_size": size, "scale": size**-0.5}
        lse, out = np.empty((rows, heads), np.float32), np.empty_like(q)
        gradients = [np.empty_like(a) for a in (q, k, v)]
        forward = lambda: ops.attention(q, cache, starts, lengths, tables, lse=lse, out=out, **options)  # noqa: E731
        backward = lambda: ops.attention_backward(  # noqa: E731
            dout, out, q, cache, lse, starts, lengths, tables, gradients=tuple(gradients), **options
        )
        forward()
        if by == "pyllm-forward":
            backward()
        record(operations=(2 if by == "pyllm-forward" else 5) * products, by=by, state="in cache")
        benchmark.pedantic(forward if by == "pyllm-forward" else backward, warmup_rounds=1, rounds=7)
    group = heads // groups
    last, head = slice(rows - tokens, rows), slice((groups - 1) * size, groups * size)
    expected = [
        dense(
            *(a[last, h * size : (h + 1) * size] if a is q else a[last, head] for a in (q, k, v)),
            dout[last, h * size : (h + 1) * size],
        )
        for h in range(heads - group, heads)
    ]
    exact = expected[-1][0], sum(e[1] for e in expected), sum(e[2] for e in expected)
    for actual, wanted in zip(gradients, exact, strict=True):
        assert np.abs(actual[last, -size:] - wanted).max() < 1e-5 * np.abs(wanted).max()

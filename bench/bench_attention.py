"""Attention over the paged cache: decode at depth, from memory, and prefill of a prompt, at the Llama-3.2-1B shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import sized

from pyllm import _cpu
from pyllm.ops import Ops
from pyllm.position_bias import Alibi

HEADS, GROUPS, SIZE = 32, 8, 64
SCALE = SIZE**-0.5
PAGE = 64
CACHE_BYTES = sized(1 << 30, 1 << 20)  # beyond every level of cache, so that decode reads memory
BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.int8)]
RNG = np.random.default_rng(0)


def caches(layers: int, blocks: int, dtype: np.dtype) -> np.ndarray:
    """Written caches of all layers [layers, blocks, G, 2, 64 * E], in int8 64 * (E + 2), on huge pages."""
    shape = (layers, blocks, GROUPS, 2, PAGE * (SIZE + 2 * (dtype == np.int8)))
    memory = _cpu.allocate(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
    if dtype == np.int8:
        memory[:] = RNG.integers(-127, 128, shape[1:])
        memory[..., PAGE * SIZE :].view(BF16)[...] = RNG.uniform(0.01, 0.03, (*shape[1:4], PAGE))
    else:
        memory[:] = RNG.normal(size=shape[1:]).astype(dtype)
    return memory


def contents(cache: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [tokens, G, E] of one layer whose blocks stand in order."""
    blocks = len(cache)
    keys, values = (np.ascontiguousarray(cache[:, :, i, : PAGE * SIZE]).astype(np.float32) for i in range(2))
    if cache.dtype == np.float32:
        keys = keys.reshape(blocks, GROUPS, PAGE // 16, SIZE, 16).transpose(0, 2, 4, 1, 3)
        values = values.reshape(blocks, GROUPS, PAGE, SIZE).transpose(0, 2, 1, 3)
    else:
        keys = keys.reshape(blocks, GROUPS, PAGE // 16, SIZE // 2, 16, 2).transpose(0, 2, 4, 1, 3, 5)
        values = values.reshape(blocks, GROUPS, PAGE // 2, SIZE, 2).transpose(0, 2, 4, 1, 3)
    keys, values = (np.ascontiguousarray(a.reshape(-1, GROUPS, SIZE)) for a in (keys, values))
    if cache.dtype == np.int8:
        scales = np.ascontiguousarray(cache[..., PAGE * SIZE :]).view(BF16).astype(np.float32)
        scales = scales.transpose(2, 0, 3, 1).reshape(2, -1, GROUPS, 1)
        keys, values = keys * scales[0], values * scales[1]
    return keys[:tokens], values[:tokens]


def formula(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    change: Callable[[np.ndarray], np.ndarray] = lambda score: score,
) -> np.ndarray:
    """Causal attention with numpy: q [T, H, E] at the last positions of keys and values [S, G, E] -> [T, H * E].

    `change` is given the scores [H, T, S].
    """
    rows, length = len(q), len(keys)
    grouped = q.reshape(rows, GROUPS, -1, SIZE).transpose(1, 2, 0, 3)
    score = grouped @ keys.transpose(1, 2, 0)[:, None] * np.float32(SCALE)
    score = change(score.reshape(-1, rows, length)).reshape(score.shape)
    hidden = np.arange(length)[None, :] > np.arange(length - rows, length)[:, None]
    score[..., hidden] = -np.inf
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    return (weight @ values.transpose(1, 0, 2)[:, None]).transpose(2, 0, 1, 3).reshape(rows, -1)


def assert_matches(result: np.ndarray, q: np.ndarray, cache: np.ndarray, tokens: int) -> None:
    """Hold a result against the formula, with queries and weights rounded where the kernel rounds them."""
    keys, values = contents(cache, tokens)
    allowed = 1e-4
    unit = np.float32(SCALE) * np.float32(np.log2(np.e))  # queries as the kernel scales and rounds them
    if dot_products(cache.dtype) == "bfloat16":
        q = (q * unit).astype(BF16).astype(np.float32) / unit
        allowed += 1.1 * 2**-8 * float(np.abs(values).max())
    if cache.dtype == np.int8:
        word = np.abs(q * unit).max(axis=-1, keepdims=True) / np.float32(32767)
        q = np.rint(q * unit / word) * word / unit
        allowed += 2**-10 * float(np.abs(values).max())
    assert np.abs(result - formula(q, keys, values)).max() < allowed


def dot_products(cache: np.dtype) -> str:
    """In which dtype queries, keys, weights and values are multiplied; int16, for int8, counts as float32."""
    return "bfloat16" if cache == BF16 and "bf16" in _cpu.active_isa() and _cpu.fast_bf16_dots() else "float32"


@pytest.mark.parametrize("blocks_in", ["order", "shuffled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "depth"), sized([(1, 512), (1, 2048), (1, 8192), (4, 2048), (16, 2048)], [(1, 128), (1, 256), (3, 128)])
)
def test_decode(
    benchmark: Any, record: Callable[..., None], ops: Ops, batch: int, depth: int, dtype: np.dtype, blocks_in: str
) -> None:
    blocks = batch * depth // PAGE
    memory = caches(max(2, CACHE_BYTES // (2 * batch * depth * GROUPS * SIZE * dtype.itemsize)), blocks, dtype)
    order = np.arange(blocks) if blocks_in == "order" else RNG.permutation(blocks)
    tables = order.astype(np.int32).reshape(batch, -1)
    q = RNG.normal(size=(batch, HEADS * SIZE)).astype(np.float32)
    starts, lengths = np.arange(batch + 1, dtype=np.int32), np.full(batch, depth, np.int32)
    ops.begin_recording()
    out = [ops.attention(q, layer, starts, lengths, tables, head_size=SIZE, scale=SCALE) for layer in memory]
    graph = ops.end_recording()
    work = len(memory) * batch * depth
    record(
        dtype=dot_products(dtype),
        bytes=2 * work * GROUPS * (SIZE + 2 * (dtype == np.int8)) * dtype.itemsize,
        operations=4 * work * HEADS * SIZE,
        cache=str(dtype),
        layers=len(memory),
        state="cache in memory",
    )
    benchmark.pedantic(ops.replay, (graph,), warmup_rounds=1, rounds=5)
    for b in (0, batch - 1):
        row = q[b : b + 1].reshape(1, HEADS, SIZE)
        assert_matches(out[0][b : b + 1], row, memory[0][tables[b]], depth)
    assert np.array_equal(out[0], out[-1])


@pytest.mark.parametrize("by", ["pyllm-float32", "pyllm-bfloat16", "pyllm-int8", "numpy", "torch"])
@pytest.mark.parametrize("tokens", sized([512, 2048], [128]))
def test_prefill(benchmark: Any, record: Callable[..., None], ops: Ops, threads: int, tokens: int, by: str) -> None:
    dtype = {"pyllm-bfloat16": BF16, "pyllm-int8": np.dtype(np.int8)}.get(by, np.dtype(np.float32))
    cache = caches(1, tokens // PAGE, dtype)[0]
    keys, values = contents(cache, tokens)
    q = RNG.normal(size=(tokens, HEADS * SIZE)).astype(np.float32)
    heads = q.reshape(tokens, HEADS, SIZE)
    call: Callable[[], Any]
    if by == "numpy":
        call = lambda: formula(heads, keys, values)  # noqa: E731
    elif by == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(threads)
        parts = [torch.from_numpy(np.ascontiguousarray(a.transpose(1, 0, 2)))[None] for a in (heads, keys, values)]
        attend = torch.nn.functional.scaled_dot_product_attention
        call = lambda: (  # noqa: E731
            attend(*parts, is_causal=True, enable_gqa=True, scale=SCALE)[0]
            .numpy()
            .transpose(1, 0, 2)
            .reshape(tokens, -1)
        )
    else:
        starts, lengths = np.array([0, tokens], np.int32), np.array([tokens], np.int32)
        tables = np.arange(tokens // PAGE, dtype=np.int32)[None]
        call = lambda: ops.attention(q, cache, starts, lengths, tables, head_size=SIZE, scale=SCALE)  # noqa: E731
    used = dot_products(dtype) if by.startswith("pyllm") else "float32"
    record(dtype=used, operations=4 * HEADS * SIZE * tokens * (tokens + 1) / 2, by=by, state="in cache")
    result = benchmark.pedantic(call, warmup_rounds=1, rounds=5)
    assert_matches(result, heads, cache, tokens)


@pytest.mark.parametrize("change", ["none", "softcap", "bias", "slopes"])
@pytest.mark.parametrize(("rows", "depth"), sized([(1, 2048), (512, 512)], [(1, 128), (70, 128)]))
def test_changed_scores(
    benchmark: Any, record: Callable[..., None], ops: Ops, change: str, rows: int, depth: int
) -> None:
    cache = caches(1, depth // PAGE, DTYPES[0])[0]
    q = RNG.normal(size=(rows, HEADS * SIZE)).astype(np.float32)
    starts, lengths = np.array([0, rows], np.int32), np.array([depth], np.int32)
    tables = np.arange(depth // PAGE, dtype=np.int32)[None]
    bias, slopes = RNG.normal(size=(HEADS, 257)).astype(np.float32), Alibi().slopes(HEADS)
    distance = np.arange(depth)[None, :] - np.arange(depth - rows, depth)[:, None]
    by: dict[str, tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = {
        "none": ({}, lambda score: score),
        "softcap": ({"softcap": 5.0}, lambda score: 5 * np.tanh(score / 5)),
        "bias": ({"bias": bias}, lambda score: score + bias[:, np.clip(distance, -128, 128) + 128]),
        "slopes": ({"slopes": slopes}, lambda score: score + slopes[:, None, None] * distance),
    }
    more, changed = by[change]
    record(operations=4 * HEADS * SIZE * rows * (depth - (rows - 1) / 2), change=change, state="in cache")
    result = benchmark(lambda: ops.attention(q, cache, starts, lengths, tables, head_size=SIZE, scale=SCALE, **more))
    expected = formula(q.reshape(rows, HEADS, SIZE), *contents(cache, depth), changed)
    assert np.abs(result - expected).max() < 1e-4

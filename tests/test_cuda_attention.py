"""The CUDA attention kernels on the host emulator, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from cuda_host import DTYPES, AttentionArgs, CacheView, aligned, as_aligned, build

bfloat16 = ml_dtypes.bfloat16
PAGE = 64


@pytest.fixture(scope="module")
def kernels():
    return build()


@dataclass
class Case:
    """Ragged queries over a paged cache whose unwritten slots hold NaN."""

    q: np.ndarray  # [T, H, E]
    keys: list[np.ndarray]  # of each sequence, [S, G, E]
    values: list[np.ndarray]
    cache: np.ndarray  # [blocks, G, 2, PAGE, Ep]
    starts: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray


def case(queries, lengths, heads, kv_heads, head_size, dtype=bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    padded = -(-head_size // 16) * 16
    pages = [-(-length // PAGE) for length in lengths]
    width = max(pages) + 1
    tables = np.full((len(lengths), width), 2**30, np.int32)  # entries past the end must not be followed
    order = iter(rng.permutation(sum(pages)))
    cache = aligned((max(1, sum(pages)), kv_heads, 2, PAGE, padded), np.dtype(dtype))
    cache[...] = np.nan
    keys, values = [], []
    for b, length in enumerate(lengths):
        kv = rng.standard_normal((2, length, kv_heads, head_size)).astype(dtype)
        keys.append(kv[0].astype("f8"))
        values.append(kv[1].astype("f8"))
        for page in range(pages[b]):
            tables[b, page] = block = next(order)
            part = kv[:, page * PAGE : (page + 1) * PAGE]
            cache[block, :, :, : part.shape[1], :head_size] = part.transpose(2, 0, 1, 3)
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    q = as_aligned((2 * rng.standard_normal((starts[-1], heads, head_size))).astype(dtype))
    return Case(q, keys, values, cache, starts, np.array(lengths, np.int32), tables)


def call(run, c, *, window=0, split_blocks=2):
    rows, heads, head_size = c.q.shape
    sequences, width = c.tables.shape
    kv_heads = c.cache.shape[1]
    out = aligned((rows + 1, heads, head_size), c.q.dtype)
    out[...] = np.nan
    splits = -(-width // split_blocks)
    partial = np.full((sequences, kv_heads, splits, 16, head_size + 2), np.nan, np.float32)
    tickets = np.zeros((sequences, kv_heads), np.uint32)
    args = AttentionArgs(
        out=out.ctypes.data, q=c.q.ctypes.data, starts=c.starts.ctypes.data, lengths=c.lengths.ctypes.data,
        cache=CacheView(c.cache.ctypes.data, len(c.cache), kv_heads, head_size, DTYPES[c.q.dtype]),
        tables=c.tables.ctypes.data, sequences=sequences, heads=heads, table_width=width, q_stride=heads * head_size,
        out_stride=heads * head_size, window=window, most_queries=int(np.diff(c.starts).max(initial=0)),
        scale=head_size**-0.5, split_blocks=split_blocks, partial=partial.ctypes.data, tickets=tickets.ctypes.data,
    )  # fmt: skip
    assert run(ctypes.byref(args)) == 0
    assert not tickets.any() and np.isnan(out[rows:].astype("f4")).all()
    return out[:rows].astype("f8")


def formula(c, *, window=0):
    rows, heads, head_size = c.q.shape
    out = np.zeros((rows, heads, head_size))
    group = heads // c.cache.shape[1]
    for b, (keys, values) in enumerate(zip(c.keys, c.values, strict=True)):
        for row in range(c.starts[b], c.starts[b + 1]):
            position = c.lengths[b] - c.starts[b + 1] + row
            first = max(0, position - window + 1) if window else 0
            for h in range(heads):
                k, v = keys[first : position + 1, h // group], values[first : position + 1, h // group]
                scores = k @ c.q[row, h].astype("f8") * head_size**-0.5
                weights = np.exp(scores - scores.max())
                out[row, h] = weights @ v / weights.sum()
    return out


def close(got, expected, bound=4e-3):  # weights and results are rounded to bf16, 2^-9 each
    assert np.isfinite(got).all()
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error <= bound, error


@pytest.mark.parametrize("window", [0, 1, 70])
@pytest.mark.parametrize(
    ("queries", "lengths", "heads", "kv_heads", "head_size"),
    [
        ([1], [1], 1, 1, 8),
        ([5, 0, 70], [5, 3, 70], 4, 2, 64),
        ([33, 3], [97, 200], 3, 1, 80),
        ([65], [65], 2, 2, 128),
        ([2, 17], [129, 64], 4, 1, 256),
    ],
)
def test_prompt_matches_formula(kernels, queries, lengths, heads, kv_heads, head_size, window):
    c = case(queries, lengths, heads, kv_heads, head_size, seed=head_size)
    close(call(kernels.host_prompt_attention, c, window=window), formula(c, window=window))


@pytest.mark.parametrize("window", [0, 1, 70])
@pytest.mark.parametrize(
    ("queries", "lengths", "heads", "kv_heads", "head_size"),
    [
        ([1], [1], 1, 1, 8),
        ([1, 1, 0], [64, 65, 9], 8, 2, 64),
        ([1, 4], [300, 513], 4, 1, 80),
        ([2], [260], 16, 2, 128),
        ([1], [193], 3, 3, 256),
    ],
)
def test_split_matches_formula(kernels, queries, lengths, heads, kv_heads, head_size, window):
    c = case(queries, lengths, heads, kv_heads, head_size, seed=head_size)
    for split_blocks in (1, 2, 9):
        got = call(kernels.host_split_attention, c, window=window, split_blocks=split_blocks)
        close(got, formula(c, window=window))


@pytest.mark.parametrize("window", [0, 1, 70])
def test_plain_matches_formula(kernels, window):
    for heads, kv_heads, head_size in ((3, 1, 8), (4, 2, 80), (2, 2, 250)):
        c = case([1, 0, 3], [70, 4, 3], heads, kv_heads, head_size, dtype=np.float32)
        close(call(kernels.host_plain_attention, c, window=window), formula(c, window=window), 1e-6)


def test_a_sequence_is_the_same_bits_in_any_batch(kernels):
    c = case([1, 1, 1], [70, 300, 150], 4, 2, 64)
    whole = call(kernels.host_split_attention, c)
    for b in range(3):
        one = Case(
            as_aligned(c.q[b : b + 1]), c.keys[b : b + 1], c.values[b : b + 1], c.cache,
            np.array([0, 1], np.int32), c.lengths[b : b + 1].copy(), c.tables[b : b + 1].copy(),
        )  # fmt: skip
        assert (call(kernels.host_split_attention, one)[0] == whole[b]).all()


def test_what_a_kernel_cannot_take_is_an_error(kernels):
    def refused(run, heads=4, kv_heads=2, head_size=64, dtype=2, queries=1, split_blocks=1):
        cache = CacheView(0, 1, kv_heads, head_size, dtype)
        return run(
            AttentionArgs(sequences=1, heads=heads, cache=cache, most_queries=queries, split_blocks=split_blocks)
        )

    for run in (kernels.host_prompt_attention, kernels.host_split_attention):
        assert refused(run, head_size=100) and refused(run, head_size=264) and refused(run, dtype=0)
        assert refused(run, heads=5) and not refused(run, queries=0)
    assert refused(kernels.host_plain_attention, dtype=2) and refused(kernels.host_plain_attention, heads=5, dtype=0)
    assert refused(kernels.host_split_attention, queries=9) and refused(kernels.host_split_attention, split_blocks=0)

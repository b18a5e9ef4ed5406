"""The CUDA attention kernels on the host emulator, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from cuda_host import (
    DTYPES,
    AttentionArgs,
    AttentionRule,
    AttentionScores,
    CacheView,
    aligned,
    as_aligned,
    build,
    limited,
)
from oracle.attention import Rule, softmax

bfloat16 = ml_dtypes.bfloat16
PAGE = 64
CAUSAL = Rule()


@pytest.fixture(scope="module")
def kernels():
    return build()


@dataclass
class Scores:
    """What becomes of a score: AttentionScores of core/args.h."""

    bias: np.ndarray | None = None  # [H, 2 * reach + 1]
    slopes: np.ndarray | None = None  # [H]
    softcap: float = 0.0


PLAIN = Scores()


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


def call(run, c, *, rule=CAUSAL, scores=PLAIN, split_blocks=2, out_dtype=None):
    """Output [T, H, E] and lse [T, H], float64; what lies behind them must stay as it was."""
    rows, heads, head_size = c.q.shape
    sequences, width = c.tables.shape
    kv_heads = c.cache.shape[1]
    out = aligned((rows + 1, heads, head_size), np.dtype(out_dtype or c.q.dtype))
    out[...] = np.nan
    lse = np.full((rows + 1, heads), np.nan, "f4")
    splits = -(-width // split_blocks)
    partial = np.full((sequences, kv_heads, splits, 16, head_size + 2), np.nan, np.float32)
    tickets = np.zeros((sequences, kv_heads), np.uint32)
    prefix = np.array(rule.prefix or (), np.int32)
    args = AttentionArgs(
        out=out.ctypes.data, lse=lse.ctypes.data, q=c.q.ctypes.data, starts=c.starts.ctypes.data,
        lengths=c.lengths.ctypes.data, tables=c.tables.ctypes.data,
        cache=CacheView(c.cache.ctypes.data, len(c.cache), kv_heads, head_size, DTYPES[c.cache.dtype]),
        rule=AttentionRule(prefix.ctypes.data if rule.prefix else 0, rule.window, rule.sinks, rule.causal),
        scores=AttentionScores(
            0 if scores.bias is None else scores.bias.ctypes.data,
            0 if scores.slopes is None else scores.slopes.ctypes.data,
            0 if scores.bias is None else scores.bias.shape[1] // 2, scores.softcap,
        ),
        sequences=sequences, heads=heads, table_width=width, q_stride=heads * head_size, out_stride=heads * head_size,
        most_queries=int(np.diff(c.starts).max(initial=0)), scale=head_size**-0.5, q_dtype=DTYPES[c.q.dtype],
        out_dtype=DTYPES[out.dtype], split_blocks=split_blocks, partial=partial.ctypes.data,
        tickets=tickets.ctypes.data,
    )  # fmt: skip
    assert run(ctypes.byref(args)) == 0
    assert not tickets.any()
    assert np.isnan(out[rows:].astype("f4")).all()
    assert np.isnan(lse[rows:]).all()
    return out[:rows].astype("f8"), lse[:rows].astype("f8")


def formula(c, *, rule=CAUSAL, scores=PLAIN):
    """Output and lse in float64."""
    rows, heads, head_size = c.q.shape
    out, lse = np.zeros((rows, heads, head_size)), np.zeros((rows, heads))
    group = heads // c.cache.shape[1]
    for b, (keys, values) in enumerate(zip(c.keys, c.values, strict=True)):
        queries = c.q[c.starts[b] : c.starts[b + 1]].astype("f8")
        k, v = (np.repeat(a, group, axis=1) for a in (keys, values))
        score = np.einsum("the,she->hts", queries, k) * head_size**-0.5
        distance = np.arange(len(k)) - (len(k) - len(queries) + np.arange(len(queries))[:, None])
        if scores.softcap:
            score = scores.softcap * np.tanh(score / scores.softcap)
        if scores.bias is not None:
            reach = scores.bias.shape[1] // 2
            score = score + scores.bias[:, np.clip(distance, -reach, reach) + reach]
        if scores.slopes is not None:
            score = score + scores.slopes[:, None, None] * distance
        weight, log_sum = softmax(score, rule.seen(b, len(queries), len(k)))
        out[c.starts[b] : c.starts[b + 1]] = np.einsum("hts,she->the", weight, v)
        lse[c.starts[b] : c.starts[b + 1]] = log_sum[..., 0].T
    return out, lse


def close(got, expected, bound=4e-3):  # weights and results are rounded to bf16, 2^-9 each
    for mine, wanted in zip(got, expected, strict=True):
        assert (np.isneginf(mine) == np.isneginf(wanted)).all()
        mine, wanted = np.where(np.isneginf(wanted), 0, mine), np.where(np.isneginf(wanted), 0, wanted)
        assert np.isfinite(mine).all()
        error = np.linalg.norm(mine - wanted) / max(np.linalg.norm(wanted), 1e-30)
        assert error <= bound, error


PROMPTS = [
    ([1], [1], 1, 1, 8),
    ([5, 0, 70], [5, 3, 70], 4, 2, 64),
    ([33, 3], [97, 200], 3, 1, 80),
    ([65], [65], 2, 2, 128),
    ([2, 17], [129, 64], 4, 1, 256),
]
DECODES = [
    ([1], [1], 1, 1, 8),
    ([1, 1, 0], [64, 65, 9], 8, 2, 64),
    ([1, 4], [300, 513], 4, 1, 80),
    ([2], [260], 16, 2, 128),
    ([1], [193], 3, 3, 256),
]


@pytest.mark.parametrize("kernel", ["prompt", "split"])
def test_less_shared_memory_gives_the_same_bits(kernels, kernel):
    run = getattr(kernels, f"host_{kernel}_attention")
    for sizes in (PROMPTS if kernel == "prompt" else DECODES)[3:]:
        c = case(*sizes)
        whole = call(run, c)
        for shared in (163, 99):  # A100, the other chips of Ampere
            with limited(shared * 1024, major=8):
                for got, expected in zip(call(run, c), whole, strict=True):
                    assert (got == expected).all()


@pytest.mark.parametrize("rule", [CAUSAL, Rule(window=1), Rule(window=70)], ids=str)
@pytest.mark.parametrize("sizes", PROMPTS, ids=str)
def test_prompt_matches_formula(kernels, sizes, rule):
    c = case(*sizes, seed=sizes[-1])
    close(call(kernels.host_prompt_attention, c, rule=rule), formula(c, rule=rule))


HOPPER_PROMPTS = [
    ([1], [1], 1, 1, 64),
    ([5, 0, 170], [5, 3, 170], 4, 2, 64),
    ([2, 17], [129, 64], 4, 1, 128),
    ([140, 3], [450, 700], 2, 2, 128),  # more pages than the stages hold, rows of two blocks
]


@pytest.mark.parametrize("rule", [CAUSAL, Rule(window=1), Rule(window=70)], ids=str)
@pytest.mark.parametrize("sizes", HOPPER_PROMPTS, ids=str)
def test_wgmma_matches_formula(kernels, sizes, rule):
    c = case(*sizes, seed=sizes[-1])
    close(call(kernels.host_wgmma_attention, c, rule=rule), formula(c, rule=rule))


@pytest.mark.parametrize("rule", [CAUSAL, Rule(window=1), Rule(window=70)], ids=str)
@pytest.mark.parametrize("sizes", DECODES, ids=str)
def test_split_matches_formula(kernels, sizes, rule):
    c = case(*sizes, seed=sizes[-1])
    for split_blocks in (1, 2, 9):
        got = call(kernels.host_split_attention, c, rule=rule, split_blocks=split_blocks)
        close(got, formula(c, rule=rule))


@pytest.mark.parametrize("rule", [CAUSAL, Rule(window=1), Rule(window=70)], ids=str)
def test_plain_matches_formula(kernels, rule):
    for heads, kv_heads, head_size in ((3, 1, 8), (4, 2, 80), (2, 2, 250)):
        c = case([1, 0, 3], [70, 4, 3], heads, kv_heads, head_size, dtype=np.float32)
        close(call(kernels.host_plain_attention, c, rule=rule), formula(c, rule=rule), 1e-6)


RULES = [
    Rule(sinks=3, window=5),
    Rule(sinks=100, window=40),
    Rule(prefix=(130, 0)),
    Rule(prefix=(200, 60), window=20, sinks=1),
    Rule(causal=False),
    Rule(causal=False, window=9),
    Rule(causal=False, window=30, sinks=70),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kernel", ["prompt", "wgmma", "split", "plain"])
def test_rules_of_what_is_seen(kernels, kernel, rule):
    dtype, bound = (np.float32, 1e-6) if kernel == "plain" else (bfloat16, 4e-3)
    queries = [90, 2] if kernel in ("prompt", "wgmma") else [7, 2]
    c = case(queries, [330, 61], 2, 1, 64 if kernel == "wgmma" else 32, dtype=dtype)
    for split_blocks in (1, 4) if kernel == "split" else (1,):
        got = call(getattr(kernels, f"host_{kernel}_attention"), c, rule=rule, split_blocks=split_blocks)
        close(got, formula(c, rule=rule), bound)


@pytest.mark.parametrize("kernel", ["prompt", "wgmma", "split", "plain"])
def test_a_query_that_sees_no_key_gives_zero(kernels, kernel):
    dtype = np.float32 if kernel == "plain" else bfloat16
    for causal in (True, False):
        c = case([1, 3], [70, 0], 2, 1, 64 if kernel == "wgmma" else 16, dtype=dtype)
        out, lse = call(getattr(kernels, f"host_{kernel}_attention"), c, rule=Rule(causal=causal))
        assert (out[1:] == 0).all()
        assert np.isneginf(lse[1:]).all()
        assert np.isfinite(lse[:1]).all()


@pytest.mark.parametrize("kernel", ["prompt", "wgmma", "split", "plain"])
def test_biases_slopes_and_caps_of_scores(kernels, kernel):
    dtype, bound = (np.float32, 1e-6) if kernel == "plain" else (bfloat16, 4e-3)
    c = case([70, 1] if kernel in ("prompt", "wgmma") else [3, 1], [200, 61], 4, 2, 64, dtype=dtype)
    rng = np.random.default_rng(0)
    bias, slopes = rng.standard_normal((4, 2 * 20 + 1)).astype("f4"), np.array([0.5, 0.25, 0.1, 0.0], "f4")
    for scores in (Scores(bias), Scores(slopes=slopes), Scores(softcap=2.0), Scores(bias, slopes, 5.0)):
        for rule in (CAUSAL, Rule(causal=False, window=50)):
            got = call(getattr(kernels, f"host_{kernel}_attention"), c, rule=rule, scores=scores)
            close(got, formula(c, rule=rule, scores=scores), bound)


@pytest.mark.parametrize("kernel", ["prompt", "wgmma", "split"])
def test_queries_and_results_in_float32(kernels, kernel):
    c = case([1, 2], [70, 200], 4, 2, 128 if kernel == "wgmma" else 80)
    exact = call(getattr(kernels, f"host_{kernel}_attention"), c, out_dtype=np.float32)[0]
    rounded = call(getattr(kernels, f"host_{kernel}_attention"), c)[0]
    assert (rounded == exact.astype("f4").astype(bfloat16).astype("f8")).all()
    c.q = as_aligned(c.q.astype("f4"))
    assert (call(getattr(kernels, f"host_{kernel}_attention"), c)[0] == exact).all()


def test_a_sequence_is_the_same_bits_in_any_batch(kernels):
    c = case([1, 1, 1], [70, 300, 150], 4, 2, 64)
    whole = call(kernels.host_split_attention, c)[0]
    for b in range(3):
        one = Case(
            as_aligned(c.q[b : b + 1]), c.keys[b : b + 1], c.values[b : b + 1], c.cache,
            np.array([0, 1], np.int32), c.lengths[b : b + 1].copy(), c.tables[b : b + 1].copy(),
        )  # fmt: skip
        assert (call(kernels.host_split_attention, one)[0][0] == whole[b]).all()


def test_what_a_kernel_cannot_take_is_an_error(kernels):
    def refused(run, heads=4, kv_heads=2, head_size=64, dtype=2, queries=1, split_blocks=1):
        cache = CacheView(0, 1, kv_heads, head_size, dtype)
        return run(
            AttentionArgs(sequences=1, heads=heads, cache=cache, most_queries=queries, split_blocks=split_blocks)
        )

    for run in (kernels.host_prompt_attention, kernels.host_wgmma_attention, kernels.host_split_attention):
        assert refused(run, head_size=100) and refused(run, head_size=264) and refused(run, dtype=0)
        assert refused(run, heads=5) and not refused(run, queries=0)
    assert refused(kernels.host_wgmma_attention, head_size=96)
    with limited(163 * 1024, major=8):
        assert refused(kernels.host_wgmma_attention) == 801  # cudaErrorNotSupported
    assert refused(kernels.host_plain_attention, dtype=2) and refused(kernels.host_plain_attention, heads=5, dtype=0)
    assert refused(kernels.host_split_attention, queries=9) and refused(kernels.host_split_attention, split_blocks=0)

"""Attention that is not causal, with prefixes, windows and sinks, and over keys of another sequence: both ways, against
the formula, and bit equality of every way to cut the work."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from oracle import attention as formulas
from oracle.attention import DTYPES, UNCHANGED, Rule, Scores, put, rounded_queries
from oracle.harness import ISAS, assert_close, at_isa
from test_attention import PAGE, Case, make, multiplies_bf16

from pyllm.ops_training import TrainingOps

POOLS = {threads: TrainingOps(threads) for threads in (1, 2, 3)}
LENGTHS = [17, 1, 300, 600]
RULES = {
    "bidirectional": Rule(causal=False),
    "prefix": Rule(prefix=(5, 1, 70, 301)),
    "two-sided": Rule(causal=False, window=40),
    "sinks": Rule(window=33, sinks=4),
    "far-sinks": Rule(window=20, sinks=70),
    "two-sided-sinks": Rule(causal=False, window=9, sinks=3),
    "all": Rule(prefix=(17, 0, 129, 64), window=100, sinks=2),
}


def arguments(rule: Rule, sequences: list[int]) -> dict[str, Any]:
    """The rule as the kernel takes it, for a batch of these sequences."""
    prefix = None if rule.prefix is None else np.array([rule.prefix[b] for b in sequences], np.int32)
    return {"causal": rule.causal, "prefix": prefix, "window": rule.window, "sinks": rule.sinks}


def attend(case: Case, ops: TrainingOps, rule: Rule, *ranges: tuple[int, int, int], **more: Any) -> np.ndarray:
    q, starts, lengths, tables = case.rows(*ranges)
    size = case.head_size
    given = arguments(rule, [b for b, _, _ in ranges]) | more
    return ops.attention(q, case.cache, starts, lengths, tables, head_size=size, scale=size**-0.5, **given)


def formula(
    case: Case,
    rule: Rule,
    dots: bool,
    *ranges: tuple[int, int, int],
    dtype: type = np.float64,
    scores: Scores = UNCHANGED,
) -> np.ndarray:
    q = np.concatenate([case.queries[b][i:j] for b, i, j in ranges])
    scale = case.head_size**-0.5
    q = rounded_queries(q, scale, case.cache.dtype, dots).astype(dtype)
    if rule.prefix is not None:
        rule = replace(rule, prefix=tuple(rule.prefix[b] for b, _, _ in ranges))
    starts = np.cumsum([0] + [j - i for _, i, j in ranges])
    keys, values = ([part[b][:j] for b, _, j in ranges] for part in (case.keys, case.values))
    return formulas.attention(q, keys, values, starts, scale, rule, scores).reshape(len(q), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_matches_formula(name: str, dtype: np.dtype) -> None:
    rule = RULES[name]
    case = make(LENGTHS, 6, 2, 24, dtype, seed=len(name))
    whole = [(b, 0, n) for b, n in enumerate(LENGTHS)]
    for dots in sorted({multiplies_bf16(isa) for isa in ISAS}):
        oracle, naive = (formula(case, rule, dots, *whole, dtype=d) for d in (np.float64, np.float32))
        allowed = 2 * float(np.abs(naive - oracle).max()) + 4 * 2**-23 * float(np.abs(oracle).max())
        for isa in ISAS:
            if multiplies_bf16(isa) == dots:
                with at_isa(isa):
                    actual = attend(case, POOLS[2], rule, *whole)
                assert np.abs(actual - oracle).max() <= allowed + case.weight_error(dots)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_same_bits_however_it_is_cut(isa: str, dtype: np.dtype, name: str) -> None:
    """Company and threads change nothing; nor does decoding, or a chunk, where attention is causal."""
    rule, n = RULES[name], LENGTHS[3]
    case = make(LENGTHS, 4, 2, 33, dtype)
    with at_isa(isa):
        whole = attend(case, POOLS[1], rule, (3, 0, n))
        for ops in POOLS.values():
            company = attend(case, ops, rule, (0, 0, 17), (3, 0, n), (1, 0, 1))
            assert company[17 : 17 + n].tobytes() == whole.tobytes()
            if not rule.causal:
                continue
            first = rule.prefix[3] if rule.prefix else 1
            cuts = [0, first, *range(first + 97, n, 97), n]
            parts = [attend(case, ops, rule, (3, i, j)) for i, j in pairwise(cuts)]
            assert np.concatenate(parts).tobytes() == whole.tobytes()
            for at in (first, 420, n - 1):
                assert attend(case, ops, rule, (3, at, at + 1)).tobytes() == whole[at : at + 1].tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_are_not_read(isa: str, dtype: np.dtype) -> None:
    """Between sinks and window nothing is read: infinite and undefined keys there, and blocks that are gone."""
    rule = Rule(window=50, sinks=4)
    case = make([600], 4, 2, 32, dtype)
    with at_isa(isa):
        before = attend(case, POOLS[2], rule, (0, 560, 600))
        for place in (4, 63, 450, 510):
            poison = np.full((2, 32), np.inf if place % 2 else np.nan, np.float32)
            put(case.cache, int(case.tables[0, place // PAGE]) * PAGE + place % PAGE, poison, poison)
        case.tables[0, 1:7] = -1
        assert attend(case, POOLS[2], rule, (0, 560, 600)).tobytes() == before.tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_prefix_is_read_at_replay(isa: str) -> None:
    case = make(LENGTHS, 4, 2, 16, DTYPES[0])
    ops = TrainingOps(2)
    ranges = [(0, 0, 17), (2, 0, 300)]
    q, starts, lengths, tables = case.rows(*ranges)
    prefix = np.zeros(2, np.int32)
    with at_isa(isa):
        ops.begin_recording()
        out = ops.attention(q, case.cache, starts, lengths, tables, head_size=16, scale=0.25, prefix=prefix)
        graph = ops.end_recording()
        for values in ((0, 0), (17, 3), (1, 300)):
            prefix[:] = values
            ops.replay(graph)
            assert out.tobytes() == attend(case, POOLS[1], Rule(), *ranges, prefix=prefix.copy()).tobytes()
    prefix[0] = 18
    with pytest.raises(ValueError, match=r"prefix\[0\]: expected from 0 to 17, the keys in the cache, got 18"):
        ops.replay(graph)


def gradients(case: Case, ops: TrainingOps, q: np.ndarray, dout: np.ndarray, batch: tuple, rule: Rule) -> tuple:
    """dq, dk, dv, out, lse of a batch (starts, lengths, tables)."""
    settings: dict[str, Any] = {"head_size": case.head_size, "scale": case.head_size**-0.5}
    settings |= arguments(rule, list(range(len(batch[1]))))
    lse = np.full((len(q), case.queries[0].shape[1]), np.nan, np.float32)
    out = ops.attention(q, case.cache, *batch, lse=lse, **settings)
    return *ops.attention_backward(dout, out, q, case.cache, lse, *batch, **settings), out, lse


def check_gradients(case: Case, q: np.ndarray, starts: np.ndarray, rule: Rule, isa: str) -> None:
    rng = np.random.default_rng(5)
    heads, size = case.queries[0].shape[1:]
    dout = rng.normal(size=q.shape).astype(np.float32)
    lengths = np.array([len(k) for k in case.keys], np.int32)
    batch = starts, lengths, case.tables
    with at_isa(isa):
        actual = gradients(case, POOLS[1], q, dout, batch, rule)
        for ops in (POOLS[2], POOLS[3]):
            again = gradients(case, ops, q, dout, batch, rule)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(actual, again, strict=True))
    shaped = [a.reshape(-1, heads, size) for a in (dout, q)]
    oracle, naive = (
        formulas.attention_backward(*(a.astype(d) for a in shaped), case.keys, case.values, starts, size**-0.5, rule)
        for d in (np.float64, np.float32)
    )
    for a, exact, usual in zip(actual, oracle, naive, strict=True):
        seen = np.isfinite(exact)
        assert np.array_equal(np.isfinite(a).reshape(exact.shape), seen)
        assert_close(a.reshape(exact.shape)[seen], exact[seen], usual[seen])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", RULES)
def test_gradients_match_formula(isa: str, name: str) -> None:
    """From the forward pass to the gradients."""
    case = make([17, 1, 300, 320], 4, 2, 20, DTYPES[0], seed=len(name))
    q, starts, _, _ = case.rows(*[(b, 0, len(k)) for b, k in enumerate(case.keys)])
    check_gradients(case, q, starts, RULES[name], isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [(3, 70, 0, 300), (1, 0, 65, 5)])
def test_cross_attention(isa: str, rows: tuple[int, ...]) -> None:
    """Queries of other lengths than the keys, which may number zero: then the result and its gradient are 0."""
    case = make([90, 1, 270, 0], 4, 2, 24, DTYPES[0])
    rng = np.random.default_rng(1)
    starts = np.cumsum([0, *rows]).astype(np.int32)
    q = rng.normal(size=(starts[-1], 4 * 24)).astype(np.float32)
    check_gradients(case, q, starts, Rule(causal=False), isa)
    with at_isa(isa):
        lengths = np.array([90, 1, 270, 0], np.int32)
        settings: dict[str, Any] = {"head_size": 24, "scale": 24**-0.5, "causal": False}
        out = POOLS[2].attention(q, case.cache, starts, lengths, case.tables, **settings)
        assert not out[starts[3] :].any()
        for b in range(4):  # each sequence by itself, row by row
            for row in range(starts[b], starts[b + 1], 13):
                one = np.array([0, 1], np.int32), lengths[b : b + 1], case.tables[b : b + 1]
                alone = POOLS[3].attention(q[row : row + 1], case.cache, *one, **settings)
                assert alone.tobytes() == out[row : row + 1].tobytes()


def test_refuses_bad_rules() -> None:
    case = make([70, 5], 4, 2, 8, DTYPES[0])
    q, starts, lengths, tables = case.rows((0, 68, 70), (1, 4, 5))
    i32 = lambda *a: np.array(a, np.int32)  # noqa: E731
    for rule, message in (
        ({"prefix": i32(71, 5)}, r"prefix\[0\]: expected from 0 to 70, the keys in the cache, got 71"),
        ({"prefix": i32(70, -1)}, r"prefix\[1\]: expected from 0 to 5"),
        ({"prefix": i32(1)}, r"prefix: expected int32\[2\]"),
        ({"prefix": i32(1, 1), "causal": False}, "prefix: expected None where attention is not causal"),
        ({"sinks": 4}, "sinks: expected 0 without a window"),
        ({"sinks": -1, "window": 5}, "sinks: expected >= 0, got -1"),
        ({"window": -2, "causal": False}, "window: expected >= 0, got -2"),
    ):
        with pytest.raises(ValueError, match=message):
            POOLS[1].attention(q, case.cache, starts, lengths, tables, head_size=8, scale=1.0, **rule)  # type: ignore[arg-type]
    few = i32(1, 5)
    with pytest.raises(ValueError, match=r"lengths\[0\]: expected from 2, the rows of the sequence"):
        POOLS[1].attention(q, case.cache, starts, few, tables, head_size=8, scale=1.0, causal=False, window=3)
    POOLS[1].attention(q, case.cache, starts, few, tables, head_size=8, scale=1.0, causal=False)

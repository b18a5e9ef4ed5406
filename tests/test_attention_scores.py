"""Biases and soft caps of attention scores: both ways, against the formula, at every dtype of the cache and every way
to cut the work; and the numbers that families' biases are made of."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from oracle import attention as formulas
from oracle import dropout
from oracle.attention import DTYPES, PAGE, Rule, Scores, put
from oracle.harness import ISAS, assert_close, at_isa
from test_attention import Case, make, multiplies_bf16
from test_attention_rules import arguments, attend, formula

from pyllm.errors import ConfigError
from pyllm.ops_training import TrainingOps
from pyllm.position_bias import Alibi, Buckets

POOLS = {threads: TrainingOps(threads) for threads in (1, 2, 3)}
LENGTHS = [17, 1, 300, 600]
HEADS, GROUPS = 6, 2
RNG = np.random.default_rng(41)


def biases(reach: int, heads: int = HEADS) -> np.ndarray:
    return RNG.normal(size=(heads, 2 * reach + 1)).astype(np.float32)


SCORES = {
    "bias": Scores(bias=biases(10)),
    "wide-bias": Scores(bias=biases(150)),
    "bias-of-all": Scores(bias=biases(0)),
    "slopes": Scores(slopes=Alibi().slopes(HEADS)),
    "softcap": Scores(softcap=3.0),
    "all": Scores(biases(33), Alibi(4.0).slopes(HEADS), 8.0),
}
RULES = {"causal": Rule(), "bidirectional": Rule(causal=False), "window": Rule(window=50, sinks=3)}
CASES = [*((name, "causal") for name in SCORES), ("bias", "bidirectional"), ("all", "bidirectional"), ("all", "window")]


def given(scores: Scores) -> dict[str, Any]:
    return {"bias": scores.bias, "slopes": scores.slopes, "softcap": scores.softcap}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_matches_formula(name: str, rule: str, dtype: np.dtype) -> None:
    scores, seen = SCORES[name], RULES[rule]
    case = make(LENGTHS[:3], HEADS, GROUPS, 24, dtype, seed=len(name))
    whole = [(b, 0, n) for b, n in enumerate(LENGTHS[:3])]
    for dots in sorted({multiplies_bf16(isa) for isa in ISAS}):
        oracle, naive = (formula(case, seen, dots, *whole, dtype=d, scores=scores) for d in (np.float64, np.float32))
        allowed = 2 * float(np.abs(naive - oracle).max()) + 4 * 2**-23 * float(np.abs(oracle).max())
        for isa in ISAS:
            if multiplies_bf16(isa) == dots:
                with at_isa(isa):
                    actual = attend(case, POOLS[2], seen, *whole, **given(scores))
                assert np.abs(actual - oracle).max() <= allowed + case.weight_error(dots)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bias", "all"])
def test_same_bits_however_it_is_cut(isa: str, dtype: np.dtype, name: str) -> None:
    """Chunks, single tokens, company and threads change nothing."""
    n, more = LENGTHS[3], given(SCORES[name])
    case = make(LENGTHS, HEADS, GROUPS, 33, dtype)
    with at_isa(isa):
        whole = attend(case, POOLS[1], Rule(), (3, 0, n), **more)
        for ops in POOLS.values():
            company = attend(case, ops, Rule(), (0, 0, 17), (3, 0, n), (1, 0, 1), **more)
            assert company[17 : 17 + n].tobytes() == whole.tobytes()
            parts = [attend(case, ops, Rule(), (3, i, j), **more) for i, j in pairwise([0, *range(97, n, 97), n])]
            assert np.concatenate(parts).tobytes() == whole.tobytes()
            for at in (0, 255, 420, n - 1):
                assert attend(case, ops, Rule(), (3, at, at + 1), **more).tobytes() == whole[at : at + 1].tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_are_not_read(isa: str, dtype: np.dtype) -> None:
    case, more, rule = make([300], HEADS, GROUPS, 32, dtype), given(SCORES["all"]), Rule(window=50, sinks=4)
    with at_isa(isa):
        before = attend(case, POOLS[2], rule, (0, 260, 290), **more)
        for place in (4, 63, 205, 295):
            poison = np.full((GROUPS, 32), np.inf if place % 2 else np.nan, np.float32)
            put(case.cache, int(case.tables[0, place // PAGE]) * PAGE + place % PAGE, poison, poison)
        assert attend(case, POOLS[2], rule, (0, 260, 290), **more).tobytes() == before.tobytes()


def test_formula_is_the_derivative() -> None:
    """The oracle's gradients with all that changes scores, against central differences in float64."""
    starts = np.array([0, 3, 8])
    q, dout = (RNG.normal(size=(8, 2, 5)) for _ in range(2))
    keys, values = ([RNG.normal(size=(n, 1, 5)) for n in (3, 5)] for _ in range(2))
    bias = RNG.normal(size=(2, 5))

    def run() -> tuple[np.ndarray, ...]:
        scores = Scores(bias, np.array([0.5, 0.1]), 1.5)
        return formulas.attention_backward(dout, q, keys, values, starts, 0.4, Rule(), scores=scores)

    dq, dk, _, _, _, dbias = run()
    for array, gradient in ((q, dq), (keys[0], dk[:3]), (bias, dbias)):
        for at in np.ndindex(*array.shape):
            before, step = array[at], 1e-5
            array[at] = before + step
            above = (run()[3] * dout).sum()
            array[at] = before - step
            below = (run()[3] * dout).sum()
            array[at] = before
            assert abs((above - below) / (2 * step) - gradient[at]) < 1e-8


def gradients(case: Case, ops: TrainingOps, scores: Scores, rule: Rule, dout: np.ndarray, **more: Any) -> tuple:
    """dq, dk, dv, out, lse and dbias, if any, of whole sequences."""
    q, starts, lengths, tables = case.rows(*[(b, 0, len(k)) for b, k in enumerate(case.keys)])
    size = case.head_size
    settings = {"head_size": size, "scale": size**-0.5, **arguments(rule, list(range(len(lengths)))), **given(scores)}
    lse = np.full((len(q), case.queries[0].shape[1]), np.nan, np.float32)
    batch = starts, lengths, tables
    out = ops.attention(q, case.cache, *batch, lse=lse, **settings, **more)
    dbias = None if scores.bias is None else np.full_like(scores.bias, np.nan)
    found = ops.attention_backward(dout, out, q, case.cache, lse, *batch, dbias=dbias, **settings, **more)
    return (*found, out, lse) if dbias is None else (*found, out, lse, dbias)


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_gradients_match_formula(name: str, rule: str) -> None:
    """At every level, and with the same bits for any number of threads."""
    scores, seen = SCORES[name], RULES[rule]
    case = make([17, 1, 300], HEADS, GROUPS, 20, DTYPES[0], seed=len(name))
    dout = RNG.normal(size=(318, HEADS * 20)).astype(np.float32)
    shaped = dout.reshape(-1, HEADS, 20), np.concatenate(case.queries)
    starts = np.cumsum([0, 17, 1, 300])
    oracle, naive = (
        formulas.attention_backward(
            *(a.astype(d) for a in shaped), case.keys, case.values, starts, 20**-0.5, seen, scores=scores
        )
        for d in (np.float64, np.float32)
    )
    for isa in ISAS:
        with at_isa(isa):
            actual = gradients(case, POOLS[1], scores, seen, dout)
            for ops in (POOLS[2], POOLS[3]):
                again = gradients(case, ops, scores, seen, dout)
                assert all(a.tobytes() == b.tobytes() for a, b in zip(actual, again, strict=True))
        for a, exact, usual in zip(actual, oracle, naive, strict=True):
            assert_close(a.reshape(exact.shape), exact, usual)


@pytest.mark.parametrize("isa", ISAS)
def test_with_dropout(isa: str) -> None:
    """Dropped weights have no gradient, and scores are those of the softmax before."""
    seed, rate, site = np.array([77], np.uint64), 0.3, 2
    case = make([70, 33], HEADS, GROUPS, 16, DTYPES[0])
    dout = RNG.normal(size=(103, HEADS * 16)).astype(np.float32)
    with at_isa(isa):
        actual = gradients(case, POOLS[2], SCORES["all"], Rule(), dout, dropout=(rate, seed, site))

    def factors(row: int, head: int, n: int) -> np.ndarray:
        return dropout.kept(rate, int(seed[0]), site, row, n, head + 1) / (1 - rate)

    shaped = dout.reshape(-1, HEADS, 16), np.concatenate(case.queries)
    oracle, naive = (
        formulas.attention_backward(
            *(a.astype(d) for a in shaped), case.keys, case.values, np.cumsum([0, 70, 33]), 0.25, Rule(), factors,
            scores=SCORES["all"],
        )
        for d in (np.float64, np.float32)
    )  # fmt: skip
    for a, exact, usual in zip(actual, oracle, naive, strict=True):
        assert_close(a.reshape(exact.shape), exact, usual)


def test_gradient_of_the_bias_is_added_to() -> None:
    case = make([70], HEADS, GROUPS, 16, DTYPES[0])
    q, starts, lengths, tables = case.rows((0, 0, 70))
    bias = biases(5)
    lse, dbias = np.zeros((70, HEADS), np.float32), np.full_like(bias, np.nan)
    settings: dict[str, Any] = {"head_size": 16, "scale": 0.25, "bias": bias}
    out = POOLS[2].attention(q, case.cache, starts, lengths, tables, lse=lse, **settings)
    batch = out, out, q, case.cache, lse, starts, lengths, tables
    POOLS[2].attention_backward(*batch, dbias=dbias, **settings)
    once = dbias.copy()
    POOLS[2].attention_backward(*batch, dbias=dbias, add_dbias=True, **settings)
    assert np.array_equal(dbias, once + once)


def test_refuses_bad_arguments() -> None:
    case = make([70, 5], 4, 2, 8, DTYPES[0])
    q, starts, lengths, tables = case.rows((0, 68, 70), (1, 4, 5))
    for changed, message in (
        ({"bias": biases(3, 3)}, r"bias: expected float32\[4, any\], got float32\[3, 7\]"),
        ({"bias": biases(3, 4)[:, :6].copy()}, "bias: expected an odd number of columns, .* got 6"),
        ({"slopes": np.ones(3, np.float32)}, r"slopes: expected float32\[4\]"),
        ({"softcap": 0.0}, "softcap: expected a finite number above 0, or None, got 0"),
        ({"softcap": math.inf}, "softcap: expected a finite number above 0"),
        ({"slopes": np.ones(4, np.float32), "causal": False, "lengths": np.array([1, 5], np.int32)},
         r"lengths\[0\]: expected from 2, the rows of the sequence"),
    ):  # fmt: skip
        batch = {"lengths": lengths, **changed}
        with pytest.raises(ValueError, match=message):
            POOLS[1].attention(q, case.cache, starts, tables=tables, head_size=8, scale=1.0, **batch)
    lse, dout = np.zeros((3, 4), np.float32), np.zeros_like(q)
    with pytest.raises(ValueError, match="dbias: expected None, as there is no bias"):
        POOLS[1].attention_backward(
            dout, dout, q, case.cache, lse, starts, lengths, tables, head_size=8, scale=1.0, dbias=biases(3, 4)
        )


# The numbers


def test_alibi_slopes() -> None:
    """Powers of two begin at the half, or where 8 is not the largest bias at its root; others are put in between."""
    assert Alibi().slopes(8).tolist() == [2.0**-k for k in range(1, 9)]
    assert Alibi().slopes(1).tolist() == [2.0**-8]
    assert np.allclose(Alibi(4.0).slopes(16), [2 ** (-k / 4) for k in range(1, 17)])
    twelve = Alibi().slopes(12)
    assert np.array_equal(twelve[:8], Alibi().slopes(8))
    assert np.array_equal(twelve[8:], Alibi().slopes(16)[0:8:2])
    with pytest.raises(ConfigError, match="ALiBi's largest bias"):
        Alibi(0.0)


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (16, 64), (8, 20)])
@pytest.mark.parametrize("two_sided", [False, True])
def test_buckets(count: int, farthest: int, two_sided: bool) -> None:
    found = Buckets(count, farthest).of_distances(two_sided)
    assert found.dtype == np.int32
    assert len(found) == 2 * farthest + 1
    for distance, bucket in zip(range(-farthest, farthest + 1), found.tolist(), strict=True):
        side, later = (count // 2, distance > 0) if two_sided else (count, False)
        far = abs(distance) if two_sided else max(-distance, 0)
        exact = side // 2
        if far >= exact:
            far = min(side - 1, exact + int(math.log(far / exact) / math.log(farthest / exact) * (side - exact)))
        assert bucket == far + later * side, distance


def test_bad_buckets() -> None:
    with pytest.raises(ConfigError, match="buckets of distances"):
        Buckets(3)
    with pytest.raises(ConfigError, match="largest distance of a bucket"):
        Buckets(32, 16)

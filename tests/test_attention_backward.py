"""Gradients of attention against their formula, and bit equality of every way to compute them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from oracle import attention as formulas
from oracle import dropout
from oracle.attention import BF16, PAGE, put
from oracle.harness import ISAS, Framed, assert_close, at_isa
from test_attention import SIZES, Case, make, multiplies_bf16

from pyllm.ops import Dropout
from pyllm.ops_training import TrainingOps

POOLS = {threads: TrainingOps(threads) for threads in (1, 2, 3)}
DTYPES = [np.dtype(np.float32), BF16]
RNG = np.random.default_rng(17)
SEED = np.array([0x1234567890ABCDEF], np.uint64)


def assert_log_sums(rounds: bool, lse: np.ndarray, oracle: np.ndarray, naive: np.ndarray) -> None:
    """Weights that are rounded to bfloat16 come from a polynomial that is 1e-4 off."""
    if rounds:
        assert np.abs(lse - oracle).max() <= 1.1e-4
    else:
        assert_close(lse, oracle, naive)


class Whole:
    """All sequences of a case, each from its first row to its last, and a random cotangent."""

    def __init__(
        self, case: Case, isa: str, window: int = 0, dropout: Dropout | None = None, dots: bool | None = None
    ) -> None:
        """`dots` says whether a bfloat16 cache is multiplied as such, which is the machine's choice if None."""
        self.case, self.window, self.dropout = case, window, dropout
        self.q, self.starts, self.lengths, self.tables = case.rows(*[(b, 0, len(k)) for b, k in enumerate(case.keys)])
        self.heads, self.size = case.queries[0].shape[1:]
        self.dout = RNG.normal(size=self.q.shape).astype(np.float32)
        self.dots = dots
        rounds = multiplies_bf16(isa) if dots is None else dots and isa.endswith("bf16")
        self.rounds = case.cache.dtype == BF16 and rounds
        self.known: dict[object, tuple[object, tuple[np.ndarray, ...]]] = {}  # results, with what was given

    def formula(self, dtype: type, given: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, ...]:
        """dq, dk, dv, out, lse; of queries as the kernel rounds them. Computed once."""
        key = dtype, given and (id(given[0]), id(given[1]))
        if key not in self.known:
            self.known[key] = given, self.compute(dtype, given)
        return self.known[key][1]

    def compute(self, dtype: type, given: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, ...]:
        shape = len(self.q), self.heads, self.size
        q = formulas.rounded_queries(self.q.reshape(shape), self.size**-0.5, self.case.cache.dtype, self.rounds)
        if given is not None:
            given = given[0].reshape(shape), given[1]
        arguments = self.dout.reshape(shape).astype(dtype), q.astype(dtype), self.case.keys, self.case.values
        factors = self.factors() if self.dropout else None
        results = formulas.attention_backward(
            *arguments, self.starts, self.size**-0.5, formulas.Rule(window=self.window), factors, given
        )
        return tuple(a.reshape(len(q), -1) for a in results)

    def assert_gradients(self, actual: tuple[np.ndarray, ...], out: np.ndarray, lse: np.ndarray) -> None:
        """Within the tolerance of all kernels of the formula, the naive version being given the same out and lse.

        Where the naive version is exact by luck: dout v and delta, of which gradients take the difference, and scores
        are wrong by about half a unit in the last place of the products of their norms. That difference, which a wrong
        score is multiplied with, is smaller than the norms by the root of the head size.
        """
        oracle, naive = self.formula(np.float64), self.formula(np.float32, (out, lse))
        norm = lambda parts: max(float(np.linalg.norm(a, axis=-1).max()) for a in parts)  # noqa: E731
        largest = lambda parts: max(float(np.abs(a).max()) for a in parts)  # noqa: E731
        case, scale, dout = self.case, self.size**-0.5, [self.dout.reshape(-1, self.heads, self.size)]
        score = norm(case.queries) * norm(case.keys) * scale
        spread = norm(dout) * norm(case.values) * scale * max(1, score * scale)
        floors = spread * largest(case.keys), spread * largest(case.queries), score * largest(dout)
        if self.dropout is not None:
            floors = tuple(f / (1 - self.dropout[0]) for f in floors)
        for name, a, exact, usual, floor in zip(("dq", "dk", "dv"), actual, oracle, naive, floors, strict=False):
            assert np.isfinite(a).all()
            error = float(np.abs(a - exact).max())
            allowed = 2 * max(float(np.abs(usual - exact).max()), 2**-24 * floor)
            allowed += 4 * 2**-23 * float(np.abs(exact).max())
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"

    def factors(self) -> Callable[[int, int, int], np.ndarray]:
        assert self.dropout is not None
        rate, seed, site = self.dropout
        return lambda row, head, n: dropout.kept(rate, int(seed[0]), site, row, n, head + 1) / (1 - rate)

    def forward(self, ops: TrainingOps) -> tuple[np.ndarray, np.ndarray]:
        lse = np.full((len(self.q), self.heads), np.nan, np.float32)
        out = ops.empty(*self.q.shape)
        ops.context.attention(out, self.q, self.case.cache, *self.settings(), lse, self.dropout, self.dots)
        return out, lse

    def backward(self, ops: TrainingOps, out: np.ndarray, lse: np.ndarray) -> tuple[np.ndarray, ...]:
        width = self.case.cache.shape[1] * self.size
        gradients = ops.empty(*self.q.shape), ops.empty(len(self.q), width), ops.empty(len(self.q), width)
        inputs = self.dout, out, self.q, self.case.cache, lse
        ops.context.attention_backward(*gradients, *inputs, *self.settings(), self.dropout, self.dots)
        return gradients

    def settings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, float, int]:
        return self.starts, self.lengths, self.tables, self.size, self.size**-0.5, self.window


def same_bits(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def test_formula_is_the_derivative() -> None:
    """The oracle's gradients against central differences of its own forward pass, in float64."""
    rng = np.random.default_rng(3)
    starts = np.array([0, 3, 8])
    q, dout = (rng.normal(size=(8, 4, 5)) for _ in range(2))
    keys, values = ([rng.normal(size=(n, 2, 5)) for n in (3, 5)] for _ in range(2))
    mask = {(t, h): rng.uniform(size=8) < 0.7 for t in range(8) for h in range(4)}

    def run() -> tuple[np.ndarray, ...]:
        return formulas.attention_backward(
            dout, q, keys, values, starts, 0.4, formulas.Rule(window=3), lambda t, h, n: mask[t, h][:n] / 0.7
        )

    dq, dk, dv, _, _ = run()
    gradients = [
        (q, dq),
        *[(a, d[s:e]) for part, d in ((keys, dk), (values, dv)) for a, s, e in zip(part, (0, 3), (3, 8), strict=True)],
    ]
    for array, gradient in gradients:
        for at in np.ndindex(*array.shape):
            before, step = array[at], 1e-5
            array[at] = before + step
            above = (run()[3] * dout).sum()
            array[at] = before - step
            below = (run()[3] * dout).sum()
            array[at] = before
            assert abs((above - below) / (2 * step) - gradient[at]) < 1e-8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_match_formula(dtype: np.dtype, size: int) -> None:
    """Given out and lse, the gradients of ragged sequences, in guarded and misaligned slices of wider arrays."""
    heads, groups = 6, 2
    case = make([17, 65, 300, 64, 1], heads, groups, size, dtype, seed=size)
    for window in (0, 1, 30, 257):
        wholes: dict[bool, tuple[Whole, np.ndarray, np.ndarray]] = {}  # by what the formula depends on
        for isa in ISAS:
            whole = Whole(case, isa, window)
            if whole.rounds not in wholes:
                wholes[whole.rounds] = whole, *(a.astype(np.float32) for a in whole.formula(np.float64)[3:])
            whole, out, lse = wholes[whole.rounds]
            width = groups * size
            fused = Framed(np.zeros((len(out), (heads + 2 * groups) * size), np.float32), offset=size % 9)
            dq, dk, dv = np.split(fused.array, [heads * size, heads * size + width], axis=1)
            inputs = [Framed(a, offset=1 + i, gap=5 - i).array for i, a in enumerate((whole.dout, out, whole.q))]
            with at_isa(isa):
                POOLS[2].attention_backward(
                    *inputs,
                    case.cache,
                    lse,
                    whole.starts,
                    whole.lengths,
                    whole.tables,
                    head_size=size,
                    scale=size**-0.5,
                    window=window,
                    gradients=(dq, dk, dv),
                )
            fused.check()
            whole.assert_gradients((dq, dk, dv), out, lse)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (7, 7), (8, 2), (7, 1), (12, 4)])
def test_gradients_match_formula_for_lengths(isa: str, heads: int, groups: int) -> None:
    """From the forward pass to the gradients; lse is that of the formula."""
    case = make([1, 15, 16, 63, 64, 65, 255, 256, 257, 700], heads, groups, 16, DTYPES[0], seed=heads)
    for window in (0, 100):
        whole = Whole(case, isa, window)
        with at_isa(isa):
            out, lse = whole.forward(POOLS[2])
            gradients = whole.backward(POOLS[2], out, lse)
        oracle, naive = whole.formula(np.float64), whole.formula(np.float32)
        assert_close(lse, oracle[4], naive[4])
        whole.assert_gradients(gradients, out, lse)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dots", [False, True])
def test_bfloat16_pass(isa: str, dots: bool) -> None:
    """Forward and backward over a bfloat16 cache: where weights are rounded, out and so gradients are off by 2^-8."""
    whole = Whole(make([200, 64, 7], 4, 2, 48, BF16), isa, dots=dots)
    with at_isa(isa):
        out, lse = whole.forward(POOLS[2])
        gradients = whole.backward(POOLS[2], out, lse)
    oracle, naive = whole.formula(np.float64), whole.formula(np.float32)
    assert_log_sums(whole.rounds, lse, oracle[4], naive[4])
    if not whole.rounds:
        return whole.assert_gradients(gradients, out, lse)
    for actual, exact in zip(gradients, oracle, strict=False):
        assert np.abs(actual - exact).max() <= 2**-8 * np.abs(exact).max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "dots"), [(DTYPES[0], False), (BF16, False), (BF16, True)], ids=str)
def test_dropout(isa: str, dtype: np.dtype, dots: bool) -> None:
    """Forward and backward drop the same weights, those of the generator's description."""
    case = make([300, 65, 1], 4, 2, 24, dtype)
    whole = Whole(case, isa, 0, (0.3, SEED, 5), dots)
    oracle, naive = whole.formula(np.float64), whole.formula(np.float32)
    with at_isa(isa):
        out, lse = whole.forward(POOLS[2])
        given = tuple(a.astype(np.float32) for a in oracle[3:])
        gradients = whole.backward(POOLS[2], *given)
        from_forward = whole.backward(POOLS[2], out, lse)
    assert_log_sums(whole.rounds, lse, oracle[4], naive[4])
    if whole.rounds:
        assert np.abs(out - oracle[3]).max() <= 2**-7 * max(np.abs(v).max() for v in case.values)
    else:
        assert_close(out, oracle[3], naive[3])
        whole.assert_gradients(from_forward, out, lse)
    whole.assert_gradients(gradients, *given)


@pytest.mark.parametrize("isa", ISAS)
def test_dropout_over_int8(isa: str) -> None:
    case = make([300, 65, 1], 4, 2, 24, np.dtype(np.int8))
    whole = Whole(case, isa, 0, (0.3, SEED, 5))
    with at_isa(isa):
        out, _ = whole.forward(POOLS[2])
    oracle = whole.formula(np.float64)[3]
    assert np.abs(out - oracle).max() <= case.weight_error(False) / (1 - 0.3)


@pytest.mark.parametrize("isa", ISAS)
def test_dropout_of_split_rows(isa: str) -> None:
    """A long sequence's few rows, whose key blocks go to different threads, drop the same weights as all rows do."""
    case = make([600], 2, 1, 16, DTYPES[0])
    rate, site = 0.2, 1
    with at_isa(isa):
        q, starts, lengths, tables = case.rows((0, 599, 600))
        results = []
        for threads, ops in POOLS.items():
            lse = np.zeros((1, 2), np.float32)
            out = ops.attention(
                q,
                case.cache,
                starts,
                lengths,
                tables,
                head_size=16,
                scale=0.25,
                lse=lse,
                dropout=(rate, SEED, site),
            )
            results.append((out, lse))
            assert same_bits(results[0], results[-1]), threads
    weights = []
    for h in range(2):
        scores = case.keys[0][:, 0].astype(np.float64) @ case.queries[0][599, h] * 0.25
        top = scores.max()
        p = np.exp(scores - top)
        lse_oracle = top + np.log(p.sum())
        assert abs(results[0][1][0, h] - lse_oracle) < 1e-5
        weights.append(p / p.sum() * dropout.kept(rate, int(SEED[0]), site, 0, 600, h + 1) / (1 - rate))
    assert np.abs(results[0][0][0].reshape(2, 16) - np.array(weights) @ case.values[0][:, 0]).max() < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "size", "window"), [(6, 2, 33, 0), (3, 3, 64, 0), (4, 1, 80, 70)])
def test_same_bits_for_threads_graph_and_company(
    isa: str, dtype: np.dtype, heads: int, groups: int, size: int, window: int
) -> None:
    case = make([300, 70, 513], heads, groups, size, dtype, seed=size)
    whole = Whole(case, isa, window)
    with at_isa(isa):
        out, lse = whole.forward(POOLS[1])
        expected = whole.backward(POOLS[1], out, lse)
        for ops in POOLS.values():
            assert same_bits(whole.forward(ops), (out, lse))
            assert same_bits(whole.backward(ops, out, lse), expected)
            ops.begin_recording()
            recorded_out, recorded_lse = whole.forward(ops)
            recorded = whole.backward(ops, recorded_out, recorded_lse)
            graph = ops.end_recording()
            for _ in range(2):
                for a in recorded:
                    a.fill(np.nan)
                ops.replay(graph)
                assert same_bits(recorded, expected)
        at = 0
        for b, n in enumerate((300, 70, 513)):  # each sequence by itself
            rows, at = slice(at, at + n), at + n
            alone = Whole(
                Case(
                    case.keys[b : b + 1],
                    case.values[b : b + 1],
                    case.queries[b : b + 1],
                    case.cache,
                    case.tables[b : b + 1],
                ),
                isa,
                window,
            )
            alone.dout = whole.dout[rows]
            assert same_bits(alone.backward(POOLS[2], out[rows], lse[rows]), tuple(a[rows] for a in expected))


@pytest.mark.parametrize("isa", ISAS)
def test_seed_is_read_at_replay(isa: str) -> None:
    case = make([70], 2, 1, 16, DTYPES[0])
    seed = np.array([1], np.uint64)
    whole = Whole(case, isa, 0, (0.5, seed, 0))
    ops = TrainingOps(2)
    with at_isa(isa):
        ops.begin_recording()
        out, lse = whole.forward(ops)
        recorded = whole.backward(ops, out, lse)
        graph = ops.end_recording()
        for value in (1, 2**63 + 5):
            seed[0] = value
            ops.replay(graph)
            eager = whole.forward(POOLS[1])
            assert same_bits((out, lse), eager)
            assert same_bits(recorded, whole.backward(POOLS[1], *eager))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_beyond_the_rows_are_not_read(isa: str, dtype: np.dtype) -> None:
    """What stands in a page behind a sequence's last row, NaN or infinite, does not get into its gradients."""
    case = make([70], 4, 2, 32, dtype)
    whole = Whole(case, isa)
    with at_isa(isa):
        out, lse = whole.forward(POOLS[2])
        before = whole.backward(POOLS[2], out, lse)
        assert all(np.isfinite(a).all() for a in before)
        for place in range(70, 2 * PAGE):
            poison = np.full((2, 32), np.inf if place % 2 else 3e38, np.float32)
            put(case.cache, int(case.tables[0, place // PAGE]) * PAGE + place % PAGE, poison, poison)
        assert same_bits(whole.backward(POOLS[2], out, lse), before)


def test_nothing_to_do() -> None:
    case = make([5], 2, 1, 8, DTYPES[0])
    none, rows = np.zeros(0, np.int32), np.zeros((0, 16), np.float32)
    gradients = POOLS[2].attention_backward(
        rows,
        rows,
        rows,
        case.cache,
        np.zeros((0, 2), np.float32),
        np.zeros(1, np.int32),
        none,
        np.zeros((0, 4), np.int32),
        head_size=8,
        scale=1.0,
    )
    assert [a.shape for a in gradients] == [(0, 16), (0, 8), (0, 8)]


def test_refuses_bad_arguments() -> None:
    case = make([70, 5], 4, 2, 8, DTYPES[0])
    whole = Whole(case, "avx2")
    out, lse = whole.forward(POOLS[1])
    good = {"dout": whole.dout, "out": out, "q": whole.q, "cache": case.cache, "lse": lse, "starts": whole.starts}
    good |= {"lengths": whole.lengths, "tables": whole.tables, "head_size": 8, "scale": 1.0}

    def call(**changed: object) -> None:
        POOLS[1].attention_backward(**{**good, **changed})  # type: ignore[arg-type]

    call()
    with at_isa("avx2"):
        widest = {"gradients": (out * 0, *np.zeros((2, 75, 16), np.float32)), "window": 2**63 - 1}
        assert same_bits(POOLS[1].attention_backward(**{**good, **widest}), POOLS[1].attention_backward(**good))
    narrow = np.zeros((75, 8), np.float32)
    seed = np.zeros(1, np.uint64)
    fitting = tuple(np.zeros((75, columns), np.float32) for columns in (32, 16, 16))
    for changed, message in (
        (
            {"lengths": whole.lengths + np.int32(1), "gradients": fitting},
            "lengths: expected a sum of 75, the rows of dk",
        ),
        ({"lse": lse[:, :3]}, r"lse: expected float32\[75, 4\], got float32\[75, 3\]"),
        ({"dout": narrow}, r"dout: expected float32\[75, 32\]"),
        ({"out": out[:70]}, r"out: expected float32\[75, 32\]"),
        ({"gradients": (whole.q.copy(), narrow, np.zeros((75, 16), np.float32))}, r"dk: expected float32\[any, 16\]"),
        ({"gradients": (whole.dout, *np.zeros((2, 75, 16), np.float32))}, "dq: expected memory of its own"),
        ({"tables": whole.tables + np.int32(9)}, r"tables\[0\]\[0\]: expected a block"),
        ({"dropout": (1.0, seed, 0)}, "rate: expected at least 0 and below 1"),
        ({"dropout": (float("nan"), seed, 0)}, "rate: expected at least 0"),
        ({"dropout": (0.5, seed, -1)}, "site: expected 0 to"),
        ({"dropout": (0.5, np.zeros(2, np.uint64), 0)}, r"seed: expected uint64\[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changed)
    for changed, message in (
        ({"cache": np.zeros((4, 2, 2, PAGE * 18), np.int8)}, "cache: expected float32 or bfloat16"),
        ({"dropout": (0.5, np.zeros(1, np.int64), 0)}, "seed: expected uint64"),
        ({"dropout": 0.5}, r"dropout: expected \(rate, seed, site\)"),
    ):
        with pytest.raises(TypeError, match=message):
            call(**changed)

"""Attention over the paged cache against its formula, and bit equality of every way to cut the work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from oracle.attention import BF16, DTYPES, PAGE, Rule, attention, empty, put, rounded_queries, stored, weight_error
from oracle.harness import ISAS, Framed, at_isa

from pyllm import _cpu
from pyllm.ops import Ops

SIZES = [1, 3, 8, 16, 33, 64, 80, 96, 127, 128, 256]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 700]
POOLS = {threads: Ops(threads) for threads in (1, 2, 3)}


@dataclass
class Case:
    """Sequences with their keys and values in a cache whose other places are NaN and whose blocks are shuffled."""

    keys: list[np.ndarray]  # [length, G, E], as the cache holds them
    values: list[np.ndarray]
    queries: list[np.ndarray]  # [length, H, E], one for every position
    cache: np.ndarray
    tables: np.ndarray

    @property
    def head_size(self) -> int:
        return self.keys[0].shape[2]

    def weight_error(self, dots: bool) -> float:
        """By how much rounded weights move an output at most."""
        return weight_error(self.cache.dtype, dots) * max(float(np.abs(v).max()) for v in self.values)

    def rows(self, *ranges: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """q, starts, lengths, tables of a batch of (sequence, first position, end position)."""
        q = np.concatenate([self.queries[b][i:j] for b, i, j in ranges])
        starts = np.cumsum([0] + [j - i for _, i, j in ranges]).astype(np.int32)
        lengths = np.array([j for _, _, j in ranges], np.int32)
        return q.reshape(len(q), q.shape[1] * q.shape[2]), starts, lengths, self.tables[[b for b, _, _ in ranges]]

    def attend(self, ops: Ops, *ranges: tuple[int, int, int], window: int = 0) -> np.ndarray:
        q, starts, lengths, tables = self.rows(*ranges)
        scale = self.head_size**-0.5
        return ops.attention(
            q, self.cache, starts, lengths, tables, head_size=self.head_size, scale=scale, window=window
        )

    def formula(
        self, *ranges: tuple[int, int, int], window: int = 0, dtype: type = np.float64, dots: bool = False
    ) -> np.ndarray:
        q = np.concatenate([self.queries[b][i:j] for b, i, j in ranges])
        q = rounded_queries(q, self.head_size**-0.5, self.cache.dtype, dots).astype(dtype)
        starts = np.cumsum([0] + [j - i for _, i, j in ranges])
        keys, values = ([part[b][:j] for b, _, j in ranges] for part in (self.keys, self.values))
        return attention(q, keys, values, starts, self.head_size**-0.5, Rule(window=window)).reshape(len(q), -1)


def multiplies_bf16(isa: str) -> bool:
    """Whether a bfloat16 cache is multiplied as such, on this machine, by default."""
    with at_isa(isa):
        return isa.endswith("bf16") and _cpu.fast_bf16_dots()


def assert_close_to_formula(
    case: Case, dots: bool, actual: np.ndarray, *ranges: tuple[int, int, int], window: int = 0
) -> None:
    """The tolerance of all kernels, with a floor for batches so small that the naive version is exact by luck.

    A score is wrong by about half a unit in its last place, and a weight, so an output, by as much as its score.
    """
    oracle, naive = (case.formula(*ranges, window=window, dtype=d, dots=dots) for d in (np.float64, np.float32))
    norms = [max(float(np.linalg.norm(a, axis=-1).max()) for a in part) for part in (case.queries, case.keys)]
    score = norms[0] * norms[1] * case.head_size**-0.5
    floor = 2**-24 * score * max(float(np.abs(v).max()) for v in case.values)
    assert np.isfinite(actual).all()
    error, usual = (float(np.abs(a - oracle).max(initial=0)) for a in (actual, naive))
    allowed = 2 * max(usual, floor) + 4 * 2**-23 * float(np.abs(oracle).max(initial=0))
    allowed += case.weight_error(dots)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def make(lengths: list[int], heads: int, groups: int, size: int, dtype: np.dtype, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    raw_keys, raw_values, queries = (
        [rng.normal(size=(n, h, size)).astype(np.float32) for n in lengths] for h in (groups, groups, heads)
    )
    keys, values = ([stored(a, dtype) for a in part] for part in (raw_keys, raw_values))
    queries = [q * 2 for q in queries]
    pages = [(n + PAGE - 1) // PAGE for n in lengths]
    width = max(pages) + 1
    blocks = rng.permutation(sum(pages) + 2)
    tables = np.full((len(lengths), width), -1, np.int32)
    cache = empty(len(blocks), groups, size, dtype)
    used = 0
    for b, n in enumerate(lengths):
        tables[b, : pages[b]] = blocks[used : used + pages[b]]
        used += pages[b]
        for t in range(n):
            put(cache, int(tables[b, t // PAGE]) * PAGE + t % PAGE, raw_keys[b][t], raw_values[b][t])
    return Case(keys, values, queries, cache, tables)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_matches_formula(dtype: np.dtype, size: int) -> None:
    """Decode rows, prefill chunks and whole prompts in one batch, in guarded and misaligned arrays."""
    case = make([17, 65, 300, 64], 6, 2, size, dtype, seed=size)
    for window in (0, 1, 30, 257):
        ranges = [(0, 0, 17), (1, 64, 65), (2, 200, 300), (3, 63, 64), (2, 299, 300), (1, 40, 40)]
        q, starts, lengths, tables = case.rows(*ranges)
        for isa in ISAS:
            query, out = Framed(q, offset=size % 9), Framed(np.zeros_like(q), offset=1, gap=5)
            with at_isa(isa):
                context = POOLS[2].context
                context.attention(out.array, query.array, case.cache, starts, lengths, tables, size, size**-0.5, window)
            out.check()
            assert_close_to_formula(case, multiplies_bf16(isa), out.array, *ranges, window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (7, 7), (8, 2), (7, 1), (30, 1), (28, 4), (32, 8)])
def test_lengths_and_heads(dtype: np.dtype, heads: int, groups: int) -> None:
    case = make(LENGTHS, heads, groups, 16, dtype, seed=heads)
    everything = [(b, n - 1, n) for b, n in enumerate(LENGTHS)]
    some = [(b, max(0, n - 9), n) for b, n in enumerate(LENGTHS)]
    for ranges in (everything, some, everything[-1:], [(10, 600, 700)]):
        for window in (0, 100):
            for isa in ISAS:
                with at_isa(isa):
                    actual = case.attend(POOLS[2], *ranges, window=window)
                assert_close_to_formula(case, multiplies_bf16(isa), actual, *ranges, window=window)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "size", "window"), [(6, 2, 33, 0), (8, 8, 64, 0), (4, 2, 80, 100), (5, 1, 16, 3)]
)
def test_same_bits_however_it_is_cut(
    isa: str, dtype: np.dtype, heads: int, groups: int, size: int, window: int
) -> None:
    """Prefill, decode, chunks, company and threads change nothing."""
    n = 300
    case = make([n, 70, 513], heads, groups, size, dtype, seed=size)
    with at_isa(isa):
        whole = case.attend(POOLS[1], (0, 0, n), window=window)
        assert not np.isnan(whole).any()
        for ops in POOLS.values():
            for step in (1, 7, 64, 100) if ops.threads == 2 else (64, n):
                parts = [case.attend(ops, (0, i, min(n, i + step)), window=window) for i in range(0, n, step)]
                assert np.array_equal(np.concatenate(parts).view(np.int32), whole.view(np.int32)), (ops.threads, step)
            company = case.attend(ops, (1, 3, 70), (0, 100, n), (2, 512, 513), (0, 57, 58), window=window)
            assert np.array_equal(company[67 : 67 + n - 100].view(np.int32), whole[100:].view(np.int32))
            assert np.array_equal(company[-1].view(np.int32), whole[57].view(np.int32))


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa.endswith("bf16")])
@pytest.mark.parametrize("dots", [False, True])
@pytest.mark.parametrize("size", [33, 64, 256])
def test_both_ways_to_multiply_bfloat16(isa: str, dots: bool, size: int) -> None:
    """What other machines of the level do by default: against the formula, and prefill equals decoding."""
    case = make([300], 6, 2, size, BF16, seed=size)

    def attend(begin: int, end: int) -> np.ndarray:
        q, starts, lengths, tables = case.rows((0, begin, end))
        out = np.empty_like(q)
        context = POOLS[2].context
        context.attention(out, q, case.cache, starts, lengths, tables, size, size**-0.5, 100, bf16_dots=dots)
        return out

    with at_isa(isa):
        whole = attend(0, 300)
        assert_close_to_formula(case, dots, whole, (0, 0, 300), window=100)
        for i in range(0, 300, 23):
            assert np.array_equal(attend(i, i + 1).view(np.int32), whole[i : i + 1].view(np.int32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_later_keys_leave_earlier_rows_alone(isa: str, dtype: np.dtype) -> None:
    """Infinite and undefined keys and values behind a row's position, or before its window, are not read into it."""
    case = make([200], 4, 2, 32, dtype)
    with at_isa(isa):
        before = case.attend(POOLS[2], (0, 90, 150), window=50)
        for place in (0, 39, 40, 150, 151, 199):
            poison = np.full((2, 32), np.inf if place % 2 else np.nan, np.float32)
            put(case.cache, int(case.tables[0, place // PAGE]) * PAGE + place % PAGE, poison, poison)
        assert np.array_equal(case.attend(POOLS[2], (0, 90, 150), window=50).view(np.int32), before.view(np.int32))
        chunk = case.attend(POOLS[2], (0, 100, 160), window=50)
        assert np.array_equal(chunk[:50].view(np.int32), before[10:].view(np.int32))
        assert np.isnan(chunk[50:]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_shows(isa: str, dtype: np.dtype, wrong: float) -> None:
    """A key or value that is not finite leaves no finite result where it counts, and changes nothing elsewhere."""
    at, n, heads, size = 70, 130, 4, 32
    for kind in ("key", "value"):
        case = make([n], heads, 2, size, dtype)
        with at_isa(isa):
            before = case.attend(POOLS[2], (0, 0, n)).reshape(n, heads, size)
            key, value = case.keys[0][at].copy(), case.values[0][at].copy()
            (key if kind == "key" else value)[0, 0] = wrong  # of the first two heads
            put(case.cache, int(case.tables[0, at // PAGE]) * PAGE + at % PAGE, key, value)
            after = case.attend(POOLS[2], (0, 0, n)).reshape(n, heads, size)
        same = after.view(np.int32) == before.view(np.int32)
        assert same[:at].all() and same[:, 2:].all()
        seen = ~np.isfinite(after[at:, :2])
        if kind == "value":
            assert seen[..., 0].all()
        else:  # a score of -inf is a weight of 0
            assert seen[(case.queries[0][at:, :2, 0] * wrong > 0) | np.isnan(wrong)].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: np.dtype) -> None:
    """Scores far apart: softmax picks one key, nothing overflows, what vanishes is 0."""
    case = make([520], 2, 1, 8, dtype)
    case.queries[0] *= 1000
    # A score is a sum of 8 products, each rounded; weights and so the result move by as much as scores do.
    largest = np.abs(case.queries[0]).max() * np.abs(case.keys[0]).max() * 8**0.5
    allowed = 8 * 2**-24 * largest * np.abs(case.values[0]).max()
    for isa in ISAS:
        with at_isa(isa):
            actual = case.attend(POOLS[2], (0, 0, 520))
        assert np.isfinite(actual).all()
        oracle = case.formula((0, 0, 520), dots=multiplies_bf16(isa))
        assert np.abs(actual - oracle).max() <= allowed + case.weight_error(multiplies_bf16(isa))
        assert np.median(np.abs(actual - oracle)) <= 2**-22


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_recorded_with_lengths_that_change(isa: str, threads: int) -> None:
    """A recorded decode step reads lengths, tables and starts anew at each replay."""
    case = make([700, 520, 90], 8, 2, 24, BF16)
    ops = Ops(threads)
    q, starts, lengths, tables = case.rows((0, 0, 1), (1, 0, 1), (2, 0, 1))
    with at_isa(isa):
        ops.begin_recording()
        out = ops.attention(q, case.cache, starts, lengths, tables, head_size=24, scale=24**-0.5)
        graph = ops.end_recording()
        for at in ((699, 519, 89), (0, 0, 0), (256, 300, 64), (511, 2, 63)):
            ranges = [(b, i, i + 1) for b, i in enumerate(at)]
            q[...], _, lengths[...], _ = case.rows(*ranges)
            ops.replay(graph)
            assert np.array_equal(out.view(np.int32), case.attend(POOLS[1], *ranges).view(np.int32))


def test_nothing_to_do() -> None:
    case = make([5], 2, 1, 8, DTYPES[0])
    assert case.attend(POOLS[2], (0, 5, 5)).shape == (0, 16)
    none = np.zeros(0, np.int32)
    empty = np.zeros((0, 16), np.float32)
    out = POOLS[2].attention(
        empty, case.cache, np.zeros(1, np.int32), none, np.zeros((0, 4), np.int32), head_size=8, scale=1.0
    )
    assert out.shape == (0, 16)


def test_refuses_bad_arguments() -> None:
    case = make([70, 5], 4, 2, 8, DTYPES[0])
    q, starts, lengths, tables = case.rows((0, 68, 70), (1, 4, 5))

    def call(**changed: object) -> None:
        given: dict[str, object] = {"q": q, "cache": case.cache, "starts": starts, "lengths": lengths, "tables": tables}
        given |= {"head_size": 8, "scale": 1.0, "window": 0}
        POOLS[1].attention(**{**given, **changed})  # type: ignore[arg-type]

    call()
    i32 = lambda *a: np.array(a, np.int32)  # noqa: E731
    for changed, message in (
        ({"starts": i32(1, 2, 3)}, r"starts\[0\]: expected 0, got 1"),
        ({"starts": i32(0, 3, 2)}, r"starts\[2\]: expected at least 3, the one before, got 2"),
        ({"starts": i32(0, 1, 2)}, r"starts\[2\]: expected 3, the rows of q, got 2"),
        ({"starts": i32(0, 3)}, r"starts: expected int32\[3\], got int32\[2\]"),
        ({"lengths": i32(1, 5)}, r"lengths\[0\]: expected from 2, the rows of the sequence, to 192"),
        ({"lengths": i32(70, 193)}, r"lengths\[1\]: expected from 1, .* got 193"),
        ({"lengths": i32(129, 5)}, r"tables\[0\]\[2\]: expected a block in \[0, 5\), got -1"),
        ({"tables": tables + 5}, r"tables\[0\]\[0\]: expected a block in"),
        ({"tables": tables[:1]}, r"tables: expected int32\[2, any\]"),
        ({"tables": np.asfortranarray(tables)}, "tables: "),
        ({"head_size": 0}, "head_size: expected 1 to 256, got 0"),
        ({"head_size": 5}, r"q: expected a multiple of head_size = 5 columns, got 32"),
        ({"q": q[:, :24]}, "q: expected a multiple of the cache's 2 heads, got 3"),
        ({"q": q[:, ::2]}, "q: expected an aligned array whose last dimension is contiguous"),
        ({"window": -1}, "window: expected >= 0, got -1"),
        ({"scale": float("inf")}, "scale: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changed)
    for changed, message in (
        ({"q": q.astype(np.float64)}, r"q: expected float32\[any, any\], got float64\[3, 32\]"),
        ({"tables": tables.astype(np.int64)}, "tables: expected int32"),
        ({"cache": case.cache.astype(np.float16)}, "cache: expected float32, bfloat16 or int8"),
        ({"cache": [1]}, "cache: expected a numpy array"),
    ):
        with pytest.raises(TypeError, match=message):
            call(**changed)

"""Row lookups: exact, so compared bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from oracle.harness import DIMS, ISAS, Framed, at_isa

from pyllm.ops import Ops
from pyllm.ops_training import TrainingOps

OPS = TrainingOps(threads=2)
RNG = np.random.default_rng(7)
DTYPES: list[Any] = [np.float32, np.float16, ml_dtypes.bfloat16]
VOCAB = 131  # two panels and a piece


def table(dim: int, dtype: Any, rows: int = VOCAB) -> np.ndarray:
    return RNG.normal(0, 2, (rows, dim)).astype(dtype)


def ids(count: int, limit: int = VOCAB) -> np.ndarray:
    return RNG.integers(0, limit, count).astype(np.int32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_table(isa: str, dtype: Any) -> None:
    for dim in DIMS:
        weights = Framed(table(dim, dtype)).array
        positions_table = Framed(table(dim, np.float32, 9)).array
        for count in (0, 1, 5):
            tokens, positions = ids(count), ids(count, 9)
            expected = weights[tokens].astype(np.float32)
            with at_isa(isa):
                assert np.array_equal(OPS.embedding(tokens, weights), expected)
                y = OPS.embedding(tokens, weights, positions, positions_table)
                assert np.array_equal(y, expected + positions_table[positions])
                types, type_table = ids(count, 3), Framed(table(dim, np.float32, 3)).array
                y = OPS.embedding(tokens, weights, positions, positions_table, types, type_table)
                assert np.array_equal(y, expected + positions_table[positions] + type_table[types])
                y = OPS.embedding(tokens, weights, types=types, type_table=type_table)
                assert np.array_equal(y, expected + type_table[types])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_table(isa: str, dtype: Any) -> None:
    for dim in DIMS:
        weights = table(dim, dtype)
        tokens = np.concatenate([ids(6), [0, 63, 64, VOCAB - 1]]).astype(np.int32)
        with at_isa(isa):
            y = OPS.embedding(tokens, OPS.pack(weights))
        assert np.array_equal(y, weights[tokens].astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_table_at_any_address(isa: str, dtype: Any) -> None:
    """Rows of a mapped file need not be aligned to their elements, and may be read-only."""
    weights = table(67, dtype)
    for shift in (1, 2, 3):
        raw = bytes(shift) + weights.tobytes()
        mapped = np.frombuffer(raw, np.uint8)[shift:].view(dtype).reshape(weights.shape)
        tokens = np.array([VOCAB - 1, 0, 5], np.int32)
        with at_isa(isa):
            assert np.array_equal(OPS.embedding(tokens, mapped), weights[tokens].astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_output_frame_and_threads(isa: str) -> None:
    weights, tokens = table(77, np.float16), ids(999)
    out = Framed(np.zeros((999, 77), np.float32))
    with at_isa(isa):
        for threads in (1, 3):
            Ops(threads).context.embedding(out.array, tokens, weights, None, None, None, None)
            out.check()
            assert np.array_equal(out.array, weights[tokens].astype(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_gather(isa: str) -> None:
    for dim in DIMS:
        x = Framed(table(dim, np.float32)).array
        index = ids(40)
        with at_isa(isa):
            assert np.array_equal(OPS.gather(x, index), x[index])
            assert OPS.gather(x, index[:0]).shape == (0, dim)


def test_bad_arguments() -> None:
    weights, tokens = table(8, np.float32), ids(3)
    for bad in (-1, VOCAB, 2**31 - 1):
        tokens[1] = bad
        with pytest.raises(ValueError, match=rf"tokens\[1\]: expected a row of table in \[0, {VOCAB}\), got {bad}"):
            OPS.embedding(tokens, weights)
    tokens = ids(3)
    with pytest.raises(ValueError, match=r"positions\[2\]"):
        OPS.embedding(tokens, weights, np.array([0, 1, 9], np.int32), table(8, np.float32, 9))
    with pytest.raises(TypeError, match="positions: expected a numpy array"):
        OPS.embedding(tokens, weights, None, table(8, np.float32, 9))
    with pytest.raises(ValueError, match=r"types\[0\]: expected a row of type_table in \[0, 2\)"):
        OPS.embedding(tokens, weights, types=np.full(3, 2, np.int32), type_table=table(8, np.float32, 2))
    with pytest.raises(TypeError, match="tokens: expected int32"):
        OPS.embedding(tokens.astype(np.int64), weights)
    with pytest.raises(TypeError, match="table: expected float32, float16 or bfloat16"):
        OPS.embedding(tokens, weights.astype(np.float64))
    with pytest.raises(ValueError, match="table: expected rows that are contiguous"):
        OPS.embedding(tokens, np.asfortranarray(weights))
    with pytest.raises(ValueError, match="position_table: expected"):
        OPS.embedding(tokens, weights, tokens, table(9, np.float32))


def added(start: np.ndarray, dy: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Row after row, in float32."""
    total = start.copy()
    for r, i in enumerate(index):
        total[i] += dy[r]
    return total


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packed", [True, False])
def test_embedding_backward(isa: str, packed: bool) -> None:
    """Rows that many tokens share are added in the order of the tokens, on any number of threads."""
    everything = np.arange(VOCAB, dtype=np.int32)
    for dim in DIMS:
        start, positions_start, types_start = (table(dim, np.float32, rows) for rows in (VOCAB, 9, 2))
        for count in (0, 1, 300):
            tokens, positions, dy = ids(count), ids(count, 9), Framed(table(dim, np.float32, count)).array
            tokens[: count // 2] = 64
            types = ids(count, 2)
            for threads in (1, 2, 3):
                ops = TrainingOps(threads)
                dpositions = Framed(positions_start)
                dtypes = Framed(types_start)
                plain = Framed(start)
                with at_isa(isa):
                    dtable = ops.pack(start) if packed else plain.array
                    ops.embedding_backward(dtable, dpositions.array, dy, tokens, positions, dtypes.array, types)
                    actual = ops.embedding(everything, dtable)
                plain.check()
                dpositions.check()
                dtypes.check()
                assert np.array_equal(dtypes.array, added(types_start, dy, types))
                assert np.array_equal(actual, added(start, dy, tokens))
                assert np.array_equal(dpositions.array, added(positions_start, dy, positions))


@pytest.mark.parametrize("isa", ISAS)
def test_gather_backward(isa: str) -> None:
    for dim in DIMS:
        for count in (0, 1, 50):
            index, dy = ids(count, 20), Framed(table(dim, np.float32, count)).array
            for threads in (1, 3):
                dx = Framed(np.full((20, dim), np.nan, np.float32), gap=5)
                with at_isa(isa):
                    assert TrainingOps(threads).gather_backward(dx.array, dy, index) is dx.array
                dx.check()
                assert np.array_equal(dx.array, added(np.zeros((20, dim), np.float32), dy, index))


@pytest.mark.parametrize("isa", ISAS)
def test_columns_both_ways(isa: str) -> None:
    for dim, count in ((1, 0), (1, 7), (32, 257), (5, 2053)):
        x, index = Framed(table(dim, np.float32, 3)).array, RNG.integers(0, dim, count).astype(np.int32)
        out = Framed(np.zeros((3, count), np.float32), offset=2)
        dx, dy = Framed(table(dim, np.float32, 3), gap=5), table(count, np.float32, 3)
        expected = added(dx.array.T.copy(), dy.T, index).T
        with at_isa(isa):
            OPS.gather_columns(x, index, out=out.array)
            OPS.gather_columns_backward(dx.array, dy, index)
        out.check()
        dx.check()
        assert np.array_equal(out.array, x[:, index])
        assert np.array_equal(dx.array, expected)


def test_backward_in_a_graph() -> None:
    tokens, dy, dtable, dx = (
        ids(40),
        table(70, np.float32, 40),
        np.zeros((VOCAB, 70), np.float32),
        table(70, np.float32),
    )
    ops = TrainingOps(threads=2)
    ops.begin_recording()
    ops.embedding_backward(dtable, None, dy, tokens, None)
    ops.gather_backward(dx, dy, tokens)
    graph = ops.end_recording()
    expected = dtable.copy()
    for _ in range(2):
        tokens[:] = ids(40)
        ops.replay(graph)
        expected = added(expected, dy, tokens)
        assert np.array_equal(dtable, expected)
        assert np.array_equal(dx, added(np.zeros_like(dx), dy, tokens))
    tokens[3] = VOCAB
    with pytest.raises(ValueError, match=rf"tokens\[3\]: expected a row of dtable in \[0, {VOCAB}\)"):
        ops.replay(graph)


def test_backward_bad_arguments() -> None:
    dtable, dy, tokens = table(8, np.float32), table(8, np.float32, 3), ids(3)
    positions = np.array([0, 1, 9], np.int32)
    for arguments, error, message in (
        ((table(7, np.float32), None, dy, tokens, None), ValueError, "dtable: expected float32"),
        ((OPS.pack(table(7, np.float32)), None, dy, tokens, None), ValueError, "dtable: expected a float32 matrix"),
        ((OPS.pack(table(8, np.float16)), None, dy, tokens, None), ValueError, "dtable: expected a float32 matrix"),
        ((dtable, None, dy, tokens[:2], None), ValueError, "tokens: expected int32"),
        ((dtable, None, dy, tokens - VOCAB, None), ValueError, r"tokens\[0\]: expected a row of dtable"),
        ((dtable, table(8, np.float32, 9), dy, tokens, positions), ValueError, r"positions\[2\]"),
        ((dtable, table(8, np.float32, 9), dy, tokens, None), TypeError, "positions: expected a numpy array"),
    ):
        with pytest.raises(error, match=message):
            OPS.embedding_backward(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"index\[1\]: expected a row of dx in \[0, 5\)"):
        OPS.gather_backward(np.zeros((5, 8), np.float32), dy, np.array([0, 5, 1], np.int32))
    with pytest.raises(ValueError, match=r"index\[1\]: expected a column of x in \[0, 8\), got 8"):
        OPS.gather_columns(dy, np.array([0, 8], np.int32))
    with pytest.raises(ValueError, match=r"index\[0\]: expected a column of dx in \[0, 8\), got -1"):
        OPS.gather_columns_backward(np.zeros((3, 8), np.float32), dy, np.array([-1] * 8, np.int32))

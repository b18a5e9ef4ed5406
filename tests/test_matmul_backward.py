"""The gradients of matmul against float64, at every ISA level, and their bitwise promises."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import matmul as oracle
from oracle.harness import ISAS, Framed, assert_close, at_isa

from pyllm import _cpu
from pyllm.ops_training import TrainingOps
from pyllm.spec import Activation

Array = NDArray[Any]

OPS = TrainingOps(threads=2)
DTYPES = ["float32", "float16", "bfloat16"]
EPS = 2.0**-24
# Around every vector width, the panel (64) and the blocks of the inner dimension (128 steps).
SIZES = [1, 2, 3, 5, 8, 15, 17, 31, 33, 63, 64, 65, 127, 128, 129, 193]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_isa(request.param):
        yield request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(12)


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> Array:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def zeros(n: int, k: int, gated: bool = False, value: Array | None = None) -> _cpu.PackedMatrix:
    """A float32 matrix of gradients; `value` [N, K], gated [2N, K], is what it holds."""
    packed = _cpu.PackedMatrix(n, k, "float32", gated)
    if value is not None:
        OPS.context.pack(packed, value[:n], 0, 0)
        if gated:
            OPS.context.pack(packed, value[n:], 0, 1)
    return packed


def chain(a: Array, b: Array, start: Array | None = None) -> Array:
    """``start + a b`` in float32, one term after the other."""
    c = np.zeros((a.shape[0], b.shape[1]), np.float32) if start is None else start.copy()
    for s in range(a.shape[1]):
        c += a[:, s, None] * b[s].astype(np.float32)
    return c


def check(got: Array, want: Array, naive: Array, mass: Array) -> None:
    """Within twice the naive chain's error; where that was lucky (few outputs), 2 eps of the sum of magnitudes."""
    assert got.dtype == np.float32
    allowed = 2 * np.abs(naive - want).max(initial=0) + 4 * EPS * np.abs(want).max(initial=0)
    assert np.abs(got - want).max(initial=0) <= max(allowed, 2 * EPS * mass.max(initial=0))


def check_dx(got: Array, dy: Array, w: Array, start: Array | None = None) -> None:
    first = np.zeros(got.shape) if start is None else start
    check(
        got,
        first + oracle.matmul_dx(dy, w),
        chain(dy, w, start),
        np.abs(first) + oracle.matmul_dx(np.abs(dy), np.abs(w.astype(np.float32))),
    )


def check_dw(got: Array, dy: Array, x: Array, start: Array | None = None) -> None:
    first = np.zeros(got.shape) if start is None else start
    check(
        got,
        first + oracle.matmul_dw(dy, x),
        chain(np.ascontiguousarray(dy.T), x, start),
        np.abs(first) + oracle.matmul_dw(np.abs(dy), np.abs(x)),
    )


def test_oracle_against_central_differences(rng: np.random.Generator) -> None:
    x, w, dy = rng.normal(size=(3, 5)), rng.normal(size=(4, 5)), rng.normal(size=(3, 4))
    for of, gradient in ((x, oracle.matmul_dx(dy, w)), (w, oracle.matmul_dw(dy, x))):
        for at in np.ndindex(of.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = of.copy()
                moved[at] += step
                pair = (moved, w) if of is x else (x, moved)
                sides.append(float((oracle.matmul(*pair) * dy).sum()))
            assert abs((sides[0] - sides[1]) / 2e-5 - gradient[at]) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
def test_dx_edges(isa: str, dtype: str, rng: np.random.Generator) -> None:
    for size in SIZES:
        for rows, n, k in ((7, size, 37), (5, 70, size), (size, 19, 21)):
            dy, w = normal(rng, rows, n), normal(rng, n, k, dtype=dtype)
            check_dx(OPS.matmul_dx(dy, OPS.pack(w)), dy, w)


def test_dw_edges(isa: str, rng: np.random.Generator) -> None:
    for size in SIZES:
        for rows, n, k in ((7, size, 37), (5, 70, size), (size, 19, 21)):
            dy, x, start = normal(rng, rows, n), normal(rng, rows, k), normal(rng, n, k)
            dw = zeros(n, k, value=start)
            OPS.matmul_dw(dw, dy, x)
            check_dw(OPS.unpack(dw), dy, x, start)


@pytest.mark.parametrize("rows", [1, 600, 1500])
def test_large(isa: str, rows: int, rng: np.random.Generator) -> None:
    """Several passes over rows, and over panels: more than 64 of them."""
    n, k = 4500, 130
    dy, w, x = normal(rng, rows, n), normal(rng, n, k), normal(rng, rows, k)
    check_dx(OPS.matmul_dx(dy, OPS.pack(w)), dy, w)
    dw = zeros(n, k)
    OPS.matmul_dw(dw, dy, x)
    check_dw(OPS.unpack(dw), dy, x)


@pytest.mark.parametrize("n", [1, 63, 64, 70, 129])
def test_gated(isa: str, n: int, rng: np.random.Generator) -> None:
    rows, k = 13, 35
    dy, w, gate, x = normal(rng, rows, 2 * n), normal(rng, n, k), normal(rng, n, k), normal(rng, rows, k)
    both = np.concatenate([gate, w])
    packed = OPS.pack(w, gate=gate)
    assert np.array_equal(OPS.unpack(packed), both)
    check_dx(OPS.matmul_dx(dy, packed), dy, both)
    dw = zeros(n, k, gated=True, value=both)
    OPS.matmul_dw(dw, dy, x)
    check_dw(OPS.unpack(dw), dy, x, both)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dx_adds(isa: str, dtype: str, rng: np.random.Generator) -> None:
    for rows, n, k in ((3, 7, 5), (130, 65, 200), (9, 4200, 66)):
        dy, w, start = normal(rng, rows, n), normal(rng, n, k, dtype=dtype), normal(rng, rows, k)
        out = start.copy()
        assert OPS.matmul_dx(dy, OPS.pack(w), out=out, add=True) is out
        check_dx(out, dy, w, start)


def test_a_row_does_not_depend_on_the_others(isa: str, rng: np.random.Generator) -> None:
    dy, w = normal(rng, 1100, 300), OPS.pack(normal(rng, 300, 131))
    want = OPS.matmul_dx(dy, w)
    for rows in (1, 2, 5, 7, 64, 129, 600):
        assert np.array_equal(OPS.matmul_dx(dy[-rows:], w), want[-rows:])


def test_rows_may_be_cut_into_calls(isa: str, rng: np.random.Generator) -> None:
    dy, x = normal(rng, 700, 70), normal(rng, 700, 131)
    whole = zeros(70, 131)
    OPS.matmul_dw(whole, dy, x)
    for cuts in ((0, 350, 700), (0, 1, 3, 200, 700)):
        parts = zeros(70, 131)
        for begin, end in itertools.pairwise(cuts):
            OPS.matmul_dw(parts, dy[begin:end], x[begin:end])
        assert np.array_equal(parts.flat, whole.flat)


def test_threads_give_the_same_bits(isa: str, rng: np.random.Generator) -> None:
    dy, x, w = normal(rng, 530, 400), normal(rng, 530, 333), normal(rng, 400, 333)
    results = []
    for threads in (1, 2, 3, 2):
        ops = TrainingOps(threads)
        dw, sums = zeros(400, 333), np.zeros(400, np.float32)
        ops.matmul_dw(dw, dy, x)
        ops.column_sum(sums, dy)
        results.append((ops.matmul_dx(dy, OPS.pack(w)).tobytes(), dw.flat.tobytes(), sums.tobytes()))
    assert len(set(results)) == 1


def test_columns_past_the_matrix_stay_zero(isa: str, rng: np.random.Generator) -> None:
    dw = zeros(70, 9)
    OPS.matmul_dw(dw, normal(rng, 40, 70), normal(rng, 40, 9))
    assert not dw.flat.reshape(2, 9, 64)[1, :, 6:].any()


def test_nothing_outside_is_touched(isa: str, rng: np.random.Generator) -> None:
    for rows, n, k in ((1, 1, 1), (3, 17, 19), (9, 65, 63), (14, 130, 66)):
        dy, x = Framed(normal(rng, rows, n)), Framed(normal(rng, rows, k), offset=3)
        dx, sums = Framed(np.zeros((rows, k), np.float32), offset=5), Framed(np.zeros(n, np.float32))
        w, dw = normal(rng, n, k), zeros(n, k)
        OPS.matmul_dx(dy.array, OPS.pack(w), out=dx.array)
        OPS.matmul_dw(dw, dy.array, x.array)
        OPS.column_sum(sums.array, dy.array)
        check_dx(dx.array, dy.array, w)
        check_dw(OPS.unpack(dw), dy.array, x.array)
        for framed in (dy, x, dx, sums):
            framed.check()


def test_column_sum(isa: str, rng: np.random.Generator) -> None:
    for n in (*SIZES, 500):
        for rows in (0, 1, 7, 300):
            x, start = normal(rng, rows, n), normal(rng, n)
            out, naive = start.copy(), start.copy()
            OPS.column_sum(out, x)
            for row in x:
                naive += row
            assert np.array_equal(out, naive)  # the same chain
            assert_close(out, start + x.astype(np.float64).sum(0), naive)


@pytest.mark.parametrize("activation", [None, *Activation])
@pytest.mark.parametrize("gated", [False, True])
def test_pre_activations(isa: str, activation: Activation | None, gated: bool, rng: np.random.Generator) -> None:
    for rows, n, k in ((1, 5, 7), (9, 83, 24), (70, 129, 131)):
        x, w, gate = normal(rng, rows, k), normal(rng, n, k), normal(rng, n, k)
        bias, bias_up = normal(rng, n), normal(rng, n) if gated else None
        packed = OPS.pack(w, gate=gate if gated else None)
        want = OPS.matmul(x, packed, bias, bias_up, activation)
        pre = Framed(np.zeros((rows, n * (1 + gated)), np.float32))
        assert np.array_equal(OPS.matmul(x, packed, bias, bias_up, activation, pre=pre.array), want)
        pre.check()
        parts = [OPS.matmul(x, OPS.pack(gate), bias), OPS.matmul(x, OPS.pack(w), bias_up)]
        assert np.array_equal(pre.array, np.hstack(parts) if gated else OPS.matmul(x, OPS.pack(w), bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_is_the_inverse_of_pack(isa: str, dtype: str, rng: np.random.Generator) -> None:
    for n, k in ((1, 1), (5, 3), (64, 64), (70, 129), (131, 67), (0, 4), (3, 0)):
        w, gate = normal(rng, n, k, dtype=dtype), normal(rng, n, k, dtype=dtype)
        assert np.array_equal(OPS.unpack(OPS.pack(w)), w.astype(np.float32))
        out = Framed(np.zeros((2 * n, k), np.float32)) if n * k else None
        got = OPS.unpack(OPS.pack(w, gate=gate), out=out.array if out else None)
        assert np.array_equal(got, np.concatenate([gate, w]).astype(np.float32))
        if out:
            out.check()


def test_matrices_over_given_memory(rng: np.random.Generator) -> None:
    w, x = normal(rng, 70, 33), normal(rng, 3, 33)
    first, second = _cpu.packed_bytes(70, 33, "float32"), _cpu.packed_bytes(70, 33, "bfloat16")
    memory = _cpu.allocate(first + second)
    wide = _cpu.PackedMatrix(70, 33, "float32", memory=memory[:first].view(np.float32))
    narrow = _cpu.PackedMatrix(70, 33, "bfloat16", memory=memory[first:])
    for packed in (wide, narrow):
        OPS.context.pack(packed, w, 0, 0)
        assert np.array_equal(OPS.matmul(x, packed), OPS.matmul(x, OPS.pack(w, dtype=packed.dtype)))
    assert np.array_equal(wide.flat, memory[:first].view(np.float32))
    flat = wide.flat
    del memory, wide, packed
    assert flat.any()  # the view keeps the memory alive
    flat *= 2


def test_graph_equals_eager(isa: str, rng: np.random.Generator) -> None:
    dy, x = normal(rng, 70, 90), normal(rng, 70, 40)
    w, dw, want = OPS.pack(normal(rng, 90, 40)), zeros(90, 40), zeros(90, 40)
    dx, sums, pre = np.zeros((70, 40), np.float32), np.zeros(90, np.float32), np.zeros((70, 90), np.float32)
    y, dpre = np.zeros((70, 90), np.float32), np.zeros((70, 90), np.float32)
    OPS.begin_recording()
    OPS.matmul(x, w, activation=Activation.SILU, out=y, pre=pre)
    OPS.activation_backward(dy, pre, Activation.SILU, out=dpre)
    OPS.matmul_dx(dpre, w, out=dx)
    OPS.matmul_dw(dw, dpre, x)
    OPS.column_sum(sums, dpre)
    graph = OPS.end_recording()
    assert len(graph) == 5 and not dx.any() and not dw.flat.any()
    total = np.zeros(90, np.float32)
    for _ in range(2):
        dy[...], x[...] = normal(rng, 70, 90), normal(rng, 70, 40)
        OPS.replay(graph)
        before = OPS.matmul(x, w)
        d = OPS.activation_backward(dy, before, Activation.SILU)
        OPS.matmul_dw(want, d, x)
        OPS.column_sum(total, d)
        assert np.array_equal(dx, OPS.matmul_dx(d, w))
        assert np.array_equal(dw.flat, want.flat)
        assert np.array_equal(sums, total)


def test_empty(isa: str) -> None:
    def empty(*shape: int) -> Array:
        return np.zeros(shape, np.float32)

    assert OPS.matmul_dx(empty(0, 4), OPS.pack(empty(4, 3))).shape == (0, 3)
    assert OPS.matmul_dx(empty(2, 4), OPS.pack(empty(4, 0))).shape == (2, 0)
    out = np.ones((2, 3), np.float32)
    OPS.matmul_dx(empty(2, 0), OPS.pack(empty(0, 3)), out=out, add=True)
    assert (out == 1).all()
    assert not OPS.matmul_dx(empty(2, 0), OPS.pack(empty(0, 3)), out=out).any()
    for rows, n, k in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        OPS.matmul_dw(zeros(n, k), empty(rows, n), empty(rows, k))


def test_bad_arguments(rng: np.random.Generator) -> None:
    dy, x, w = normal(rng, 3, 5), normal(rng, 3, 8), OPS.pack(normal(rng, 5, 8))
    shared = np.zeros(60, np.float32)
    with pytest.raises(ValueError, match=r"dy: expected float32\[any, 5\], got float32\[3, 8\]"):
        OPS.matmul_dx(x, w)
    with pytest.raises(ValueError, match="w: expected a matrix of floats, got one of int8"):
        OPS.matmul_dx(dy, OPS.pack(normal(rng, 5, 8), dtype="int8"))
    with pytest.raises(TypeError, match="w: expected a PackedMatrix"):
        OPS.context.matmul_dx(x.copy(), dy, x, False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="add: expected an out to add to"):
        OPS.matmul_dx(dy, w, add=True)
    with pytest.raises(ValueError, match=r"out: .*overlaps dy"):
        OPS.matmul_dx(shared[:15].reshape(3, 5), w, out=shared[10:34].reshape(3, 8))
    with pytest.raises(ValueError, match="dw: expected a matrix of float32, got one of bfloat16"):
        OPS.matmul_dw(OPS.pack(normal(rng, 5, 8), dtype="bfloat16"), dy, x)
    with pytest.raises(ValueError, match=r"x: expected float32\[3, 8\], got float32\[2, 8\]"):
        OPS.matmul_dw(w, dy, x[:2])
    with pytest.raises(ValueError, match=r"out: expected float32\[5\], got float32\[4\]"):
        OPS.column_sum(np.zeros(4, np.float32), dy)
    with pytest.raises(ValueError, match=r"pre: expected float32\[3, 5\], got float32\[3, 4\]"):
        OPS.matmul(x, w, pre=np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"pre: expected memory of its own"):
        OPS.matmul(x, w, out=shared[:15].reshape(3, 5), pre=shared[10:25].reshape(3, 5))
    with pytest.raises(ValueError, match="packed: expected a matrix of floats, got one of int4"):
        OPS.unpack(OPS.pack(normal(rng, 5, 8), dtype="int4"))
    with pytest.raises(ValueError, match="flat: expected a matrix of float32, got one of bfloat16"):
        _ = OPS.pack(normal(rng, 5, 8), dtype="bfloat16").flat
    memory = _cpu.allocate(4096)
    with pytest.raises(ValueError, match="memory: expected 2048 bytes, got 4096"):
        _cpu.PackedMatrix(5, 8, "float32", memory=memory)
    with pytest.raises(ValueError, match=r"memory: .*aligned to 64 bytes"):
        _cpu.PackedMatrix(5, 8, "float32", memory=memory[4 : 4 + 2048])
    with pytest.raises(TypeError, match="memory: expected float32 or uint8, got int64"):
        _cpu.PackedMatrix(5, 8, "float32", memory=memory[:2048].view(np.int64))

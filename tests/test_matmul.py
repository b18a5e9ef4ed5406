"""matmul and pack against float64 oracles, at every ISA level of this machine, and their bitwise promises."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import matmul as oracle

from pyllm import _cpu
from pyllm.ops import Ops
from pyllm.spec import Activation

Array = NDArray[Any]

DTYPES = ["float32", "float16", "bfloat16"]
EPS = 2.0**-24
# Around every vector width, the panel (64) and the blocks of K (1024 steps, 128 of few rows; one k each, or a pair).
COLUMNS = [1, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 193]
DEPTHS = [0, 1, 2, 3, 7, 64, 65, 255, 256, 257, 511, 513, 1031, 2053]


@pytest.fixture(params=_cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.active_isa()
    _cpu.set_isa(request.param)
    assert _cpu.active_isa() == request.param
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture(scope="module")
def ops() -> Ops:
    return Ops(threads=2)


def rounds_x(isa: str, dtype: str) -> bool:
    return dtype == "bfloat16" and isa.endswith("bf16")


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> Array:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def check(y: Array, x: Array, w: Array, isa: str, dtype: str) -> None:
    """y = x w^T within the worst case of a float32 chain, and no worse than the naive version in float32.

    Where the naive version was lucky (few outputs), 2 eps sum |x| |w| is allowed: random chains stay well below.
    """
    round_x = rounds_x(isa, dtype)
    expected = oracle.matmul(x, w, round_x=round_x)
    used = x.astype(ml_dtypes.bfloat16).astype(np.float32) if round_x else x
    error = np.abs(y - expected)
    mass = oracle.matmul(np.abs(used), np.abs(w))
    assert np.all(error <= 2 * x.shape[1] * EPS * mass)
    naive = np.zeros(expected.shape, np.float32)
    for k in range(x.shape[1]):
        naive += used[:, k, None] * w[:, k].astype(np.float32)
    allowed = 2 * np.abs(naive - expected).max(initial=0) + 4 * EPS * np.abs(expected).max(initial=0)
    assert error.max(initial=0) <= max(allowed, 2 * EPS * mass.max(initial=0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_edges(isa: str, dtype: str, ops: Ops, rng: np.random.Generator) -> None:
    for n in COLUMNS:
        x, w = normal(rng, 7, 37), normal(rng, n, 37, dtype=dtype)
        check(ops.matmul(x, ops.pack(w)), x, w, isa, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 29, 97])
def test_depth_edges(isa: str, dtype: str, rows: int, ops: Ops, rng: np.random.Generator) -> None:
    for k in DEPTHS:
        x, w = normal(rng, rows, k), normal(rng, 70, k, dtype=dtype)
        check(ops.matmul(x, ops.pack(w)), x, w, isa, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(isa: str, dtype: str, rng: np.random.Generator) -> None:
    x, w, gate = normal(rng, 600, 531), normal(rng, 150, 531, dtype=dtype), normal(rng, 150, 531, dtype=dtype)
    one = Ops(threads=1)
    packed = one.pack(w, gate=gate)
    want = one.matmul(x, packed, activation=Activation.SILU)
    for threads in (1, 2, 3):
        ops = Ops(threads=threads)
        assert np.array_equal(ops.matmul(x, packed, activation=Activation.SILU), want)
        for rows in (1, 2, 3, 4, 7, 8, 16, 33, 130, 513):
            first = 600 - rows
            assert np.array_equal(ops.matmul(x[first:], packed, activation=Activation.SILU), want[first:]), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [2.0**-64, 2.0**-62, 2.0**63])
def test_the_ends_of_the_range_do_not_depend_on_the_batch(
    isa: str, dtype: str, scale: float, ops: Ops, rng: np.random.Generator
) -> None:
    """Denormal factors, products and sums, and sums that overflow."""
    x, w = normal(rng, 130, 67) * np.float32(scale), normal(rng, 70, 67) * np.float32(scale)
    x[:, ::5] *= np.float32(2.0**-65 if scale < 1 else 1)
    with np.errstate(over="ignore"):  # of float16
        packed = ops.pack(w.astype(dtype))
    want = np.concatenate([ops.matmul(row[None], packed) for row in x])
    for rows in (2, 3, 7, 16, 50, 130):
        assert np.array_equal(ops.matmul(x[:rows], packed), want[:rows], equal_nan=True), rows


@pytest.mark.parametrize("activation", [None, *Activation])
@pytest.mark.parametrize("gated", [False, True])
def test_epilogue(isa: str, activation: Activation | None, gated: bool, ops: Ops, rng: np.random.Generator) -> None:
    rows, n, k = 5, 83, 24
    x, w = normal(rng, rows, k), normal(rng, n, k) / 4
    gate = normal(rng, n, k) / 4 if gated else None
    packed = ops.pack(w, gate=gate)
    for bits in range(8):
        bias = normal(rng, n) if bits & 1 else None
        bias_up = normal(rng, n) if bits & 2 and gated else None
        residual = normal(rng, rows, n) if bits & 4 else None
        name = None if activation is None else activation.value
        want = oracle.matmul(x, w, bias, gate=gate, bias_up=bias_up, residual=residual, activation=name)
        y = ops.matmul(x, packed, bias, bias_up, activation, residual)
        # Sums of 24 terms of about 1, an activation of slope at most 1.2, a product: 64 ulps of the largest value.
        assert np.abs(y - want).max() <= 64 * EPS * max(1.0, np.abs(want).max())
        if residual is not None:
            assert ops.matmul(x, packed, bias, bias_up, activation, residual, out=residual) is residual
            assert np.array_equal(residual, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_output_is_written(isa: str, dtype: str, ops: Ops, rng: np.random.Generator) -> None:
    for rows, n in [(1, 1), (3, 17), (9, 63), (14, 65), (1, 130)]:
        frame = np.full((rows + 2, n + 7), np.nan, np.float32)
        x, w = normal(rng, rows, 33), normal(rng, n, 33, dtype=dtype)
        ops.matmul(x, ops.pack(w), out=frame[1:-1, 3:-4])
        check(frame[1:-1, 3:-4], x, w, isa, dtype)
        frame[1:-1, 3:-4] = np.nan
        assert np.isnan(frame).all()


def test_strided_and_offset_inputs(isa: str, ops: Ops, rng: np.random.Generator) -> None:
    for dtype in DTYPES:
        x, w = normal(rng, 11, 101)[1:, 3:96], normal(rng, 67, 93, dtype=dtype)
        check(ops.matmul(x, ops.pack(w)), x, w, isa, dtype)
        for apart in (x, normal(rng, 11, 1024)[:, 5:98]):  # as they stand, and so far apart that they are copied first
            assert np.array_equal(ops.matmul(apart, ops.pack(w)), ops.matmul(apart.copy(), ops.pack(w)))


def guarded(values: Array) -> Array:
    """A copy of `values` that ends where readable memory ends."""
    page = mmap.PAGESIZE
    size = -(-max(values.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, values.dtype, values.size, size - values.nbytes).reshape(values.shape)
    copy[...] = values
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_past_the_inputs_is_read(isa: str, dtype: str, ops: Ops, rng: np.random.Generator) -> None:
    for rows, n, k in [(1, 5, 3), (1, 67, 31), (7, 67, 31), (13, 33, 259)]:
        x, w = guarded(normal(rng, rows, k)), guarded(normal(rng, n, k, dtype=dtype))
        bias, residual = guarded(normal(rng, n)), guarded(normal(rng, rows, n))
        packed = ops.pack(w)
        check(ops.matmul(x, packed), x, w, isa, dtype)
        ops.matmul(x, packed, bias, residual=residual, out=residual)
        assert np.array_equal(ops.matmul(x, ops.pack(guarded(w.T).T)), ops.matmul(x, packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_row_stays_alone(isa: str, dtype: str, bad: float, ops: Ops, rng: np.random.Generator) -> None:
    x, packed = normal(rng, 14, 45), ops.pack(normal(rng, 66, 45, dtype=dtype))
    want = ops.matmul(x, packed)
    x[5, 44] = bad
    y = ops.matmul(x, packed)
    assert not np.isfinite(y[5]).any()
    assert np.array_equal(np.delete(y, 5, 0), np.delete(want, 5, 0))


def unpack(ops: Ops, packed: _cpu.PackedMatrix) -> Array:
    """The weights that a packed matrix holds, read through products with the unit vectors (exact)."""
    return ops.matmul(np.eye(packed.shape[1], dtype=np.float32), packed).T


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_converts_like_numpy(isa: str, source: str, dtype: str, ops: Ops, rng: np.random.Generator) -> None:
    w = (normal(rng, 130, 67) * np.exp2(rng.integers(-20, 12, (130, 67)))).astype(np.float32).astype(source)
    want = w.astype(np.float32).astype(dtype).astype(np.float32)
    got = unpack(ops, ops.pack(w, dtype=dtype))
    keep = np.abs(want) >= 2.0**-126  # the dot-product instruction takes denormals for zero
    assert np.array_equal(got[keep], want[keep])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_takes_any_strides_and_alignment(isa: str, dtype: str, ops: Ops, rng: np.random.Generator) -> None:
    w = normal(rng, 131, 77, dtype=dtype)
    want = w.astype(np.float32)
    raw = np.zeros(w.nbytes + 1, np.uint8)
    odd = raw[1:].view(w.dtype).reshape(w.shape)
    odd[...] = w
    wide = np.zeros((262, 231), w.dtype)
    wide[::2, ::3] = w
    flipped = np.ascontiguousarray(w[::-1, ::-1])[::-1, ::-1]
    for view in (w, np.asfortranarray(w), odd, wide[::2, ::3], flipped):
        assert np.array_equal(unpack(ops, ops.pack(view)), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_stacks_at_any_row(isa: str, dtype: str, ops: Ops, rng: np.random.Generator) -> None:
    parts = [normal(rng, rows, 35, dtype=dtype) for rows in (5, 64, 1, 70, 0, 13)]
    whole = np.concatenate(parts)
    x = normal(rng, 3, 35)
    assert np.array_equal(ops.matmul(x, ops.pack(*parts)), ops.matmul(x, ops.pack(whole)))
    assert np.array_equal(unpack(ops, ops.pack(*parts)), whole.astype(np.float32))


def test_graph_equals_eager(isa: str, ops: Ops, rng: np.random.Generator) -> None:
    for dtype in DTYPES:
        x, residual = normal(rng, 3, 40), normal(rng, 3, 90)
        packed = ops.pack(normal(rng, 90, 40, dtype=dtype))
        out = np.zeros((3, 90), np.float32)
        ops.begin_recording()
        ops.matmul(x, packed, residual=residual, out=out)
        graph = ops.end_recording()
        assert len(graph) == 1 and not out.any()
        for _ in range(2):
            x[...] = normal(rng, 3, 40)
            ops.replay(graph)
            assert np.array_equal(out, ops.matmul(x, packed, residual=residual))


def test_empty(isa: str, ops: Ops) -> None:
    packed = ops.pack(np.zeros((9, 0), np.float32))
    assert not ops.matmul(np.zeros((2, 0), np.float32), packed).any()
    assert ops.matmul(np.zeros((0, 4), np.float32), ops.pack(np.zeros((3, 4), np.float32))).shape == (0, 3)
    assert ops.matmul(np.zeros((2, 4), np.float32), ops.pack(np.zeros((0, 4), np.float32))).shape == (2, 0)


def test_bad_arguments(ops: Ops, rng: np.random.Generator) -> None:
    x, w = normal(rng, 3, 8), ops.pack(normal(rng, 5, 8))
    read_only = np.zeros((3, 5), np.float32)
    read_only.flags.writeable = False
    shared = np.zeros(40, np.float32)
    with pytest.raises(TypeError, match=r"x: expected float32\[any, 8\], got float64\[3, 8\]"):
        ops.matmul(x.astype(np.float64), w)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="w: expected a PackedMatrix"):
        ops.context.matmul(np.zeros((3, 5), np.float32), x, np.zeros((5, 8), np.float32), None, None, None, 0, None)
    with pytest.raises(ValueError, match=r"x: expected float32\[any, 8\], got float32\[3, 7\]"):
        ops.matmul(normal(rng, 3, 7), w)
    with pytest.raises(ValueError, match=r"x: .*contiguous"):
        ops.matmul(np.asfortranarray(x), w)
    with pytest.raises(ValueError, match=r"bias: expected float32\[5\], got float32\[4\]"):
        ops.matmul(x, w, normal(rng, 4))
    with pytest.raises(ValueError, match=r"bias_up: .*not gated"):
        ops.matmul(x, w, bias_up=normal(rng, 5))
    with pytest.raises(ValueError, match=r"out: expected float32\[3, 5\], got float32\[2, 5\]"):
        ops.matmul(x, w, out=np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"out: .*read-only"):
        ops.matmul(x, w, out=read_only)
    with pytest.raises(ValueError, match=r"out: .*overlaps x"):
        ops.matmul(shared[:24].reshape(3, 8), w, out=shared[20:35].reshape(3, 5))
    with pytest.raises(ValueError, match=r"out: .*overlaps residual"):
        ops.matmul(x, w, residual=shared[:15].reshape(3, 5), out=shared[1:16].reshape(3, 5))
    with pytest.raises(ValueError, match="activation: expected 0 to 8, got 9"):
        ops.context.matmul(np.zeros((3, 5), np.float32), x, w, None, None, None, 9, None)
    with pytest.raises(ValueError, match="rows 3 to 6 lie outside"):
        ops.context.pack(w, normal(rng, 3, 8), 3, 0)
    with pytest.raises(TypeError, match="src: expected float32, float16 or bfloat16, got int64"):
        ops.context.pack(w, np.zeros((5, 8), np.int64), 0, 0)

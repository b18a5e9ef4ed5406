"""Integer weights against float64 oracles at every ISA level: packing, the matmul over them, row lookups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import matmul as float_oracle
from oracle import quantized as oracle
from oracle.harness import ISAS, Framed, at_isa

from pyllm import _cpu
from pyllm.ops import Ops
from pyllm.spec import Activation

Array = NDArray[Any]

EPS = 2.0**-24
BF16 = ml_dtypes.bfloat16
# dtype, group size, dtype of the scales, zeros
KINDS = [
    ("int8", 0, np.float32, False),
    ("int8", 0, np.float32, True),
    ("int8", 32, BF16, False),
    ("int8", 128, np.float16, False),
    ("int8", 64, np.float16, True),
    ("int4", 0, np.float32, False),
    ("int4", 32, np.float16, True),
    ("int4", 64, BF16, False),
    ("int4", 128, BF16, True),
]
IDS = [f"{d}-{g}-{np.dtype(s).name}{'-zeros' if z else ''}" for d, g, s, z in KINDS]
# Around vectors and the panel of 64; around quads, groups, tiles and the block of 512.
COLUMNS = [1, 3, 15, 16, 17, 63, 64, 65, 130]
DEPTHS = [0, 1, 3, 4, 5, 8, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 511, 512, 513, 1031]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 16, 17, 32, 33, 65]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_isa(request.param):
        yield request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture(scope="module")
def ops() -> Ops:
    return Ops(threads=2)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def packed(ops: Ops, w: oracle.Integers, gate: oracle.Integers | None = None) -> _cpu.PackedMatrix:
    parts = None if gate is None else (gate.stored, gate.scales, gate.zeros)
    return ops.pack_quantized(
        w.stored,
        w.scales,
        w.zeros,
        dtype=w.dtype,
        group_size=w.group_size,
        columns=w.values.shape[1],
        gate=parts,
    )


def check(y: Array, x: Array, w: oracle.Integers) -> None:
    """Only adding up groups and blocks rounds: an operation for each of them, and a few for the scales."""
    groups = -(-x.shape[1] // (w.group_size or oracle.BLOCK)) + -(-x.shape[1] // oracle.BLOCK)
    used = np.abs(oracle.rounded(x))
    mass = used @ np.abs(w.weights.astype(np.float64)).T
    assert np.all(np.abs(y - oracle.matmul(x, w)) <= (groups + 4) * EPS * mass)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_matmul(isa: str, kind: Any, ops: Ops, rng: np.random.Generator) -> None:
    sizes = [(7, n, 200) for n in COLUMNS] + [(5, 67, k) for k in DEPTHS] + [(rows, 70, 580) for rows in ROWS]
    for rows, n, k in sizes:
        x, w = normal(rng, rows, k), oracle.random_integers(rng, n, k, *kind)
        check(ops.matmul(x, packed(ops, w)), x, w)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_extremes_are_exact(isa: str, kind: Any, ops: Ops) -> None:
    """Nothing saturates where every product is as large as it gets: x of +-127, weights at their ends."""
    dtype, group, scale_dtype, zeros = kind
    k, top = 640, 255 if dtype == "int8" else 15
    x = np.array([[127.0] * k, [-127.0] * k, [127.0, -127.0] * (k // 2)], np.float32)
    values = np.array([[0] * k, [top] * k, [0, top] * (k // 2), [top, 0] * (k // 2)], np.uint8)
    groups = k // group if group else 1
    w = oracle.Integers(
        dtype,
        group,
        values,
        np.ones((4, groups), scale_dtype),
        np.array([[0], [top], [3], [9]], np.uint8).repeat(groups, 1) if zeros else None,
    )
    assert np.array_equal(ops.matmul(x, packed(ops, w)), oracle.matmul(x, w))
    assert np.array_equal(ops.matmul(x.repeat(9, 0), packed(ops, w)), oracle.matmul(x, w).repeat(9, 0))


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_row_never_depends_on_the_others(isa: str, kind: Any, rng: np.random.Generator) -> None:
    x = normal(rng, 600, 1100)
    w, gate = (oracle.random_integers(rng, 130, 1100, *kind) for _ in range(2))
    matrix = packed(Ops(threads=1), w, gate)
    want = Ops(threads=1).matmul(x, matrix, activation=Activation.SILU)
    for threads in (1, 2, 3):
        ops = Ops(threads=threads)
        assert np.array_equal(ops.matmul(x, matrix, activation=Activation.SILU), want)
        for rows in (1, 2, 3, 4, 7, 8, 13, 16, 17, 33, 130, 513):
            assert np.array_equal(ops.matmul(x[600 - rows :], matrix, activation=Activation.SILU), want[600 - rows :])


def test_levels_agree(ops: Ops, rng: np.random.Generator) -> None:
    """Sums of a group are exact, so that all levels that fuse multiply and add give the same bits."""
    x = normal(rng, 40, 700)
    for kind in KINDS:
        matrix = packed(ops, oracle.random_integers(rng, 70, 700, *kind))
        results = []
        for name in ISAS:
            if name != "baseline":
                with at_isa(name):
                    results += [
                        ops.matmul(x, matrix),
                        np.concatenate([ops.matmul(x[i : i + 1], matrix) for i in (0, 39)]),
                    ]
        for whole, ends in zip(results[::2], results[1::2], strict=True):
            assert np.array_equal(whole, results[0])
            assert np.array_equal(ends, whole[[0, 39]])


def test_zeros_in_the_middle_equal_none(isa: str, ops: Ops, rng: np.random.Generator) -> None:
    for dtype, group, scale_dtype, zeros in KINDS:
        if not zeros:
            w = oracle.random_integers(rng, 70, 300, dtype, group, scale_dtype, False)
            same = oracle.Integers(
                dtype, group, w.values, w.scales, np.full(w.scales.shape, 128 if dtype == "int8" else 8, np.uint8)
            )
            for rows in (1, 20):
                x = normal(rng, rows, 300)
                assert np.array_equal(ops.matmul(x, packed(ops, w)), ops.matmul(x, packed(ops, same)))


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_epilogue(isa: str, kind: Any, ops: Ops, rng: np.random.Generator) -> None:
    for rows in (1, 20):
        x, (w, gate) = normal(rng, rows, 96), (oracle.random_integers(rng, 83, 96, *kind) for _ in range(2))
        bias, bias_up, residual = normal(rng, 83), normal(rng, 83), normal(rng, rows, 83)
        used = oracle.rounded(x)
        want = float_oracle.matmul(
            used, w.weights, bias, gate=gate.weights, bias_up=bias_up, residual=residual, activation="silu"
        )
        y = ops.matmul(x, packed(ops, w, gate), bias, bias_up, Activation.SILU, residual)
        assert np.abs(y - want).max() <= 64 * EPS * max(1.0, np.abs(want).max())
        plain = ops.matmul(x, packed(ops, w), bias, residual=residual, out=residual)
        assert plain is residual


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_nan_and_stays_alone(isa: str, kind: Any, bad: float, ops: Ops, rng: np.random.Generator) -> None:
    x, matrix = normal(rng, 14, 300), packed(ops, oracle.random_integers(rng, 66, 300, *kind))
    want = ops.matmul(x, matrix)
    x[5, 131] = bad
    y = ops.matmul(x, matrix)
    assert np.isnan(y[5]).all()
    assert np.array_equal(np.delete(y, 5, 0), np.delete(want, 5, 0))
    assert np.isnan(ops.matmul(x[5:6], matrix)).all()


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_zero_and_tiny_groups(isa: str, kind: Any, ops: Ops, rng: np.random.Generator) -> None:
    w = oracle.random_integers(rng, 66, 300, *kind)
    assert not ops.matmul(np.zeros((3, 300), np.float32), packed(ops, w)).any()
    tiny = np.full((1, 300), 1e-42, np.float32)  # a denormal, whose inverse is infinite
    assert not ops.matmul(tiny, packed(ops, w)).any()
    x = normal(rng, 4, 300)
    x[:, :256] = 0
    check(ops.matmul(x, packed(ops, w)), x, w)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_frame_strides_and_threads(isa: str, kind: Any, rng: np.random.Generator) -> None:
    w = oracle.random_integers(rng, 131, 150, *kind)
    for rows in (1, 7, 40):
        x = Framed(normal(rng, rows, 150))
        for threads in (1, 2, 3):
            ops, out = Ops(threads), Framed(np.zeros((rows, 131), np.float32))
            ops.matmul(x.array, packed(ops, w), out=out.array)
            out.check()
            check(out.array, x.array, w)


def unpack(ops: Ops, matrix: _cpu.PackedMatrix) -> Array:
    """The weights that a packed matrix stands for."""
    return ops.embedding(np.arange(matrix.shape[0], dtype=np.int32), matrix)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_lookup_and_lossless_packing(isa: str, kind: Any, ops: Ops, rng: np.random.Generator) -> None:
    for n, k in [(1, 1), (64, 8), (67, 5), (130, 129), (3, 1031), (65, 64)]:
        w = oracle.random_integers(rng, n, k, *kind)
        assert np.array_equal(unpack(ops, packed(ops, w)), w.weights)
        strided = np.zeros((n, w.stored.shape[1] + 3), np.uint8)
        strided[:, :-3] = w.stored
        again = ops.pack_quantized(
            strided[:, :-3], w.scales, w.zeros, dtype=w.dtype, group_size=w.group_size, columns=k
        )
        assert np.array_equal(unpack(ops, again), w.weights)


@pytest.mark.parametrize("source", [np.float16, BF16])
def test_row_scales_of_any_float_dtype(isa: str, source: Any, ops: Ops, rng: np.random.Generator) -> None:
    w = oracle.random_integers(rng, 70, 40, "int8", 0, source, False)
    assert np.array_equal(unpack(ops, packed(ops, w)), w.weights)


@pytest.mark.parametrize("source", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_int8_rounds_to_the_nearest(isa: str, group: int, source: Any, ops: Ops, rng: np.random.Generator) -> None:
    for n, k in [(1, 1), (67, 45), (64, 128), (70, 300), (3, 1031)]:
        w = (normal(rng, n, k) * np.exp2(rng.integers(-12, 8, (n, 1)))).astype(source)
        full = w.astype(np.float32)
        got = unpack(ops, ops.pack(w, dtype="int8", group_size=group))
        for start in range(0, k, group or k):
            piece, back = (a[:, start : start + (group or k)] for a in (full, got))
            scale = np.abs(piece).max(axis=1, keepdims=True) / np.float32(127)
            kept = scale if group == 0 else scale.astype(BF16).astype(np.float32)
            # Half a step, and where the scale was rounded down what the largest values lose at their end.
            assert np.all(
                np.abs(piece - back) <= np.maximum(0.5 * kept * 1.0001, np.abs(piece) - 127 * kept + 1e-6 * kept)
            )


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_leaves_less_error_than_the_largest_value_over_7(
    isa: str, group: int, ops: Ops, rng: np.random.Generator
) -> None:
    w = normal(rng, 130, 512)
    got = unpack(ops, ops.pack(w, dtype="int4", group_size=group))
    grouped = w.reshape(130, -1, group)
    scale = np.abs(grouped).max(axis=2, keepdims=True) / 7
    plain = np.rint(grouped / scale) * scale
    assert ((got - w) ** 2).sum() < 0.92 * ((plain - grouped) ** 2).sum()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("group", [0, 64])
def test_pack_takes_any_strides_and_stacks_at_any_row(
    isa: str, dtype: str, group: int, ops: Ops, rng: np.random.Generator
) -> None:
    parts = [normal(rng, rows, 77) for rows in (5, 64, 1, 70, 0, 13)]
    whole = np.concatenate(parts)
    want = unpack(ops, ops.pack(whole, dtype=dtype, group_size=group))
    assert np.array_equal(unpack(ops, ops.pack(*parts, dtype=dtype, group_size=group)), want)
    wide = np.zeros((306, 231), np.float32)
    wide[::2, ::3] = whole
    flipped = np.ascontiguousarray(whole[::-1, ::-1])[::-1, ::-1]
    for view in (np.asfortranarray(whole), wide[::2, ::3], flipped):
        assert np.array_equal(unpack(ops, ops.pack(view, dtype=dtype, group_size=group)), want)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("group", [0, 64])
def test_odd_weights(isa: str, dtype: str, group: int, ops: Ops, rng: np.random.Generator) -> None:
    """Zero groups give zeros, groups with a value that is not finite NaN, and neither touches the others."""
    w = normal(rng, 20, 200)
    w[3], w[4], w[5] = 0, 1e-38, -0.0
    want = unpack(ops, ops.pack(w, dtype=dtype, group_size=group))
    assert not want[3:6].any()
    for bad in (np.nan, np.inf):
        w[7, 70] = bad
        got = unpack(ops, ops.pack(w, dtype=dtype, group_size=group))
        group_of = slice(64, 128) if group else slice(0, 200)
        assert np.isnan(got[7, group_of]).all()
        got[7, group_of] = want[7, group_of]
        assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_empty(isa: str, kind: Any, ops: Ops, rng: np.random.Generator) -> None:
    for rows, n, k in [(2, 9, 0), (0, 3, 4), (2, 0, 4)]:
        w = oracle.random_integers(rng, n, k, *kind)
        y = ops.matmul(np.ones((rows, k), np.float32), packed(ops, w))
        assert y.shape == (rows, n)
        assert not y.any()


def test_bytes(ops: Ops) -> None:
    w = np.zeros((130, 100), np.float32)
    panels = 3
    assert ops.pack(w, dtype="int8").nbytes == panels * 64 * (104 + 4)
    assert ops.pack(w, dtype="int8", group_size=32).nbytes == panels * 64 * (104 + 4 * 2)
    assert ops.pack(w, dtype="int4").nbytes == panels * 64 * (52 + 2 * 2)
    assert ops.pack(w, dtype="int4", group_size=128, gate=w).nbytes == 2 * panels * 64 * (52 + 2)
    assert _cpu.packed_bytes(130, 100, "int4", False, 64, "float16", True) == panels * 64 * (52 + 2 * 3)


def test_bad_arguments(ops: Ops, rng: np.random.Generator) -> None:
    w = oracle.random_integers(rng, 70, 100, "int4", 32, np.float16, True)
    options: dict[str, Any] = {"dtype": "int4", "group_size": 32}
    with pytest.raises(ValueError, match=r"group_size: expected 32, 64, 128 or 0 .*got 48"):
        ops.pack(normal(rng, 4, 96), dtype="int8", group_size=48)
    with pytest.raises(ValueError, match="group_size, zeros: expected none for float32"):
        ops.pack(normal(rng, 4, 96), group_size=32)
    with pytest.raises(ValueError, match=r"scale_dtype: expected float16 or bfloat16 for groups, got float32"):
        ops.pack_quantized(w.stored, w.scales.astype(np.float32), w.zeros, **options)
    with pytest.raises(ValueError, match=r"values: expected uint8\[any, 49\], got uint8\[70, 50\]"):
        ops.pack_quantized(w.stored, w.scales, w.zeros, columns=98, **options)
    with pytest.raises(ValueError, match=r"scales: expected float16\[70, 4\], got float16\[70, 3\]"):
        ops.pack_quantized(w.stored, w.scales[:, :3], w.zeros, **options)
    with pytest.raises(ValueError, match=r"zeros: expected uint8\[70, 4\], got uint8\[69, 4\]"):
        ops.pack_quantized(w.stored, w.scales, w.zeros[:69], **options)
    with pytest.raises(TypeError, match=r"values: expected uint8\[any, 50\], got int8"):
        ops.pack_quantized(w.stored.view(np.int8), w.scales, w.zeros, **options)
    with pytest.raises(ValueError, match="dst: expected a matrix of int8 or int4, got float32"):
        ops.pack_quantized(w.stored, w.scales, dtype="float32", group_size=0)
    matrix = packed(ops, w)
    with pytest.raises(ValueError, match="zeros: expected uint8, as the matrix has them, got None"):
        ops.context.pack_quantized(matrix, w.stored, w.scales, None)
    with pytest.raises(TypeError, match=r"scales: expected float16, got bfloat16"):
        ops.context.pack_quantized(matrix, w.stored, w.scales.astype(BF16), w.zeros)
    with pytest.raises(ValueError, match="rows 1 to 71 lie outside"):
        ops.context.pack_quantized(matrix, w.stored, w.scales, w.zeros, 1)
    with pytest.raises(ValueError, match="dst: expected a matrix without zeros"):
        ops.context.pack(matrix, normal(rng, 70, 100))
    assert (matrix.dtype, matrix.group_size, matrix.symmetric) == ("int4", 32, False)

"""Layer norm and RMS norm against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.harness import DIMS, ISAS, Framed, assert_close, at_isa
from oracle.norm import norm, norm_backward

from pyllm.ops import Ops
from pyllm.ops_training import TrainingOps
from pyllm.spec import NormKind

OPS = TrainingOps(threads=2)
RNG = np.random.default_rng(5)
KINDS = list(NormKind)


def random(*shape: int, mean: float = 0.3) -> np.ndarray:
    return RNG.normal(mean, 1.7, shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_formula(isa: str, kind: NormKind) -> None:
    for dim in DIMS:
        for rows in (0, 1, 3):
            for weighted, biased in ((True, True), (True, False), (False, False)):
                x = Framed(random(rows, dim), offset=dim % 5)
                weight = random(dim, mean=1) if weighted else None
                bias = random(dim) if biased else None
                out = Framed(np.zeros((rows, dim), np.float32), offset=3)
                with at_isa(isa):
                    OPS.norm(x.array, weight, bias, kind=kind, eps=1e-5, out=out.array)
                out.check()
                naive = norm(x.array, weight, bias, kind.value, 1e-5)
                assert_close(out.array, norm(x.array.astype(np.float64), weight, bias, kind.value, 1e-5), naive)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_residual_and_sum(isa: str, kind: NormKind) -> None:
    for dim in (1, 17, 64, 129, 768):
        x, residual, weight = random(5, dim), random(5, dim), random(dim)
        added = x + residual
        oracle = norm(added.astype(np.float64), weight, None, kind.value, 1e-6)
        naive = norm(added, weight, None, kind.value, 1e-6)
        with at_isa(isa):
            total = Framed(np.zeros_like(x))
            y = OPS.norm(x, weight, kind=kind, eps=1e-6, residual=residual, sum_out=total.array)
            assert_close(y, oracle, naive)
            total.check()
            assert np.array_equal(total.array, added)
            without = OPS.norm(x, weight, kind=kind, eps=1e-6, residual=residual)
            assert np.array_equal(without, y)
            stream = x.copy()  # the sum may replace x
            again = OPS.norm(stream, weight, kind=kind, eps=1e-6, residual=residual, sum_out=stream)
            assert np.array_equal(again, y)
            assert np.array_equal(stream, added)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_in_place(isa: str, kind: NormKind) -> None:
    """The heads of a slice of a wider array, as the norm of queries and keys uses it."""
    for heads, size in ((1, 7), (3, 16), (4, 33), (8, 128)):
        wide = random(6, heads * size + 11)
        weight, bias = random(size), random(size)
        expected = wide.copy()
        view = wide[:, 4 : 4 + heads * size].reshape(6, heads, size)
        oracle = norm(view.astype(np.float64), weight, bias, kind.value, 1e-6)
        naive = norm(view, weight, bias, kind.value, 1e-6)
        view = np.lib.stride_tricks.as_strided(wide[:, 4:], (6, heads, size), (wide.strides[0], size * 4, 4))
        with at_isa(isa):
            assert OPS.norm(view, weight, bias, kind=kind, eps=1e-6, out=view) is view
        assert_close(view, oracle, naive)
        expected[:, 4 : 4 + heads * size] = wide[:, 4 : 4 + heads * size]
        assert np.array_equal(wide, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_large_mean_keeps_its_variance(isa: str) -> None:
    """Squared deviations, not the difference of large squares."""
    x = (10000 + RNG.normal(0, 1, (2, 512))).astype(np.float32)
    with at_isa(isa):
        y = OPS.norm(x, None, kind=NormKind.LAYER, eps=1e-5)
    oracle = norm(x.astype(np.float64), None, None, "layer", 1e-5)
    assert np.abs(y - oracle).max() < 2e-3  # the mean itself is rounded to 2^-10


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_threads_and_rows(isa: str, kind: NormKind) -> None:
    x, weight, bias = random(301, 257), random(257), random(257)
    with at_isa(isa):
        one = Ops(threads=1).norm(x, weight, bias, kind=kind, eps=1e-5)
        assert one.tobytes() == Ops(threads=3).norm(x, weight, bias, kind=kind, eps=1e-5).tobytes()
        for r in (0, 7, 300):
            alone = Framed(x[r : r + 1], offset=r % 4)
            assert OPS.norm(alone.array, weight, bias, kind=kind, eps=1e-5).tobytes() == one[r].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_graph_equals_eager(isa: str) -> None:
    x, weight = random(4, 100), random(100)
    ops = Ops(threads=2)
    with at_isa(isa):
        eager = ops.norm(x, weight, kind=NormKind.RMS, eps=1e-5)
        ops.begin_recording()
        out = ops.norm(x, weight, kind=NormKind.RMS, eps=1e-5, out=np.zeros_like(x))
        graph = ops.end_recording()
        assert not out.any()
        ops.replay(graph)
        assert out.tobytes() == eager.tobytes()


def test_bad_arguments() -> None:
    x = random(3, 8)
    cases = [
        ({"weight": random(7)}, ValueError, "weight: expected float32"),
        ({"weight": random(8).astype(np.float64)}, TypeError, "weight: expected float32"),
        ({"out": np.zeros((3, 9), np.float32)}, ValueError, "out: expected"),
        ({"residual": random(2, 8)}, ValueError, "residual: expected"),
        ({"sum_out": random(3, 8)}, ValueError, "sum_out: expected a residual"),
        ({"eps": float("nan")}, ValueError, "eps: expected"),
        ({"eps": -1e-5}, ValueError, "eps: expected"),
        ({"out": random(8, 3).T}, ValueError, "out: expected an aligned array"),
    ]
    for changes, error, message in cases:
        arguments = {"weight": None, "kind": NormKind.RMS, "eps": 1e-5} | changes
        with pytest.raises(error, match=message):
            OPS.norm(x, **arguments)
    out = random(3, 8)
    with pytest.raises(ValueError, match="array of its own"):
        OPS.norm(x, None, kind=NormKind.RMS, eps=0, residual=x, sum_out=out, out=out)
    with pytest.raises(ValueError, match="adjacent heads"):
        OPS.norm(random(3, 4, 8)[:, ::2], None, kind=NormKind.RMS, eps=0)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_formula_is_the_derivative(kind: NormKind) -> None:
    dy, x, weight, bias = (RNG.normal(size=shape) for shape in ((3, 5), (3, 5), 5, 5))
    gradients = norm_backward(dy, x, weight, kind.value, 1e-3)
    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        for at in np.ndindex(*array.shape):
            before, ends = array[at], []
            for step in (1e-5, -1e-5):
                array[at] = before + step
                ends.append((norm(x, weight, bias, kind.value, 1e-3) * dy).sum())
            array[at] = before
            assert abs((ends[0] - ends[1]) / 2e-5 - gradient[at]) < 1e-8


def backward_formulas(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray | None, kind: NormKind, eps: float
) -> list[tuple[np.ndarray, ...]]:
    """In float64, and in float32."""
    return [norm_backward(dy.astype(t), x.astype(t), weight, kind.value, eps) for t in (np.float64, np.float32)]


def max_scale(x: np.ndarray, kind: NormKind) -> float:
    """The largest factor that a row is normalised with."""
    if not x.size:
        return 0.0
    x = x.astype(np.float64)
    squares = x.var(-1) if kind is NormKind.LAYER else (x * x).mean(-1)
    return float((1 / np.sqrt(squares + 1e-5)).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_matches_formula(isa: str, kind: NormKind) -> None:
    for dim in DIMS:
        for rows in (0, 1, 3, 40):
            x, dy = Framed(random(rows, dim), offset=dim % 5).array, Framed(random(rows, dim), offset=2).array
            weight = random(dim, mean=1) if rows != 3 else None
            out = Framed(np.zeros((rows, dim), np.float32), offset=3)
            sums = [Framed(random(dim), offset=i) for i in (1, 2)]
            before = [s.array.copy() for s in sums]
            arguments = {"kind": kind, "eps": 1e-5}
            with at_isa(isa):
                OPS.norm_backward(dy, x, weight, dweight=sums[0].array, dbias=sums[1].array, out=out.array, **arguments)
                for a in (out, *sums):
                    a.check()
                without = OPS.norm_backward(dy, x, weight, **arguments)
                assert without.tobytes() == out.array.tobytes()
            oracle, naive = backward_formulas(dy, x, weight, kind, 1e-5)
            # Where the naive version is exact by luck: dy weight is rounded, and what is taken off along 1 and along x.
            scale = max_scale(x, kind)
            floor = 2**-23 * scale * np.abs(dy if weight is None else dy * weight).max(initial=0)
            lucky = np.abs(naive[0] - oracle[0]).max(initial=0) < floor
            assert_close(out.array, oracle[0], oracle[0] + floor if lucky else naive[0])
            for a, start, exact, usual in zip(sums, before, oracle[1:], naive[1:], strict=True):
                assert_close(a.array, start + exact, start + usual)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_of_heads_with_residual(isa: str, kind: NormKind) -> None:
    """Heads in slices of wider arrays, and the gradient that comes past the norm; out may be dy or the residual."""
    for heads, size in ((1, 7), (3, 16), (4, 33), (8, 128)):
        wide, dy, residual = random(6, heads * size + 11), random(6, heads, size), random(6, heads, size)
        x = np.lib.stride_tricks.as_strided(wide[:, 4:], (6, heads, size), (wide.strides[0], size * 4, 4))
        weight, dweight, dbias = random(size), np.zeros(size, np.float32), np.zeros(size, np.float32)
        arguments = {"kind": kind, "eps": 1e-6}
        oracle, naive = backward_formulas(dy, x, weight, kind, 1e-6)
        with at_isa(isa):
            out = OPS.norm_backward(dy, x, weight, dweight=dweight, dbias=dbias, residual=residual, **arguments)
            for place in (dy.copy(), residual.copy()):
                given = {"residual": place if place.tobytes() == residual.tobytes() else residual, "out": place}
                cotangent = dy if given["residual"] is place else place
                assert OPS.norm_backward(cotangent, x, weight, **given, **arguments) is place
                assert place.tobytes() == out.tobytes()
        assert_close(out, oracle[0] + residual, naive[0] + residual)
        assert_close(dweight, oracle[1], naive[1])
        assert_close(dbias, oracle[2], naive[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_same_bits_for_threads_and_graph(isa: str, kind: NormKind) -> None:
    x, dy, weight = random(2001, 67), random(2001, 67), random(67)

    def run(ops: TrainingOps) -> tuple[np.ndarray, ...]:
        sums = np.ones(67, np.float32), np.ones(67, np.float32)
        return *sums, ops.norm_backward(dy, x, weight, kind=kind, eps=1e-5, dweight=sums[0], dbias=sums[1])

    with at_isa(isa):
        expected = run(TrainingOps(threads=1))
        for threads in (2, 3):
            assert all(a.tobytes() == b.tobytes() for a, b in zip(run(TrainingOps(threads)), expected, strict=True))
        ops = TrainingOps(threads=2)
        ops.begin_recording()
        recorded = run(ops)
        graph = ops.end_recording()
        ops.replay(graph)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(recorded, expected, strict=True))
        alone = OPS.norm_backward(dy[7:8], x[7:8], weight, kind=kind, eps=1e-5)
        assert alone.tobytes() == expected[2][7].tobytes()


def test_backward_bad_arguments() -> None:
    x = random(3, 8)
    for changes, error, message in (
        ({"dy": random(3, 7)}, ValueError, "dy: expected"),
        ({"weight": random(7)}, ValueError, "weight: expected float32"),
        ({"dweight": random(7)}, ValueError, "dweight: expected float32"),
        ({"dbias": random(8).astype(np.float64)}, TypeError, "dbias: expected float32"),
        ({"residual": random(2, 8)}, ValueError, "residual: expected"),
        ({"out": x}, ValueError, "out: expected memory of its own, .* overlaps x"),
        ({"eps": -1.0}, ValueError, "eps: expected"),
    ):
        arguments = {"dy": x.copy(), "x": x, "weight": None, "kind": NormKind.RMS, "eps": 1e-5} | changes
        with pytest.raises(error, match=message):
            OPS.norm_backward(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_each_head(kind: NormKind) -> None:
    """A row of weights for each head, both ways: what heads by themselves give, in columns of a wider array."""
    wide, weight, dweight = random(7, 90), random(5, 12), random(5, 12)
    x, dy, residual = wide[:, 20:80].reshape(7, 5, 12), random(7, 5, 12), random(7, 5, 12)
    arguments = {"kind": kind, "eps": 1e-5}
    sums, out = dweight.copy(), np.zeros_like(dy)
    y = OPS.norm(x, weight, **arguments)
    OPS.norm_backward(dy, x, weight, dweight=sums, residual=residual, out=out, **arguments)
    for head in range(5):
        alone, sums_of_head = np.ascontiguousarray(x[:, head]), dweight[head].copy()
        assert np.array_equal(y[:, head], OPS.norm(alone, weight[head], **arguments))
        given = np.ascontiguousarray(dy[:, head]), alone, weight[head]
        dx = OPS.norm_backward(
            *given, dweight=sums_of_head, residual=np.ascontiguousarray(residual[:, head]), **arguments
        )
        assert np.array_equal(out[:, head], dx)
        assert np.array_equal(sums[head], sums_of_head)
    for call in (lambda: OPS.norm(x, weight[:4], **arguments), lambda: OPS.norm(x[:, 0], weight, **arguments)):
        with pytest.raises(ValueError, match=r"weight: expected .*a row for each head of x"):
            call()

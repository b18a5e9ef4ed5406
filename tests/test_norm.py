"""Layer norm and RMS norm against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from oracle.harness import DIMS, ISAS, Framed, assert_close, at_isa
from oracle.norm import norm

from pyllm.ops import Ops
from pyllm.spec import NormKind

OPS = Ops(threads=2)
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

"""AdamW and the norm of gradients against float64, at every ISA level, and their bitwise promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from oracle import optim as oracle
from oracle.harness import DIMS, ISAS, Framed, assert_close, at_isa

from pyllm import _cpu
from pyllm.ops_training import TrainingOps

Array = NDArray[Any]

OPS = TrainingOps(threads=2)
EPS = 2.0**-24
BETAS = (0.9, 0.999)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with at_isa(request.param):
        yield request.param


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(13)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def state(rng: np.random.Generator, size: int) -> list[Array]:
    """params, grads, m and v."""
    return [normal(rng, size), normal(rng, size), normal(rng, size) * 0.1, normal(rng, size) ** 2 * 0.01]


def naive(arrays: list[Array], scalars: Array, decay: float) -> tuple[Array, Array, Array]:
    rate, beta1, beta2, eps, correction1, correction2, scale = scalars.astype(np.float32)
    params, grads, m, v = arrays
    one = np.float32(1)
    g = grads * scale
    m = beta1 * m + (one - beta1) * g
    v = beta2 * v + (one - beta2) * g * g
    params = params * (one - rate * np.float32(decay))
    return params - rate * (m / correction1) / (np.sqrt(v / correction2) + eps), m, v


def test_one_step(isa: str, rng: np.random.Generator) -> None:
    for size in (0, *DIMS, 40000):
        framed = [Framed(a, offset=i + 1) for i, a in enumerate(state(rng, size))]
        arrays = [f.array for f in framed]
        scalars = oracle.hyper(1e-2, *BETAS, 1e-8, 3, 0.7)
        want = oracle.adamw(*(a.astype(np.float64) for a in arrays), scalars, 0.1)
        plain = naive([a.copy() for a in arrays], scalars, 0.1)
        params, grads, m, v = arrays
        before = grads.copy()
        OPS.adamw(params, grads, m, v, scalars, 0.1)
        for got, exact, simple in zip((params, m, v), want, plain, strict=True):
            assert_close(got, exact, simple)
        assert np.array_equal(grads, before)
        for f in framed:
            f.check()


def test_twenty_steps(isa: str, rng: np.random.Generator) -> None:
    """Within 1e-6 of the distance that the parameters have gone, beside their rounding."""
    size, decay = 1000, 0.1
    params, _, _, _ = state(rng, size)
    m, v = np.zeros(size, np.float32), np.zeros(size, np.float32)
    exact = [params.astype(np.float64), np.zeros(size), np.zeros(size)]
    for step in range(1, 21):
        grads = (normal(rng, size) * 10.0 ** rng.integers(-6, 1, size)).astype(np.float32)
        scalars = oracle.hyper(1e-3 * step / 20, *BETAS, 1e-8, step, 1 / step)
        exact = list(oracle.adamw(exact[0], grads.astype(np.float64), exact[1], exact[2], scalars, decay))
        OPS.adamw(params, grads, m, v, scalars, decay)
    moved = np.float64(1e-3) * 20
    assert np.abs(params - exact[0]).max() <= 1e-6 * moved + 20 * EPS * np.abs(params).max()
    np.testing.assert_allclose(v, exact[2], rtol=20 * 4 * EPS)


@pytest.mark.oracle
def test_twenty_steps_of_torch(rng: np.random.Generator) -> None:
    import torch

    start = normal(rng, 3000)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    params, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for step in range(1, 21):
        grads = normal(rng, 3000)
        parameter.grad = torch.from_numpy(grads.copy())
        optimizer.step()
        OPS.adamw(params, grads, m, v, oracle.hyper(3e-3, 0.9, 0.95, 1e-8, step), 0.1)
    np.testing.assert_allclose(params, parameter.detach().numpy(), rtol=2e-6, atol=2e-6 * 20 * 3e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_narrow_copy(isa: str, gated: bool, rng: np.random.Generator) -> None:
    """The narrow matrix holds what packing the new weights into it gives, and the update does not depend on it."""
    for n, k in ((1, 1), (5, 3), (64, 64), (70, 33), (130, 257)):
        weights = [normal(rng, n, k) for _ in range(1 + gated)]
        wide = OPS.pack(weights[-1], gate=weights[0] if gated else None)
        alone = wide.flat.copy()
        narrow = _cpu.PackedMatrix(n, k, "bfloat16", gated)
        grads, m, v = state(rng, wide.flat.size)[1:]
        moments = m.copy(), v.copy()
        scalars = oracle.hyper(1e-2, *BETAS, 1e-8, 1)
        OPS.adamw(wide.flat, grads, m, v, scalars, 0.1, narrow=narrow)
        OPS.adamw(alone, grads, *moments, scalars, 0.1)
        assert np.array_equal(wide.flat, alone) and np.array_equal(m, moments[0]) and np.array_equal(v, moments[1])
        new = OPS.unpack(wide)
        want = OPS.pack(new[-n:], gate=new[:n] if gated else None, dtype="bfloat16")
        assert np.array_equal(OPS.unpack(narrow), OPS.unpack(want))


def test_moments_without_gradients_end_at_zero(isa: str, rng: np.random.Generator) -> None:
    """And not at denormals, which they would never leave and which cost tens of times as much."""
    params, grads, m, v = state(rng, 37)
    m, v = m * np.float32(1e-36), v * np.float32(1e-34)
    for step in range(1, 60):
        OPS.adamw(params, grads * 0, m, v, oracle.hyper(1e-2, 0.9, 0.9, 1e-8, step), 0.0)
        assert all(np.all((a == 0) | (np.abs(a) >= 2.0**-126)) for a in (m, v))
    assert not m.any() and np.isfinite(params).all()


def test_clear(isa: str, rng: np.random.Generator) -> None:
    params, grads, m, v = state(rng, 20011)
    kept = [a.copy() for a in (params, grads, m, v)]
    scalars = oracle.hyper(1e-2, *BETAS, 1e-8, 1)
    OPS.adamw(params, grads, m, v, scalars, 0.1, clear=True)
    OPS.adamw(*kept, scalars, 0.1)
    assert not grads.any()
    assert np.array_equal(params, kept[0]) and np.array_equal(m, kept[2]) and np.array_equal(v, kept[3])


def test_square_norm(isa: str, rng: np.random.Generator) -> None:
    for size in (0, *DIMS, 65535, 65536, 65537, 1 << 20):
        x = Framed(normal(rng, size), offset=size % 7)
        out = np.array([2.5])
        OPS.square_norm(out, x.array)
        want = 2.5 + float((x.array.astype(np.float64) ** 2).sum())
        # float32 within 1024 elements, and no more in all: random roundings of blocks cancel.
        assert abs(out[0] - want) <= 4 * EPS * want


def test_square_norm_of_many_large_and_small(isa: str, rng: np.random.Generator) -> None:
    x = (normal(rng, 1 << 21) * 10.0 ** rng.integers(-8, 8, 1 << 21)).astype(np.float32)
    out = np.zeros(1)
    OPS.square_norm(out, x)
    want = float((x.astype(np.float64) ** 2).sum())
    assert abs(out[0] - want) <= 4 * EPS * want


def test_threads_and_reruns_give_the_same_bits(isa: str, rng: np.random.Generator) -> None:
    start, results = state(rng, 300007), []
    for threads in (1, 2, 3, 2):
        ops = TrainingOps(threads)
        params, grads, m, v = (a.copy() for a in start)
        total = np.zeros(1)
        ops.square_norm(total, grads)
        ops.adamw(params, grads, m, v, oracle.hyper(1e-2, *BETAS, 1e-8, 1), 0.1)
        results.append((total.tobytes(), params.tobytes(), m.tobytes(), v.tobytes()))
    assert len(set(results)) == 1


def test_clipping_inside_a_graph(isa: str, rng: np.random.Generator) -> None:
    """Recorded steps read rate, step and the factor of gradients anew at each replay."""
    size, bound = 5003, 1.0
    params, grads, m, v = state(rng, size)
    other = [params.copy(), m.copy(), v.copy()]
    scalars, square = np.ones(7), np.zeros(1)
    OPS.begin_recording()
    OPS.square_norm(square, grads)
    measure = OPS.end_recording()
    OPS.begin_recording()
    OPS.adamw(params, grads, m, v, scalars, 0.1)
    update = OPS.end_recording()
    for step, size_of_gradient in ((1, 1e-3), (2, 1.0), (3, 50.0)):
        grads[...] = normal(rng, size) * np.float32(size_of_gradient)
        scalars[:6] = oracle.hyper(1e-3 * step, *BETAS, 1e-8, step)[:6]
        square[0] = 0
        OPS.replay(measure)
        norm = float(np.sqrt((grads.astype(np.float64) ** 2).sum()))
        assert abs(np.sqrt(square[0]) - norm) <= 1e-6 * norm
        scalars[6] = min(1.0, bound / (norm + 1e-6))
        assert (scalars[6] == 1.0) == (step == 1)
        OPS.replay(update)
        OPS.adamw(other[0], grads, other[1], other[2], oracle.hyper(1e-3 * step, *BETAS, 1e-8, step, scalars[6]), 0.1)
        assert np.array_equal(params, other[0])


def test_a_gradient_that_is_no_number_is_not_hidden(isa: str) -> None:
    for bad in (np.nan, np.inf):
        x, square = np.full(2000, 1e-3, np.float32), np.zeros(1)
        x[1234] = bad
        OPS.square_norm(square, x)
        assert not np.isfinite(square[0])


def test_bad_arguments(rng: np.random.Generator) -> None:
    params, grads, m, v = state(rng, 64)
    good = oracle.hyper(1e-3, *BETAS, 1e-8, 1)
    with pytest.raises(ValueError, match=r"m: expected float32\[64\], got float32\[63\]"):
        OPS.adamw(params, grads, m[:63], v, good, 0.0)
    with pytest.raises(TypeError, match=r"hyper: expected float64\[7\], got float32\[7\]"):
        OPS.adamw(params, grads, m, v, good.astype(np.float32), 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight_decay: expected a finite number >= 0"):
        OPS.adamw(params, grads, m, v, good, -1.0)
    for index, value in ((0, -1.0), (0, np.nan), (1, 1.0), (2, -0.1), (3, 0.0), (4, 0.0), (5, 1.5)):
        bad = good.copy()
        bad[index] = value
        with pytest.raises(ValueError, match=rf"hyper\[{index}\]: expected"):
            OPS.adamw(params, grads, m, v, bad, 0.0)
    with pytest.raises(ValueError, match="narrow: expected a matrix of bfloat16, got one of float32"):
        OPS.adamw(params, grads, m, v, good, 0.0, narrow=_cpu.PackedMatrix(1, 1, "float32"))
    with pytest.raises(ValueError, match="params: expected the 128 elements of the panels of narrow, got 64"):
        OPS.adamw(params, grads, m, v, good, 0.0, narrow=_cpu.PackedMatrix(1, 2, "bfloat16"))
    with pytest.raises(ValueError, match=r"out: expected float64\[1\], got float64\[2\]"):
        OPS.square_norm(np.zeros(2), params)

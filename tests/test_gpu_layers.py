"""The small CUDA kernels on a GPU through their bindings, against float64 and the CPU; skipped where there is none.

Outputs are NaN before each run, sizes odd, and three runs give the same bits.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracle.activation import activation as activation_formula
from oracle.norm import norm as norm_formula
from oracle.rope import rope as rope_formula
from oracle.rope import rope_angles as angles_formula
from test_gpu import Kernels, close, thrice

from pyllm import device
from pyllm.ops import ACTIVATIONS, Ops
from pyllm.sampling import SAMPLE_ROW, SamplingParams, SamplingState, sample_inputs
from pyllm.spec import Activation

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float32 = np.dtype(np.float32)
MISSING = device.unavailable()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=f"no GPU to run on: {MISSING}")]
rng = np.random.default_rng


@pytest.fixture(scope="module")
def gpu():
    return device.open_device()


@pytest.fixture(scope="module")
def kernels(gpu):
    return Kernels(gpu.kernels)


@pytest.mark.parametrize("dtype", [float32, bfloat16])
@pytest.mark.parametrize("dim", [33, 128, 2053])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm(gpu, kernels, kind, dim, dtype):
    x = rng(dim).standard_normal((5, dim)).astype("f4") + 3
    residual, weight, bias = (rng(1).standard_normal(shape).astype("f4") for shape in ((5, dim), dim, dim))
    arrays = [gpu.upload(a) for a in (x, weight, bias, residual)]
    got = thrice(gpu, lambda y: kernels.norm(y, *arrays, None, 1e-5, int(kind == "rms"), gpu.stream), (5, dim), dtype)
    close(got, norm_formula((x + residual).astype("f8"), weight, bias, kind, 1e-5), 1e-3 if dtype == float32 else 1e-2)


@pytest.mark.parametrize("name", list(Activation))
def test_activation(gpu, kernels, name):
    x, up = rng(0).standard_normal((2, 3, 1029)).astype("f4")
    arrays = [gpu.upload(a) for a in (x, up)]
    got = thrice(gpu, lambda y: kernels.activation(y, *arrays, ACTIVATIONS[name], gpu.stream), x.shape, bfloat16)
    close(got, activation_formula(x.astype("f8"), name.value) * up, 1e-2)


def test_axpby(gpu, kernels):
    x, y = rng(0).standard_normal((2, 3, 1029)).astype("f4")
    arrays = [gpu.upload(a) for a in (x, y)]
    got = thrice(gpu, lambda out: kernels.axpby(out, arrays[0], 0.5, arrays[1], -2.0, gpu.stream), x.shape, float32)
    close(got, 0.5 * x.astype("f8") - 2.0 * y, 1e-6)


def test_gather_columns(gpu, kernels):
    x, index = rng(0).standard_normal((3, 37)).astype("f4"), rng(1).permutation(37).astype(np.int32)[:33]
    arrays = [gpu.upload(a) for a in (x, index)]
    got = thrice(gpu, lambda y: kernels.gather_columns(y, *arrays, gpu.stream), (3, 33), float32)
    assert (got == x[:, index]).all()


def test_embedding(gpu, kernels):
    table, places = rng(0).standard_normal((11, 65)).astype(bfloat16), rng(1).standard_normal((5, 65)).astype("f4")
    tokens, positions = np.array([10, 0, 3], np.int32), np.array([0, 4, 2], np.int32)
    arrays = [gpu.upload(a) for a in (tokens, table, positions, places)]
    got = thrice(gpu, lambda y: kernels.embedding(y, *arrays, gpu.stream), (3, 65), float32)
    assert (got == table[tokens].astype("f4") + places[positions]).all()


def test_rope_and_kv_write(gpu, kernels):
    positions, inv_freq = np.array([0, 5, 131071], np.int32), (10000.0 ** -(np.arange(32) / 32)).astype("f4")[None]
    places, frequencies = gpu.upload(positions), gpu.upload(inv_freq)
    cos, sin = (gpu.upload(np.full((3, 32), np.nan, "f4")) for _ in range(2))
    kernels.rope_angles(cos, sin, places, frequencies, None, 1.0, gpu.stream)
    c, s = angles_formula(positions, inv_freq[0], 1.0)
    assert np.abs(cos.numpy() - c).max() <= 2**-23
    assert np.abs(sin.numpy() - s).max() <= 2**-23
    k, v = rng(0).standard_normal((2, 3, 2, 80)).astype("f4")
    keys = rope_formula(k.astype("f8"), c, s)
    turned = gpu.upload(k.reshape(3, 160))
    kernels.rope(turned, cos, sin, 80, False, gpu.stream)
    close(turned.numpy().astype("f8"), keys.reshape(3, 160), 1e-3)
    slots = gpu.upload(np.array([64, -1, 3], np.int64))
    flat = [gpu.upload(a.reshape(3, 160)) for a in (k, v)]
    cache = thrice(
        gpu,
        lambda cache: kernels.kv_write(cache, *flat, slots, 80, cos, sin, gpu.stream),
        (2, 2, 2, 64, 80),
        bfloat16,
    )
    for row, (block, offset) in ((0, (1, 0)), (2, (0, 3))):
        close(cache[block, :, 0, offset], keys[row], 1e-2)
        assert (cache[block, :, 1, offset] == v[row].astype(bfloat16)).all()
        cache[block, :, :, offset] = np.nan
    assert np.isnan(cache).all()


@pytest.mark.parametrize("chain", [{"temperature": 0}, {}, {"top_k": 40, "top_p": 0.9, "min_p": 0.05}], ids=str)
def test_sample_and_logprobs_are_those_of_the_cpu(gpu, kernels, chain):
    states = [
        SamplingState(SamplingParams(repetition_penalty=1.2, logit_bias={3: 2.0}, **chain), [1, 2], seed)
        for seed in (1, 2, 3)
    ]
    logits, inputs, ops = rng(0).normal(0, 3, (3, 50257)).astype("f4"), sample_inputs(states), Ops(threads=1)
    rows = gpu.upload(inputs.rows.view(np.uint8).reshape(3, -1))
    lists = [gpu.upload(a) for a in (*inputs.history, *inputs.bias)]
    expected, tokens = ops.sample(logits.copy(), inputs), gpu.upload(np.zeros(3, np.int32))
    for _ in range(3):
        kernels.sample(tokens, gpu.upload(logits), rows, *lists, None, None, None, gpu.stream)
        assert (tokens.numpy() == expected).all()
    chosen, top = (gpu.upload(np.zeros(shape, "f4")) for shape in (3, (3, 20)))
    ranks, top_ids = (gpu.upload(np.zeros(shape, np.int32)) for shape in (3, (3, 20)))
    kernels.logprobs(chosen, ranks, top, top_ids, gpu.upload(logits), tokens, gpu.stream)
    for got, other in zip((chosen, ranks, top, top_ids), ops.logprobs(logits, expected, 20), strict=True):
        assert np.allclose(got.numpy(), other, rtol=1e-5, atol=1e-6)


def test_advance_makes_the_inputs_of_the_next_step(gpu, kernels):
    rows = np.zeros(3, SAMPLE_ROW)
    rows["position"], rows["seed"] = [4, 0, 2**40], 7
    host = [np.array([1, 2, 3], np.int32), np.array([5, 0, 9], np.int32), np.array([70, -1, 3], np.int64),
            np.array([6, 1, 10], np.int32)]  # fmt: skip
    arrays = [gpu.upload(a) for a in host]
    draws = gpu.upload(rows.view(np.uint8).reshape(3, -1))
    kernels.advance(*arrays, draws, gpu.upload(np.array([8, -1, 9], np.int32)), gpu.stream)
    for got, want in zip(arrays, ([8, -1, 9], [6, 1, 10], [71, 0, 4], [7, 2, 11]), strict=True):
        assert got.numpy().tolist() == want
    after = draws.numpy().reshape(-1).view(SAMPLE_ROW)
    assert after["position"].tolist() == [5, 1, 2**40 + 1] and (after["seed"] == 7).all()

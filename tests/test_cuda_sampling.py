"""The CUDA kernels of sampling on the host emulator, against the CPU's and a reference that sorts in float64."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_host import LogprobsArgs, RowLists, SampleArgs, build
from oracle.sampling import log_softmax, probabilities

from pyllm import _cpu
from pyllm.ops import Ops
from pyllm.sampling import SampleInputs, SamplingParams, SamplingState, sample_inputs

OPS = Ops(threads=1)
CHAINS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.95},
    {"top_k": 3000},
    {"top_p": 0.01},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 5.0},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
]
rng = np.random.default_rng


@pytest.fixture(scope="module")
def kernels():
    return build()


def pointer(array):
    return 0 if array is None else array.ctypes.data


def sample(kernels, logits, inputs):
    """Tokens [R]; `logits` [R, V] change as on the CPU."""
    tokens = np.full(len(logits), -7, np.int32)
    history, bias, allowed = inputs.history or (None,) * 3, inputs.bias or (None,) * 3, inputs.allowed or (None,) * 2
    workspace = np.full(0 if allowed[1] is None else len(allowed[1]), np.nan, "f4")
    args = SampleArgs(
        tokens=tokens.ctypes.data, logits=logits.ctypes.data, rows=inputs.rows.ctypes.data,
        history=RowLists(pointer(history[0]), pointer(history[1])), history_counts=pointer(history[2]),
        bias=RowLists(pointer(bias[0]), pointer(bias[1])), bias_values=pointer(bias[2]),
        allowed=RowLists(pointer(allowed[0]), pointer(allowed[1])), count=len(logits), vocab=logits.shape[1],
        stride=logits.shape[1], workspace=workspace.ctypes.data,
    )  # fmt: skip
    assert kernels.host_sample(args) == 0
    return tokens


def inputs_of(params, count, seed=3):
    states = [SamplingState(params, [], seed) for _ in range(count)]
    for i, state in enumerate(states):
        state.position = i
    return sample_inputs(states)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_draws_are_those_of_the_reference_and_the_cpu(kernels, chain):
    params = SamplingParams(**chain)
    for vocab, draws in ((1, 1), (33, 4), (1025, 3), (4099, 2)):
        x = rng(vocab).normal(0, 3, vocab).astype("f4")
        if vocab % 2:
            x = np.round(x)  # many equals, of which a border takes a part
        logits = np.tile(x, (draws, 1))
        inputs = inputs_of(params, draws)
        got = sample(kernels, logits.copy(), inputs)
        cumulative = np.cumsum(probabilities(x, params))
        for i, token in enumerate(got):
            u = _cpu.uniform(3, 0, i)
            if np.abs(cumulative - u).min() > 1e-6:  # clear of a border
                assert token == np.searchsorted(cumulative, u, side="right")
        assert (got == OPS.sample(logits.copy(), inputs)).all()


def test_top_p_takes_equals_by_rising_id(kernels):
    x = np.zeros((6, 2000), "f4")
    inputs = inputs_of(SamplingParams(top_p=0.25), 6)
    got = sample(kernels, x, inputs)
    assert (got < 500).all()
    assert got.tolist() == [int(_cpu.uniform(3, 0, i) * 500) for i in range(6)]


def test_greedy_takes_the_first_of_equals_and_refuses_what_has_no_order(kernels):
    x = rng(0).standard_normal((7, 1500)).astype("f4")
    x[0, [3, 1499]] = 9
    x[1] = -np.inf
    x[2, 700] = np.nan
    x[3, 1] = np.inf
    x[4] = -np.inf
    x[4, 1499] = -3e38
    x[5] = -0.0
    x[5, 1] = 0.0
    x[6, 5] = -np.nan
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1, top_k=1)):
        inputs = inputs_of(params, 7)
        expected = OPS.sample(x.copy(), inputs)
        assert expected[:5].tolist() == [3, -1, -1, -1, 1499] or params.temperature
        assert expected[6] == -1
        if params.temperature == 0:
            assert (sample(kernels, x.copy(), inputs) == expected).all()
        else:
            assert (sample(kernels, x.copy(), inputs)[1:5] == expected[1:5]).all()


def test_penalties_biases_and_allowed_ids(kernels):
    params = [
        SamplingParams(temperature=0.7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
        SamplingParams(temperature=0, logit_bias={3: 5.0, 40: -100.0}),
        SamplingParams(temperature=1, allowed_token_ids=[7, 60, 7, 2]),
        SamplingParams(),
    ]
    states = [SamplingState(p, [1, 5, 9], seed=11) for p in params]
    for state in states:
        for token in (9, 9, 20):
            state.append(token)
    inputs = sample_inputs(states, [[], [3], [60], [0, 1]])
    x = rng(4).normal(0, 3, (4, 70)).astype("f4")
    mine, other = x.copy(), x.copy()
    assert (sample(kernels, mine, inputs) == OPS.sample(other, inputs)).all()
    assert np.allclose(mine, other, rtol=1e-6, atol=0)


def test_a_row_is_the_same_token_in_any_batch(kernels):
    x = rng(5).normal(0, 3, (4, 1300)).astype("f4")
    inputs = inputs_of(SamplingParams(top_p=0.8), 4)
    whole = sample(kernels, x.copy(), inputs)
    for row in range(4):
        alone = SampleInputs(inputs.rows[row : row + 1].copy())
        assert sample(kernels, x[row : row + 1].copy(), alone)[0] == whole[row]


def logprobs(kernels, logits, ids, top_n):
    rows = len(logits)
    chosen, ranks = np.full(rows, 7, "f4"), np.full(rows, 7, np.int32)
    top, top_ids = np.full((rows, top_n), 7, "f4"), np.full((rows, top_n), 7, np.int32)
    args = LogprobsArgs(
        chosen=chosen.ctypes.data, ranks=ranks.ctypes.data, top=top.ctypes.data, top_ids=top_ids.ctypes.data,
        logits=logits.ctypes.data, ids=ids.ctypes.data, count=rows, vocab=logits.shape[1], stride=logits.shape[1],
        top_n=top_n,
    )  # fmt: skip
    assert kernels.host_logprobs(args) == 0
    return chosen, ranks, top, top_ids


@pytest.mark.parametrize(("vocab", "top_n"), [(1, 1), (33, 0), (33, 33), (1025, 20), (4099, 3)])
def test_logprobs_match_the_reference_and_the_cpu(kernels, vocab, top_n):
    x = np.round(rng(vocab).normal(0, 3, (3, vocab)), 1).astype("f4")
    x[1, : vocab // 2] = -np.inf
    ids = rng(1).integers(0, vocab, 3).astype(np.int32)
    got, other = logprobs(kernels, x, ids, top_n), OPS.logprobs(x, ids, top_n)
    for mine, expected in zip(got[1::2], other[1::2], strict=True):  # ranks and ids
        assert (mine == expected).all()
    oracle = log_softmax(x)
    assert np.allclose(got[0], oracle[np.arange(3), ids], rtol=1e-6, atol=1e-6)
    assert np.allclose(got[2], other[2], rtol=1e-6, atol=1e-6)


def test_logprobs_of_rows_and_ids_that_have_none(kernels):
    x = rng(0).standard_normal((4, 50)).astype("f4")
    x[0, 3], x[1] = np.nan, -np.inf
    ids = np.array([0, 0, -1, 49], np.int32)
    chosen, ranks, top, top_ids = logprobs(kernels, x, ids, 2)
    assert np.isnan(chosen).tolist() == [True, True, True, False]
    assert ranks[:3].tolist() == [0, 0, 0]
    assert np.isnan(top[:2]).all()
    assert (top_ids[:2] == -1).all()
    assert (top_ids[2:, 0] == x[2:].argmax(1)).all()


def test_what_a_kernel_cannot_take_is_an_error(kernels):
    assert kernels.host_sample(SampleArgs(count=1, vocab=1 << 24)) != 0
    assert kernels.host_logprobs(LogprobsArgs(count=1, vocab=5, top_n=257)) != 0
    assert kernels.host_sample(SampleArgs(count=0, vocab=5)) == 0

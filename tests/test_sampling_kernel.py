"""The choice of tokens and log-probabilities, against a reference that sorts in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle.harness import ISAS, Framed, at_isa
from oracle.sampling import adjust, log_softmax, probabilities

from pyllm import _cpu
from pyllm.ops import Ops
from pyllm.sampling import SampleInputs, SamplingParams, SamplingState, sample_inputs

OPS = Ops(threads=2)
VOCABS = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 129, 260, 1000, 4099]
CHAINS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 40, "top_p": 0.95},
    {"top_k": 3000},
    {"top_p": 0.01},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 0.5},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def inputs(params: SamplingParams, count: int, seed: int = 3, position: int = 0) -> SampleInputs:
    """`count` rows of equal parameters, each with the draw of a position of its own."""
    states = [SamplingState(params, [], seed) for _ in range(count)]
    for i, state in enumerate(states):
        state.position = position + i
    return sample_inputs(states)


def expected_token(p: np.ndarray, u: float) -> tuple[int, bool]:
    """The token that u falls on, and whether it lies clear of the border to another by more than rounding."""
    cumulative = np.cumsum(p)
    token = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return token, bool(np.abs(cumulative - u).min() > 1e-5)


def test_generator_known_answers() -> None:
    """Test vectors published with Philox 4x32-10."""
    ones = 0xFFFFFFFF
    assert _cpu.philox4x32([0] * 4, [0] * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert _cpu.philox4x32([ones] * 4, [ones] * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    assert _cpu.philox4x32(pi[:4], pi[4:]) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_is_uniform() -> None:
    draws = np.array([_cpu.uniform(7, stream, i) for stream in range(3) for i in range(4000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.unique(draws).size == draws.size
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert ((counts - 600) ** 2 / 600).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_draws_follow_the_chain(isa: str, chain: dict[str, Any]) -> None:
    """The same uniform numbers through the reference give the same tokens, and only kept tokens are chosen."""
    params = SamplingParams(**chain)
    for vocab in VOCABS:
        x = rng(vocab).normal(0, 3, vocab).astype(np.float32)
        if vocab % 2:
            x = np.round(x)  # many ties
        p = probabilities(x, params)
        logits = Framed(np.tile(x, (40, 1)))
        with at_isa(isa):
            tokens = OPS.sample(logits.array, inputs(params, 40))
        logits.check()
        assert np.array_equal(logits.array, np.tile(x, (40, 1)))
        for i, token in enumerate(tokens):
            expected, clear = expected_token(p, _cpu.uniform(3, 0, i))
            assert p[token] > 0
            assert token == expected or not clear


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 10.0])
def test_kept_sets_of_a_large_vocabulary(isa: str, spread: float) -> None:
    """Draws at both ends and all along the kept mass, flat rows and whole rows of ties included."""
    vocab = 32003
    x = rng(1).normal(0, spread, vocab).astype(np.float32)
    for chain in (
        {"top_p": 0.9},
        {"top_p": 0.5, "temperature": 0.7},
        {"top_k": 2000},
        {"top_k": 40, "top_p": 0.95},
        {},
    ):
        params = SamplingParams(**chain)
        p = probabilities(x, params)
        with at_isa(isa):
            tokens = OPS.sample(np.tile(x, (30, 1)), inputs(params, 30))
        kept = np.flatnonzero(p)
        for i, token in enumerate(tokens):
            expected, _ = expected_token(p, _cpu.uniform(3, 0, i))
            near = np.searchsorted(kept, expected)
            assert token in kept[max(0, near - 8) : near + 9]  # float32 weights shift the border between tokens by 1e-7


@pytest.mark.parametrize("isa", ISAS)
def test_nucleus_of_equals_goes_by_id(isa: str) -> None:
    """Exactly half of 64 equal tokens hold half the probability; ties with the k-th stay all."""
    x = np.full((200, 256), -20, np.float32)
    x[:, 64:128] = 1.0
    with at_isa(isa):
        half = OPS.sample(x.copy(), inputs(SamplingParams(top_p=0.4999), 200))
        ties = OPS.sample(x.copy(), inputs(SamplingParams(top_k=5), 200))
        both = OPS.sample(x.copy(), inputs(SamplingParams(top_k=5, top_p=0.25), 200))
    assert set(half.tolist()) <= set(range(64, 96))
    assert {64, 95} & set(half.tolist())
    assert min(ties) >= 64
    assert max(ties) > 120
    assert set(both.tolist()) <= set(range(64, 80))


@pytest.mark.parametrize("isa", ISAS)
def test_distribution(isa: str) -> None:
    """Chi-square of 20,000 draws against the probabilities."""
    x = rng(2).normal(0, 1.5, 50).astype(np.float32)
    params = SamplingParams(top_k=20, top_p=0.98, temperature=1.3)
    p = probabilities(x, params)
    with at_isa(isa):
        tokens = OPS.sample(np.tile(x, (20000, 1)), inputs(params, 20000))
    counts = np.bincount(tokens, minlength=50)
    kept = p > 0
    assert counts[~kept].sum() == 0
    freedom = int(kept.sum()) - 1
    assert ((counts - 20000 * p)[kept] ** 2 / (20000 * p[kept])).sum() < freedom + 4.5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("isa", ISAS)
def test_greedy(isa: str) -> None:
    params = SamplingParams(temperature=0)
    for vocab in VOCABS:
        x = np.round(rng(vocab).normal(-5, 2, (60, vocab))).astype(np.float32)
        with at_isa(isa):
            assert np.array_equal(OPS.sample(x, inputs(params, 60)), x.argmax(1))
    negative = np.full((1, 67), -np.inf, np.float32)
    negative[0, 66] = -3e38
    with at_isa(isa):
        assert OPS.sample(negative, inputs(params, 1))[0] == 66


@pytest.mark.parametrize("isa", ISAS)
def test_penalties_bias_and_lists(isa: str) -> None:
    """Rows of different needs in one batch; the changed logits equal the reference to rounding."""
    vocab = 131
    generator = rng(4)
    cases: list[tuple[SamplingParams, list[int], list[int], list[int]]] = [
        (SamplingParams(repetition_penalty=1.3), [1, 2, 2, 5], [7, 7, 2], []),
        (SamplingParams(presence_penalty=1.5, frequency_penalty=-0.5), [1, 2], [2, 9, 9, 9], []),
        (SamplingParams(logit_bias={3: 5.0, 130: -100.0}), [1], [2], [4]),
        (SamplingParams(allowed_token_ids=[130, 4, 64]), [], [], [4]),
        (SamplingParams(), [5], [6], []),
        (
            SamplingParams(temperature=0, repetition_penalty=0.5, frequency_penalty=2, logit_bias={8: 1.0}),
            [8],
            [8, 8],
            [0],
        ),
        (SamplingParams(top_k=1, allowed_token_ids=[77]), [], [], []),
    ]
    states, expected = [], []
    logits = generator.normal(0, 2, (len(cases), vocab)).astype(np.float32)
    for (params, prompt, output, forbidden), row in zip(cases, logits, strict=True):
        state = SamplingState(params, prompt, seed=11)
        for token in output:
            state.append(token)
        states.append(state)
        expected.append(adjust(row, params, prompt, output, forbidden))
    batch = sample_inputs(states, [case[3] for case in cases])
    with at_isa(isa):
        tokens = OPS.sample(logits, batch)
    np.testing.assert_allclose(logits, np.array(expected), rtol=1e-6, atol=1e-6)
    for (params, _, output, _), row, token in zip(cases, expected, tokens, strict=True):
        if params.greedy:
            assert token == row.argmax()
        else:
            assert token == expected_token(probabilities(row, params), _cpu.uniform(11, 0, len(output)))[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("chain", [{}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 5}], ids=str)
def test_nothing_to_choose(isa: str, chain: dict[str, Any]) -> None:
    params = SamplingParams(**chain)
    for vocab in (1, 64, 67, 200):
        for place in {0, vocab // 2, vocab - 1}:
            x = rng().normal(0, 1, (4, vocab)).astype(np.float32)
            x[0, place], x[1, place], x[2], x[3] = np.nan, np.inf, -np.inf, -np.inf
            x[3, place] = -50
            with at_isa(isa):
                assert OPS.sample(x, inputs(params, 4)).tolist() == [-1, -1, -1, place]


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_logits(isa: str) -> None:
    """The largest numbers, denormals and zeros of both signs."""
    x = np.array([[-3.4e38, 3.4e38, 0, -0.0, 1e-40], [0, -0.0, 0, -0.0, -3.4e38]], np.float32)
    for chain in ({}, {"top_p": 0.5}, {"top_k": 2}, {"temperature": 1e-4}, {"temperature": 1e30}):
        with at_isa(isa):
            tokens = OPS.sample(x.copy(), inputs(SamplingParams(**chain), 2))
        assert tokens[0] == 1 or chain == {"temperature": 1e30}
        assert tokens[1] in range(5 if chain == {"temperature": 1e30} else 4)


@pytest.mark.parametrize("isa", ISAS)
def test_same_draw_in_any_batch(isa: str) -> None:
    x = rng(8).normal(0, 2, (64, 5000)).astype(np.float32)
    for chain in ({}, {"top_p": 0.8}, {"top_k": 50, "min_p": 0.01}):
        params = SamplingParams(**chain)
        with at_isa(isa):
            whole = Ops(threads=1).sample(x.copy(), inputs(params, 64))
            assert np.array_equal(whole, Ops(threads=3).sample(x.copy(), inputs(params, 64)))
            for r in (0, 13, 63):
                alone = Framed(x[r : r + 1], offset=r % 5)
                assert OPS.sample(alone.array, inputs(params, 1, position=r))[0] == whole[r]


@pytest.mark.parametrize("isa", ISAS)
def test_logprobs(isa: str) -> None:
    for vocab in VOCABS:
        x = Framed(rng(vocab).normal(0, 4, (5, vocab)).astype(np.float32))
        x.array[1] = np.round(x.array[1])
        x.array[2, : vocab // 2] = -np.inf
        ids = rng(1).integers(0, vocab, 5).astype(np.int32)
        top_n = min(20, vocab)
        oracle = log_softmax(x.array)
        with at_isa(isa):
            chosen, ranks, top, top_ids = OPS.logprobs(x.array, ids, top_n)
        for r in range(5):
            order = np.argsort(-x.array[r], kind="stable")[:top_n]
            order = order[x.array[r][order] > -np.inf]
            assert np.array_equal(top_ids[r, : order.size], order)
            assert np.all(top_ids[r, order.size :] == -1)
            assert np.all(top[r, order.size :] == -np.inf)
            np.testing.assert_allclose(top[r, : order.size], oracle[r, order], rtol=1.2e-7, atol=2e-7)
            np.testing.assert_allclose(chosen[r], oracle[r, ids[r]], rtol=1.2e-7, atol=2e-7)
            assert ranks[r] == 1 + (x.array[r] > x.array[r, ids[r]]).sum()


@pytest.mark.parametrize("isa", ISAS)
def test_logprobs_of_large_and_bad_rows(isa: str) -> None:
    x = rng(3).normal(0, 0.01, (4, 128256)).astype(np.float32)
    x[1, 5], x[2] = np.nan, -np.inf
    ids = np.array([9, 9, 9, 128255], np.int32)
    with at_isa(isa):
        chosen, ranks, top, top_ids = OPS.logprobs(x, ids, 3)
        only = OPS.logprobs(x, ids)
        again = Ops(threads=1).logprobs(x, ids, 3)
    assert np.array_equal(only[0], chosen, equal_nan=True)
    assert only[2].shape == (4, 0)
    assert again[0].tobytes() == chosen.tobytes()
    assert np.isnan(chosen[1:3]).all()
    assert ranks[1:3].tolist() == [0, 0]
    assert np.isnan(top[1:3]).all()
    assert np.all(top_ids[1:3] == -1)
    oracle = log_softmax(x[[0, 3]])
    np.testing.assert_allclose(chosen[[0, 3]], oracle[[0, 1], [9, 128255]], rtol=1e-7, atol=1e-7)


def test_bad_arguments() -> None:
    x = np.zeros((2, 8), np.float32)
    good = inputs(SamplingParams(), 2)
    cases: list[tuple[str, float, str]] = [
        ("temperature", np.nan, "temperature of row 1"),
        ("temperature", -1, "temperature of row 1"),
        ("top_p", 0, "top_p of row 1"),
        ("min_p", 1.5, "min_p of row 1"),
        ("top_k", -1, "top_k of row 1"),
        ("repetition_penalty", 0, "repetition_penalty of row 1"),
        ("presence_penalty", np.inf, "presence_penalty of row 1"),
    ]
    for name, value, message in cases:
        rows = good.rows.copy()
        rows[name][1] = value
        with pytest.raises(ValueError, match=message):
            OPS.sample(x, SampleInputs(rows))
    starts, ids = np.array([0, 1, 2]), np.array([3, 8], np.int32)
    with pytest.raises(ValueError, match=r"allowed ids\[1\]: expected a token in \[0, 8\), got 8"):
        OPS.sample(x, SampleInputs(good.rows, allowed=(starts, ids)))
    with pytest.raises(ValueError, match="allowed starts: expected numbers that rise"):
        OPS.sample(x, SampleInputs(good.rows, allowed=(np.array([0, 2, 1]), ids)))
    with pytest.raises(ValueError, match="bias values"):
        OPS.sample(x, SampleInputs(good.rows, bias=(starts, ids - 3, np.array([0, np.nan], np.float32))))
    with pytest.raises(TypeError, match="rows: expected dtype"):
        OPS.sample(x, SampleInputs(np.zeros(2, np.float32)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows: expected a contiguous array"):
        OPS.sample(x, SampleInputs(good.rows[:1]))
    with pytest.raises(ValueError, match=r"ids\[0\]: expected a token"):
        OPS.logprobs(x, np.array([-1, 0], np.int32))
    with pytest.raises(ValueError, match="top_n: expected at most"):
        OPS.logprobs(x, np.array([1, 0], np.int32), 9)

"""SamplingParams: names, defaults, ranges, aliases; and the per-sequence state built from it."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm.engine.sampler import BadWords
from pyllm.sampling import SamplingParams, SamplingState, sample_inputs

NAMES = [f.name for f in dataclasses.fields(SamplingParams)]
ODD: list[Any] = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    2**63,
    -(2**63),
    2**64,
    10**400,
    1e300,
    1e-300,
    "1",
    b"",
    None,
    True,
    [],
    {},
    object(),
]

VALID = {
    "n": st.integers(1, 16),
    "max_tokens": st.none() | st.integers(1, 2**31 - 1),
    "temperature": st.floats(0.01, 1e6),
    "top_k": st.integers(-1, 2**31 - 1),
    "top_p": st.floats(1e-6, 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(1e-3, 1e3),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "seed": st.none() | st.integers(0, 2**64 - 1),
    "stop": st.text(min_size=1, max_size=256) | st.lists(st.text(min_size=1, max_size=20), max_size=16),
    "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=20),
    "bad_words": st.lists(st.text(min_size=1, max_size=20), max_size=20),
    "allowed_token_ids": st.none() | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20),
    "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=20),
    "logprobs": st.none() | st.integers(0, 20),
    "prompt_logprobs": st.none() | st.integers(0, 20),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
}


@given(st.fixed_dictionaries({}, optional=VALID))
@settings(deadline=None)
def test_valid_values_are_kept(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    for name, value in values.items():
        kept = getattr(params, name)
        if name == "top_k":
            assert kept == max(0, value)
        elif name == "stop":
            assert kept == ((value,) if isinstance(value, str) else tuple(value))
        elif name in ("stop_token_ids", "allowed_token_ids") and value is not None:
            assert kept == tuple(dict.fromkeys(value))
        elif name == "bad_words":
            assert kept == tuple(value)
        else:
            assert kept == value
    assert dataclasses.replace(params) == params
    SamplingState(params, [1, 2, 3], seed=0)


@given(st.sampled_from(NAMES), st.sampled_from(ODD) | st.floats() | st.integers() | st.text(max_size=3))
@settings(deadline=None, max_examples=500)
def test_any_value_is_taken_or_named(name: str, value: Any) -> None:
    """What is accepted is finite and in range; what is not is an error that names the parameter."""
    try:
        params = SamplingParams(**{name: value})
    except (TypeError, ValueError) as error:
        assert str(error).startswith(name)
        assert "expected" in str(error)
        return
    row = SamplingState(params, [], seed=0).row
    for field in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert math.isfinite(row[field][0])
    assert row["top_p"][0] > 0
    assert row["repetition_penalty"][0] > 0


def test_defaults_are_those_of_the_table() -> None:
    table = SamplingParams.__doc__ or ""
    listed = {m[1]: m[2] for m in re.finditer(r"^ *``(\w+)`` +(\S+)", table, re.M)}
    assert listed == {f.name: repr(getattr(SamplingParams(), f.name)) for f in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"n": 17}, ValueError, "n: expected an integer from 1 to 16, got 17"),
        ({"n": True}, TypeError, "n: expected an integer from 1 to 16, got True"),
        ({"n": 2, "temperature": 0}, ValueError, "n: expected 1 where temperature is 0"),
        ({"temperature": True}, TypeError, "temperature: expected a number of at least 0 and finite, got True"),
        ({"temperature": "0.5"}, TypeError, "temperature: expected a number"),
        ({"temperature": -0.1}, ValueError, "temperature: expected a number of at least 0"),
        ({"top_p": 0}, ValueError, "top_p: expected a number above 0 and at most 1, got 0"),
        ({"top_k": -2}, ValueError, "top_k: expected an integer from -1"),
        ({"top_k": 1.5}, TypeError, "top_k: expected an integer"),
        ({"min_tokens": 5, "max_tokens": 4}, ValueError, "min_tokens: expected at most max_tokens = 4, got 5"),
        ({"stop": ["a"] * 17}, ValueError, "stop: expected at most 16 strings"),
        ({"stop": "a" * 257}, ValueError, "stop: expected at most 16 strings of at most 256 characters"),
        ({"stop": ""}, ValueError, "none empty"),
        ({"stop": [1]}, TypeError, "stop: expected at most 16 strings"),
        ({"stop": "a", "detokenize": False}, ValueError, "stop: expected no stop strings"),
        ({"logprobs": 21}, ValueError, "logprobs: expected an integer from 0 to 20, got 21"),
        ({"allowed_token_ids": []}, ValueError, "allowed_token_ids: expected at least one"),
        ({"logit_bias": {1: math.nan}}, ValueError, r"logit_bias\[1\]: expected a number"),
        ({"logit_bias": {"x": 1}}, TypeError, "logit_bias key: expected an integer"),
        ({"stop_token_ids": [1, -1]}, ValueError, r"stop_token_ids\[1\]: expected an integer"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos: expected True or False, got 1"),
        ({"temprature": 1}, TypeError, "unknown sampling parameter temprature: did you mean temperature?"),
        ({"max_new_token": 1}, TypeError, "unknown sampling parameter max_new_token: did you mean max_new_tokens?"),
        ({"qqqq": 1}, TypeError, "unknown sampling parameter qqqq: expected one of n, max_tokens"),
        ({"num_beam_groups": 4}, ValueError, "num_beam_groups: pyllm does not have this yet: expected 1 or no"),
        ({"num_beam": 4}, TypeError, "unknown sampling parameter num_beam: did you mean num_beams?"),
        (
            {"max_tokens": 1, "max_new_tokens": 1},
            ValueError,
            "max_new_tokens: the same as max_tokens, which is given too",
        ),
        ({"do_sample": False, "temperature": 0.5}, ValueError, "do_sample: False means temperature = 0"),
    ],
)
def test_messages(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("values", "name", "kept"),
    [
        ({"max_new_tokens": 7}, "max_tokens", 7),
        ({"min_new_tokens": 7}, "min_tokens", 7),
        ({"num_return_sequences": 3}, "n", 3),
        ({"stop_strings": "x"}, "stop", ("x",)),
        ({"eos_token_id": 5}, "stop_token_ids", (5,)),
        ({"do_sample": False}, "temperature", 0.0),
    ],
)
def test_aliases_warn(values: dict[str, Any], name: str, kept: Any) -> None:
    with pytest.warns(UserWarning, match=name) as caught:
        params = SamplingParams(**values)
    assert caught[0].filename == __file__
    assert getattr(params, name) == kept


def test_neutral_values_of_absent_parameters_warn() -> None:
    with pytest.warns(UserWarning, match="num_beam_groups has no effect"):
        assert SamplingParams(num_beam_groups=1) == SamplingParams()  # type: ignore[call-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SamplingParams(top_k=np.int64(5), temperature=np.float32(0.5), logit_bias={"12": 1})  # type: ignore[dict-item]


@given(st.lists(st.integers(0, 30), max_size=20), st.lists(st.integers(0, 60), max_size=60))
@settings(deadline=None)
def test_history_counts_tokens(prompt: list[int], output: list[int]) -> None:
    state = SamplingState(SamplingParams(presence_penalty=1), prompt, seed=5, stream=2)
    for token in output:
        state.append(token)
    ids, counts = state.history
    assert state.row["position"][0] == len(output)
    assert len(set(ids.tolist())) == ids.size
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {t: Counter(output)[t] for t in {*prompt, *output}}


def test_inputs_hold_only_what_is_needed() -> None:
    plain = SamplingState(SamplingParams(), [1, 2], seed=1)
    plain.append(3)
    alone = sample_inputs([plain])
    assert alone[1:] == (None, None, None)
    biased = SamplingState(SamplingParams(logit_bias={4: 2.0}, allowed_token_ids=[4, 5]), [], seed=1)
    both = sample_inputs([plain, biased], [[7], []])
    assert both.history is None
    assert both.bias is not None
    assert [a.tolist() for a in both.bias] == [[0, 1, 2], [7, 4], [-math.inf, 2.0]]
    assert both.allowed is not None
    assert [a.tolist() for a in both.allowed] == [[0, 0, 2], [4, 5]]


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(map(ord, text))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=6),
    st.text("ab ", max_size=8),
)
def test_bad_words_end_where_their_last_token_would_come(words: list[str], output: str) -> None:
    spelled = {text for word in words for text in (word, f" {word}")}
    expected = {ord(text[-1]) for text in spelled if output.endswith(text[:-1])}
    found = BadWords(words, Letters()).banned(list(map(ord, output)))  # type: ignore[arg-type]
    assert set(found) == expected

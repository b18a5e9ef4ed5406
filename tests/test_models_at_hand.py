"""Real trained models: their published text and logits, at every ISA level."""

import json
from pathlib import Path

import numpy as np
import pytest

from pyllm import LLM, SamplingParams, active_isa, available_isas, set_isa


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest):
    before = active_isa()
    set_isa(request.param)
    yield request.param
    set_isa(before)


def test_stories260k_tells_its_published_story(shared_data: Path, isa: str) -> None:
    folder = shared_data / "stories260K"
    llm = LLM(folder, threads=2)
    greedy = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    [out] = llm.generate([{"prompt_token_ids": [1]}], greedy)
    expected = (folder / "expected.txt").read_text(encoding="utf-8")
    assert len(out.outputs[0].token_ids) == 200
    assert out.outputs[0].text == expected
    assert llm.encode(expected) == [1, *out.outputs[0].token_ids]


@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_narrow_caches_cost_little_perplexity(shared_data: Path, cache: str) -> None:
    """Stories that the model tells are scored with less than half a percent more perplexity."""
    exact, narrow = (LLM(shared_data / "stories260K", kv_cache_dtype=dtype) for dtype in ("float32", cache))
    params = [SamplingParams(max_tokens=200, seed=seed, ignore_eos=True) for seed in range(8)]
    outs = exact.generate([{"prompt_token_ids": [1]}] * len(params), params)
    stories = [{"prompt_token_ids": [1, *o.outputs[0].token_ids]} for o in outs]
    losses = [-np.mean([lp for s in llm.score(stories) for lp in s.logprobs]) for llm in (exact, narrow)]
    assert losses[1] - losses[0] < np.log(1.005)


def test_nano_sort_has_the_published_logits(shared_data: Path, isa: str) -> None:
    folder = shared_data / "gpt-nano-sort"
    llm = LLM(folder, skip_tokenizer_init=True, threads=2)
    expected = json.loads((folder / "expected.json").read_text())
    for ids, logits in zip(expected["idx"], expected["lm_head"], strict=True):
        got = llm.forward(ids).logits
        assert np.abs(got - np.array(logits)).max() <= 2e-5


@pytest.mark.parametrize("digits", [[2, 0, 1, 1, 0, 2], [0, 0, 0, 0, 0, 0], [2, 2, 1, 1, 0, 0], [1, 0, 2, 1, 0, 1]])
def test_nano_sort_sorts(shared_data: Path, digits: list[int]) -> None:
    llm = LLM(shared_data / "gpt-nano-sort", skip_tokenizer_init=True, threads=1)
    # The context of 11 ends with the fifth digit of the answer; the sixth is read from the last logits.
    [out] = llm.generate([{"prompt_token_ids": digits}], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    answer = out.outputs[0].token_ids
    last = int(llm.forward(digits + answer).logits[-1].argmax())
    assert [*answer, last] == sorted(digits)

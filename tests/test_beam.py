"""Beam search, and the options of generation that choose with it: against transformers, and on its own terms."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllm import LLM, SamplingParams
from pyllm.cache import BLOCK_TOKENS, BlockPool
from pyllm.engine.sampler import NgramBans
from pyllm.engine.sequence import Sequence
from pyllm.errors import NonFiniteError, RequestError

GOLDEN = Path(__file__).resolve().parent / "golden"
SCORE_TOLERANCE = 1e-4


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_beams", GOLDEN / "make_beams.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


beams = _load_script()
RENAMED = {"num_return_sequences": "n", "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


def check(case: Any, expected: Any) -> None:
    llm = LLM(GOLDEN / case.model, dtype="float32", skip_tokenizer_init=True, threads=2, max_num_seqs=8)
    options = {RENAMED.get(name, name): value for name, value in case.options.items()}
    params = SamplingParams(temperature=0, stop_token_ids=case.ends, **options)
    [result] = llm.generate({"prompt_token_ids": expected.prompt}, params)
    assert [output.token_ids for output in result.outputs] == expected.outputs
    for output, score in zip(result.outputs, expected.scores, strict=False):
        assert output.score == pytest.approx(score, abs=SCORE_TOLERANCE)
        length = len(output.token_ids)
        assert output.score == pytest.approx(output.cumulative_logprob / length**params.length_penalty)
    assert llm.engine.scheduler.pool.free == llm.engine.scheduler.pool.size


@pytest.mark.parametrize("number", range(len(beams.CASES)))
def test_golden(number: int) -> None:
    check(beams.CASES[number], beams.read()[number])


@pytest.mark.oracle
@pytest.mark.parametrize("number", range(len(beams.CASES)))
def test_live(number: int) -> None:
    check(beams.CASES[number], beams.run(beams.CASES[number]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=256)


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return LLM(folder, threads=2, max_num_seqs=8)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    pool = shared.engine.scheduler.pool
    pool.check()
    assert shared.engine.idle and pool.free == pool.size and not pool.copies


PROMPTS = [{"prompt_token_ids": np.random.default_rng(n).integers(6, 250, n).tolist()} for n in (3, 63, 100, 64)]
FOUR = SamplingParams(num_beams=4, n=4, max_tokens=70, length_penalty=0.7)


def outcome(result: Any) -> list[tuple[list[int], float, str]]:
    return [(output.token_ids, output.score, output.text) for output in result.outputs]


def test_beams_with_text_of_their_own_ranked_by_score(llm: LLM) -> None:
    [result] = llm.generate("Once upon a time", num_beams=3, n=3, max_tokens=20)
    scores = [output.score for output in result.outputs]
    assert scores == sorted(scores, reverse=True) and len({tuple(o.token_ids) for o in result.outputs}) == 3
    for output in result.outputs:
        assert output.text == llm.decode(output.token_ids)
        assert output.finish_reason == ("stop" if output.token_ids[-1] in llm.engine.end_ids else "length")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "bfloat16"},
        {"kv_cache_dtype": "int8", "quantization": "int8"},
        {"quantization": "int4", "max_num_batched_tokens": 3},
    ],
)
def test_together_with_others_a_search_finds_what_it_finds_alone(folder: Path, options: dict[str, Any]) -> None:
    llm = LLM(folder, threads=2, max_num_seqs=8, **options)
    greedy = SamplingParams(temperature=0, max_tokens=70)
    alone = [llm.generate(prompt, FOUR)[0] for prompt in PROMPTS]
    plain = llm.generate(PROMPTS[0], greedy)[0].outputs[0].token_ids
    together = llm.generate([*PROMPTS, PROMPTS[0]], [FOUR] * len(PROMPTS) + [greedy])
    assert [outcome(result) for result in together[:-1]] == [outcome(result) for result in alone]
    assert together[-1].outputs[0].token_ids == plain


def test_a_search_that_loses_its_blocks_finds_the_same(folder: Path, llm: LLM) -> None:
    block = llm.plan.cache // llm.plan.cache_blocks
    small = LLM(folder, threads=2, max_num_seqs=8, max_model_len=170, kv_cache_bytes=13 * block)
    together = small.generate(PROMPTS, FOUR)
    assert small.stats.preemptions > 0
    assert [outcome(r) for r in together] == [outcome(r) for r in llm.generate(PROMPTS, FOUR)]
    pool = small.engine.scheduler.pool
    pool.check()
    assert pool.free == pool.size


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_whatever_is_aborted_whenever_gives_all_blocks_back(shared: LLM, data: st.DataObject) -> None:
    engine = shared.engine
    running = []
    for _ in range(data.draw(st.integers(1, 4))):
        ids = PROMPTS[data.draw(st.integers(0, 3))]["prompt_token_ids"]
        width = data.draw(st.integers(1, 5))
        running.append(engine.add(None, ids, SamplingParams(num_beams=width, temperature=0, max_tokens=40), 0))
    while not engine.idle:
        engine.step()
        engine.scheduler.pool.check()
        if running and data.draw(st.integers(0, 7)) == 0:
            engine.abort(running.pop())
    assert engine.scheduler.pool.free == engine.scheduler.pool.size


def test_beams_share_blocks_until_they_write() -> None:
    pool = BlockPool(8)
    one = Sequence(range(BLOCK_TOKENS + 10), 100, False)
    assert one.reserve(pool, len(one.tokens))
    one.computed = len(one.tokens)
    two, three = one.fork(pool), one.fork(pool)
    assert pool.free == 6 and one.blocks == two.blocks == three.blocks
    for sequence in (one, two, three):
        assert sequence.reserve(pool, len(sequence.tokens) + 1)
    assert pool.free == 4 and len({s.blocks[0] for s in (one, two, three)}) == 1
    assert len({s.blocks[1] for s in (one, two, three)}) == 3
    assert [source for source, _ in pool.copies] == [three.blocks[1]] * 2  # the last to write keeps the old one
    for sequence in (two, one, three):
        sequence.leave(pool)
    pool.check()
    assert pool.free == 8


def test_a_model_of_no_numbers_fails_the_whole_search(tmp_path: Path) -> None:
    llm = LLM(tiny_model.make(tmp_path, poison="model.norm.weight"), threads=1)
    with pytest.raises(NonFiniteError, match="the head"):
        llm.generate("Once", num_beams=3, n=2, max_tokens=4)
    assert llm.engine.idle and llm.engine.scheduler.pool.free == llm.engine.scheduler.pool.size


def test_fewer_hypotheses_than_asked_for_where_there_are_no_more(llm: LLM) -> None:
    [result] = llm.generate("Once", num_beams=4, n=4, max_tokens=1, allowed_token_ids=[7, 8])
    assert [output.token_ids[0] for output in result.outputs] in ([7, 8], [8, 7]) and result.finished


def test_forced_tokens_also_without_beams(llm: LLM) -> None:
    [out] = llm.generate("Once", max_tokens=5, ignore_eos=False, forced_bos_token_id=9, forced_eos_token_id=1, seed=1)
    ids = out.outputs[0].token_ids
    assert ids[0] == 9 and ids[-1] == 1 and out.outputs[0].finish_reason == "stop"
    with pytest.raises(RequestError, match=r"forced_bos_token_id.*below"):
        llm.generate("Once", forced_bos_token_id=10**6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ngram_bans_are_what_a_search_through_the_tokens_finds(size: int) -> None:
    tokens = np.random.default_rng(size).integers(0, 3, 30).tolist()
    bans = NgramBans(size, tokens[:5])
    for end in range(5, len(tokens) + 1):
        grams = [tuple(tokens[i : i + size]) for i in range(end - size + 1)]
        tail = tuple(tokens[end - size + 1 : end]) if size > 1 else ()
        assert set(bans.banned()) == {gram[-1] for gram in grams if gram[:-1] == tail}
        if end < len(tokens):
            bans.append(tokens[end])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected an integer from 1 to 16"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature: expected 0"),
        ({"num_beams": 2, "n": 3}, "n: expected at most num_beams = 2"),
        ({"num_beams": 2, "stop": ["x"]}, "stop: expected none"),
        ({"num_beams": 2, "logprobs": 1}, "logprobs: expected none"),
        ({"num_beams": 2, "max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"num_beams": 2, "early_stopping": "later"}, "early_stopping: expected True, False or 'never'"),
        ({"length_penalty": 2.0}, "length_penalty: only of beam search"),
        ({"early_stopping": True}, "early_stopping: only of beam search"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: expected"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_searches_that_cannot_run_are_refused_before_anything_runs(folder: Path, llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"num_beams: expected 1.*use generate"):
        llm.stream("Once", num_beams=2)
    with pytest.raises(RequestError, match="expected at most max_num_seqs = 8, got 9"):
        llm.generate("Once", num_beams=9)
    block = llm.plan.cache // llm.plan.cache_blocks
    small = LLM(folder, threads=1, kv_cache_bytes=5 * block)
    with pytest.raises(RequestError, match="take 6 blocks of cache, which has 5"):
        small.generate("Once", num_beams=3, max_tokens=100)
    guessing = LLM(folder, threads=1, speculative="ngram")
    with pytest.raises(RequestError, match="speculative"):
        guessing.generate("Once", num_beams=2)

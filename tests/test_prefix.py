"""Decoders with a bidirectional prefix: what they compute, what the batch must not change, what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from oracle.harness import ISAS, at_isa
from oracle.transformer import forward

from pyllm import LLM, SamplingParams
from pyllm.errors import RequestError
from pyllm.models import open_checkpoint
from pyllm.prefix import PrefixSpec
from pyllm.prompts import Prompts

GOLDEN = Path(__file__).resolve().parent / "golden"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
LENGTHS = (1, 2, 17, 63, 64, 65, 100)


def load(name: str, **options: Any) -> LLM:
    options = {"dtype": "float32", "threads": 2, "prefix": True, "skip_tokenizer_init": True, **options}
    return LLM(GOLDEN / name, **options)


def ids_of(llm: LLM, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(3, llm.spec.vocab_size, length).tolist()


def prompts_of(llm: LLM, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": ids_of(llm, min(n, llm.max_model_len - 12))} for n in lengths]


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 2e-5 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("name", ["bloom", "gemma3", "glm4", "gpt2", "llama", "mistral", "phi3"])
def test_logits_and_states_are_those_of_float64(name: str) -> None:
    llm = load(name)
    ids = ids_of(llm, 33)
    with open_checkpoint(GOLDEN / name) as checkpoint:
        for prefix in (0, 1, 20, None):
            output = llm.forward(ids, output_hidden_states=True, prefix=prefix)
            seen = len(ids) if prefix is None else prefix
            logits, hidden = forward(checkpoint.spec, checkpoint.tensors, np.array(ids), seen)
            assert_close(output.logits, logits)
            assert output.hidden_states is not None
            for found, expected in zip(output.hidden_states, hidden, strict=True):
                assert_close(found, expected)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_with_the_same_mask(name: str) -> None:
    """Logits, hidden states, and 32 greedy ids, with the mask and the positions given to it."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / name, attn_implementation="eager").float().eval()

    def theirs(ids: list[int], prefix: int) -> Any:
        rows = torch.arange(len(ids))
        seen = (rows[None] <= rows[:, None]) | (rows[None] < prefix)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            return model(torch.tensor([ids]), attention_mask=mask, position_ids=rows[None], output_hidden_states=True)

    llm = load(name)
    prompt = ids_of(llm, 24)
    expected = theirs(prompt, len(prompt))
    found = llm.forward(prompt, output_hidden_states=True)
    assert_close(found.logits, expected.logits[0].numpy())
    for ours, states in zip(found.hidden_states or [], expected.hidden_states, strict=True):
        assert_close(ours, states[0].numpy())
    ids = prompt.copy()
    for _ in range(32):
        ids.append(int(theirs(ids, len(prompt)).logits[0, -1].argmax()))
    [output] = llm.generate({"prompt_token_ids": prompt}, **{**GREEDY, "max_tokens": 32})
    assert list(output.outputs[0].token_ids) == ids[len(prompt) :]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int4", "kv_cache_dtype": "int8"}])
def test_a_batch_of_mixed_lengths_equals_its_sequences_alone(isa: str, options: dict[str, Any]) -> None:
    with at_isa(isa):
        llm = load("llama", **options)
        params = SamplingParams(**GREEDY, logprobs=3)
        prompts = prompts_of(llm)
        alone = [llm.generate([prompt], params)[0].outputs for prompt in prompts]
        for more in ({}, {"max_num_seqs": 2, "threads": 1}, {"speculative": "ngram"}):
            together = load("llama", **options, **more).generate(prompts, params)
            assert [output.outputs for output in together] == alone


def test_generated_tokens_follow_from_the_whole_forward_pass() -> None:
    llm = load("gpt2")
    for length in LENGTHS[:-1]:
        prompt = ids_of(llm, length)
        [output] = llm.generate({"prompt_token_ids": prompt}, **GREEDY)
        ids = [*prompt, *output.outputs[0].token_ids]
        logits = llm.forward(ids, prefix=length).logits[length - 1 : -1]
        assert logits.argmax(-1).tolist() == ids[length:]


def test_a_prefix_is_never_cut_and_waits_for_room() -> None:
    """Steps are shorter than all prompts together; a plan is looked at as it is made."""
    llm = load("llama", max_num_batched_tokens=7, max_model_len=100)
    assert (llm.plan.prefix_tokens, llm.plan.step_tokens) == (100, 132)
    scheduler, plans = llm.engine.scheduler, []
    schedule = scheduler.schedule
    scheduler.schedule = lambda: plans.append([(w.start, w.rows) for w in schedule()]) or scheduler._plan
    llm.generate(prompts_of(llm, (60, 60, 60, 3)), **GREEDY)
    firsts = [rows for plan in plans for start, rows in plan if start == 0]
    assert sorted(firsts) == [3, 60, 60, 60]
    assert all(sum(rows for _, rows in plan) <= 132 for plan in plans)
    with pytest.raises(RequestError, match="a step has room for 50"):
        llm.engine.rules.max_prefix = 50
        llm.generate(prompts_of(llm, (60,)), **GREEDY)


@pytest.mark.parametrize("options", [{}, {"speculative": "ngram"}])
def test_a_prefix_as_long_as_the_context_does_not_wait_for_others_to_end(options: dict[str, Any]) -> None:
    llm = load("llama", max_num_batched_tokens=7, max_model_len=100, max_num_seqs=2, **options)
    other = llm.stream(prompts_of(llm, (3,))[0], temperature=0, max_tokens=60, ignore_eos=True)
    next(other)
    llm.generate({"prompt_token_ids": ids_of(llm, 100)}, max_tokens=0)
    assert llm.stats.generated_tokens < 30
    assert sum(len(piece.token_ids) for piece in other) > 30


def test_blocks_are_shared_by_equal_prefixes_only() -> None:
    llm = load("llama")
    prompt = ids_of(llm, 100)
    other = [*prompt[:-1], prompt[-1] ^ 1]  # as long, and the same but for the last token
    expected = {tuple(p): load("llama", enable_prefix_caching=False).generate(
        {"prompt_token_ids": p}, **GREEDY)[0].outputs for p in (prompt, other)}  # fmt: skip
    for _ in range(2):
        for given in (prompt, other):
            [output] = llm.generate({"prompt_token_ids": given}, **GREEDY)
            assert output.outputs == expected[tuple(given)]
    assert output.cached_tokens == 64  # of the second round
    assert llm.stats.cached_tokens == 2 * 64
    [longer] = llm.generate({"prompt_token_ids": [*prompt, 5]}, **GREEDY)
    assert longer.cached_tokens == 0


def test_several_completions_beams_and_preemption() -> None:
    llm = load("llama")
    prompts = prompts_of(llm, (60, 50, 40))
    sampled = SamplingParams(n=3, seed=5, max_tokens=20, ignore_eos=True)
    beams = SamplingParams(num_beams=3, n=3, temperature=0, max_tokens=20, ignore_eos=True)
    block = llm.plan.cache // llm.plan.cache_blocks
    tight = load("llama", kv_cache_bytes=4 * block, enable_prefix_caching=False)
    greedy = {**GREEDY, "max_tokens": 28}
    expected = [o.outputs for o in llm.generate(prompts, **greedy)]
    assert [o.outputs for o in tight.generate(prompts, **greedy)] == expected
    assert tight.stats.preemptions > 0
    for params in (sampled, beams):
        alone = [llm.generate([prompt], params)[0].outputs for prompt in prompts]
        assert [o.outputs for o in llm.generate(prompts, params)] == alone


def test_scores_count_what_stands_behind_the_prefix(tiny_folder: Path) -> None:
    llm, causal = (LLM(tiny_folder, threads=2, prefix=prefix) for prefix in (True, False))
    text = "the cat sat on the mat"
    context, ids = llm.encode("the cat sat"), llm.encode(text)
    [score] = llm.score([("the cat sat", " on the mat")])
    logits = llm.forward(ids, prefix=len(context)).logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert score.token_ids == ids[len(context) :]
    expected = [logprobs[i - 1, ids[i]] for i in range(len(context), len(ids))]
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-5)
    assert llm.score([text]) == causal.score([text])
    assert score.logprobs != causal.score([("the cat sat", " on the mat")])[0].logprobs
    [output] = llm.generate(text, max_tokens=1, prompt_logprobs=1)
    assert output.prompt_logprobs == [None] * len(ids)


def test_embeddings_see_the_whole_text() -> None:
    llm = load("llama")
    ids = ids_of(llm, 40)
    states = llm.forward(ids, output_hidden_states=True).hidden_states
    assert states is not None
    [vector] = llm.embed([{"prompt_token_ids": ids}], pooling="mean")
    np.testing.assert_allclose(vector, states[-1].astype(np.float64).mean(0), atol=1e-6)


@pytest.mark.parametrize("prefix", [-1, 34])
def test_an_impossible_prefix(prefix: int) -> None:
    llm = load("llama")
    with pytest.raises(RequestError, match="prefix: expected 0 to the 33 tokens"):
        llm.forward(ids_of(llm, 33), prefix=prefix)


def test_command_line(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "pyllm", "generate", "the cat sat on the mat", "-m", tiny_folder, "-n", "12"]
    command += ["--temperature", "0", "--ignore-eos", "--json"]
    texts = [json.loads(subprocess.check_output([*map(str, command), *flag])) for flag in ([], ["--prefix"])]
    expected = LLM(tiny_folder, prefix=True).generate("the cat sat on the mat", **GREEDY)[0].outputs[0]
    assert texts[1]["token_ids"] == list(expected.token_ids)
    assert texts[0]["token_ids"] != list(expected.token_ids)


def test_positions_of_blanks() -> None:
    """A text with two masks (90, 91), and the contents of both behind start tokens (99)."""
    tokens = [5, 90, 6, 91, 7, 99, 1, 2, 99, 3]
    one = PrefixSpec(99, ((90, 91),), restarts=True)
    first, second = one.positions(tokens)
    assert first.tolist() == [0, 1, 2, 3, 4, 1, 1, 1, 3, 3]
    assert second.tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert one.length(tokens) == 5
    first, second = PrefixSpec(99, ((91,), (90,))).positions(tokens)  # the first kind wins, and one blank is filled
    assert first.tolist() == [0, 1, 2, 3, 4, 3, 3, 3, 3, 3]
    assert second.tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
    first, second = one.positions(tokens[:5])
    assert (first.tolist(), second.tolist()) == ([0, 1, 2, 3, 4], [0] * 5)
    assert one.length(tokens[:5]) == 5


def test_prompts_of_blanks() -> None:
    rule = PrefixSpec(99, ((91,), (90,)))
    assert rule.completed([5, 6]) == [5, 6, 91, 99]
    assert rule.completed([5, 90, 6]) == [5, 90, 6, 99]
    assert rule.completed([5, 90, 99, 1]) == [5, 90, 99, 1]
    assert PrefixSpec().completed([5, 6]) == [5, 6]
    rule.check([5, 90, 99], generates=True)
    rule.check([5], generates=False)
    with pytest.raises(RequestError, match="start token \\(id 99\\)"):
        rule.check([5, 90], generates=True)
    with pytest.raises(RequestError, match="mask before its start token"):
        rule.check([5, 99, 90], generates=False)


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int4", "kv_cache_dtype": "int8"}])
@pytest.mark.parametrize("name", ["chatglm", "glm2021"])
def test_models_that_fill_blanks_do_not_depend_on_the_batch(name: str, options: dict[str, Any]) -> None:
    """Nor on recorded steps, drafts, or blocks that were given back and computed again."""
    llm = load(name, prefix=False, **options)
    rng = np.random.default_rng(0)
    prompts = []
    for length in (3, 17, 62, 64, 65, 90):
        ids = rng.integers(3, 60, length)
        ids[length // 2], ids[-1] = 60, 62
        prompts.append({"prompt_token_ids": ids.tolist()})
    params = SamplingParams(**{**GREEDY, "max_tokens": 20}, logprobs=3)
    alone = [llm.generate([prompt], params)[0].outputs for prompt in prompts]
    block = llm.plan.cache // llm.plan.cache_blocks
    variants: list[dict[str, Any]] = [{"threads": 1}, {"speculative": "ngram"}]
    variants += [{"kv_cache_bytes": 5 * block, "enable_prefix_caching": False, "max_model_len": 128}]
    for more in variants:
        other = load(name, prefix=False, **options, **more)
        assert [output.outputs for output in other.generate(prompts, params)] == alone
    llm.engine.use_graphs = False
    assert [output.outputs for output in llm.generate(prompts, params)] == alone
    whole = llm.forward([*prompts[1]["prompt_token_ids"], *alone[1][0].token_ids])
    assert whole.logits[16:-1].argmax(-1).tolist() == list(alone[1][0].token_ids)


def test_scores_of_a_blank() -> None:
    llm = load("chatglm", prefix=False)
    ids = [5, 6, 60, 7, 62, 8, 9]
    [score] = llm.score([{"prompt_token_ids": ids}])
    logits = llm.forward(ids).logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert score.token_ids == [8, 9]
    np.testing.assert_allclose(score.logprobs, [logprobs[4, 8], logprobs[5, 9]], atol=1e-5)
    with pytest.raises(RequestError, match="nothing does here"):
        llm.score([{"prompt_token_ids": [5, 6, 60, 7, 62]}])
    with pytest.raises(RequestError, match="start token"):
        llm.generate({"prompt_token_ids": [5, 6, 60, 7]}, **GREEDY)
    with pytest.raises(RequestError, match="mask before its start token"):
        llm.forward([5, 6, 7, 62, 8])


def test_a_text_becomes_a_prompt_with_a_blank() -> None:
    llm = load("chatglm", prefix=False)
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens=True: [5, 6])
    tokenizer.apply_chat_template = lambda messages, chat_template, tools: "text"
    llm._prompts = Prompts(llm.spec, cast(Any, tokenizer))
    assert llm.encode("text") == [5, 6, 61, 62]
    assert llm.encode("text", add_special_tokens=False) == [5, 6]
    assert llm.chat_prompt([])["prompt_token_ids"] == [5, 6, 61, 62]


@drawn(
    tokens=st.lists(st.integers(0, 4), min_size=2, max_size=40),
    prompt=st.integers(1, 39),
    restarts=st.booleans(),
)
def test_positions_of_a_growing_sequence_are_those_of_all_its_tokens(
    tokens: list[int], prompt: int, restarts: bool
) -> None:
    rule, tokens = PrefixSpec(start_id=4, mask_ids=((1, 2), (3,)), restarts=restarts), [1, *tokens]
    first, second = rule.positions(tokens)
    place = rule.place(tokens[:prompt])
    for index in range(len(tokens[:prompt]), len(tokens)):
        place = rule.positions_after(place, tokens)
        assert place == (index, first[index], second[index])

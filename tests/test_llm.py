"""`LLM` as its users call it."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from pyllm import LLM, PyllmError, SamplingParams
from pyllm.errors import InsufficientMemoryError, RequestError, TokenizerError

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("model") / "tiny", chat=True)


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return LLM(folder, threads=2)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert shared.engine.idle
    pool = shared.engine.scheduler.pool
    pool.check()
    assert pool.free == pool.size, "a request left blocks behind"


def test_outputs_have_the_shape_of_vllms(llm: LLM) -> None:
    [out] = llm.generate("Once upon", GREEDY)
    [one] = out.outputs
    assert out.prompt == "Once upon" and out.prompt_token_ids == llm.encode("Once upon") and out.finished
    assert (
        len(one.token_ids) == 16 and one.finish_reason == "length" and one.stop_reason is None and one.logprobs is None
    )
    assert one.text == llm.decode(one.token_ids)


def test_prompts_of_mixed_lengths_run_together_and_keep_their_order(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 100)
    prompts = [{"prompt_token_ids": rng.integers(3, 200, n).tolist()} for n in lengths]
    params = [SamplingParams(temperature=0, max_tokens=int(m), ignore_eos=True) for m in rng.integers(1, 9, 100)]
    before = llm.stats.decode_steps
    outputs = llm.generate(prompts, params)
    assert [o.prompt_token_ids for o in outputs] == [p["prompt_token_ids"] for p in prompts]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    assert llm.stats.decode_steps - before < 100  # far fewer than the 450 tokens generated


def test_stream_is_the_generated_text_in_pieces(llm: LLM) -> None:
    [out] = llm.generate("héllo 🦙 wörld", GREEDY)
    pieces = list(llm.stream("héllo 🦙 wörld", GREEDY))
    assert "".join(p.text for p in pieces) == out.outputs[0].text
    assert [t for p in pieces for t in p.token_ids] == out.outputs[0].token_ids
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"


def test_closing_a_stream_frees_everything_at_once(llm: LLM) -> None:
    stream = llm.stream("Once", SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    assert not llm.engine.idle
    stream.close()
    assert llm.engine.idle


def test_two_streams_can_be_read_in_turn(llm: LLM) -> None:
    alone = [llm.generate(p, GREEDY)[0].outputs[0].text for p in ("Once", "The dog")]
    texts = ["", ""]
    streams = [llm.stream("Once", GREEDY), llm.stream("The dog", GREEDY)]
    running = [0, 1]
    while running:
        for i in list(running):
            piece = next(streams[i], None)
            if piece is None:
                running.remove(i)
            else:
                texts[i] += piece.text
    assert texts == alone


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    [whole] = llm.generate("Once", GREEDY)
    text = whole.outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    first = text.find(stop)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, stop=[stop])
    [cut] = llm.generate("Once", params)
    assert cut.outputs[0].text == text[:first]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert "".join(p.text for p in llm.stream("Once", params)) == text[:first]


def test_stop_token_and_minimum(llm: LLM) -> None:
    [whole] = llm.generate("Once", GREEDY)
    ids = whole.outputs[0].token_ids
    [cut] = llm.generate("Once", temperature=0, max_tokens=16, ignore_eos=True, stop_token_ids=[ids[3]])
    assert cut.outputs[0].token_ids == ids[: ids.index(ids[3]) + 1]
    assert cut.outputs[0].stop_reason == ids[3] and cut.outputs[0].finish_reason == "stop"
    [later] = llm.generate("Once", temperature=0, max_tokens=16, stop_token_ids=[ids[0]], min_tokens=5)
    assert ids[0] not in later.outputs[0].token_ids[:5] and len(later.outputs[0].token_ids) >= 5


def test_end_token_of_the_model_ends_unless_ignored(llm: LLM) -> None:
    end = llm.engine.end_ids[0]
    bias = {end: 100.0}
    [out] = llm.generate("Once", temperature=0, max_tokens=8, logit_bias=bias)
    assert (out.outputs[0].finish_reason, out.outputs[0].token_ids, out.outputs[0].text) == ("stop", [end], "")
    [on] = llm.generate("Once", temperature=0, max_tokens=8, logit_bias=bias, ignore_eos=True)
    assert on.outputs[0].token_ids == [end] * 8


def test_seed_repeats_and_no_seed_does_not(llm: LLM) -> None:
    def ids(**params: object) -> list[list[int]]:
        [out] = llm.generate("Once", max_tokens=12, ignore_eos=True, **params)
        return [o.token_ids for o in out.outputs]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    assert ids() != ids()
    three = ids(seed=1, n=3)
    assert len({tuple(t) for t in three}) == 3 and three[0] == ids(seed=1)[0]


def test_seed_is_unmoved_by_company(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=7, top_k=20, top_p=0.9)
    [alone] = llm.generate("Once", params)
    together = llm.generate(["The dog", "Once", "A", "B"], params)
    assert together[1].outputs == alone.outputs


def test_allowed_and_bad_words_are_kept(llm: LLM) -> None:
    [only] = llm.generate("Once", max_tokens=20, allowed_token_ids=[10, 11], ignore_eos=True)
    assert set(only.outputs[0].token_ids) <= {10, 11}
    first, second = llm.encode("qx", add_special_tokens=False)  # a word of two tokens
    likely = {first: 60.0, second: 50.0}
    wish = {"temperature": 0, "max_tokens": 6, "logit_bias": likely, "repetition_penalty": 1.0, "ignore_eos": True}
    [plain] = llm.generate("Once", frequency_penalty=2.0, **wish)
    [without] = llm.generate("Once", frequency_penalty=2.0, bad_words=["qx"], **wish)
    pairs = list(zip(without.outputs[0].token_ids, without.outputs[0].token_ids[1:], strict=False))
    assert set(plain.outputs[0].token_ids) <= {first, second}
    assert (first, second) not in pairs
    [never] = llm.generate("Once", bad_words=["q"], **wish)
    assert first not in never.outputs[0].token_ids and second in never.outputs[0].token_ids


def test_logprobs_are_the_log_softmax_of_the_logits(llm: LLM) -> None:
    ids = llm.encode("Once upon a time")
    params = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2, repetition_penalty=1.3
    )
    [out] = llm.generate({"prompt_token_ids": ids}, params)
    sequence = ids + out.outputs[0].token_ids
    logits = llm.forward(sequence).logits.astype(np.float64)
    expected = logits - logits.max(1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(1, keepdims=True))
    assert out.prompt_logprobs is not None and out.prompt_logprobs[0] is None
    entries = [*out.prompt_logprobs[1:], *(out.outputs[0].logprobs or [])]
    for i, entry in enumerate(entries):
        assert entry is not None
        row, token = expected[i], sequence[i + 1]
        order = np.argsort(-row, kind="stable")
        assert set(entry) == {token, *order[: 2 if i < len(ids) - 1 else 3].tolist()}
        for t, value in entry.items():
            assert value.logprob == pytest.approx(row[t], abs=1e-5)
            assert value.rank == 1 + int((row > row[t]).sum())
            assert value.decoded_token == llm.decode([t], skip_special_tokens=False)
    assert out.outputs[0].cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(out.outputs[0].logprobs or [], out.outputs[0].token_ids, strict=True))
    )


def test_score_sums_log_probabilities_of_the_continuation(llm: LLM) -> None:
    [whole] = llm.score(["Once upon a time"])
    [pair] = llm.score([("Once upon", " a time")])
    assert whole.token_ids[-len(pair.token_ids) :] == pair.token_ids
    assert whole.logprobs[-len(pair.logprobs) :] == pair.logprobs
    assert pair.total == pytest.approx(sum(pair.logprobs)) and pair.total < 0


@pytest.mark.parametrize("stride", [1, 20, 64, 127, None])
def test_perplexity_is_the_mean_over_tokens_each_scored_once(llm: LLM, stride: int | None) -> None:
    window = llm.max_model_len
    ids = np.random.default_rng(3).integers(3, 200, window + 45 if stride == 1 else 3 * window + 17).tolist()
    expected, scored, begin = 0.0, 1, 0  # the first token has nothing before it
    while scored < len(ids):
        logits = llm.forward(ids[begin : begin + window]).logits.astype(np.float64)
        peak = logits.max(1)
        normaliser = peak + np.log(np.exp(logits - peak[:, None]).sum(1))
        for position in range(scored, min(begin + window, len(ids))):
            row = position - 1 - begin
            expected += normaliser[row] - logits[row, ids[position]]
            scored += 1
        begin += stride or window // 2
    result = llm.perplexity(ids, stride=stride)
    assert result.tokens == len(ids) - 1
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(np.exp(expected / (len(ids) - 1)), rel=1e-6)
    with pytest.raises(ValueError, match="stride"):
        llm.perplexity(ids, stride=llm.max_model_len)


def test_perplexity_of_a_text_within_the_context_is_its_score(llm: LLM) -> None:
    ids = np.random.default_rng(4).integers(3, 200, llm.max_model_len).tolist()
    [score] = llm.score([{"prompt_token_ids": ids}])
    assert llm.perplexity(ids).nll == pytest.approx(-score.total)


def test_a_dropped_stream_was_never_started(llm: LLM) -> None:
    stream = llm.stream("Once", GREEDY)
    assert llm.engine.idle
    del stream
    with pytest.raises(RequestError, match="context"):
        llm.stream({"prompt_token_ids": [1] * 100_000}, GREEDY)


@pytest.mark.parametrize("name", ["advance", "_compute", "_choose"])
def test_a_step_that_fails_halfway_leaves_nothing_wrong_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    llm = LLM(folder, threads=2)
    prompt = {"prompt_token_ids": np.random.default_rng(5).integers(3, 200, 100).tolist()}
    [expected] = LLM(folder, threads=2).generate(prompt, GREEDY)
    waiting = llm.stream({"prompt_token_ids": [5, 6, 7]}, GREEDY)
    next(waiting)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler if name == "advance" else llm.engine, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompt, GREEDY)
    with pytest.raises(RequestError, match="run it again"):
        list(waiting)
    assert llm.engine.idle
    [again] = llm.generate(prompt, GREEDY)
    assert again.outputs == expected.outputs and again.cached_tokens == 0


def test_ctrl_c_waits_for_the_end_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    choose, reached = llm.engine._choose, []

    def interrupted(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)
        choose(*args)  # type: ignore[arg-type]
        reached.append(True)

    try:
        monkeypatch.setattr(llm.engine, "_choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Once", GREEDY)
        assert reached == [True]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_between_the_steps_of_a_stream_ctrl_c_acts_at_once(llm: LLM) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stream = llm.stream("Once", GREEDY)
        next(stream)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        [inner] = llm.generate("The dog", GREEDY)  # meanwhile
        assert len(inner.outputs[0].token_ids) == 16
        assert sum(len(piece.token_ids) for piece in stream) == 15
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_constraints_that_leave_no_token_are_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="allowed_token_ids"):
        llm.generate("Once", allowed_token_ids=[9], stop_token_ids=[9], min_tokens=3)


def test_an_abandoned_stream_collected_during_a_step_is_ended_after_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream("Once", GREEDY)
    next(stream)
    choose = llm.engine._choose

    def close_then_choose(*args: object) -> None:
        stream.close()  # as the collector might
        choose(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.engine, "_choose", close_then_choose)
    [out] = llm.generate("The dog", GREEDY)
    assert len(out.outputs[0].token_ids) == 16


@pytest.mark.parametrize("prompt", [None, {"prompt_token_ids": None}, {"prompt_token_ids": "12"}])
def test_prompts_of_a_wrong_kind_say_what_is_expected(llm: LLM, prompt: object) -> None:
    with pytest.raises(TypeError, match="expected"):
        llm.generate(prompt, GREEDY)  # type: ignore[arg-type]


def test_a_lone_pair_is_no_list_of_texts(llm: LLM) -> None:
    with pytest.raises(TypeError, match="list"):
        llm.score(("a", "b"))  # type: ignore[arg-type]


def test_chat_uses_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    prompt = llm.chat_prompt(messages)
    [out] = llm.chat(messages, GREEDY)
    assert out.prompt_token_ids == prompt["prompt_token_ids"]
    assert "".join(p.text for p in llm.stream_chat(messages, GREEDY)) == out.outputs[0].text


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ({"prompt_token_ids": []}, RequestError),
        ({"prompt_token_ids": [-1]}, RequestError),
        ({"prompt_token_ids": [10**9]}, RequestError),
        ({"prompt_token_ids": [1.5]}, TypeError),
        ({"prompt_token_ids": [True]}, TypeError),
        ({"prompt_token_ids": [1] * 100_000}, RequestError),
        ({"text": "x"}, TypeError),
        (7, TypeError),
    ],
)
def test_bad_prompts_are_refused_and_nothing_is_left_running(llm: LLM, prompt: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        llm.generate(["fine", prompt], GREEDY)  # type: ignore[list-item]
    assert llm.engine.idle


def test_unknown_arguments_name_the_nearest(folder: Path, llm: LLM) -> None:
    with pytest.raises(TypeError, match="max_model_len"):
        LLM(folder, max_model_length=5)
    with pytest.raises(TypeError, match="temperature"):
        llm.generate("x", temprature=0.5)
    with pytest.raises(TypeError, match="prompt_token_ids"):
        llm.generate({"prompt": "x", "prompt_tokens": [1]}, GREEDY)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int3"},
        {"device": "tpu"},
        {"max_model_len": 0},
        {"max_model_len": 10**9},
        {"kv_cache_dtype": "int1"},
        {"kv_cache_bytes": 5},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": -1},
        {"threads": 0},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused(folder: Path, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LLM(folder, **options)  # type: ignore[arg-type]


def test_memory_is_computed_before_it_is_taken(folder: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"needed .* free .*kv_cache_bytes"):
        LLM(folder, kv_cache_bytes=1 << 50)


def test_without_a_tokenizer_only_ids_are_served(folder: Path) -> None:
    llm = LLM(folder, skip_tokenizer_init=True, threads=1)
    [out] = llm.generate({"prompt_token_ids": [5, 6]}, GREEDY)
    assert len(out.outputs[0].token_ids) == 16 and out.outputs[0].text == ""
    for call in (lambda: llm.encode("x"), lambda: llm.generate("x", GREEDY)):
        with pytest.raises(TokenizerError, match="skip_tokenizer_init"):
            call()
    with pytest.raises(ValueError, match="stop"):
        llm.generate({"prompt_token_ids": [5]}, stop="x")


def test_weights_that_are_no_numbers_give_an_error_that_names_the_layer(tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "bad", poison="model.layers.1.mlp.down_proj.weight")
    llm = LLM(folder, threads=1)
    with pytest.raises(PyllmError, match="layer 1"):
        llm.generate("Once", GREEDY)
    assert llm.engine.idle


def test_threads_may_generate_at_once(llm: LLM) -> None:
    expected = {p: llm.generate(p, GREEDY)[0].outputs[0].token_ids for p in ("Once", "The", "A dog", "Hello")}
    found: dict[str, list[int]] = {}

    def work(prompt: str) -> None:
        found[prompt] = llm.generate(prompt, GREEDY)[0].outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(p,)) for p in expected]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == expected


def test_hidden_states_are_one_more_than_layers(llm: LLM) -> None:
    out = llm.forward(llm.encode("Once upon"), output_hidden_states=True)
    assert out.hidden_states is not None
    assert len(out.hidden_states) == len(llm.spec.blocks) + 1
    assert all(h.shape == (len(out.logits), llm.spec.hidden) for h in out.hidden_states)


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.5), ("int4", 0.35)])
def test_quantization_shrinks_the_weights_and_keeps_the_logits_near(
    folder: Path, shared: LLM, quantization: str, most: float
) -> None:
    llm = LLM(folder, threads=2, quantization=quantization)
    ids = list(range(3, 40))
    want, got = shared.forward(ids).logits, llm.forward(ids).logits
    error = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert 0 < error < (0.05 if quantization == "int8" else 0.5)
    assert llm.plan.weights == llm.model.weights.nbytes < most * shared.model.weights.nbytes
    assert llm.plan.dtype == llm.model.weights.dtype
    assert llm.plan.dtype.startswith(quantization)
    assert ("embedding and head int8" in llm.plan.dtype) == (quantization == "int4")
    assert llm.plan.cache_dtype == shared.plan.cache_dtype


def test_quantization_skips_what_it_is_told_to(folder: Path, shared: LLM) -> None:
    llm = LLM(folder, threads=2, quantization="int8", quantization_skip=["blocks.0.*", "*.mlp.down.weight"])
    first, second = llm.model.weights.blocks[:2]
    assert [m.dtype for m in (first.qkv, first.out, first.up, first.down)] == ["float32"] * 4
    assert [m.dtype for m in (second.qkv, second.out, second.up, second.down)] == ["int8"] * 3 + ["float32"]
    assert llm.model.weights.embed.dtype == "int8"
    assert llm.plan.dtype == "int8 (blocks.0.*, *.mlp.down.weight float32)"
    assert llm.plan.weights == llm.model.weights.nbytes
    everything = LLM(folder, threads=2, quantization="int4", quantization_skip=["*"])
    assert np.array_equal(everything.forward([5, 6, 7]).logits, shared.forward([5, 6, 7]).logits)


def test_quantizations_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantization: expected None, int8 or int4, got 'int3'"):
        LLM(folder, quantization="int3")
    with pytest.raises(ValueError, match=r"dtype: expected auto, .* got 'int8'; for integers give quantization='int8'"):
        LLM(folder, dtype="int8")
    with pytest.raises(ValueError, match=r"quantization_skip: .*'layers.0', which matches none"):
        LLM(folder, quantization="int8", quantization_skip=["layers.0"])
    with pytest.raises(ValueError, match="quantization_skip: expected a sequence of patterns, got the text 'embed'"):
        LLM(folder, quantization="int8", quantization_skip="embed")

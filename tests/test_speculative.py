"""Speculative decoding gives what plain decoding gives, bit for bit, whatever is guessed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model

from pyllm import LLM, SamplingParams
from pyllm.cache import BLOCK_TOKENS, BlockPool
from pyllm.engine.draft_model import DraftModel
from pyllm.engine.outputs import CompletionOutput
from pyllm.engine.scheduler import Scheduler
from pyllm.engine.sequence import Sequence as EngineSequence
from pyllm.engine.speculative import NGRAM_SIZES, NgramProposer, Proposer, Prospect, Speculation, _NgramIndex
from pyllm.errors import ConfigError, InsufficientMemoryError, RequestError
from pyllm.planning import plan

KINDS: list[dict[str, str]] = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"quantization": "int8"},
    {"quantization": "int4", "dtype": "bfloat16", "kv_cache_dtype": "int8"},
]
PROMPTS = ["Once upon", "the dog the dog the dog the", "A", "numbers: 3.14159, 3.14159, 3.14"]
FEW = list(range(40, 45))  # C to G: a vocabulary so small that n-grams come again
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "ignore_eos": True},
    "greedy of few": {"temperature": 0, "ignore_eos": True, "allowed_token_ids": FEW},
    "sampled": {"seed": 1},
    "sampled of few": {"seed": 2, "allowed_token_ids": FEW, "ignore_eos": True, "top_p": 0.9, "min_p": 0.01},
    "penalties": {
        "seed": 3,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "logit_bias": dict.fromkeys(FEW, 12.0),
        "logprobs": 3,
    },
    "completions": {"seed": 4, "n": 3, "logit_bias": dict.fromkeys(FEW, 15.0), "top_k": 4},
    "ends": {"seed": 5, "logit_bias": {**dict.fromkeys(FEW, 15.0), 1: 14.0}, "min_tokens": 3},
    "bad words": {
        "temperature": 0,
        "logit_bias": dict.fromkeys(FEW, 30.0),
        "bad_words": ["CC", "ED", "G"],
        "logprobs": 0,
    },
    "prompt too": {"temperature": 0, "prompt_logprobs": 1, "logprobs": 1, "allowed_token_ids": FEW},
}


class Scripted:
    """A proposer that a function of the sequence's tokens and of the most that is wanted stands for."""

    def __init__(self, drafts: Callable[[list[int], int], list[int]]) -> None:
        self.drafts = drafts
        self.seen: set[EngineSequence] = set()

    def propose(self, prospects: Sequence[Prospect]) -> list[list[int]]:
        self.seen |= {p.sequence for p in prospects}
        return [self.drafts(list(p.sequence.tokens), p.most) for p in prospects]

    def forget(self, sequence: EngineSequence) -> None:
        self.seen.discard(sequence)

    def clear(self) -> None:
        self.seen.clear()


def always_right(*known: list[int]) -> Scripted:
    """Knows the whole sequences that will come."""

    def drafts(tokens: list[int], most: int) -> list[int]:
        return next((k[len(tokens) : len(tokens) + most] for k in known if k[: len(tokens)] == tokens), [])

    return Scripted(drafts)


def half_right(*known: list[int]) -> Scripted:
    """Right for a while, of a length that is drawn anew each time, then wrong; now and then of the wrong length."""
    rng = random.Random(0)
    right = always_right(*known)

    def drafts(tokens: list[int], most: int) -> list[int]:
        found = right.drafts(tokens, rng.randint(0, most))
        return [*found, *(rng.randint(0, 200) for _ in range(rng.randint(0, most + 3 - len(found))))]

    return Scripted(drafts)


def garbage() -> Scripted:
    """Tokens at random, many of them none of the model's."""
    rng = random.Random(0)
    return Scripted(lambda _, most: [rng.randint(-2, 400) for _ in range(most + 2)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make(tmp_path_factory.mktemp("target") / "model", chat=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that shares nothing but the vocabulary, with half the context."""
    made = tmp_path_factory.mktemp("draft") / "model"
    return tiny_model.make(made, seed=9, num_hidden_layers=1, max_position_embeddings=64)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(kind.values()))
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param, threads=2)


@pytest.fixture(scope="module")
def plain(folder: Path, kind: dict[str, Any]) -> LLM:
    return LLM(folder, **kind)


@pytest.fixture(scope="module")
def llm(folder: Path, kind: dict[str, Any]) -> LLM:
    return LLM(folder, speculative="ngram", num_speculative_tokens=5, **kind)


@pytest.fixture(scope="module")
def drafted(folder: Path, kind: dict[str, Any]) -> LLM:
    """With itself as the draft model."""
    return LLM(folder, draft_model=folder, num_speculative_tokens=5, **kind)


def use(llm: LLM, proposer: Proposer) -> None:
    assert llm.engine.speculation is not None
    llm.engine.speculation.proposer = proposer


def outputs(llm: LLM, prompts: Any, params: Any) -> list[list[CompletionOutput]]:
    """What `generate` gives; nothing may stay behind."""
    found = [out.outputs for out in llm.generate(prompts, params)]
    check_idle(llm)
    return found


def check_idle(llm: LLM) -> None:
    pools = [llm.engine.scheduler.pool]
    if llm.engine.speculation is not None:
        proposer = llm.engine.speculation.proposer
        pools += [proposer.pool] if isinstance(proposer, DraftModel) else []
        held = getattr(proposer, "seen", getattr(proposer, "_indexes", getattr(proposer, "_copies", None)))
        assert not held, "the proposer was not told of an end"
    assert llm.engine.idle
    for pool in pools:
        pool.check()
        assert pool.free == pool.size


def whole(plain: LLM, prompts: Sequence[str], params: SamplingParams) -> list[list[int]]:
    """Prompts and completions as token lists."""
    found = zip(prompts, outputs(plain, list(prompts), params), strict=True)
    return [plain.encode(prompt) + one.token_ids for prompt, completions in found for one in completions]


@pytest.mark.parametrize("source", ["ngram", "always right", "half right", "garbage", "nothing"])
@pytest.mark.parametrize("name", PARAMS)
def test_the_output_is_that_of_plain_decoding(plain: LLM, llm: LLM, name: str, source: str) -> None:
    params = SamplingParams(max_tokens=70, **PARAMS[name])
    known = whole(plain, PROMPTS, params)
    made: dict[str, Callable[[], Proposer]] = {
        "ngram": NgramProposer,
        "always right": lambda: always_right(*known),
        "half right": lambda: half_right(*known),
        "garbage": garbage,
        "nothing": lambda: Scripted(lambda *_: []),
    }
    use(llm, made[source]())
    assert outputs(llm, PROMPTS, params) == outputs(plain, PROMPTS, params)
    assert [o.prompt_logprobs for o in llm.generate(PROMPTS, params)] == [
        o.prompt_logprobs for o in plain.generate(PROMPTS, params)
    ]


@pytest.mark.parametrize("name", PARAMS)
def test_a_draft_model_like_its_target_is_always_right(plain: LLM, drafted: LLM, name: str) -> None:
    """It has the target's sampler, penalties and random numbers, so nothing else could be drawn."""
    params = SamplingParams(max_tokens=70, **PARAMS[name])
    before = drafted.stats.accepted_tokens
    found = drafted.generate(PROMPTS, params)
    assert [o.outputs for o in found] == outputs(plain, PROMPTS, params)
    check_idle(drafted)
    assert drafted.stats.accepted_tokens > before
    for out in found:
        assert out.drafts is not None
        # What was guessed behind the token that ended a completion was never looked at.
        unseen = sum(one.finish_reason == "stop" for one in out.outputs) * 5
        assert out.drafts.accepted >= out.drafts.drafted - unseen


def test_a_draft_model_of_another_kind_and_a_shorter_context(
    plain: LLM, folder: Path, other: Path, kind: dict[str, Any]
) -> None:
    llm = LLM(folder, draft_model=other, **kind)
    assert llm.plan.drafts == 4
    for values in PARAMS.values():
        params = SamplingParams(max_tokens=100, **values)
        assert outputs(llm, PROMPTS, params) == outputs(plain, PROMPTS, params)
    assert llm.stats.drafted_tokens > 0


def test_a_draft_model_goes_on_from_what_was_chosen(folder: Path, other: Path) -> None:
    """Asked step after step, it says what another one says that has seen nothing before: its cache is right."""
    llm = LLM(folder, threads=2, draft_model=other)
    fresh = LLM(folder, threads=2, draft_model=other, max_num_batched_tokens=2048, enable_prefix_caching=False)
    kept = llm.engine.speculation.proposer  # type: ignore[union-attr]
    anew = fresh.engine.speculation.proposer  # type: ignore[union-attr]
    asked = []

    class Both(Scripted):
        def propose(self, prospects: Sequence[Prospect]) -> list[list[int]]:
            found = kept.propose(prospects)
            assert found == anew.propose(prospects)
            asked.extend(prospects)
            for prospect in prospects:
                anew.forget(prospect.sequence)
            return found

        def forget(self, sequence: EngineSequence) -> None:
            kept.forget(sequence)

    use(llm, Both(lambda *_: []))
    for name in ("greedy of few", "penalties", "completions"):
        params = SamplingParams(max_tokens=60, **PARAMS[name])
        llm.generate(PROMPTS, params)
    assert len(asked) > 150 and llm.stats.accepted_tokens > 20


def test_stop_strings_and_stop_tokens_amid_accepted_drafts(plain: LLM, llm: LLM) -> None:
    greedy = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    known = whole(plain, PROMPTS, SamplingParams(**greedy))
    for prompt, tokens in zip(PROMPTS, known, strict=True):
        made = tokens[len(plain.encode(prompt)) :]
        text = plain.decode(made)
        for i in range(2, 12):
            for more in (
                {"stop_token_ids": [made[i]]},
                {"stop_token_ids": [made[i]], "min_tokens": i + 3},
                {"stop": [text[i : i + 3]]},
                {"stop": [text[i : i + 3]], "include_stop_str_in_output": True},
                {"max_tokens": i},
            ):
                params = SamplingParams(**{**greedy, **more})
                use(llm, always_right(tokens))
                assert outputs(llm, prompt, params) == outputs(plain, prompt, params)


def test_streams_have_the_same_pieces(plain: LLM, llm: LLM) -> None:
    params = SamplingParams(seed=1, max_tokens=50, ignore_eos=True, logprobs=2, stop=["zz"])
    use(llm, half_right(*whole(plain, ["héllo 🦙"], params)))
    assert list(llm.stream("héllo 🦙", params)) == list(plain.stream("héllo 🦙", params))
    check_idle(llm)
    stream = llm.stream("héllo 🦙", params)
    next(stream)
    stream.close()
    check_idle(llm)


def test_a_seed_is_unmoved_by_company(plain: LLM, llm: LLM) -> None:
    params = [SamplingParams(max_tokens=20 + i, seed=i, allowed_token_ids=FEW, ignore_eos=True) for i in range(12)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(12)]
    use(llm, NgramProposer())
    before = llm.stats.accepted_tokens
    together = outputs(llm, prompts, params)
    assert llm.stats.accepted_tokens > before
    assert together == [outputs(plain, prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]


@pytest.mark.parametrize("options", [{"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 1}, {"max_num_seqs": 3}])
def test_chunked_prompts_and_full_steps(folder: Path, options: dict[str, int]) -> None:
    """Drafts take what other sequences leave of a step's tokens."""
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(3, 200, n).tolist()} for n in (50, 3, 90, 1, 20)]
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, allowed_token_ids=FEW)
    plain = LLM(folder, threads=2)
    expected = outputs(plain, prompts, params)
    known = [p["prompt_token_ids"] + o[0].token_ids for p, o in zip(prompts, expected, strict=True)]
    llm = LLM(folder, threads=2, speculative="ngram", **options)
    for proposer in (NgramProposer(), always_right(*known), half_right(*known), garbage()):
        use(llm, proposer)
        assert outputs(llm, prompts, params) == expected
    drafted = LLM(folder, threads=2, draft_model=folder, **options)
    assert outputs(drafted, prompts, params) == expected
    if options.get("max_num_batched_tokens") != 1:
        assert llm.stats.accepted_tokens > 0 and drafted.stats.acceptance_rate == 1


@pytest.mark.parametrize("draft_model", [False, True])
def test_preempted_sequences_go_on_as_if_nothing_had_happened(folder: Path, draft_model: bool) -> None:
    prompts = [f"{i} Once upon a time there was a little girl" for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, allowed_token_ids=FEW)
    plain = LLM(folder, threads=2)
    expected = outputs(plain, prompts, params)
    block = plain.plan.cache // plain.plan.cache_blocks * (2 if draft_model else 1)
    source = {"draft_model": folder} if draft_model else {"speculative": "ngram"}
    llm = LLM(folder, threads=2, kv_cache_bytes=5 * block, **source)  # type: ignore[arg-type]
    known = whole(plain, prompts, params)
    for proposer in [None] if draft_model else [NgramProposer(), half_right(*known), always_right(*known)]:
        if proposer is not None:
            use(llm, proposer)
        before = llm.stats.preemptions
        assert outputs(llm, prompts, params) == expected
        assert llm.stats.preemptions > before and llm.stats.accepted_tokens > 0


def test_what_was_accepted_is_found_again_and_what_was_not_is_not(folder: Path) -> None:
    """The conversation goes on behind an answer whose drafts crossed block after block."""
    plain = LLM(folder, threads=2, enable_prefix_caching=False)
    llm = LLM(folder, threads=2, speculative="ngram", num_speculative_tokens=9)
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    [known] = whole(plain, ["Once upon"], params)
    use(llm, half_right(known))
    assert outputs(llm, "Once upon", params) == outputs(plain, "Once upon", params)
    longer = {"prompt_token_ids": known[: BLOCK_TOKENS + 9]}
    few = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    [again] = llm.generate(longer, few)
    assert again.cached_tokens == BLOCK_TOKENS
    assert [again.outputs] == outputs(plain, longer, few)


def test_steps_that_are_not_recorded_give_the_same(plain: LLM, llm: LLM) -> None:
    params = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
    known = whole(plain, PROMPTS, params)
    use(llm, half_right(*known))
    llm.engine.use_graphs = False
    try:
        assert outputs(llm, PROMPTS, params) == outputs(plain, PROMPTS, params)
    finally:
        llm.engine.use_graphs = True


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
        {"model_type": "mistral", "sliding_window": 20},
    ],
)
def test_frequencies_of_the_length_and_windows(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tiny_model.make(tmp_path / "model", **config)
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    plain = LLM(folder, threads=2)
    expected = outputs(plain, PROMPTS, params)
    llm = LLM(folder, threads=2, speculative="ngram")
    use(llm, half_right(*whole(plain, PROMPTS, params)))
    assert outputs(llm, PROMPTS, params) == expected
    drafted = LLM(folder, threads=2, draft_model=folder)
    assert outputs(drafted, PROMPTS, params) == expected
    assert drafted.stats.acceptance_rate == 1


def test_counts(plain: LLM, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=37, ignore_eos=True)
    [known] = whole(plain, ["Once upon"], params)

    def run(proposer: Proposer) -> tuple[dict[str, int], Any]:
        use(llm, proposer)
        before = {name: getattr(llm.stats, name) for name in COUNTED}
        [out] = llm.generate("Once upon", params)
        return {name: getattr(llm.stats, name) - before[name] for name in COUNTED}, out.drafts

    counts, drafts = run(always_right(known))
    # The prompt gives the first token, six steps of 5 drafts six tokens each: the limit is met exactly.
    assert counts == dict(zip(COUNTED, (37, 6, 36, 30, 30), strict=True))
    assert (drafts.drafted, drafts.accepted, drafts.acceptance_rate) == (30, 30, 1.0)
    counts, drafts = run(Scripted(lambda tokens, most: [(known[len(tokens)] + 1) % 300] * most))
    assert counts["decode_steps"] == 36 and counts["accepted_tokens"] == 0 < counts["drafted_tokens"]
    assert drafts.acceptance_rate == 0
    counts, drafts = run(Scripted(lambda *_: []))
    assert counts["decode_steps"] == 36 and counts["drafted_tokens"] == 0 and drafts.acceptance_rate is None
    [out] = plain.generate("Once upon", params)
    assert out.drafts is None and plain.stats.acceptance_rate is None


def test_what_nothing_comes_of_is_tried_more_and_more_seldom(plain: LLM, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=110, ignore_eos=True)
    [known] = whole(plain, ["Once upon"], params)
    right, asked = always_right(known), []

    def drafts(tokens: list[int], most: int) -> list[int]:
        asked.append((len(tokens), most))
        return right.drafts(tokens, most) if len(tokens) > 50 else [(known[len(tokens)] + 1) % 300] * most

    use(llm, Scripted(drafts))
    before = llm.stats.drafted_tokens
    [out] = llm.generate("Once upon", params)
    assert plain.encode("Once upon") + out.outputs[0].token_ids == known
    wrong, later = [a for a in asked if a[0] <= 50], [a for a in asked if a[0] > 50]
    steps = [b - a for (a, _), (b, _) in itertools.pairwise(wrong)]
    assert steps == [1, 5, 9, 17]
    assert [most for _, most in wrong] == [5, 2, 1, 1, 1]
    assert later[0][1] == 1 and {most for _, most in later[1:-1]} == {5}  # right again
    assert llm.stats.drafted_tokens - before == sum(most for _, most in asked)


def test_more_sequences_than_rows_for_all_share_what_there_is(folder: Path, plain: LLM, kind: dict[str, Any]) -> None:
    count, params = 40, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm = LLM(folder, speculative="ngram", max_num_seqs=count, **kind)
    prompts = [f"{i} of the dog" for i in range(count)]
    known = whole(plain, prompts, params)
    half = always_right(*known[: count // 2])
    use(llm, Scripted(lambda tokens, most: half.drafts(tokens, most) or [5] * most))
    assert whole(llm, prompts, params) == known
    assert llm.stats.accepted_tokens > count and llm.stats.decode_tokens > 1.3 * count * llm.stats.decode_steps / 2


COUNTED = ("generated_tokens", "decode_steps", "decode_tokens", "drafted_tokens", "accepted_tokens")


def test_a_proposer_that_fails_ends_its_step_and_nothing_more(plain: LLM, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def fail(*_: object) -> list[int]:
        raise MemoryError("no room to think")

    use(llm, Scripted(fail))
    with pytest.raises(MemoryError, match="no room"):
        llm.generate("Once", params)
    use(llm, NgramProposer())
    assert outputs(llm, "Once", params) == outputs(plain, "Once", params)


@pytest.mark.parametrize("graphs", [True, False])
def test_failures_amid_accepted_drafts_leave_the_others_alone(
    plain: LLM, llm: LLM, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """One completion goes on for two tokens and has then none left to choose; the other's logits are needed yet."""
    words = ["".join(letters) for letters in itertools.product("CD", repeat=3)]
    constraints = {"temperature": 0, "allowed_token_ids": FEW[:2], "bad_words": words}
    fine = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    [two] = whole(plain, ["Once"], SamplingParams(max_tokens=2, **constraints))
    [known] = whole(plain, ["Once"], fine)
    use(llm, always_right([*two, *FEW], known))
    monkeypatch.setattr(llm.engine, "use_graphs", graphs)
    before = llm.stats.accepted_tokens
    limits = [SamplingParams(max_tokens=9, **constraints), fine]
    requests = [llm.engine.add(None, llm.encode("Once"), params, 0) for params in limits]
    for _ in range(2):
        llm.engine.step()
    assert isinstance(requests[0].error, RequestError) and requests[0].finished
    assert requests[0].completions[0].output.token_ids == two[-2:]
    assert llm.stats.accepted_tokens - before == 1 + 5
    while not requests[1].finished:
        llm.engine.step()
    assert requests[1].result().outputs == plain.generate("Once", fine)[0].outputs
    check_idle(llm)


def test_a_draft_model_without_numbers_or_room_guesses_nothing(folder: Path, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    plain = LLM(folder, threads=1)
    poisoned = tiny_model.make(tmp_path / "bad", poison="model.layers.1.mlp.down_proj.weight")
    llm = LLM(folder, threads=1, draft_model=poisoned)
    assert outputs(llm, PROMPTS, params) == outputs(plain, PROMPTS, params)
    assert llm.stats.drafted_tokens == 0
    llm = LLM(folder, threads=1, draft_model=folder)
    assert llm.engine.speculation is not None and isinstance(llm.engine.speculation.proposer, DraftModel)
    llm.engine.speculation.proposer.pool = BlockPool(2)
    assert outputs(llm, PROMPTS, params) == outputs(plain, PROMPTS, params)
    assert llm.stats.drafted_tokens > 0


def test_a_draft_model_needs_the_same_vocabulary(folder: Path, tmp_path: Path) -> None:
    wider = tiny_model.make(tmp_path / "wide", tokenizer=False)
    with pytest.raises(ConfigError, match=r"draft_model: expected .* 32\d tokens, got one of 300"):
        LLM(folder, draft_model=wider)


def test_a_draft_model_is_planned_for(folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, both = plan(folder), plan(folder, draft_model=other)
    assert alone.draft_model is None and both.draft_model is not None
    assert both.total == both.weights + both.cache + both.workspace + both.draft_model.total
    assert both.draft_model.total > both.draft_model.weights > 0
    assert both.draft_model.cache == both.cache // 2  # one layer for two
    assert both.workspace > alone.workspace  # drafts pass through the head
    assert both.draft_model.max_length == 64
    monkeypatch.setattr("pyllm.planning.available_memory", lambda: 1000)
    with pytest.raises(InsufficientMemoryError, match="draft model"):
        LLM(folder, draft_model=other)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"speculative": "magic"}, "speculative: expected 'ngram'"),
        ({"speculative": "ngram", "draft_model": "x"}, "one of them"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens: 3 tokens need a source"),
        ({"speculative": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens: expected an integer from 1"),
        ({"speculative": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens: expected an integer"),
        ({"speculative": "ngram", "num_speculative_tokens": 33}, "num_speculative_tokens: expected an integer"),
    ],
)
def test_options_that_make_no_sense_are_refused(folder: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LLM(folder, **options)


@pytest.mark.parametrize("seed", range(20))
def test_the_index_finds_what_a_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randint(0, rng.choice([1, 3, 20])) for _ in range(rng.randint(1, 40))]
    index = _NgramIndex(NGRAM_SIZES)
    for _ in range(60):
        tokens += [rng.randint(0, 3) for _ in range(rng.randint(1, 4))]
        expected = None
        for size in NGRAM_SIZES:
            places = [i for i in range(size, len(tokens)) if tokens[i - size : i] == tokens[-size:]]
            if places:
                expected = places[-1]
                break
        assert index.find(tokens) == expected


def test_loops_are_continued_for_as_long_as_wanted() -> None:
    def drafts(tokens: list[int], most: int) -> list[int]:
        params = SamplingParams()
        [found] = NgramProposer().propose([Prospect(EngineSequence(tokens, 10, False), params, most)])  # type: ignore[arg-type]
        return found

    assert drafts([1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafts([7, 7, 7], 4) == [7, 7, 7, 7]
    assert drafts([1, 2, 5, 6, 8, 1, 2], 2) == [5, 6]
    assert drafts([1, 2, 3, 4], 4) == []


class Memory:
    """Stands for the cache: which token was written to which slot, to see what a step would have read."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], int] = {}

    def compute(self, plan: list[Any]) -> None:
        for work in plan:
            tokens = [*work.sequence.tokens[: work.start + work.count], *work.drafts]
            for i in range(work.start, len(tokens)):
                self.slots[work.sequence.blocks[i // BLOCK_TOKENS], i % BLOCK_TOKENS] = tokens[i]
        for work in plan:
            tokens = [*work.sequence.tokens[: work.start + work.count], *work.drafts]
            blocks = work.sequence.blocks
            assert [self.slots[blocks[i // BLOCK_TOKENS], i % BLOCK_TOKENS] for i in range(len(tokens))] == tokens


@pytest.mark.parametrize("seed", range(30))
def test_random_loads_with_random_acceptance(seed: int) -> None:
    """Without a model: what is in the cache is what the tokens say, through sharing, preemption and rejection."""
    rng = random.Random(seed)
    s = Scheduler(BlockPool(rng.randint(5, 20)), rng.randint(1, 6), rng.choice([1, 7, 64, 300]), rng.random() < 0.8)
    most = s.pool.size * BLOCK_TOKENS
    memory, sequences = Memory(), []
    for _ in range(rng.randint(1, 12)):
        prompt = [rng.randint(0, 1)] * rng.randint(1, min(150, most - 1)) + [rng.randint(0, 5)]
        sequences.append(EngineSequence(prompt, rng.randint(0, min(120, most - len(prompt))), rng.random() < 0.8))
        s.add(sequences[-1])
    proposer = Scripted(lambda _, wanted: [rng.randint(0, 3) for _ in range(rng.randint(0, wanted))])
    speculation = Speculation(proposer, rng.randint(1, 9), max_rows=rng.randint(s.max_sequences, 64))
    states: Any = dict.fromkeys(sequences, type("Completion", (), {"sampling": None}))
    for _ in range(10_000):
        plan = speculation.extend(s.schedule(), states, s, 300)
        if not plan:
            break
        assert sum(w.rows for w in plan) <= s.max_tokens
        assert sum(1 + len(w.drafts) for w in plan if w.last) <= speculation.max_rows
        s.pool.check()
        memory.compute(plan)
        s.advance(plan)
        for w in plan:
            accepted = rng.randint(0, len(w.drafts))
            if w.last:
                w.sequence.tokens += [*w.drafts[:accepted], rng.randint(0, 5)]
            assert len(w.sequence.tokens) <= w.sequence.limit
            if len(w.sequence.tokens) == w.sequence.limit or rng.random() < 0.01:
                s.remove(w.sequence)
        s.settle(plan)
    assert s.pool.free == s.pool.size and not s.running and not s.waiting

"""Structured output: what is generated matches, what cannot be compiled is refused, and nobody else notices."""

from __future__ import annotations

import contextlib
import gc
import json
import random
import re
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from pyllm import LLM, SamplingParams, StructuredOutputs
from pyllm.cache import KVCache
from pyllm.cli import main
from pyllm.engine.sampler import Shared
from pyllm.errors import RequestError
from pyllm.structured import MAX_GRAMMAR_BYTES, GrammarCompiler, Matcher
from pyllm.tokenizer import Tokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

PROMPTS = ["Once upon a time", "The quick brown", "numbers: 3.14"]
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "größe", None]}, "minItems": 2, "maxItems": 3},
    {"anyOf": [{"const": {"a": [1]}}, {"type": "string", "maxLength": 4}]},
]
GRAMMAR = 'start: sum\nsum: DIGIT | DIGIT "+" sum2\nsum2: DIGIT\nDIGIT: /[0-9]/'


def params(seed: int | None = 1, **wanted: Any) -> SamplingParams:
    return SamplingParams(max_tokens=100, seed=seed, structured_outputs=StructuredOutputs(**wanted))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    yield LLM(tiny_model.make(tmp_path_factory.mktemp("m"), max_position_embeddings=256), threads=2, max_num_seqs=8)


def texts(llm: LLM, prompts: Any, given: Any) -> list[str]:
    outputs = [completion for result in llm.generate(prompts, given) for completion in result.outputs]
    assert [output.finish_reason for output in outputs] == ["stop"] * len(outputs)
    return [output.text for output in outputs]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_json_is_valid_for_its_schema(llm: LLM, schema: dict[str, Any]) -> None:
    for given in (schema, json.dumps(schema)):
        for text in texts(llm, PROMPTS, params(json=given)):
            jsonschema.validate(json.loads(text), schema)


def test_regex_choice_and_grammar(llm: LLM) -> None:
    assert all(re.fullmatch(r"[a-c]{2,5}/\d\n?", t) for t in texts(llm, PROMPTS, params(regex=r"[a-c]{2,5}/\d\n?")))
    choices = ["yes", "no.*", "a/b \\ \"c'\n", "größe 🙂"]
    assert set(texts(llm, PROMPTS, params(choice=choices))) <= set(choices)
    for choice in choices:
        assert texts(llm, "x", params(choice=[choice])) == [choice]
    assert all(re.fullmatch(r"\d(\+\d)?", text) for text in texts(llm, PROMPTS, params(grammar=GRAMMAR)))


def test_any_json_object(llm: LLM) -> None:
    bias = dict.fromkeys(range(6, 300), -100.0) | {llm.tokenizer.id_of("}"): 100.0}  # type: ignore[union-attr]
    given = SamplingParams(max_tokens=50, logit_bias=bias, structured_outputs=StructuredOutputs(json_object=True))
    assert all(isinstance(json.loads(text), dict) for text in texts(llm, PROMPTS, given))


def test_completions_streams_and_logprobs(llm: LLM) -> None:
    given = SamplingParams(
        n=3, max_tokens=40, seed=5, logprobs=2, structured_outputs=StructuredOutputs(regex="[a-z]{3}")
    )
    [result] = llm.generate("Once", given)
    assert len({completion.text for completion in result.outputs}) > 1
    for completion in result.outputs:
        assert re.fullmatch("[a-z]{3}", completion.text) and completion.logprobs is not None
        assert all(np.isfinite(value.logprob) for entry in completion.logprobs for value in entry.values())
    single = params(seed=5, regex="[a-z]{3}")
    assert "".join(piece.text for piece in llm.stream("Once", single)) == texts(llm, "Once", single)[0]
    stopped = SamplingParams(max_tokens=40, stop="b", structured_outputs=StructuredOutputs(regex="aaab+c"))
    assert texts(llm, "Once", stopped) == ["aaa"]


def test_others_in_the_batch_do_not_notice(llm: LLM) -> None:
    plain = [SamplingParams(max_tokens=30, seed=i, temperature=0.7) for i in range(2)]
    alone = [llm.generate(p, s)[0].outputs[0].token_ids for p, s in zip(PROMPTS, plain, strict=False)]
    wanted = params(seed=3, json=SCHEMAS[0])
    own = texts(llm, PROMPTS[2], wanted)
    together = llm.generate(PROMPTS, [*plain, wanted])
    assert [result.outputs[0].token_ids for result in together[:2]] == alone
    assert [together[2].outputs[0].text] == own


def test_an_ended_output_is_not_held(llm: LLM) -> None:
    request = llm.engine.add("x", [6, 7], params(regex="[a-c]{20}"), seed=1)
    plain = llm.engine.add("x", [6, 7], SamplingParams(max_tokens=3), seed=1)
    held = [weakref.ref(each.completions[0]) for each in (request, plain)]
    while not llm.engine.idle:
        llm.engine.step()
    assert request.finished and plain.finished
    del request, plain
    gc.collect()
    assert [each() for each in held] == [None, None]  # its grammar may take megabytes


def test_put_back_and_behind_shared_beginnings_they_give_the_same(llm: LLM, tmp_path: Path) -> None:
    folder = tiny_model.make(tmp_path / "m", max_position_embeddings=256)
    block = KVCache.block_bytes(llm.spec, "float32")
    beginning = "Once upon a time there was a little girl. " * 4
    prompts = [beginning + word for word in ("She", "He", "The dog", "A fox")]
    wanted = [params(seed=i, regex="[a-z]{90}") for i in range(4)]
    expected = texts(llm, prompts, wanted)
    tight = LLM(folder, threads=2, max_num_seqs=8, max_num_batched_tokens=32, kv_cache_bytes=8 * block)
    assert texts(tight, prompts, wanted) == expected
    assert tight.stats.preemptions > 0 and tight.stats.cached_tokens > 0
    before = tight.stats.cached_tokens
    assert texts(tight, prompts[:1], wanted[0]) == expected[:1] and tight.stats.cached_tokens > before


def test_a_speculating_engine_gives_the_same(llm: LLM, tmp_path: Path) -> None:
    prompts, wanted = PROMPTS * 2, params(seed=3, regex="[a-z]{80}")
    expected = texts(llm, prompts, wanted)
    folder = tiny_model.make(tmp_path / "m", max_position_embeddings=256)
    guessing = LLM(folder, threads=2, max_num_seqs=8, speculative="ngram")
    assert texts(guessing, prompts, wanted) == expected and guessing.stats.drafted_tokens == 0


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": {"type": "foo"}},
        {"json": {"type": "integer", "minimum": 3, "maximum": 2}},
        {"json": '{"allOf":[' * 2000 + "{}" + "]}" * 2000},
        {"regex": "(a"},
        {"regex": "(" * 30000 + ")" * 30000},
        {"grammar": "start: foo"},
        {"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000},
    ],
)
def test_hostile_or_malformed_ones_are_refused_soon(llm: LLM, wanted: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="structured_outputs: "):
        llm.generate("x", params(**wanted))
    assert time.monotonic() - began < 2
    assert llm.engine.idle and texts(llm, "x", params(choice=["fine"])) == ["fine"]


SQL = """
start: "select " columns " from " NAME (" join " NAME " on " test)* (" where " condition)? (" order by " NAME)?
columns: "*" | column ("," " "? column)*
column: (NAME "." )? NAME (" as"? " " NAME)? | FUNCTION "(" column ")"
condition: condition (" and " | " or ") condition | test | "(" condition ")"
test: column " "? OPERATOR " "? (column | NUMBER | TEXT)
FUNCTION: "count" | "sum" | "max"
OPERATOR: "=" | "<" | ">" | "like"
NUMBER: /-?[0-9]{1,9}(\\.[0-9]{1,4})?/
TEXT: /'[^'\\n]{0,60}'/
NAME: /[a-z_][a-z0-9_]{0,30}/
"""
SUMS = """
start: sum
sum: product (("+" | "-") product)*
product: factor (("*" | "/") factor)*
factor: name | "(" sum ")" | name "(" sum ("," sum)* ")"
name: LETTER (LETTER | DIGIT){0,30}
LETTER: /[a-z_]/
DIGIT: /[0-9]/
"""
AMBIGUOUS = 'start: e\ne: e e | e e e | /[a-z]/ | ""'  # an output is read in ways beyond number


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    """Of 10,000 made-up words, any of which names may be made of: masks cost more than with real vocabularies."""
    rng = random.Random(0)
    parts = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {token: i for i, token in enumerate([*parts, "</s>"])}
    letters = parts = [*map(chr, range(ord("a"), ord("z") + 1)), "_", *"0123456789"]
    merges: list[tuple[str, str]] = []
    while len(known) < 10_000:
        pair = rng.choice(parts), rng.choice(letters)
        if len("".join(pair)) <= 12 and known.setdefault("".join(pair), len(known)) == len(known) - 1:
            merges.append(pair)
            parts.append("".join(pair))
    made = Library(models.BPE(known, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("vocabulary")
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    return GrammarCompiler(Tokenizer.load(folder), len(known), [256])


def walk(matcher: Matcher, tokens: int) -> int:
    """How many tokens, drawn from those that may come, an output has when it ends, or ends in an error."""
    rng = np.random.default_rng(0)
    for count in range(tokens):
        possible = np.flatnonzero(matcher.ceiling() > 0)
        if not possible.size:
            return count
        token = int(rng.choice(possible))
        if token == 256:
            return count
        matcher.append(token)
    return tokens


@pytest.mark.parametrize("grammar", [SQL, SUMS])
def test_ordinary_grammars_go_on(compiler: GrammarCompiler, grammar: str) -> None:
    wanted = StructuredOutputs(grammar=grammar)
    matcher = compiler.compile(wanted)
    assert walk(matcher, 50) > 5 and matcher.error is None


def test_a_grammar_that_costs_too_much_ends_in_bounded_time(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyllm.structured._SECONDS", 0.5)
    began = time.thread_time()
    matcher = compiler.compile(StructuredOutputs(grammar=AMBIGUOUS))
    assert walk(matcher, 10_000) < 10_000
    assert time.thread_time() - began < 2 and "too costly to match" in str(matcher.error)
    assert walk(matcher.fork(), 1) == 0  # all outputs of a request share what it may take


def test_what_a_grammar_may_cost_grows_with_its_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllm.structured._SECONDS", 0.0)
    wanted = params(regex="[a-z]{30}")
    with pytest.raises(ValueError, match=r"structured_outputs: it is too costly to match: 0\.0 s for 0 tokens"):
        llm.generate("x", wanted)  # compiling counts
    compiled = llm.engine.prepare  # of what the first mask and compiling took nothing is counted here

    def free(given: SamplingParams) -> Shared:
        with monkeypatch.context() as patch:
            patch.setattr("pyllm.structured._SECONDS", 1.0)
            return compiled(given)

    monkeypatch.setattr(llm.engine, "prepare", free)
    with pytest.raises(RequestError, match="cannot go on after 0 tokens: it is too costly to match"):
        llm.generate("x", wanted)
    assert llm.engine.idle
    monkeypatch.setattr("pyllm.structured._SECONDS_A_TOKEN", 1.0)
    monkeypatch.setattr("pyllm.structured._SECONDS", 1.0)
    assert re.fullmatch("[a-z]{30}", texts(llm, "x", wanted)[0])


@pytest.mark.parametrize("regex", ["((((.{0,99}){0,99}){0,99}){0,99})x", "(.*a.{40}b){40}"])
def test_costly_ones_end_in_bounded_time(llm: LLM, regex: str) -> None:
    began = time.monotonic()
    with contextlib.suppress(ValueError, RequestError):  # to be matched, or refused at once or when it grows too large
        llm.generate("x", params(regex=regex))
    assert time.monotonic() - began < 5 and llm.engine.idle


def test_arguments_are_checked() -> None:
    for wanted, error in (
        ({}, ValueError),
        ({"regex": "a", "choice": ["b"]}, ValueError),
        ({"regex": 1}, TypeError),
        ({"choice": "abc"}, TypeError),
        ({"choice": []}, ValueError),
        ({"json": 3}, TypeError),
        ({"json": "[1]"}, ValueError),
        ({"json": "{"}, ValueError),
        ({"json": {"a": {1}}}, ValueError),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, ValueError),
        ({"json_object": 1}, TypeError),
    ):
        with pytest.raises(error, match="structured_outputs: "):
            StructuredOutputs(**wanted)  # type: ignore[arg-type]
    structured = StructuredOutputs(regex="a")
    for more in ({"num_beams": 2}, {"min_tokens": 1}, {"ignore_eos": True}, {"allowed_token_ids": [7]}):
        with pytest.raises(ValueError, match=f"{next(iter(more))}: expected .* with structured_outputs"):
            SamplingParams(structured_outputs=structured, **more)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="structured_outputs: expected a StructuredOutputs"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]


def test_a_missing_package_is_one_clear_error(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pyllm\[structured\]"):
        LLM(tiny_folder, threads=1).generate("x", params(regex="a"))


def test_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g").write_text(GRAMMAR)
    (tmp_path / "s").write_text('{"const": 7}')
    base = ["generate", "-m", str(tiny_folder), "Once", "--seed", "1", "-q"]
    for options, pattern in (
        (["--regex", "[ab]{3}"], "[ab]{3}\n"),
        (["--choice", "yes", "--choice", "no"], "(yes|no)\n"),
        (["--grammar", str(tmp_path / "g")], r"\d(\+\d)?\n"),
        (["--json-schema", str(tmp_path / "s")], "7\n"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main([*base, *options])
        assert re.fullmatch(pattern, capsys.readouterr().out)
    with pytest.raises(SystemExit, match="2"):
        main([*base, "--regex", "a", "--choice", "b"])


def test_server(tiny_chat_folder: Path) -> None:
    pytest.importorskip("starlette")
    from serving import running

    hello = [{"role": "user", "content": "hello"}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[0]}}
    with running(LLM(tiny_chat_folder, threads=2, max_num_seqs=2)) as server:
        chat, plain = "/v1/chat/completions", "/v1/completions"
        answer = server.post(chat, messages=hello, max_tokens=60, response_format=form)
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMAS[0])
        answer = server.post(plain, prompt="x", max_tokens=60, structured_outputs={"choice": ["yes"]})
        assert answer["choices"][0]["text"] == "yes"
        several = {"prompt": "x", "n": 3, "seed": 1, "max_tokens": 60, "stop": "8"}
        several["structured_outputs"] = {"regex": "([a-e]{2}[0-9]){9}"}
        choices = server.post(plain, **several)["choices"]
        assert all(re.fullmatch("([a-e]{2}[0-79]){0,8}[a-e]{2}|([a-e]{2}[0-79]){9}", c["text"]) for c in choices)
        assert any(len(choice["text"]) < 27 for choice in choices)
        with server.client.stream("POST", plain, json={**several, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line.startswith("data: {")]
        pieces = [json.loads(line[6:])["choices"][0] for line in lines]
        for choice in choices:
            assert "".join(p["text"] for p in pieces if p["index"] == choice["index"]) == choice["text"]
        for body in (
            {"response_format": {"type": "xml"}},
            {"response_format": {"type": "json_schema"}},
            {"response_format": form, "structured_outputs": {"regex": "a"}},
        ):
            assert server.refusal(chat, 400, messages=hello, **body)["param"] == "response_format"
        for wanted in ({}, {"regex": "(a"}, {"json": {"type": "foo"}}, {"regex": "a", "choice": ["b"]}):
            error = server.refusal(plain, 400, prompt="x", structured_outputs=wanted)
            assert error["param"] == "structured_outputs"

"""The server as its clients see it: answers in OpenAI's shape, equal to what `LLM` gives."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Running, running, slowed, until

from pyllm import LLM, SamplingParams

GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once upon a time"}]


@pytest.fixture(scope="module")
def llm(tiny_chat_folder: Path) -> LLM:
    return LLM(tiny_chat_folder, threads=2)


@pytest.fixture(scope="module")
def shared(llm: LLM) -> Iterator[Running]:
    with running(llm) as server:
        yield server


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    yield shared
    shared.assert_idle()


@pytest.fixture(scope="module")
def client(shared: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{shared.url}/v1", api_key="any", max_retries=0)


@pytest.fixture(scope="module")
def valid(shared_data: Path) -> Any:
    """Checks a body against a schema of OpenAI's description of its interface."""
    import jsonschema

    description = json.loads((shared_data / "openai" / "openapi.json").read_text())

    def check(name: str, body: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
        jsonschema.Draft202012Validator(schema).validate(body)

    return check


def alone(llm: LLM, prompt: Any, **params: Any) -> Any:
    """What the model gives without a server."""
    [output] = llm.generate(prompt, SamplingParams(**params))
    return output


def events(server: Running, path: str, **body: Any) -> list[Any]:
    """The events of a stream, which must end with [DONE]."""
    with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_completions_are_the_models(server: Running, llm: LLM) -> None:
    expected = alone(llm, "Once upon", **GREEDY)
    answer = server.post("/v1/completions", prompt="Once upon", **GREEDY)
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    [choice] = answer["choices"]
    assert choice == {
        "index": 0, "text": expected.outputs[0].text, "logprobs": None, "finish_reason": "length"
    }  # fmt: skip
    read = len(expected.prompt_token_ids)
    assert answer["usage"] == {
        "prompt_tokens": read,
        "completion_tokens": 12,
        "total_tokens": read + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_every_kind_of_prompt(server: Running, llm: LLM) -> None:
    ids = llm.encode("Once upon")
    for prompt in ("Once upon", ["Once upon"], ids, [ids]):
        [choice] = server.post("/v1/completions", prompt=prompt, **GREEDY)["choices"]
        assert choice["text"] == alone(llm, "Once upon", **GREEDY).outputs[0].text
    several = server.post("/v1/completions", prompt=["Once", "The dog"], n=2, seed=3, max_tokens=5)["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    each = [one.text for p in ("Once", "The dog") for one in alone(llm, p, n=2, seed=3, max_tokens=5).outputs]
    assert [choice["text"] for choice in several] == each


@pytest.mark.parametrize("extra", [{}, {"n": 3}, {"logprobs": 2}, {"echo": True, "logprobs": 1}, {"stop": ["e", "🙂"]}])
def test_streamed_completions_equal_whole_ones(server: Running, extra: dict[str, Any]) -> None:
    body = {"prompt": ["Once", "héllo 🦙"], "seed": 5, "max_tokens": 20, **extra}
    whole = server.post("/v1/completions", **body)
    pieces = events(server, "/v1/completions", stream_options={"include_usage": True}, **body)
    assert pieces.pop()["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [p["finish_reason"] for p in mine if p["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"] is not None:
            for field, values in choice["logprobs"].items():
                assert [v for piece in mine if piece["logprobs"] for v in piece["logprobs"][field]] == values


def test_streamed_chats_equal_whole_ones(server: Running, llm: LLM) -> None:
    body = {"messages": CHAT, "n": 2, "seed": 2, "max_tokens": 16, "logprobs": True, "top_logprobs": 3}
    whole = server.post("/v1/chat/completions", **body)
    expected = llm.chat(CHAT, SamplingParams(n=2, seed=2, max_tokens=16))[0].outputs
    assert [c["message"]["content"] for c in whole["choices"]] == [one.text for one in expected]
    pieces = events(server, "/v1/chat/completions", **body)
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(p["delta"].get("content", "") for p in mine) == choice["message"]["content"]
        logged = [entry for p in mine if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert logged == choice["logprobs"]["content"] and len(logged[0]["top_logprobs"]) == 3


def test_chat_runs_to_the_end_of_the_context_unless_told_otherwise(server: Running, llm: LLM) -> None:
    answer = server.post("/v1/chat/completions", messages=CHAT, temperature=0, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == llm.max_model_len
    answer = server.post("/v1/completions", prompt="Once", temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16


def test_echoed_log_probabilities_are_those_of_score(server: Running, llm: LLM) -> None:
    text = "Once upon a time there was a fox."
    [score] = llm.score([text])
    [choice] = server.post("/v1/completions", prompt=text, echo=True, logprobs=0, max_tokens=0)["choices"]
    assert choice["text"] == text and choice["logprobs"]["token_logprobs"][1:] == score.logprobs
    assert choice["logprobs"]["token_logprobs"][0] is None and choice["finish_reason"] == "length"
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert "".join(tokens) == text and all(text[o:].startswith(t) for o, t in zip(offsets, tokens, strict=True))
    answer = server.post("/v1/completions", prompt="Once", logprobs=0, seed=1, max_tokens=9, ignore_eos=True)
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    ids = alone(llm, "Once", seed=1, max_tokens=9, ignore_eos=True).outputs[0].token_ids
    [again] = llm.score([{"prompt_token_ids": llm.encode("Once") + ids}])
    assert logprobs == again.logprobs[-9:]


def test_an_echoed_prompt_without_text_is_told_of_once(server: Running, llm: LLM) -> None:
    [end] = llm.engine.end_ids
    body = {"prompt": [end], "echo": True, "logprobs": 0, "max_tokens": 3, "ignore_eos": True}
    body["logit_bias"] = {str(end): 100}
    pieces = events(server, "/v1/completions", **body)
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == ""
    assert sum(len(piece["choices"][0]["logprobs"]["tokens"]) for piece in pieces) == 1 + 3


def test_completions_with_echoed_log_probabilities_share_their_prompt(server: Running, llm: LLM) -> None:
    body = {"prompt": "share this beginning, all of you: " * 4, "echo": True, "logprobs": 0, "max_tokens": 2, "seed": 4}
    before = llm.stats.cached_tokens
    first, *others = server.post("/v1/completions", **body, n=3)["choices"]
    assert llm.stats.cached_tokens - before >= 2 * 32
    known = len(first["logprobs"]["tokens"]) - 2
    for other in others:
        assert other["logprobs"]["token_logprobs"][:known] == first["logprobs"]["token_logprobs"][:known]


def test_stop_strings_over_several_tokens_cut_exactly(server: Running, llm: LLM) -> None:
    text = alone(llm, "Once", temperature=0, max_tokens=40, ignore_eos=True).outputs[0].text
    whole = [i for i in range(8, len(text) - 3) if "�" not in text[i : i + 3] and len(llm.encode(text[i : i + 3])) > 1]
    stop = text[whole[0] : whole[0] + 3]
    for streamed in (False, True):
        body = {"prompt": "Once", "temperature": 0, "max_tokens": 40, "ignore_eos": True, "stop": stop}
        if streamed:
            got = "".join(p["choices"][0]["text"] for p in events(server, "/v1/completions", **body))
        else:
            got = server.post("/v1/completions", **body)["choices"][0]["text"]
        assert got == text[: text.find(stop)]


def test_same_request_gives_the_same_text_alone_and_among_64(server: Running) -> None:
    def ask(index: int) -> Any:
        body = {"prompt": f"Story {index}: once", "seed": index, "max_tokens": 5 + index % 20, "logprobs": 1}
        return server.post("/v1/completions", **body)["choices"]

    quiet = [ask(index) for index in range(65)]
    with ThreadPoolExecutor(65) as crowd:
        assert list(crowd.map(ask, range(65))) == quiet


def test_bodies_are_valid_by_openais_description(server: Running, valid: Any) -> None:
    chat = {"messages": CHAT, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    valid("CreateCompletionResponse", server.post("/v1/completions", prompt="Once", logprobs=2, n=2, max_tokens=3))
    valid("CreateChatCompletionResponse", server.post("/v1/chat/completions", **chat))
    for piece in events(server, "/v1/completions", prompt="Once", max_tokens=3):
        # Pieces have no finish_reason before their last, which the description, made for whole bodies, leaves out.
        for choice in piece["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "length"
        valid("CreateCompletionResponse", piece)
    for piece in events(server, "/v1/chat/completions", stream_options={"include_usage": True}, **chat):
        # "nullable" is an older OpenAPI's word for what these say with null.
        piece = {key: value for key, value in piece.items() if value is not None}
        piece["choices"] = [{k: v for k, v in c.items() if v is not None} for c in piece["choices"]]
        for choice in piece["choices"]:
            choice.setdefault("finish_reason", "stop")
            if "logprobs" in choice:
                choice["logprobs"] = {"content": choice["logprobs"]["content"], "refusal": []}
        valid("CreateChatCompletionStreamResponse", piece)
    valid("ListModelsResponse", server.client.get("/v1/models").json())
    valid("Model", server.client.get("/v1/models/tiny").json())
    valid("ErrorResponse", server.client.post("/v1/completions", json={"prompt": 1}).json())


def test_openai_client(server: Running, client: openai.OpenAI, llm: LLM) -> None:
    expected = alone(llm, "Once", temperature=0, max_tokens=8).outputs[0].text
    body: dict[str, Any] = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 8}
    assert client.completions.create(**body).choices[0].text == expected
    pieces = client.completions.create(**body, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    said = llm.chat(CHAT, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].text
    chat: dict[str, Any] = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_completion_tokens": 8}
    assert client.chat.completions.create(**chat).choices[0].message.content == said
    stream = client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True})
    *pieces, last = stream
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said
    assert last.usage is not None and last.usage.completion_tokens <= 8
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="which is served here"):
        client.completions.create(model="other", prompt="Once")
    with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
        client.completions.create(model="tiny", prompt="Once", max_tokens=-1)
    assert caught.value.param == "max_tokens"


def test_tokenize_and_back(server: Running, llm: LLM) -> None:
    text = "Grüße 🙂 once"
    made = server.post("/tokenize", prompt=text)
    assert made == {"count": len(llm.encode(text)), "max_model_len": llm.max_model_len, "tokens": llm.encode(text)}
    assert server.post("/detokenize", tokens=made["tokens"]) == {"prompt": text}
    assert server.post("/tokenize", messages=CHAT)["tokens"] == llm.chat_prompt(CHAT)["prompt_token_ids"]
    assert server.post("/tokenize", prompt="")["tokens"] == []


def test_prefixes_are_shared_within_a_salt_only_and_counted(server: Running) -> None:
    prompt = "a long beginning, the same for all: " * 5

    def cached(**body: Any) -> int:
        answer = server.post("/v1/completions", prompt=prompt, max_tokens=1, **body)
        count: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    assert cached() == 0 and cached() > 0
    assert cached(cache_salt="a") == 0 and cached(cache_salt="b") == 0
    assert cached(cache_salt="a") == cached() > 0
    text = server.client.get("/metrics").text
    hits = next(line for line in text.splitlines() if line.startswith("pyllm:prefix_cache_hits_total"))
    assert float(hits.split()[-1]) >= 2 * cached()


def test_metrics_have_vllms_names(server: Running) -> None:
    server.post("/v1/completions", prompt="Once", max_tokens=3, ignore_eos=True)
    lines = server.client.get("/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    label = '{model_name="tiny"}'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert values[f"pyllm:{name}{label}"] == 0
    counters = ("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "num_preemptions_total")
    histograms = ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds")
    assert all(f"pyllm:{name}{label}" in values for name in counters)
    assert all(values[f"pyllm:{name}_count{label}"] > 0 for name in histograms)
    assert values['pyllm:request_success_total{finished_reason="length",model_name="tiny"}'] > 0


def test_the_log_has_no_text_and_names_the_request(server: Running) -> None:
    response = server.client.post(
        "/v1/completions", json={"prompt": "secret words", "max_tokens": 2}, headers={"X-Request-Id": "mine-1"}
    )
    assert response.headers["x-request-id"] == "mine-1"
    until(lambda: any(line["id"] == "mine-1" for line in server.log))
    [line] = [line for line in server.log if line["id"] == "mine-1"]
    assert line["status"] == 200 and line["completion_tokens"] <= 2
    assert "secret" not in json.dumps(server.log)
    odd = server.client.get("/version", headers={"X-Request-Id": "a b"})
    assert odd.headers["x-request-id"] != "a b" and odd.json()["version"]


def test_requests_run_together(server: Running, llm: LLM) -> None:
    before = llm.stats.decode_steps
    barrier = threading.Barrier(8)

    def ask(index: int) -> None:
        barrier.wait()
        server.post("/v1/completions", prompt=f"Number {index}", max_tokens=60, ignore_eos=True)

    with slowed(llm, 0.005), ThreadPoolExecutor(8) as crowd:
        list(crowd.map(ask, range(8)))
    assert llm.stats.decode_steps - before < 8 * 60 // 2

"""Tool calls: the formats of known chat templates, whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Running, running

from pyllm import LLM
from pyllm.server.chat import split
from pyllm.server.protocol import ChatBody, Message, parse
from pyllm.server.tools import MAX_CALLS, CallReader, format_of

HERMES = "{% if tools %}{{ tools | tojson }}{% endif %}<tool_call>{% for m in messages %}{{ m.content }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "Köln"}}\n</tool_call>'


def read(form: str, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    reader = CallReader(form)
    content = "".join(reader.push(piece) for piece in pieces) + reader.finish()
    return content, [(call.name, json.loads(call.arguments)) for call in reader.calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call at all", "no call at all", []),
        (CALL, "", [("look", {"at": "Köln"})]),
        (f"Let me see.\n{CALL}\n{CALL}", "Let me see.", [("look", {"at": "Köln"})] * 2),
        (CALL.removesuffix("</tool_call>"), "", [("look", {"at": "Köln"})]),
        ("<tool_call>nonsense</tool_call> a", "<tool_call>nonsense</tool_call> a", []),
        ('<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
        ("<tool_call>{", "<tool_call>{", []),
        ("1 < 2 <tool", "1 < 2 <tool", []),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
        ("spaces \n", "spaces \n", []),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}', '<tool_call>{"name": "f", "arguments": {"x": NaN}}', []),
        (CALL * MAX_CALLS + CALL, CALL, [("look", {"at": "Köln"})] * MAX_CALLS),
        (CALL * MAX_CALLS + CALL[:-5], CALL[:-5], [("look", {"at": "Köln"})] * MAX_CALLS),
    ],
)
def test_hermes(text: str, content: str, calls: list[Any]) -> None:
    assert read("hermes", [text]) == (content, calls)
    assert read("hermes", list(text)) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("just text {", "just text {", []),
        ('{"name": "f", "parameters": {"x": 1}}', "", [("f", {"x": 1})]),
        (' {"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}\n', "", [("f", {}), ("g", {})]),
        ('{"name": "f", "parameters": ', '{"name": "f", "parameters": ', []),
        ('{"a": 1}', '{"a": 1}', []),
        ("", "", []),
        ('{"name": "f", "parameters": {"x": 1e999}}', '{"name": "f", "parameters": {"x": 1e999}}', []),
        ('{"name": "f"};' * MAX_CALLS + '{"name": "f"}', '{"name": "f"}', [("f", {})] * MAX_CALLS),
    ],
)
def test_llama3(text: str, content: str, calls: list[Any]) -> None:
    assert read("llama3", [text]) == (content, calls)
    assert read("llama3", list(text)) == (content, calls)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([CALL, "<tool_call>", "</tool_call>", "<", "text", " ", "\n", "{", "}"]), max_size=8),
    st.lists(st.integers(1, 30), max_size=20),
    st.sampled_from(["hermes", "llama3"]),
)
def test_pieces_give_what_the_whole_gives(parts: list[str], cuts: list[int], form: str) -> None:
    text, pieces, at = "".join(parts), [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    assert read(form, [*pieces, text[at:]]) == read(form, [text])


def test_formats_are_known_by_their_templates() -> None:
    assert format_of(HERMES) == "hermes"
    assert format_of('{% if tools %}"parameters" ipython{% endif %}') == "llama3"
    assert format_of(None) is format_of("{{ messages }}") is format_of("{{ tools }}") is None


def test_calls_of_a_conversation_become_values() -> None:
    made = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [made]}
    body = parse(ChatBody, json.dumps({"messages": [message]}).encode())
    assert body.conversation() == [
        {"role": "assistant", "content": "", "tool_calls": [{**made, "function": {"name": "f", "arguments": {"x": 1}}}]}
    ]
    assert Message(role="developer", content="x").for_template(0)["role"] == "system"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tiny_model.make(tmp_path_factory.mktemp("tools") / "m", max_position_embeddings=512)
    with running(LLM(folder, threads=1, chat_template=HERMES)) as made:
        yield made


def test_calls_are_found_in_answers_whole_and_streamed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model never makes a call: its text is replaced by one where the engine makes it."""
    tokens = server.llm.encode(f"I look. {CALL}")
    allowed = iter(tokens * 2)
    engine = server.llm.engine
    take = engine._take

    def forced(completion: Any, token: int, entry: Any = None) -> None:
        take(completion, next(allowed), entry)

    monkeypatch.setattr(engine, "_take", forced)
    monkeypatch.setattr(engine, "use_graphs", False)
    body = {"messages": [{"role": "user", "content": "where?"}], "tools": [TOOL], "max_tokens": len(tokens)}
    [choice] = server.post("/v1/chat/completions", **body)["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "I look."
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function" and json.loads(call["function"]["arguments"]) == {"at": "Köln"}
    lines = server.client.post("/v1/chat/completions", json={**body, "stream": True}).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(c["delta"].get("content", "") for c in choices) == "I look."
    [streamed] = [call for c in choices for call in c["delta"].get("tool_calls", [])]
    assert streamed["index"] == 0 and streamed["function"] == call["function"]
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_offered_tools_stand_in_the_prompt_unless_none_may_be_called(server: Running) -> None:
    def read_tokens(**body: Any) -> int:
        message = {"role": "user", "content": "where?"}
        count: int = server.post("/v1/chat/completions", messages=[message], max_tokens=1, **body)["usage"][
            "prompt_tokens"
        ]
        return count

    assert read_tokens(tools=[TOOL]) > read_tokens() == read_tokens(tools=[TOOL], tool_choice="none")


def test_without_tools_text_is_left_alone() -> None:
    assert split(None, CALL) == (CALL, [])

"""Response bodies: what the engine gave, as an OpenAI client expects it. No HTTP here."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pyllm.engine.outputs import CompletionOutput, Logprob, RequestOutput
from pyllm.server.tools import Call

Json = dict[str, Any]
Entry: TypeAlias = "tuple[int, Mapping[int, Logprob] | None]"  # a token id, what is known of it and its alternatives
Entries = Iterable[Entry]


@dataclass(frozen=True)
class Head:
    """What all bodies of one answer share; made with `completion`, `chat`."""

    id: str
    object: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    @staticmethod
    def completion(model: str) -> Head:
        """Of an answer of ``/v1/completions``, streamed or not."""
        return Head(f"cmpl-{secrets.token_hex(12)}", "text_completion", model)

    @staticmethod
    def chat(model: str, streamed: bool) -> Head:
        """Of an answer of ``/v1/chat/completions``."""
        return Head(f"chatcmpl-{secrets.token_hex(12)}", f"chat.completion{'.chunk' if streamed else ''}", model)

    def body(self, choices: list[Json], **more: Any) -> Json:
        """A response or a piece of a stream."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


def usage(prompts: Sequence[Sequence[int]], generated: int, cached: int) -> Json:
    """Token counts of a request, over all its prompts and completions."""
    read = sum(map(len, prompts))
    return {
        "prompt_tokens": read,
        "completion_tokens": generated,
        "total_tokens": read + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def usage_of(outputs: Sequence[RequestOutput]) -> Json:
    """The same, of finished outputs."""
    generated = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return usage([o.prompt_token_ids for o in outputs], generated, sum(o.cached_tokens for o in outputs))


# Completions


def completion_reply(
    head: Head, outputs: Sequence[RequestOutput], echoed: Sequence[str] | None, text_of: Callable[[int], str]
) -> Json:
    """Body of ``/v1/completions``; with `echoed` each prompt's text, and its log-probabilities, stand in front."""
    choices = []
    for number, output in enumerate(outputs):
        before = echoed[number] if echoed is not None else ""
        for one in output.outputs:
            index = number * len(output.outputs) + one.index
            entries = [*prompt_entries(output), *generated_entries(one)]
            logprobs = completion_logprobs(entries, 0, text_of) if one.logprobs is not None else None
            choices.append(completion_choice(index, before + one.text, logprobs, one.finish_reason))
    return head.body(choices, usage=usage_of(outputs))


def completion_choice(index: int, text: str, logprobs: Json | None, finish_reason: str | None) -> Json:
    """One choice, or a piece of one."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def prompt_entries(output: RequestOutput) -> Entries:
    """Of an echoed prompt; nothing where its log-probabilities were not wanted."""
    return zip(output.prompt_token_ids, output.prompt_logprobs, strict=True) if output.prompt_logprobs else ()


def generated_entries(one: CompletionOutput) -> Entries:
    """Of a completion's tokens."""
    return zip(one.token_ids, one.logprobs or (), strict=True) if one.logprobs is not None else ()


def completion_logprobs(entries: Entries, offset: int, text_of: Callable[[int], str]) -> Json:
    """The old format: lists beside each other. `offset` is where in the text the first token begins.

    The first token of a prompt has nothing before it: its entries are null, and `text_of` gives its text.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token, entry in entries:
        text = _text(entry[token]) if entry is not None else text_of(token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if entry is None:
            values.append(None)
            tops.append(None)
            continue
        values.append(entry[token].logprob)
        listed: dict[str, float] = {}
        for value in entry.values():  # tokens that are no whole characters may look the same: the likeliest counts
            listed[_text(value)] = max(value.logprob, listed.get(_text(value), value.logprob))
        tops.append(listed)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


# Chats


def chat_reply(head: Head, output: RequestOutput, parsed: Sequence[tuple[str, list[Call]]], top: int) -> Json:
    """Body of ``/v1/chat/completions``; `parsed` has each completion's text and the calls that were found in it."""
    choices = []
    for one, (text, calls) in zip(output.outputs, parsed, strict=True):
        message: Json = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [call.body() for call in calls]
        logprobs = chat_logprobs(generated_entries(one), top) if one.logprobs is not None else None
        reason = "tool_calls" if calls else one.finish_reason
        choices.append({"index": one.index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    return head.body(choices, usage=usage_of([output]))


def chat_choice(index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
    """A piece of a streamed choice."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_logprobs(entries: Entries, top: int) -> Json:
    """One object a token, with its `top` likeliest alternatives."""
    content = [
        {
            **_described(entry[token]),
            "top_logprobs": [_described(value) for value in entry.values() if value.rank <= top],
        }
        for token, entry in entries
        if entry is not None
    ]
    return {"content": content, "refusal": None}


def _described(value: Logprob) -> Json:
    text = _text(value)
    return {"token": text, "logprob": value.logprob, "bytes": None if "�" in text else list(text.encode())}


def _text(value: Logprob) -> str:
    return value.decoded_token or ""

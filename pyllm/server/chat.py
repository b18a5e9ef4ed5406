"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pyllm.engine.outputs import StreamOutput
from pyllm.server import replies
from pyllm.server.connection import (
    PING,
    PING_SECONDS,
    ChoiceEvents,
    EventStream,
    ended_well,
    event,
    finish,
    read,
    reply,
    service_of,
    submit,
)
from pyllm.server.engine_thread import Generation
from pyllm.server.protocol import ChatBody
from pyllm.server.tools import Call, CallReader


async def chat(request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    body = await read(request, ChatBody)
    service.check_model(body.model)
    params = body.sampling_params(service.limits)
    tools = body.offered_tools()
    service.engine.admit(params.n)  # before the work of reading it
    prompt = await service.chat_prompt(body.conversation(), tools)
    generation = await submit(request, [prompt], params, streamed=bool(body.stream), salt=body.cache_salt)
    form = service.tool_format if tools else None
    head = replies.Head.chat(service.model, bool(body.stream))
    top = body.top_logprobs or 0
    if body.stream:
        await generation.accepted()
        events = _Events(generation, head, form, top, body.include_usage)
        return EventStream(generation, ended_well(events.all()), service.limits.max_seconds)
    [output] = await finish(request, generation, generation.results())
    parsed = [split(form, one.text) for one in output.outputs]
    return reply(replies.chat_reply(head, output, parsed, top))


def split(form: str | None, text: str) -> tuple[str, list[Call]]:
    """A whole answer as content and the tool calls in it; `form` None: no tools were offered."""
    if form is None:
        return text, []
    reader = CallReader(form)
    content = reader.push(text) + reader.finish()
    return content, reader.calls


class _Events:
    """The pieces of a streamed answer."""

    def __init__(self, generation: Generation, head: replies.Head, form: str | None, top: int, usage: bool) -> None:
        self.generation, self.head, self.top, self.include_usage = generation, head, top, usage
        self.readers = [CallReader(form) if form is not None else None for _ in range(generation.params.n)]
        self.called = [0] * generation.params.n  # calls sent
        self.chunks = ChoiceEvents(head, {"usage": None} if usage else {})

    async def all(self) -> AsyncIterator[bytes]:
        """The role of each choice, its pieces as they come, and the usage where that was asked for."""
        for index in range(self.generation.params.n):
            yield self.chunks.of(replies.chat_choice(index, {"role": "assistant", "content": "", "refusal": None}))
        async for item in self.generation.pieces(PING_SECONDS):
            if item is None:
                yield PING
            elif item[1].finish_reason not in ("abort", "error"):
                yield self.chunks.of(self._choice(item[1]))
        if self.include_usage:
            outputs = [request.result() for request in self.generation.requests]
            yield event(self.head.body([], usage=replies.usage_of(outputs)))

    def _choice(self, piece: StreamOutput) -> dict[str, Any]:
        index, reader, text = piece.index, self.readers[piece.index], piece.text
        delta: dict[str, Any] = {}
        reason = piece.finish_reason
        if reader is not None:
            text = reader.push(text) + (reader.finish() if reason is not None else "")
            new = reader.calls[self.called[index] :]
            if new:
                delta["tool_calls"] = [
                    {"index": number, **call.body()} for number, call in enumerate(new, self.called[index])
                ]
                self.called[index] += len(new)
            if reason is not None and reader.calls:
                reason = "tool_calls"
        if text:
            delta["content"] = text
        logprobs = None
        if piece.logprobs is not None:
            logprobs = replies.chat_logprobs(zip(piece.token_ids, piece.logprobs, strict=True), self.top)
        return replies.chat_choice(index, delta, logprobs, reason)

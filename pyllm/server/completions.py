"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

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
from pyllm.server.protocol import CompletionBody
from pyllm.server.replies import Entry
from pyllm.server.service import Service


async def completions(request: Request) -> Response:
    """Continue one or several prompts; an encoder-decoder answers them, searching as its folder says."""
    service = service_of(request)
    body = await read(request, CompletionBody)
    service.check_model(body.model)
    engine = service.llm.engine
    params = body.sampling_params(service.limits, None if service.llm.spec.encoder is None else engine.defaults)
    prompts = await service.prompts("prompt", body.prompts(), params.n, echo=bool(body.echo))
    generation = await submit(request, prompts, params, streamed=bool(body.stream), salt=body.cache_salt)
    head = replies.Head.completion(service.model)
    echoed = [prompt.text or "" for prompt in prompts] if body.echo else None
    if body.stream:
        await generation.accepted()
        events = _events(service, generation, head, echoed, body.include_usage)
        return EventStream(generation, ended_well(events), service.limits.max_seconds)
    outputs = await finish(request, generation, generation.results())
    return reply(replies.completion_reply(head, outputs, echoed, service.token_text))


async def _events(
    service: Service, generation: Generation, head: replies.Head, echoed: list[str] | None, include_usage: bool
) -> AsyncIterator[bytes]:
    count = generation.params.n
    chunks = ChoiceEvents(head, {"usage": None} if include_usage else {})
    begun: set[int] = set()  # choices whose echoed prompt was sent
    logged = [0] * generation.completions  # of the text that log-probabilities were sent of
    async for item in generation.pieces(PING_SECONDS):
        if item is None:
            yield PING
            continue
        number, piece = item
        if piece.finish_reason in ("abort", "error"):
            continue
        index = number * count + piece.index
        entries: list[Entry] = []
        if piece.logprobs is not None:
            entries.extend(zip(piece.token_ids, piece.logprobs, strict=True))
        text = piece.text
        if echoed is not None and index not in begun:
            begun.add(index)
            text = echoed[number] + text
            entries = [*replies.prompt_entries(generation.requests[number].result()), *entries]
        logprobs = None
        if piece.logprobs is not None:
            logprobs = replies.completion_logprobs(entries, logged[index], service.token_text)
            logged[index] += sum(map(len, logprobs["tokens"]))
        yield chunks.of(replies.completion_choice(index, text, logprobs, piece.finish_reason))
    if include_usage:
        outputs = [request.result() for request in generation.requests]
        yield event(head.body([], usage=replies.usage_of(outputs)))

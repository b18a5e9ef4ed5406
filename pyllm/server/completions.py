"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from pyllm.server import replies
from pyllm.server.connection import (
    PING,
    PING_SECONDS,
    EventStream,
    ended_well,
    event,
    facts_of,
    finish,
    read,
    reply,
    service_of,
)
from pyllm.server.engine_thread import Generation
from pyllm.server.protocol import CompletionBody
from pyllm.server.replies import Entry
from pyllm.server.service import Service


async def completions(request: Request) -> Response:
    """Continue one or several prompts."""
    service = service_of(request)
    body = await read(request, CompletionBody)
    service.check_model(body.model)
    params = body.sampling_params(service.limits)
    prompts = [await service.prompt(given) for given in body.prompts()]
    generation = await service.submit(
        prompts,
        params,
        streamed=bool(body.stream),
        key=request.scope.get("pyllm.key", b""),
        salt=body.cache_salt,
    )
    facts_of(request.scope)["generation"] = generation
    head = replies.Head.completion(service.model)
    decode = service.llm.decode
    echoed = [decode(p.ids) if p.text is None else p.text for p in prompts] if body.echo else None
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
    more = {"usage": None} if include_usage else {}
    lengths = [0] * generation.completions  # of the text sent
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
        if echoed is not None and not lengths[index]:
            text = echoed[number] + text
            entries = [*replies.prompt_entries(generation.requests[number].result()), *entries]
        logprobs = None
        if piece.logprobs is not None:
            logprobs = replies.completion_logprobs(entries, logged[index], service.token_text)
            logged[index] += sum(map(len, logprobs["tokens"]))
        lengths[index] += len(text)
        yield event(head.body([replies.completion_choice(index, text, logprobs, piece.finish_reason)], **more))
    if include_usage:
        outputs = [request.result() for request in generation.requests]
        yield event(head.body([], usage=replies.usage_of(outputs)))

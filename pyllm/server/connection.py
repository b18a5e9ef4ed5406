"""Between Starlette and the routes: bodies read within limits, answers, streams of events, clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pyllm.sampling import SamplingParams
from pyllm.server.engine_thread import Generation, Prompt
from pyllm.server.errors import ApiError, api_error
from pyllm.server.protocol import Body, parse
from pyllm.server.replies import Head
from pyllm.server.service import Service, aside
from pyllm.spec import Pooling

T = TypeVar("T")
B = TypeVar("B", bound=Body)
PING_SECONDS = 30.0
_GRACE = 5.0  # seconds for a reader to take what is left once its request has ended
_PARSED = 16  # bytes of a body are parsed in the time that a character takes to tokenize
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class ClientGoneError(Exception):
    """The client went away before its answer was complete."""


def service_of(request: Request) -> Service:
    """What the application serves."""
    service: Service = request.app.state.service
    return service


def facts_of(scope: Scope) -> dict[str, Any]:
    """What the access log will say of this request."""
    facts: dict[str, Any] = scope.setdefault("pyllm.facts", {})
    return facts


def encode(value: Any) -> bytes:
    """JSON in UTF-8."""
    return _ENCODER.encode(value).encode("utf-8", "replace")


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % encode(value)


class ChoiceEvents:
    """The events of a stream that tell of one choice each; what they share is encoded once."""

    def __init__(self, head: Head, more: Mapping[str, Any]) -> None:
        """`more` stands in each beside the choice."""
        before, choices, after = event(head.body([], **more)).partition(b'"choices":[')
        self._before, self._after = before + choices, after

    def of(self, choice: Mapping[str, Any]) -> bytes:
        """The event of `choice`."""
        return b"%b%b%b" % (self._before, encode(choice), self._after)


def reply(value: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(encode(value), status, media_type="application/json")


def error_reply(error: ApiError) -> Response:
    """An error as an OpenAI client expects it."""
    response = reply(error.body(), error.status)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def read(request: Request, kind: type[B]) -> B:
    """The request's body. Raises `ApiError` 400, 408, 413 or 415."""
    limits = service_of(request).limits
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        # Pages of other sites can make a browser send anything but this without asking first.
        raise ApiError(415, f"Content-Type: expected application/json, got {media[:100] or 'none'}")
    too_large = ApiError(
        413, f"the body: expected at most {limits.max_body_bytes} bytes (a limit of this server), got more: send less"
    )
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.max_body_bytes:
        raise too_large

    async def all_of_it() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.max_body_bytes:
                raise too_large
        return bytes(body)

    try:
        body = await asyncio.wait_for(all_of_it(), limits.body_seconds)
    except asyncio.TimeoutError as error:
        raise ApiError(
            408, f"the body: expected all of it within {limits.body_seconds:g} seconds, got a part: send it faster"
        ) from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return await aside(len(body) // _PARSED, lambda: parse(kind, body))


async def submit(
    request: Request,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    streamed: bool = False,
    salt: str | None = None,
    pooling: Pooling | None = None,
) -> Generation:
    """Queue the prompts of a request; nothing is queued for a client that goes away first. Raises `ApiError`."""
    scope = request.scope
    work = service_of(request).submit(
        prompts,
        params,
        streamed=streamed,
        arrival=scope["pyllm.arrival"],
        key=scope.get("pyllm.key", b""),
        salt=salt,
        pooling=pooling,
    )
    generation = await (work if params.structured_outputs is None else unless_gone(request.receive, work))
    facts_of(scope)["generation"] = generation
    return generation


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; where the client goes away first it is cancelled, and `ClientGoneError` raised."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for one in (task, watcher):
            await _ended(one)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, Exception):
        await task


class EventStream(Response):
    """Sends `events` one by one until they end or the client goes away; `generation` is closed either way.

    A client that reads so slowly that its request is long over is cut off.
    """

    def __init__(self, generation: Generation, events: AsyncIterator[bytes], seconds: float) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._generation, self._events, self._seconds = generation, events, seconds + _GRACE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await asyncio.wait_for(unless_gone(receive, self._send(send)), self._seconds)
        except asyncio.TimeoutError as error:
            raise ClientGoneError from error
        finally:
            self._generation.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def ended_well(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events, an error among them where one is raised, and the mark of the end."""
    try:
        async for data in events:
            yield data
    except ApiError as error:
        yield event(error.body())
    except Exception as error:
        yield event(api_error(error).body())
        raise
    yield DONE


async def finish(request: Request, generation: Generation, work: Awaitable[T]) -> T:
    """What `work` makes of the generation, which is closed afterwards, or when the client goes away."""

    async def run() -> T:
        return await work

    try:
        return await unless_gone(request.receive, run())
    finally:
        generation.close()

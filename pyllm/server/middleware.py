"""What happens to every request before and after its route: ids, the log, hosts, keys, how many there are at a time."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import time
import traceback
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyllm.server.connection import ClientGoneError, error_reply, facts_of
from pyllm.server.engine_thread import Generation
from pyllm.server.errors import RETRY_SECONDS, ApiError, api_error
from pyllm.server.service import Service

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PORT = re.compile(rb":[0-9]*\Z")
CLIENT_GONE = 499  # only ever in the log
OPEN_PATH = "/health"  # needs no key, and is answered however many requests there are


class Front:
    """Outermost: gives every answer its X-Request-Id, turns errors into answers, and writes a line of the log."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = scope["pyllm.arrival"] = time.monotonic()
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        name = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16).encode()
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name)]
            await send(message)

        line: dict[str, Any] = {}
        try:
            await self.app(scope, receive, named)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception as error:
            answer = api_error(error)
            if answer.status == 500:
                line["error"] = "".join(traceback.format_exception(error))
            if status == 0:
                await error_reply(answer)(scope, receive, named)
        finally:
            line = {**_line(scope, name, status or CLIENT_GONE, time.monotonic() - began), **line}
            self.service.log(line)


def _line(scope: Scope, name: bytes, status: int, seconds: float) -> dict[str, Any]:
    """What the log says of a request; never its text, nor what it got."""
    client = scope.get("client")
    line = {
        "time": round(time.time(), 3),
        "event": "request",
        "id": name.decode(),
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 6),
    }
    generation: Generation | None = facts_of(scope).get("generation")
    if generation is not None:
        line["prompt_tokens"] = sum(len(prompt.ids) for prompt in generation.prompts)
        completions = [one for request in generation.requests for one in request.completions]
        line["completion_tokens"] = sum(len(one.output.token_ids) for one in completions)
        # Those of a client that is gone end before the next step, which may be after this line.
        line["finish_reasons"] = [one.output.finish_reason or "abort" for one in completions]
    return line


class Hosts:
    """Answers 403 to requests that name a host which is not this one, where `hosts` of the service says which are.

    A page of a stranger can point its own name at 127.0.0.1 (DNS rebinding): its browser then lets it read what this
    server answers, but names the stranger's host.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.hosts = {host.lower().encode() for host in service.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and self.hosts:
            given = next((value for name, value in scope["headers"] if name == b"host"), b"")
            if _PORT.sub(b"", given.lower()) not in self.hosts:
                shown = given[:100].decode("latin-1")
                message = f"Host: {shown!r} is no name of this server: start it with --allowed-hosts to give it names"
                await error_reply(ApiError(403, message, code="host_not_allowed"))(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Keys:
    """Answers 401 to whoever has no key, before anything else is looked at; `/health` is for everyone.

    Programs send it as ``Bearer KEY``. A browser that opens the page asks its user for a name, which is anything, and a
    password, which is the key (RFC 7617), and sends both with all that the page asks for.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.keys = app, service.keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and self.keys and scope["path"] != OPEN_PATH:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            key = _key_in(given)
            known = False
            for own in self.keys:  # all of them, so that time tells nothing
                known |= hmac.compare_digest(own, key)
            if not known:
                message = "expected a valid API key: Authorization: Bearer KEY"
                answer = error_reply(ApiError(401, message, code="invalid_api_key"))
                if scope["path"] == "/":
                    answer.headers["WWW-Authenticate"] = 'Basic realm="pyllm", charset="UTF-8"'
                await answer(scope, receive, send)
                return
            scope["pyllm.key"] = key
        await self.app(scope, receive, send)


def _key_in(authorization: bytes) -> bytes:
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        with suppress(binascii.Error):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


class Crowd:
    """Answers 429 while too many requests are in progress."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.most, self.now = app, service.limits.max_requests, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] == OPEN_PATH:
            await self.app(scope, receive, send)
            return
        if self.now >= self.most:
            error = ApiError(
                429, "too many requests at a time: try again later", code="too_many_requests", retry_after=RETRY_SECONDS
            )
            await error_reply(error)(scope, receive, send)
            return
        self.now += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.now -= 1

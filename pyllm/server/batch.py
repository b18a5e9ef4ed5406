"""Requests from a file, answers into a file, in the format of OpenAI's batches; through the server's own routes, but
without a network.

Each line of the output is written whole as soon as its answer is there, and carries the number of its line of the
input: a run that was ended goes on with the lines that have no answer yet, or one that was the server's own fault.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from starlette.types import ASGIApp, Message

from pyllm.errors import RequestError
from pyllm.server.app import make_app
from pyllm.server.service import Service

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
FAULTS = 500  # answers of this status and above are not the request's fault: another run asks again
_ENVELOPE = 1 << 16  # bytes of a line beside the request's body


@dataclass
class Progress:
    """Lines of the input: all, answered in earlier runs and now, and how many of these with an error; new tokens."""

    lines: int = 0
    answered: int = 0
    failed: int = 0
    tokens: int = 0


async def run(service: Service, source: Path, target: Path, told: Callable[[Progress], None]) -> Progress:
    """Answer every line of `source` that has no answer in `target` yet, as many at a time as the engine runs.

    Raises `RequestError` where `target` holds something else than answers to `source`, `OSError` for files that cannot
    be read or written. When it is cancelled, every answer that was complete is in `target`.
    """
    if target.exists() and target.samefile(source):
        raise RequestError(f"{target}: the answers cannot be written over the requests: give another file")
    app = make_app(service)
    with _answers(target) as out, source.open("rb") as file:
        done = _done(out, target)
        limit = service.limits.max_body_bytes
        waiting = sum(1 for _ in _requests(file, limit, done, target))  # all, before any runs
        progress = Progress(lines=waiting + len(done), answered=len(done))
        file.seek(0)
        requests = _requests(file, limit, done, target)

        async def worker() -> None:
            for request in requests:  # shared by all workers
                answer = await request.answer(app)
                out.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                out.flush()
                progress.answered += 1
                progress.failed += answer["error"] is not None or answer["response"]["status_code"] != 200
                progress.tokens = service.llm.stats.generated_tokens + service.llm.stats.prompt_tokens
                told(progress)

        async with _running(service):
            tasks = [asyncio.ensure_future(worker()) for _ in range(service.llm.engine.scheduler.max_sequences * 2)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return progress


@asynccontextmanager
async def _running(service: Service) -> AsyncIterator[None]:
    service.engine.start()
    try:
        yield
    finally:
        await service.engine.stop()


@dataclass(frozen=True)
class _Line:
    """A line of the input: a request, or what is wrong with it."""

    number: int
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    fault: str | None = None

    @property
    def id(self) -> str:
        return f"batch_req_{self.number}"

    async def answer(self, app: ASGIApp) -> dict[str, Any]:
        """A line of the output."""
        response, error = None, None
        if self.fault is None:
            status, request_id, body = await _ask(app, self.url, self.body)
            response = {"status_code": status, "request_id": request_id, "body": body}
        else:
            error = {"code": "invalid_request", "message": f"line {self.number}: {self.fault}"}
        return {"id": self.id, "custom_id": self.custom_id, "response": response, "error": error}


def _requests(file: IO[bytes], limit: int, done: dict[str, str | None], target: Path) -> Iterator[_Line]:
    """The lines that have no answer yet. Raises `RequestError` where an answer belongs to no line."""
    seen: set[str] = set()
    answered = 0
    for number, text in enumerate(_lines(file, limit), 1):
        if text == b"":
            continue
        line = _parsed(number, text, seen)
        if line.custom_id is not None:
            seen.add(line.custom_id)
        if line.id in done:
            if done[line.id] != line.custom_id:
                raise RequestError(f"{target}: holds answers to other requests (line {number}): give another file")
            answered += 1
        else:
            yield line
    if answered < len(done):
        raise RequestError(f"{target}: holds answers to other requests, beyond the last line: give another file")


def _parsed(number: int, text: bytes | None, seen: set[str]) -> _Line:
    if text is None:
        return _Line(number, None, fault="the line is longer than a request may be")
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Line(number, None, fault=f"not valid JSON: {str(error)[:200]}")
    given = line.get("custom_id") if isinstance(line, dict) else None
    if not isinstance(given, str) or not 0 < len(given) <= 512:
        return _Line(number, None, fault="custom_id: expected a text of 1 to 512 characters")
    fault = None
    if given in seen:
        fault = "custom_id: another line has the same one"
    elif line.get("method") != "POST":
        fault = "method: expected POST"
    elif line.get("url") not in ROUTES:
        fault = f"url: expected {', '.join(ROUTES)}"
    elif not isinstance(line.get("body"), dict):
        fault = "body: expected an object"
    elif line["body"].get("stream"):
        fault = "body.stream: expected false: answers are written whole"
    if fault is not None:
        return _Line(number, given, fault=fault)
    return _Line(number, given, line["url"], json.dumps(line["body"]).encode())


def _lines(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """Lines without the white space around them; None for one that is longer than a request of `limit` bytes."""
    while line := file.readline(limit + _ENVELOPE):
        whole = line.endswith(b"\n") or len(line) < limit + _ENVELOPE
        rest = line
        while not whole and rest:
            rest = file.readline(limit + _ENVELOPE)
            whole = rest.endswith(b"\n")
            line = b""
        yield line.strip() if line else None


def _answers(target: Path) -> IO[bytes]:
    """The file of the answers, to be read and appended to by one process at a time."""
    out = target.open("a+b")
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        out.close()
        raise RequestError(f"{target}: another process is writing to it: wait for its end") from error
    return out


def _done(out: IO[bytes], target: Path) -> dict[str, str | None]:
    """Ids of the answers that are there, with their custom_id, but for faults of the run that gave them; a last line
    that was not written whole is cut off."""
    done: dict[str, str | None] = {}
    out.seek(0)
    end = 0
    for line in out:
        if not line.endswith(b"\n"):
            out.truncate(end)
            break
        end += len(line)
        try:
            answer = json.loads(line)
            status = answer["response"]["status_code"] if answer["response"] is not None else 0
            if status < FAULTS:
                done[answer["id"]] = answer["custom_id"]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{target}: holds something else than answers of a batch: give another file") from error
    out.seek(0, os.SEEK_END)
    return done


async def _ask(app: ASGIApp, path: str, body: bytes) -> tuple[int, str, Any]:
    """Status, request id and body of the answer to a request that no network carried."""
    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None, "server": None,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    incoming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        if not incoming:
            await asyncio.Event().wait()  # this client does not go away
        return incoming.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *pieces = sent
    request_id = dict(start["headers"]).get(b"x-request-id", b"").decode()
    return start["status"], request_id, json.loads(b"".join(piece["body"] for piece in pieces))

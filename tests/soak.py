"""Many requests of every kind, good and bad, at a server: each gets an answer, and nothing is left behind."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
import re
import socket
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from serving import JSON, Running, raw_request, running, until

from pyllm import LLM
from pyllm.sampling import MAX_N
from pyllm.server.limits import Limits

# Requests that are wrong, and the status that says so.
BAD: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": "x", "n": 99999}', 400),
    (b'{"prompt": "x", "max_tokens": 1e99}', 400),
    (b'{"prompt": ""}', 400),
    (b'{"prompt": [99999999]}', 400),
    (b'{"prompt": "x", "stop": ["' + b"y" * 300 + b'"]}', 400),
    (b'{"prompt": "' + b"x" * 70000 + b'"}', 413),
    (b'{"prompt": "' + b"word " * 200 + b'"}', 400),
    (b'{"prompt": "x", "model": "../../etc/passwd"}', 404),
    (b'{"prompt": "x", "structured_outputs": {"regex": "' + b"(" * 3000 + b'"}}', 400),
    (b'{"prompt": "x", "structured_outputs": {"json": ' + b'{"allOf": [' * 90 + b"3" + b"]}" * 90 + b"}}", 400),
    (b'{"prompt": "x", "structured_outputs": {"grammar": "start: ' + b"(" * 9000 + b'"}}', 400),
    (b'{"prompt": "x", "structured_outputs": {"choice": []}}', 400),
    (b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}}', 400),
]
# Costly to match: each is refused, ends when it grows too large, or goes on to the end; nobody else waits for it.
HOSTILE: list[dict[str, Any]] = [
    {"regex": "((((.{0,99}){0,99}){0,99}){0,99})x"},
    {"regex": "(.*a.{40}b){40}"},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": ".*a.{30}"} for i in range(99)}}},
    {"json": {"type": "string", "minLength": 50000}},
    {"grammar": 'start: e\ne: e e | e e e | "a" | ""'},
]
PROMPT_TOKENS = 120  # of long prompts, which take several steps
IDLE_TASKS = 2  # of the event loop: the server's own


@dataclass
class Report:
    """`health_seconds`: the longest that `/health` took. `slope_kib`: growth of resident memory a request, over the
    second half; `tasks` of the event loop at the end.
    """

    sent: int = 0
    answered: int = 0
    health_failures: int = 0
    health_seconds: float = 0.0
    tasks: int = 0
    slope_kib: float = 0.0
    memory: list[tuple[int, int]] = field(default_factory=list)  # (requests sent, KiB resident)


def soak(folder: Path, requests: int, warm_up: int = 0) -> Report:
    """Send so many, 16 at a time; the server must be idle and its blocks free afterwards.

    `warm_up` are sent before memory is looked at: caches, threads and the allocator take what they need.
    """
    report = Report()
    llm = LLM(folder, threads=1, max_num_seqs=4, max_num_batched_tokens=32, kv_cache_bytes=1 << 20)
    with running(llm, Limits(max_body_bytes=65536, max_queue=64)) as server:
        server.service.log = lambda line: None  # whose lines would be kept
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(server, done, report))
        watcher.start()
        with ProcessPoolExecutor(1, get_context("spawn")) as clients:

            def send(first: int, last: int) -> int:
                return clients.submit(_send, server.port, first, last).result()

            send(0, warm_up)
            part = max(1, requests // 20)
            for first in range(warm_up, warm_up + requests, part):
                last = min(first + part, warm_up + requests)
                report.answered += send(first, last)
                report.sent += last - first
                server.assert_idle()  # what requests hold while they run is no growth
                until(lambda: _tasks(server) <= IDLE_TASKS)
                report.memory.append((report.sent, _resident_kib()))
        done.set()
        watcher.join()
        server.assert_idle()
        time.sleep(0.1)
        report.tasks = _tasks(server)
    report.slope_kib = _slope(report.memory[len(report.memory) // 2 :])
    return report


class _Server(NamedTuple):
    """As its clients see it."""

    port: int
    client: httpx.Client


def _send(port: int, first: int, last: int) -> int:
    """Requests of these numbers; how many got what they should. Called in a process of its own: what clients hold is
    not the server's memory."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client, ThreadPoolExecutor(16) as crowd:
        server = _Server(port, client)
        return sum(crowd.map(lambda index: _request(server, random.Random(index)), range(first, last)))


def _request(server: _Server, rng: random.Random) -> bool:
    """One request of a random kind; whether it got what it should."""
    kind = rng.randrange(10)
    body: dict[str, Any] = {"prompt": "word " * rng.randint(1, 30), "max_tokens": rng.randint(1, 40), "seed": 1}
    if kind == 0:
        raw, status = rng.choice(BAD)
        return server.client.post("/v1/completions", content=raw, headers=JSON).status_code == status
    if kind == 1:  # while it waits, or is decoded
        return _leave(server, {**body, "max_tokens": 100, "ignore_eos": True, "stream": rng.random() < 0.5}, rng)
    if kind == 2:
        return _read_slowly(server, {**body, "stream": True})
    if kind == 3:
        with server.client.stream("POST", "/v1/completions", json={**body, "stream": True, "n": 2}) as response:
            lines = [line for line in response.iter_lines() if line]
        ends = sum('"finish_reason":"' in line for line in lines)
        return response.status_code == 429 or (lines[-1] == "data: [DONE]" and ends == 2)
    if kind == 4:  # in the middle of its prompt
        return _leave(server, {**body, "prompt": [rng.randrange(9, 99) for _ in range(PROMPT_TOKENS)]}, rng)
    if kind == 5:  # in the middle of its body
        with _connected(server) as client:
            client.sendall(raw_request(body, rng.random()))
        return True
    if kind == 6:
        answer = server.client.post("/v1/completions", json={**body, "structured_outputs": rng.choice(HOSTILE)})
        if answer.status_code == 400:
            return "structured_outputs" in answer.json()["error"]["message"]
        return answer.status_code == 429 or len(answer.json()["choices"]) == 1
    if kind == 7:
        wanted = {"temperature": 1, "max_tokens": 40, "structured_outputs": {"regex": "[a-d]{3}"}}
        answer = server.client.post("/v1/completions", json={**body, **wanted})
        found = [choice["text"] for choice in answer.json().get("choices", ())]
        return answer.status_code == 429 or re.fullmatch("[a-d]{3}", *found) is not None
    if kind == 8:
        answer = server.client.post("/v1/completions", json={**body, "n": MAX_N})
        return answer.status_code == 429 or [one["index"] for one in answer.json()["choices"]] == list(range(MAX_N))
    answer = server.client.post("/v1/completions", json={**body, "logprobs": 1})
    if answer.status_code == 429:
        return True
    [choice], usage = answer.json()["choices"], answer.json()["usage"]
    return len(choice["logprobs"]["token_logprobs"]) == usage["completion_tokens"] <= body["max_tokens"]


def _tasks(server: Running) -> int:
    loop = server.server._loop
    assert loop is not None
    return len(asyncio.all_tasks(loop))


def _connected(server: _Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def _leave(server: _Server, body: dict[str, Any], rng: random.Random) -> bool:
    with _connected(server) as client:
        client.sendall(raw_request(body))
        time.sleep(rng.random() * 0.05)
    return True


def _read_slowly(server: _Server, body: dict[str, Any]) -> bool:
    with _connected(server) as client:
        client.sendall(raw_request(body))
        received = b""
        while piece := client.recv(2000):
            received += piece
            time.sleep(0.002)
    whole = b"[DONE]" in received and received.count(b'"finish_reason":"') == 1 and b'"error"' not in received
    return whole or received.startswith(b"HTTP/1.1 429")


def _watch(server: Running, done: threading.Event, report: Report) -> None:
    with httpx.Client(base_url=server.url) as client:
        while not done.wait(0.05):
            began = time.monotonic()
            report.health_failures += client.get("/health").status_code != 200
            report.health_seconds = max(report.health_seconds, time.monotonic() - began)


def _resident_kib() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator merely holds back is no growth
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def _slope(points: list[tuple[int, int]]) -> float:
    """Of the line of least squares."""
    if len(points) < 2:
        return 0.0
    x = [p[0] for p in points]
    y = [p[1] for p in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / sum((a - mean_x) ** 2 for a in x)

"""A server of a tiny model in this process, for tests: what they send it, and what it must look like afterwards."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from pyllm import LLM
from pyllm.server.limits import Limits
from pyllm.server.run import Server, listen
from pyllm.server.service import Service

JSON = {"Content-Type": "application/json"}


class Running:
    """A server that runs in a thread; `log` has the lines of its access log."""

    def __init__(self, llm: LLM, limits: Limits, keys: tuple[str, ...], hosts: tuple[str, ...] = ()) -> None:
        self.llm = llm
        self.log: list[dict[str, Any]] = []
        self.service = Service(llm, "tiny", limits, keys, self.log.append, hosts=hosts)
        self.server = Server(self.service)
        self._listener = listen("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        self.client = httpx.Client(base_url=self.url, timeout=30, headers=headers)
        self.thread = threading.Thread(target=self.server.run, args=([self._listener],), daemon=True)

    def start(self) -> None:
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        value: dict[str, Any] = response.json()
        return value

    def refusal(self, path: str, status: int, **body: Any) -> dict[str, Any]:
        """The error in the answer to a request that must be refused with this status."""
        response = self.client.post(path, json=body)
        assert response.status_code == status, response.text
        error: dict[str, Any] = response.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
        return error

    def assert_idle(self) -> None:
        """Nothing runs, waits or holds a block, and the counts of what is open are zero."""
        until(lambda: self.service.engine.open == 0 and self.llm.engine.idle)
        pool = self.llm.engine.scheduler.pool
        pool.check()
        assert pool.free == pool.size


@contextmanager
def running(
    llm: LLM, limits: Limits | None = None, keys: tuple[str, ...] = (), hosts: tuple[str, ...] = ()
) -> Iterator[Running]:
    """A server of `llm` while this lasts; everything must be free at its end."""
    server = Running(llm, limits or Limits(), keys, hosts)
    server.start()
    try:
        yield server
        server.assert_idle()
    finally:
        server.stop()


def raw_request(body: dict[str, Any], of: float = 1.0) -> bytes:
    """A request of completions as it goes over the network, cut to its head and that share `of` its body."""
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw[: int(len(raw) * of)]


def until(holds: Any, seconds: float = 10) -> None:
    """Wait until `holds()`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@contextmanager
def slowed(llm: LLM, seconds: float) -> Iterator[None]:
    """Every step of the engine takes so much longer."""
    step = llm.engine.step

    def slow() -> None:
        time.sleep(seconds)
        step()

    llm.engine.step = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        llm.engine.step = step  # type: ignore[method-assign]

"""Runs the application under uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn

from pyllm.errors import PyllmError
from pyllm.server.app import make_app
from pyllm.server.service import Service

BACKLOG = 2048  # connections that wait to be accepted
LAST_WORDS_SECONDS = 1.0  # to send the last events in, once the drain is over or a second signal came


class Server(uvicorn.Server):
    """SIGTERM or SIGINT: take nothing new, let what runs finish within the drain's seconds, hang up on clients that do
    not read what they are sent, leave.

    A second one: what runs ends with an error now; the server leaves once those are sent and its step is computed.

    `stopped_by` is the first signal, None before it. `ready` is called once requests and signals are taken.
    """

    def __init__(self, service: Service, ready: Callable[[], None] = lambda: None) -> None:
        self.service, self._ready = service, ready
        self.stopped_by: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            uvicorn.Config(
                make_app(service),
                log_config=None,
                log_level="critical",
                access_log=False,
                lifespan="on",
                ws="none",
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(service.limits.drain_seconds) + 10,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        again, self.stopped_by = self.should_exit, self.stopped_by or sig
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_now if again else self._drain)

    def _drain(self) -> None:
        seconds = self.service.limits.drain_seconds
        self.service.engine.drain(seconds)
        assert self._loop is not None
        self._loop.call_later(seconds + LAST_WORDS_SECONDS, self._hang_up)

    def _end_now(self) -> None:
        self.service.engine.end_all()
        assert self._loop is not None
        self._loop.call_later(LAST_WORDS_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        """On clients that have not read to their end."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `OSError` where it cannot."""
    # asyncio sends small answers at once only through sockets whose protocol is named: others wait 40 ms.
    listener = socket.socket(_family(host), socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen at {host}, port {port}: {error.strerror}") from error
    return listener


def serve(service: Service, host: str, port: int, ready: Callable[[str, int], None]) -> int:
    """Serve until a signal, which is returned; `ready` gets the address.

    Raises `OSError` where it is taken, `PyllmError` where the application does not start.
    """
    with listen(host, port) as listener:
        server = Server(service, lambda: ready(*listener.getsockname()[:2]))
        with suppress(SystemExit):  # of some versions of uvicorn, where the application does not start
            server.run(sockets=[listener])
    if not server.started and server.stopped_by is None:
        raise PyllmError(
            "the server did not start: expected a thread and memory for its engine, and the system gave none: end "
            "other processes, or raise the limits of this one (ulimit -u, ulimit -v)"
        )
    return server.stopped_by or signal.SIGTERM


def address_of(host: str) -> str:
    """The IP address that `host` is here, as `listen` takes it. Raises `OSError` where it is none."""
    try:
        [(*_, place), *_] = socket.getaddrinfo(host, None, _family(host), socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {host}: {error.strerror}") from error
    return str(place[0])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET

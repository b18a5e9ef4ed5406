"""The step loop in a thread of its own, and its face towards an event loop.

The thread owns the engine: it takes commands between steps (new requests, cancellations), computes a step, and hands
what came of it to the event loop with one call, however many requests there are. The event loop never waits for a step,
and a step never waits for the event loop.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from traceback import format_exception
from typing import Any, NamedTuple

from pyllm.engine.outputs import RequestOutput, StreamOutput
from pyllm.engine.request import Request
from pyllm.engine.sampler import Shared
from pyllm.errors import PyllmError
from pyllm.llm import LLM
from pyllm.pooling import Pool
from pyllm.sampling import SamplingParams
from pyllm.server.errors import RETRY_SECONDS, ApiError, api_error, internal_error
from pyllm.spec import Pooling


@dataclass(frozen=True)
class Prompt:
    """Token ids to be continued; `text` is what they were made of, where anyone wants to see it again."""

    ids: Sequence[int]
    text: str | None = None


@dataclass
class Times:
    """Of one prompt, in seconds of the monotonic clock: arrival, first token, end."""

    arrival: float
    first: float | None = None
    end: float | None = None


class Generation:
    """Prompts with the same parameters on their way through the engine. Used from the event loop only.

    Read it with `pieces` (where `streamed`) or with `results`, and always `close` it: that ends what still runs.
    """

    def __init__(
        self,
        thread: EngineThread,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        streamed: bool,
        salt: bytes,
        deadline: float,
        pooling: Pooling | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.prompts, self.params, self.streamed = prompts, params, streamed
        self.pooling, self.shared = pooling, shared
        self.salt, self.deadline = salt, deadline
        self.requests: list[Request] = []  # the engine's, once it took them in
        self.times = [Times(time.monotonic()) for _ in prompts]
        self.error: ApiError | None = None
        self.taken = self.ended = False
        self._thread = thread
        self._pieces: deque[tuple[int, StreamOutput] | None] = deque()  # None: nothing came for a while
        self._news = asyncio.Event()

    @property
    def completions(self) -> int:
        """How many it is made of."""
        return len(self.prompts) * self.params.n

    async def accepted(self) -> None:
        """Until the engine took it in; raises `ApiError` where it cannot be run.

        So what is refused is an answer of its own, rather than an event of a stream that has begun.
        """
        try:
            while not self.taken:
                await self._wait()
        except BaseException:
            self.close()
            raise
        if self.error is not None:
            raise self.error

    async def pieces(self, patience: float) -> AsyncIterator[tuple[int, StreamOutput] | None]:
        """(prompt, piece) as they come; None after each `patience` seconds without one. Raises `ApiError`."""
        loop = asyncio.get_running_loop()
        while True:
            while self._pieces:
                yield self._pieces.popleft()
            if self.ended:
                break
            silence = loop.call_later(patience, self._silent)  # a tenth of the time of `wait_for`, and no task
            try:
                await self._wait()
            finally:
                silence.cancel()
        if self.error is not None:
            raise self.error

    async def results(self) -> list[RequestOutput]:
        """All of it, one entry for each prompt. Raises `ApiError`."""
        while not self.ended:
            await self._wait()
        if self.error is not None:
            raise self.error
        return [request.result() for request in self.requests]

    def close(self) -> None:
        """Nobody reads it any more: before the next step it is gone, and its blocks are free."""
        if not self.ended:
            self._thread.command(lambda: self._thread.cancel(self))

    def deliver(self, news: News) -> None:
        """What a step gave it."""
        self._pieces.extend(news.pieces)
        self.taken = True
        self.ended, self.error = news.ended, news.error
        self._news.set()

    def _silent(self) -> None:
        self._pieces.append(None)
        self._news.set()

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()


class News(NamedTuple):
    """What became of a generation: its new pieces (prompt, piece), whether it ended, and the error it ended with."""

    generation: Generation
    pieces: Sequence[tuple[int, StreamOutput]] = ()
    ended: bool = False
    error: ApiError | None = None


class EngineThread:
    """Runs the engine of `llm`, which must not be used from elsewhere meanwhile but for what needs no step.

    At most `max_waiting` completions wait beside those that run. `on_end` is called in the event loop for every
    generation that ended. When a step fails, what was running ends with an error, `log` gets a line with the
    traceback, and the loop goes on.
    """

    def __init__(
        self,
        llm: LLM,
        max_waiting: int,
        on_end: Callable[[Generation], None] | None = None,
        log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.llm = llm
        self.capacity = llm.engine.scheduler.max_sequences + max_waiting
        self._open: set[Generation] = set()  # admitted and not ended; the event loop's
        self.steps = 0
        self._on_end, self._log = on_end, log
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._live: set[Generation] = set()  # the thread's
        self._news: list[News] = []
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pyllm-engine", daemon=True)

    def start(self) -> None:
        """Begin; called from the event loop that will be told."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End what runs, and the thread."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    @property
    def open(self) -> int:
        """Completions admitted and not ended."""
        return sum(generation.completions for generation in self._open)

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not (self._draining or self._stopping)

    def admit(self, count: int) -> None:
        """Raise `ApiError` where so many completions more cannot be taken now: 400, 429 or 503."""
        if not self.ready:
            raise stopped()
        if count > self.capacity:
            raise ApiError(
                400,
                f"expected at most {self.capacity} completions (n of each prompt), which this server runs and queues, "
                f"got {count}: ask for fewer",
            )
        if self.open + count > self.capacity:
            raise ApiError(
                429, "too many requests are waiting: try again later", code="queue_full", retry_after=RETRY_SECONDS
            )

    def submit(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        streamed: bool,
        deadline: float,
        salt: bytes = b"",
        pooling: Pooling | None = None,
        shared: Shared | None = None,
    ) -> Generation:
        """Queue prompts, which end at the `deadline` (monotonic clock) at the latest; `shared` is what
        `Engine.prepare` gave for `params`. Raises `ApiError` as `admit` does.
        """
        generation = Generation(
            self,
            prompts,
            params,
            streamed=streamed,
            salt=salt,
            deadline=deadline,
            pooling=pooling,
            shared=shared,
        )
        self.admit(generation.completions)
        self._open.add(generation)
        self.command(lambda: self._begin(generation))
        return generation

    def command(self, command: Callable[[], None]) -> None:
        """Let the thread do something before its next step."""
        self._commands.append(command)
        self._wake.set()

    def drain(self, seconds: float) -> None:
        """Take no more requests; whatever still runs after so many seconds ends then."""
        self._draining = True
        deadline = time.monotonic() + seconds

        def shorten() -> None:
            for generation in self._live:
                generation.deadline = min(generation.deadline, deadline)

        self.command(shorten)

    def end_all(self) -> None:
        """Take no more requests, and end all with an error at once: nobody waits for the step that is computed."""
        self.drain(0)
        for generation in list(self._open):
            generation.close()
            self._deliver([News(generation, ended=True, error=stopped())])

    # In the thread

    def cancel(self, generation: Generation, error: ApiError | None = None) -> None:
        """End a generation, and say why."""
        if generation not in self._live:
            return
        with self.llm.lock:
            for request in generation.requests:
                self.llm.engine.abort(request)
        self._end(generation, error=error)

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._turn()
                except BaseException as error:  # panics of extensions are no Exception
                    self._fail(error)
        finally:
            self._stopping = True
            while self._commands:  # requests that came too late are told so
                with suppress(BaseException):
                    self._commands.popleft()()
            self._end_live(stopped())
            self._tell()

    def _turn(self) -> None:
        self._wake.clear()
        if self._stopping:  # told just before, and nobody wakes this thread again
            return
        while self._commands:
            self._commands.popleft()()
        if self.llm.engine.idle:
            self._tell()
            self._wake.wait()
            return
        with self.llm.lock:
            self.llm.engine.step()
        self.steps += 1
        self._collect()
        self._tell()

    def _fail(self, error: BaseException) -> None:
        """Something that is no request's fault went wrong: everything that runs ends, and the log says why."""
        self._report(error)
        self._end_live(internal_error(error))
        self._tell()

    def _report(self, error: BaseException) -> None:
        """A line of the log with the traceback."""
        if self._log is not None and self._loop is not None:
            line = {"time": round(time.time(), 3), "event": "error", "error": "".join(format_exception(error))}
            self._loop.call_soon_threadsafe(self._log, line)

    def _end_live(self, error: ApiError) -> None:
        """End all generations, whatever state the engine is in."""
        for generation in list(self._live):
            with suppress(BaseException), self.llm.lock:
                for request in generation.requests:
                    self.llm.engine.abort(request)
            self._end(generation, error=error)

    def _begin(self, generation: Generation) -> None:
        self._live.add(generation)
        if self._stopping:
            self.cancel(generation, stopped())
            return
        llm, params = self.llm, generation.params
        seed = params.seed if params.seed is not None else llm.seed
        requests: list[Request] = []
        try:
            with llm.lock:
                for prompt in generation.prompts:
                    each = secrets.randbits(63) if seed is None else seed
                    requests.append(
                        llm.engine.add(
                            prompt.text,
                            prompt.ids,
                            params,
                            each,
                            generation.salt,
                            None if generation.pooling is None else Pool(generation.pooling),
                            shared=generation.shared,
                        )
                    )
                    requests[-1].streamed = generation.streamed
        except Exception as error:
            if not isinstance(error, PyllmError):
                self._report(error)
            generation.requests = requests
            self.cancel(generation, api_error(error))
            return
        generation.requests = requests
        self._news.append(News(generation))

    def _collect(self) -> None:
        """What the last step gave, for everyone; generations whose time is up end."""
        now = time.monotonic()
        for generation in list(self._live):
            pieces: list[tuple[int, StreamOutput]] = []
            running = False
            for index, request in enumerate(generation.requests):
                times = generation.times[index]
                if times.first is None and request.completions[0].output.token_ids:
                    times.first = now
                if request.running:
                    running = True
                elif times.end is None:
                    times.end = now
                while request.pieces:
                    pieces.append((index, request.pieces.popleft()))
            if not running:
                failed = next((r.error for r in generation.requests if r.error is not None), None)
                self._end(generation, pieces, None if failed is None else api_error(failed))
                continue
            if pieces:
                self._news.append(News(generation, pieces))
            if now > generation.deadline:
                self.cancel(generation, stopped() if self._draining else late())

    def _end(
        self, generation: Generation, pieces: Sequence[tuple[int, StreamOutput]] = (), error: ApiError | None = None
    ) -> None:
        self._live.remove(generation)
        self._news.append(News(generation, pieces, True, error))

    def _tell(self) -> None:
        if self._news:
            assert self._loop is not None
            news, self._news = self._news, []
            self._loop.call_soon_threadsafe(self._deliver, news)

    # In the event loop again

    def _deliver(self, news: Sequence[News]) -> None:
        for each in news:
            generation = each.generation
            if generation.ended:  # by `end_all`, while the step was computed
                continue
            generation.deliver(each)
            if each.ended:
                self._open.remove(generation)
                if self._on_end is not None:
                    self._on_end(generation)


def late() -> ApiError:
    """The answer to requests whose time is up."""
    return ApiError(
        503,
        "the request took longer than this server allows: ask for fewer tokens, or try again when less is going on",
        code="deadline_exceeded",
        retry_after=RETRY_SECONDS,
    )


def stopped() -> ApiError:
    """The answer to requests that a server which is told to end does not run."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=RETRY_SECONDS)

"""Requests that one caller waits for, from the queue to their results."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from pyllm.engine.engine import Engine
from pyllm.engine.outputs import RequestOutput, StreamOutput
from pyllm.engine.request import Request
from pyllm.interrupts import Interrupts
from pyllm.pooling import KeptStates, Pool
from pyllm.prompts import Encoded
from pyllm.sampling import SamplingParams


class Session:
    """Requests in the engine while ``with session:`` lasts: whatever happens inside, nothing of them stays behind.

    `lock` is held while the engine is in use; Ctrl-C waits for the end of such a part. `seed` is of requests that have
    none; None takes fresh entropy for each.
    """

    def __init__(self, engine: Engine, lock: AbstractContextManager[Any], seed: int | None = None) -> None:
        self.engine = engine
        self.lock = lock
        self.seed = seed
        self.requests: list[Request] = []

    def __enter__(self) -> Session:
        """From here on Ctrl-C is held back where bookkeeping must not stop halfway."""
        self.interrupts = Interrupts()
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs."""
        try:
            with self.lock, self.interrupts:
                for request in self.requests:
                    self.engine.abort(request)
        finally:
            self.interrupts.remove()

    def add(
        self,
        prompt: Encoded,
        params: SamplingParams,
        *,
        pool: Pool | KeptStates | None = None,
        prefix: int | None = None,
        target: Sequence[int] = (),
        start: int | None = None,
    ) -> Request:
        """Queue a request, see `Engine.add`."""
        if params.stop and self.engine.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; this model was loaded with skip_tokenizer_init")
        seed = params.seed if params.seed is not None else self.seed
        with self.lock, self.interrupts:
            seed = secrets.randbits(63) if seed is None else seed
            request = self.engine.add(
                prompt.text,
                prompt.ids,
                params,
                seed,
                pool=pool,
                types=prompt.types,
                prefix=prefix,
                target_ids=target,
                start_id=start,
            )
            self.requests.append(request)
        return request

    def run(self, progress: Callable[[int, int], None] | None = None) -> list[RequestOutput]:
        """Results of all requests; `progress` gets (finished, all) of them. Raises the error that ended one."""
        finished, left = -1, list(self.requests)
        while left:
            if not left[-1].running:
                left.pop()
                continue
            self._step()
            if progress and (now := sum(request.finished for request in self.requests)) != finished:
                finished = now
                progress(finished, len(self.requests))
        return [_result(request) for request in self.requests]

    def stream(self, request: Request) -> Iterator[StreamOutput]:
        """Pieces of a request as they come."""
        request.streamed = True
        pieces = request.pieces
        while True:
            while pieces:
                yield pieces.popleft()
            if not request.running:
                break
            self._step()
        _result(request)

    def _step(self) -> None:
        with self.lock, self.interrupts:
            self.engine.step()


def _result(request: Request) -> RequestOutput:
    if request.error is not None:
        raise request.error
    return request.result()

"""A request as the engine holds it: its completions while they run, and the pieces waiting to be read."""

from __future__ import annotations

from collections import deque

from pyllm.engine.outputs import CompletionOutput, DraftCounts, Logprob, RequestOutput, StreamOutput
from pyllm.engine.sampler import RowState
from pyllm.engine.sequence import Sequence
from pyllm.engine.text import CompletionText
from pyllm.errors import PyllmError
from pyllm.sampling import SamplingParams


class Completion:
    """One of a request's `n` completions."""

    def __init__(
        self, request: Request, index: int, sequence: Sequence, text: CompletionText, sampling: RowState
    ) -> None:
        self.request = request
        self.sequence = sequence
        self.text = text
        self.sampling = sampling
        self.output = CompletionOutput(index)
        if request.params.logprobs is not None:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.output.finish_reason is not None

    def deliver(self, new_tokens: list[int]) -> None:
        """Queue what is new for the reader of a stream."""
        self.output.text = self.text.text
        if not self.request.streamed:
            return
        piece = self.text.take(self.finished)
        if piece or new_tokens or self.finished:
            logprobs = self.output.logprobs
            self.request.pieces.append(
                StreamOutput(
                    piece,
                    new_tokens,
                    self.output.index,
                    logprobs[len(logprobs) - len(new_tokens) :] if logprobs is not None else None,
                    self.output.finish_reason,
                )
            )


class Request:
    """A prompt, its parameters and its completions."""

    def __init__(self, request_id: str, prompt: str | None, prompt_ids: list[int], params: SamplingParams) -> None:
        self.id = request_id
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.params = params
        self.completions: list[Completion] = []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self.drafts: DraftCounts | None = None  # of all completions, with speculative decoding
        self.streamed = False  # whether anyone reads the pieces
        self.pieces: deque[StreamOutput] = deque()
        self.error: PyllmError | None = None

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(completion.finished for completion in self.completions)

    def result(self) -> RequestOutput:
        """The request as it stands now."""
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[completion.output for completion in self.completions],
            prompt_logprobs=self.prompt_logprobs,
            finished=self.finished,
            cached_tokens=self.completions[0].sequence.cached if self.completions else 0,
            drafts=self.drafts,
            error=None if self.error is None else str(self.error),
        )

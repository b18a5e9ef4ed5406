"""A request as the engine holds it: its completions while they run, and the pieces waiting to be read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from pyllm.engine.beam import BeamSearch
from pyllm.engine.outputs import CompletionOutput, DraftCounts, Logprob, RequestOutput, StreamOutput
from pyllm.engine.sampler import RowState
from pyllm.engine.sequence import Sequence
from pyllm.engine.sources import Source
from pyllm.engine.text import CompletionText
from pyllm.errors import PyllmError
from pyllm.pooling import KeptStates, Pool
from pyllm.sampling import SamplingParams


class Completion:
    """One of a request's `n` completions."""

    def __init__(
        self,
        request: Request,
        index: int,
        sequence: Sequence,
        text: CompletionText,
        sampling: RowState,
        end_ids: Iterable[int],
    ) -> None:
        self.request = request
        self.sequence = sequence
        self.text = text
        self.sampling = sampling
        self.output = CompletionOutput(index)
        # Tokens that end it, each with its stop reason, once the sequence has `least` tokens.
        self.ends: dict[int, int | None] = {token: token for token in request.params.stop_token_ids}
        self.ends |= dict.fromkeys(end_ids)
        self.ends_in_text = request.params.include_stop_str_in_output
        self.least = sequence.prompt_length + request.params.min_tokens
        if request.params.logprobs is not None:
            self.output.logprobs = []
            self.output.cumulative_logprob = 0.0

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.output.finish_reason is not None

    def end(self, reason: str, stop_reason: int | str | None = None) -> None:
        """It has ended, and why."""
        self.request.running -= not self.finished
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason

    def deliver(self, new_tokens: list[int]) -> None:
        """Queue what is new for the reader of a stream."""
        if not self.request.streamed:
            return
        finished = self.output.finish_reason is not None
        piece = self.text.take(finished)
        if piece or new_tokens or finished:
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
        self.running = 0  # of these
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self.pool: Pool | KeptStates | None = None  # of the prompt's hidden states, where they are wanted
        self.search: BeamSearch | None = None  # whose hypotheses the completions will be
        self.source: Source | None = None  # what an encoder reads: the prompt
        self.drafts: DraftCounts | None = None  # of all completions, with speculative decoding
        self.streamed = False  # whether anyone reads the pieces
        self.pieces: deque[StreamOutput] = deque()
        self.error: PyllmError | None = None

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return self.running == 0

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

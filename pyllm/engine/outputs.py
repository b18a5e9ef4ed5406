"""What a request gives back; the shapes follow vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field

FINISH_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token under the model, before penalties and temperature.

    `rank` is 1 for the most likely token; `decoded_token` is None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


Logprobs = list[dict[int, Logprob]]  # one entry a token: token id -> Logprob


@dataclass
class CompletionOutput:
    """One completion. `finish_reason` is None while it runs, then "stop", "length", "abort" or "error".

    `stop_reason` is the stop string or the stop token id that ended it, None where the model's own end token did.
    `logprobs` has an entry a token when they were asked for; `cumulative_logprob` is then the sum over those chosen. It
    is also there after a beam search, whose `score`, by which beams are ranked, is it over length ** length_penalty.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    score: float | None = None


@dataclass
class DraftCounts:
    """Of speculative decoding: tokens that were guessed and checked, and those of them that were then chosen."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None


@dataclass
class RequestOutput:
    """A request and its completions. `prompt_logprobs[0]` is None: nothing stands before the first token.

    `drafts` counts those of speculative decoding over all completions; None where it is off.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    cached_tokens: int = 0
    drafts: DraftCounts | None = None
    error: str | None = None


@dataclass(slots=True)  # frozen, it would take three times as long to make, which happens for every token
class StreamOutput:
    """What one step added to completion `index`: text and tokens since the last piece. Whole characters only."""

    text: str
    token_ids: list[int]
    index: int = 0
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Score:
    """Log-probabilities of given text: `logprobs[i]` is that of `token_ids[i]` after all tokens before it.

    The first token of a text has nothing before it and is scored only where the tokenizer puts a start token there.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        """Log-probability of the whole, in nats."""
        return float(sum(self.logprobs))


@dataclass(frozen=True)
class PerplexityResult:
    """exp(nll / tokens) of a text; `nll` in nats over `tokens` scored tokens, which stand for `bytes` bytes of text."""

    perplexity: float
    nll: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """nll in bits for each byte of text."""
        return self.nll / 0.6931471805599453 / self.bytes if self.bytes else float("nan")

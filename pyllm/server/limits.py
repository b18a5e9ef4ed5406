"""What one client may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass

from pyllm.sampling import MAX_LOGPROBS, MAX_N, MAX_STOP_CHARS, MAX_STOPS


@dataclass(frozen=True)
class Limits:
    """Each is a flag of ``pyllm serve``; what goes beyond it is answered with the status in brackets.

    max_body_bytes: of a request (413).
    max_prompt_tokens: of one prompt; None: what the context holds (400).
    max_tokens: generated for one completion; None: what the context holds (400).
    max_n: completions of one prompt (400).
    max_stop_strings, max_stop_chars: stop strings of a request, and characters of one (400).
    max_logprobs: alternatives listed for a token (400).
    max_queue: completions that wait beside those that run (429).
    max_requests: HTTP requests in progress, `/health` not counted (429).
    max_seconds: from a request's arrival to its end (503).
    body_seconds: until a request's body is there (408).
    drain_seconds: that requests in progress get when the server is told to end (503).
    """

    max_body_bytes: int = 8 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_n: int = MAX_N
    max_stop_strings: int = MAX_STOPS
    max_stop_chars: int = MAX_STOP_CHARS
    max_logprobs: int = MAX_LOGPROBS
    max_queue: int = 256
    max_requests: int = 512
    max_seconds: float = 600
    body_seconds: float = 30
    drain_seconds: float = 30

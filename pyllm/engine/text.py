"""Text of a completion as it grows: detokenized, searched for stop strings, handed out in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns tokens into text piece by piece; the pieces joined equal the decode of all tokens."""

    def push(self, ids: Sequence[int]) -> str:
        """Whole characters that these tokens completed."""

    def finish(self) -> str:
        """What is left."""


class CompletionText:
    """Text so far; it ends where `stop` is found, before it or, with `include_stop`, after it.

    Without stop strings nothing hangs on it while tokens come: then they wait until it is asked for.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: Sequence[str], include_stop: bool) -> None:
        self.text = ""
        self.searched = bool(stop)
        self.waiting: list[int] = []  # tokens that are not in it yet; where it is not searched, put there by anyone
        self._detokenizer = detokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._longest = max((len(s) for s in stop), default=0)
        self._taken = 0

    def push(self, ids: Sequence[int], may_stop: bool) -> str | None:
        """Add tokens; the stop string that was found, if any, and then the text is cut there."""
        if self._detokenizer is None:
            return None
        if not self.searched:
            self.waiting.extend(ids)
            return None
        return self._grow(self._detokenizer.push(ids), may_stop)

    def finish(self, may_stop: bool) -> str | None:
        """No more tokens: add what the detokenizer held back; the stop string found in it, if any."""
        if self._detokenizer is None:
            return None
        waiting, self.waiting = self.waiting, []
        return self._grow(self._detokenizer.push(waiting) + self._detokenizer.finish(), may_stop)

    def take(self, final: bool) -> str:
        """Text since the last call, without an end that may turn out to begin a stop string (all of it when final)."""
        if self.waiting and self._detokenizer is not None:
            self.text += self._detokenizer.push(self.waiting)
            self.waiting.clear()
        end = len(self.text) - (self._held_back() if self.searched and not final else 0)
        begin, self._taken = self._taken, max(end, self._taken)
        return self.text[begin : self._taken]

    def _grow(self, piece: str, may_stop: bool) -> str | None:
        start = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        if not may_stop or not piece:
            return None
        found = [(at, s) for s in self._stop if (at := self.text.find(s, start)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        self.text = self.text[: at + (len(stop) if self._include_stop else 0)]
        return stop

    def _held_back(self) -> int:
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0

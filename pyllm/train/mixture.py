"""Sequences of one or several files, mixed by weight, in another order in every epoch, and resumed exactly."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import DataError

WAITING = 64  # sequences to choose from when a micro-batch is filled


@dataclass(frozen=True)
class SourceReport:
    """How much of a file has been taken so far."""

    name: str
    weight: float  # share of the tokens
    tokens: int  # of the file
    epochs: float  # how often they have been taken


class File(ABC):
    """A file of data: an order of its sequences for each epoch, and the position in it. `key` tells it from others."""

    def __init__(self, name: str, key: str, seed: int, shuffle: bool) -> None:
        self.name, self.key, self.notes = name, key, list[str]()
        self._seed, self._shuffle = seed, shuffle
        self.epoch, self.at, self.taken = 0, 0, 0
        self._order: NDArray[np.int64] | None = None

    @property
    @abstractmethod
    def total(self) -> int:
        """Tokens that are seen in an epoch."""

    @abstractmethod
    def count(self) -> int:
        """Sequences in this epoch."""

    @abstractmethod
    def length(self, index: int) -> int:
        """Tokens of a sequence."""

    def draw(self) -> int:
        """The next sequence of the order."""
        if self.at >= self.count():
            self.seek(self.epoch + 1, 0, self.taken)
        if self._order is None:
            count = self.count()
            rng = np.random.Generator(np.random.PCG64([self._seed, self.epoch]))
            self._order = rng.permutation(count) if self._shuffle else np.arange(count)
        index = int(self._order[self.at])
        self.at += 1
        self.taken += self.length(index)
        return index

    def seek(self, epoch: int, at: int, taken: int) -> None:
        """Go to a position."""
        if epoch != self.epoch:
            self._order = None
        self.epoch, self.at, self.taken = epoch, at, taken


F = TypeVar("F", bound=File)


class Mixture(Generic[F]):
    """Sequences of files, each of which gives its share of the tokens.

    `weights` are the shares; they are normalised. Default: by size. `notes` says in words what a user may want to know.
    Resuming needs the same data again: a subclass says by :meth:`_identify` what that is.
    """

    def __init__(self, files: Sequence[F], weights: Sequence[float] | None) -> None:
        self._files = list(files)
        self.notes = [note for file in files for note in file.notes]
        self._weights = self._normalised(weights)
        self._waiting: list[tuple[int, int]] = []  # sequences that were drawn but did not fit: file, index
        self._choice = min(WAITING, sum(file.count() for file in self._files))
        self._identity = ""

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all files together, as often as each is taken before all have been."""
        return sum(file.total for file in self._files)

    def sources(self) -> list[SourceReport]:
        """How often each file has been taken."""
        return [
            SourceReport(file.name, weight, file.total, (file.taken - self._held(i)) / file.total)
            for i, (file, weight) in enumerate(zip(self._files, self._weights, strict=True))
        ]

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.report.Data`."""
        return {
            "data": self._identity,
            "sources": [{"epoch": s.epoch, "at": s.at, "taken": s.taken} for s in self._files],
            "waiting": [list(item) for item in self._waiting],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.report.Data`."""
        if state.get("data") != self._identity:
            raise DataError(
                "the run cannot go on with other data: files, weights, context, micro-batch, packing, mask_prompt "
                "and seed must be those that it began with"
            )
        for file, position in zip(self._files, state["sources"], strict=True):
            file.seek(position["epoch"], position["at"], position["taken"])
        self._waiting = [(int(file), int(index)) for file, index in state["waiting"]]

    def _identify(self, *values: object) -> None:
        """Tell this data from any other: by these values and the files."""
        keys = [file.key for file in self._files]
        self._identity = hashlib.sha256(json.dumps([*values, *keys]).encode()).hexdigest()[:32]

    def _take(self, size: Callable[[F, int], int]) -> tuple[F, int] | None:
        """The longest waiting sequence that fits; None where none does. `size` gives that of a sequence that fits, else
        0."""
        while len(self._waiting) < self._choice:
            self._waiting.append(self._draw())
        sizes = [size(self._files[s], i) for s, i in self._waiting]
        # The oldest, while there is room for any: else it might wait for ever.
        best = 0 if sizes[0] else max(range(len(sizes)), key=sizes.__getitem__)
        if not sizes[best]:
            return None
        file, index = self._waiting.pop(best)
        return self._files[file], index

    def _held(self, file: int) -> int:
        """Tokens of a file that were drawn and wait."""
        return sum(self._files[i].length(index) for i, index in self._waiting if i == file)

    def _draw(self) -> tuple[int, int]:
        """A sequence of the file that lies furthest behind its share."""
        total = sum(file.taken for file in self._files)
        behind = [w * total - s.taken for w, s in zip(self._weights, self._files, strict=True)]
        file = max(range(len(behind)), key=lambda i: (behind[i], self._weights[i]))
        return file, self._files[file].draw()

    def _normalised(self, weights: Sequence[float] | None) -> list[float]:
        given = [float(s.total) for s in self._files] if weights is None else [float(w) for w in weights]
        total = sum(given)
        shares = [w / total for w in given]
        if weights is not None and abs(total - 1) > 1e-6:
            shown = ", ".join(f"{s.name} {share:.4g}" for s, share in zip(self._files, shares, strict=True))
            self.notes.append(f"the weights sum to {total:.4g} and were normalised: {shown}")
        return shares


def most_sequences(tokens: int, mean: float) -> int:
    """Sequences of a mean length that a micro-batch of so many tokens may hold, with some to spare."""
    return min(2 * int(tokens / mean) + 8, tokens)


def padded_starts(ends: Sequence[int], total: int, longest: int, sequences: int) -> NDArray[np.int32]:
    """Where sequences start, int32 [B + 1], that end at `ends`, of which the first is 0: what remains up to `total`
    becomes sequences of at most `longest` tokens, and these become B = `sequences` by empty ones."""
    rest = [*range(ends[-1] + longest, total, longest)]
    return np.array([*ends, *rest, *[total] * (sequences + 1 - len(ends) - len(rest))], np.int32)


def file_seed(seed: int, index: int) -> int:
    """That of a file's order, from the seed of the data."""
    return seed + 1_000_003 * index


def mixture_problems(files: Sequence[object], weights: Sequence[float] | None, context: int) -> list[str]:
    """What does not fit of files, their weights and the longest sequence."""
    problems = []
    if not files:
        problems.append("data: expected at least one file")
    if weights is not None:
        if len(weights) != len(files):
            problems.append(f"weights: expected one for each of {len(files)} files, got {len(weights)}")
        if not all(np.isfinite(w) and w > 0 for w in weights):
            problems.append(f"weights: expected positive numbers, got {list(weights)}")
    if context < 1:
        problems.append(f"context: expected at least 1, got {context}")
    return problems

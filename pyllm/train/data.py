"""Micro-batches from tokens: packed, mixed by weight, shuffled anew in every epoch, and resumed exactly.

`packing="documents"`: each document is a sequence of its own, and nothing attends across. Documents longer than the
context are cut. A micro-batch is filled with what fits, so that no other document is cut; the few tokens that remain
are padding, which does not count.

`packing="plain"`: documents stand one behind the other, and the whole is cut into sequences of the context's length,
at another offset in every epoch.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ConfigError, DataError, listed
from pyllm.ops_training import IGNORED_LABEL
from pyllm.train.report import I32
from pyllm.train.token_store import TokenStore

PACKINGS = ("documents", "plain")
WAITING = 64  # sequences to choose from when a micro-batch is filled
FORMAT = 1


@dataclass(frozen=True)
class SourceReport:
    """How much of a file has been taken so far."""

    name: str
    weight: float  # share of the tokens
    tokens: int  # of the file
    epochs: float  # how often they have been taken


class PackedData:
    """Endless micro-batches of `tokens` tokens from one or several files.

    Args:
        stores: the files.
        weights: shares of the tokens that each file gives; they are normalised. Default: by size.
        context: longest sequence.
        tokens: of a micro-batch.
        packing: "documents" or "plain", see above.
        mask_prompt: only answers count; needs files that hold prompts.
        seed: of the order.
        shuffle: False keeps the order of the files.
        sequences: most sequences of a micro-batch; default: what the documents' length suggests.
        next_token: a token's label is the one that follows it; False: itself, which objectives choose from.

    `notes` says in words what a user may want to know: weights that were normalised, documents that were cut.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        *,
        context: int,
        tokens: int,
        weights: Sequence[float] | None = None,
        packing: str = "documents",
        mask_prompt: bool = False,
        seed: int = 0,
        shuffle: bool = True,
        sequences: int | None = None,
        next_token: bool = True,
    ) -> None:
        self.notes: list[str] = []
        _check(stores, weights, context, tokens, packing, mask_prompt, sequences)
        self.context, self.tokens, self.packing, self.mask_prompt = context, tokens, packing, mask_prompt
        kind = _Documents if packing == "documents" else _Windows
        self._sources = [
            kind(store, context, mask_prompt, seed + 1_000_003 * i, shuffle, int(next_token))
            for i, store in enumerate(stores)
        ]
        self.notes += [note for source in self._sources for note in source.notes]
        self._weights = self._normalised(weights)
        self._waiting: list[tuple[int, int]] = []  # sequences that were drawn but did not fit: source, index
        longest = -(-tokens // context)  # sequences that padding may need
        if sequences is not None:
            self._most = sequences
        elif packing == "plain":
            self._most = longest
        else:
            mean = min(source.mean_length for source in self._sources)
            self._most = min(2 * int(tokens / mean) + 8, tokens) + longest
        self._reserve = longest
        self._choice = min(WAITING, sum(source.count() for source in self._sources))
        identity = [FORMAT, context, tokens, packing, mask_prompt, seed, shuffle, self._weights]
        identity += [] if next_token else ["own labels"]
        identity += [store.key for store in stores]
        self._identity = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    @property
    def sequences(self) -> int:
        """Most sequences of a micro-batch."""
        return self._most

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of all files together, as often as each is taken before all have been."""
        return sum(source.total for source in self._sources)

    def sources(self) -> list[SourceReport]:
        """How often each file has been taken."""
        return [
            SourceReport(source.name, weight, source.total, (source.taken - self._held(i)) / source.total)
            for i, (source, weight) in enumerate(zip(self._sources, self._weights, strict=True))
        ]

    def next_batch(self) -> tuple[I32, I32, I32]:
        """Tokens [T], labels [T] and starts [B + 1], see :class:`pyllm.train.report.Data`."""
        tokens = np.zeros(self.tokens, np.int32)
        labels = np.full(self.tokens, IGNORED_LABEL, np.int32)
        starts = np.full(self._most + 1, self.tokens, np.int32)
        starts[0] = at = count = 0
        while at < self.tokens and count < self._most - (self._reserve if self.packing == "documents" else 0):
            taken = self._take(self.tokens - at)
            if taken is None:
                break
            source, index = taken
            size = self._sources[source].fill(index, tokens[at:], labels[at:])
            at, count = at + size, count + 1
            starts[count] = at
        while at < self.tokens:  # padding, in sequences that do not exceed the context
            at, count = min(at + self.context, self.tokens), count + 1
            starts[count] = at
        return tokens, labels, starts

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.report.Data`."""
        return {
            "data": self._identity,
            "sources": [{"epoch": s.epoch, "at": s.at, "taken": s.taken} for s in self._sources],
            "waiting": [list(item) for item in self._waiting],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.report.Data`."""
        if state.get("data") != self._identity:
            raise DataError(
                "the run cannot go on with other data: files, weights, context, micro-batch, packing, mask_prompt "
                "and seed must be those that it began with"
            )
        for source, position in zip(self._sources, state["sources"], strict=True):
            source.seek(position["epoch"], position["at"], position["taken"])
        self._waiting = [(int(source), int(index)) for source, index in state["waiting"]]

    def _take(self, room: int) -> tuple[int, int] | None:
        """The longest waiting sequence that fits; None where none does. Plain sequences come as they are drawn."""
        if self.packing == "plain":
            return self._draw()
        while len(self._waiting) < self._choice:
            self._waiting.append(self._draw())
        source, index = self._waiting[0]  # the oldest, while there is room for any: else it might wait for ever
        if self._sources[source].length(index) <= room:
            return self._waiting.pop(0)
        lengths = [self._sources[s].length(i) for s, i in self._waiting]
        fitting = [n if n <= room else 0 for n in lengths]
        best = max(range(len(fitting)), key=fitting.__getitem__)
        return self._waiting.pop(best) if fitting[best] else None

    def _held(self, source: int) -> int:
        """Tokens of a file that were drawn and wait."""
        return sum(self._sources[s].length(index) for s, index in self._waiting if s == source)

    def _draw(self) -> tuple[int, int]:
        """A sequence of the file that lies furthest behind its share."""
        total = sum(source.taken for source in self._sources)
        behind = [w * total - s.taken for w, s in zip(self._weights, self._sources, strict=True)]
        source = max(range(len(behind)), key=lambda i: (behind[i], self._weights[i]))
        return source, self._sources[source].draw()

    def _normalised(self, weights: Sequence[float] | None) -> list[float]:
        given = [float(s.total) for s in self._sources] if weights is None else [float(w) for w in weights]
        total = sum(given)
        shares = [w / total for w in given]
        if weights is not None and abs(total - 1) > 1e-6:
            shown = ", ".join(f"{s.name} {share:.4g}" for s, share in zip(self._sources, shares, strict=True))
            self.notes.append(f"the weights sum to {total:.4g} and were normalised: {shown}")
        return shares


class _Source(ABC):
    """One file: an order of its sequences for each epoch, and the position in it."""

    def __init__(self, store: TokenStore, seed: int, shuffle: bool, ahead: int) -> None:
        self.store, self.name, self.notes = store, store.name, list[str]()
        self._ahead = ahead  # tokens from one to its label
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

    def _copy(self, mask: NDArray[np.uint8] | None, start: int, size: int, tokens: I32, labels: I32) -> int:
        """Write `size` tokens of the file and their labels to the front of both; gives the size."""
        stored, ahead = self.store.tokens, self._ahead
        tokens[:size] = stored[start : start + size]
        labels[:size] = stored[start + ahead : start + ahead + size]
        if mask is not None:
            labels[:size][mask[start + ahead : start + ahead + size] == 0] = IGNORED_LABEL
        return size


class _Documents(_Source):
    """Each document is a sequence, or several where it is longer than the context."""

    def __init__(
        self, store: TokenStore, context: int, mask_prompt: bool, seed: int, shuffle: bool, ahead: int
    ) -> None:
        super().__init__(store, seed, shuffle, ahead)
        ends = np.asarray(store.ends)
        begins = np.concatenate([[0], ends[:-1]])
        lengths = np.maximum(ends - begins - ahead, 0)  # the last token of a document predicts nothing
        pieces = -(-lengths // context)
        document = np.repeat(np.arange(len(ends)), pieces)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = begins[document] + nth * context
        self._lengths = np.minimum(lengths[document] - nth * context, context)
        self._mask = store.answers if mask_prompt else None
        if self._mask is not None:
            answers = np.concatenate([[0], np.cumsum(self._mask, dtype=np.int64)])
            counted = answers[self._starts + self._lengths + ahead] > answers[self._starts + ahead]
            if not counted.all():
                self.notes.append(f"{self.name}: {int((~counted).sum())} sequences hold no answer and are left out")
            self._starts, self._lengths = self._starts[counted], self._lengths[counted]
        if len(self._starts) == 0:
            raise DataError(f"{self.name}: no document has a token to predict")
        if (pieces > 1).any():
            self.notes.append(
                f"{self.name}: {int((pieces > 1).sum())} of {len(ends)} documents are longer than the context of "
                f"{context} tokens and are cut"
            )
        self._total = int(self._lengths.sum())
        self.mean_length = self._total / len(self._lengths)

    @property
    def total(self) -> int:
        return self._total

    def count(self) -> int:
        return len(self._starts)

    def length(self, index: int) -> int:
        return int(self._lengths[index])

    def fill(self, index: int, tokens: I32, labels: I32) -> int:
        """Write a sequence to the front of both; gives its length."""
        return self._copy(self._mask, int(self._starts[index]), self.length(index), tokens, labels)


class _Windows(_Source):
    """Pieces of the context's length, whatever stands in them."""

    def __init__(
        self, store: TokenStore, context: int, mask_prompt: bool, seed: int, shuffle: bool, ahead: int
    ) -> None:
        super().__init__(store, seed, shuffle, ahead)
        self._context = context
        self._mask = store.answers if mask_prompt else None
        self._room = len(store.tokens) - ahead
        if self._room < context:
            raise DataError(
                f"{self.name}: {len(store.tokens)} tokens are fewer than the context of {context} and one more: give "
                "more text, or a shorter context. Where they are the part of a file that is held out, give held-out "
                "data of its own (--valid), hold out a larger part (--valid-share), or none (--valid-share 0)"
            )
        self.mean_length = float(context)

    @property
    def total(self) -> int:
        return self._room // self._context * self._context

    def _offset(self) -> int:
        """Where the first window begins in this epoch."""
        if not self._shuffle:
            return 0
        spare = min(self._context, self._room - self._context + 1)
        return int(np.random.Generator(np.random.PCG64([self._seed, self.epoch, 1])).integers(spare))

    def count(self) -> int:
        return (self._room - self._offset()) // self._context

    def length(self, index: int) -> int:
        return self._context

    def draw(self) -> int:
        """The next window, by its first token: an index would mean another one in the next epoch."""
        index = super().draw()  # which may begin an epoch
        return self._offset() + index * self._context

    def fill(self, index: int, tokens: I32, labels: I32) -> int:
        """Write a window to the front of both; gives its length."""
        return self._copy(self._mask, index, min(self._context, len(tokens)), tokens, labels)


def _check(
    stores: Sequence[TokenStore],
    weights: Sequence[float] | None,
    context: int,
    tokens: int,
    packing: str,
    mask_prompt: bool,
    sequences: int | None,
) -> None:
    problems = []
    if not stores:
        problems.append("data: expected at least one file")
    if weights is not None:
        if len(weights) != len(stores):
            problems.append(f"weights: expected one for each of {len(stores)} files, got {len(weights)}")
        if not all(np.isfinite(w) and w > 0 for w in weights):
            problems.append(f"weights: expected positive numbers, got {list(weights)}")
    if context < 1:
        problems.append(f"context: expected at least 1, got {context}")
    if tokens < context:
        problems.append(f"a micro-batch of {tokens} tokens is shorter than the context of {context}")
    least = -(-tokens // max(context, 1)) + (packing == "documents")
    if sequences is not None and sequences < least:
        problems.append(f"sequences: expected at least {least} for {tokens} tokens, got {sequences}")
    if packing not in PACKINGS:
        problems.append(f"packing: expected {' or '.join(PACKINGS)}, got {packing!r}")
    elif packing == "plain" and context >= 1 and tokens % context:
        problems.append(f"plain packing needs micro-batches of whole contexts ({context} tokens), got {tokens}")
    if mask_prompt and not any(store.answers is not None for store in stores):
        problems.append("mask_prompt: no file holds prompts: expected `prompt` and `completion`, or `messages`")
    for store in stores if mask_prompt else ():
        if not store.maskable:
            problems.append(
                f"mask_prompt: {store.name}: the chat template writes earlier turns anew, so that prompts and answers "
                "cannot be told apart"
            )
    if problems:
        raise ConfigError(listed("data", problems))

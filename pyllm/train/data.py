"""Micro-batches from tokens: packed, mixed by weight, shuffled anew in every epoch, and resumed exactly.

`packing="documents"`: each document is a sequence of its own, and nothing attends across. Documents longer than the
context are cut. A micro-batch is filled with what fits, so that no other document is cut; the few tokens that remain
are padding, which does not count.

`packing="plain"`: documents stand one behind the other, and the whole is cut into sequences of the context's length,
at another offset in every epoch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from pyllm.errors import ConfigError, DataError, listed
from pyllm.ops_training import IGNORED_LABEL
from pyllm.train.mixture import File, Mixture, file_seed, mixture_problems, most_sequences
from pyllm.train.report import I32
from pyllm.train.token_store import TokenStore

PACKINGS = ("documents", "plain")
FORMAT = 1


class _TokenFile(File):
    """A file whose sequences are parts of its tokens, in order."""

    mean_length: float  # tokens of a sequence

    def __init__(self, store: TokenStore, mask_prompt: bool, seed: int, shuffle: bool, ahead: int) -> None:
        super().__init__(store.name, store.key, seed, shuffle)
        self.store = store
        self._ahead = ahead  # tokens from one to its label
        self._mask = store.answers if mask_prompt else None

    @abstractmethod
    def fill(self, index: int, tokens: I32, labels: I32) -> int:
        """Write a sequence to the front of both; gives its length."""

    def _copy(self, start: int, size: int, tokens: I32, labels: I32) -> int:
        """Write `size` tokens of the file and their labels to the front of both; gives the size."""
        stored, ahead = self.store.tokens, self._ahead
        tokens[:size] = stored[start : start + size]
        labels[:size] = stored[start + ahead : start + ahead + size]
        if self._mask is not None:
            labels[:size][self._mask[start + ahead : start + ahead + size] == 0] = IGNORED_LABEL
        return size


class PackedData(Mixture[_TokenFile]):
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
        _check(stores, weights, context, tokens, packing, mask_prompt, sequences)
        self.context, self.tokens, self.packing, self.mask_prompt = context, tokens, packing, mask_prompt
        kind = _Documents if packing == "documents" else _Windows
        files = [
            kind(store, context, mask_prompt, file_seed(seed, i), shuffle, int(next_token))
            for i, store in enumerate(stores)
        ]
        super().__init__(files, weights)
        longest = -(-tokens // context)  # sequences that padding may need
        if sequences is not None:
            self._most = sequences
        elif packing == "plain":
            self._most = longest
        else:
            mean = min(file.mean_length for file in files)
            self._most = most_sequences(tokens, mean) + longest
        self._reserve = longest
        kind_of_labels = [] if next_token else ["own labels"]
        self._identify(FORMAT, context, tokens, packing, mask_prompt, seed, shuffle, self._weights, *kind_of_labels)

    @property
    def sequences(self) -> int:
        """Most sequences of a micro-batch."""
        return self._most

    def next_batch(self) -> tuple[I32, I32, I32]:
        """Tokens [T], labels [T] and starts [B + 1], see :class:`pyllm.train.report.Data`."""
        tokens = np.zeros(self.tokens, np.int32)
        labels = np.full(self.tokens, IGNORED_LABEL, np.int32)
        starts = np.full(self._most + 1, self.tokens, np.int32)
        starts[0] = at = count = 0
        while at < self.tokens and count < self._most - (self._reserve if self.packing == "documents" else 0):
            taken = self._next(self.tokens - at)
            if taken is None:
                break
            file, index = taken
            size = file.fill(index, tokens[at:], labels[at:])
            at, count = at + size, count + 1
            starts[count] = at
        while at < self.tokens:  # padding, in sequences that do not exceed the context
            at, count = min(at + self.context, self.tokens), count + 1
            starts[count] = at
        return tokens, labels, starts

    def _next(self, room: int) -> tuple[_TokenFile, int] | None:
        """A sequence that fits; plain ones come as they are drawn."""
        if self.packing == "plain":
            file, index = self._draw()
            return self._files[file], index
        return self._take(lambda file, index: n if (n := file.length(index)) <= room else 0)


class _Documents(_TokenFile):
    """Each document is a sequence, or several where it is longer than the context."""

    def __init__(
        self, store: TokenStore, context: int, mask_prompt: bool, seed: int, shuffle: bool, ahead: int
    ) -> None:
        super().__init__(store, mask_prompt, seed, shuffle, ahead)
        ends = np.asarray(store.ends)
        begins = np.concatenate([[0], ends[:-1]])
        lengths = np.maximum(ends - begins - ahead, 0)  # the last token of a document predicts nothing
        pieces = -(-lengths // context)
        document = np.repeat(np.arange(len(ends)), pieces)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self._starts = begins[document] + nth * context
        self._lengths = np.minimum(lengths[document] - nth * context, context)
        if self._mask is not None:
            first = self._starts + ahead
            counted = store.answers_between(first, first + self._lengths) > 0
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
        return self._copy(int(self._starts[index]), self.length(index), tokens, labels)


class _Windows(_TokenFile):
    """Pieces of the context's length, whatever stands in them."""

    def __init__(
        self, store: TokenStore, context: int, mask_prompt: bool, seed: int, shuffle: bool, ahead: int
    ) -> None:
        super().__init__(store, mask_prompt, seed, shuffle, ahead)
        self._context = context
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
        return self._copy(index, min(self._context, len(tokens)), tokens, labels)


def _check(
    stores: Sequence[TokenStore],
    weights: Sequence[float] | None,
    context: int,
    tokens: int,
    packing: str,
    mask_prompt: bool,
    sequences: int | None,
) -> None:
    problems = mixture_problems(stores, weights, context)
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

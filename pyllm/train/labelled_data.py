"""Micro-batches of labelled texts: endless ones to train on, and one pass over what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyllm.errors import ConfigError, DataError, listed
from pyllm.train.labelled import LabelledTexts, LabelSet
from pyllm.train.mixture import File, Mixture, file_seed, mixture_problems, most_sequences, padded_starts
from pyllm.train.report import MicroBatch

FORMAT = 1


class _Writer:
    """Writes texts into a micro-batch of `tokens` tokens and at most `sequences` sequences, of which the last may be
    padding, in pieces of at most `longest` tokens."""

    def __init__(self, labels: LabelSet, tokens: int, sequences: int, longest: int, types: bool) -> None:
        self._set, self._longest, self._sequences = labels, longest, sequences
        self._tokens = np.zeros(tokens, np.int32)
        self._types = np.zeros(tokens, np.int32) if types else None
        self._labels = labels.blank(sequences)
        self._ends = [0]

    @property
    def room(self) -> int:
        """Tokens that are free."""
        return len(self._tokens) - self._ends[-1]

    @property
    def count(self) -> int:
        """Texts so far."""
        return len(self._ends) - 1

    def add(self, texts: LabelledTexts, index: int) -> None:
        """Write a text, for which there must be room."""
        first, last = int(texts.begins[index]), int(texts.ends[index])
        at, end = self._ends[-1], self._ends[-1] + last - first
        self._tokens[at:end] = texts.tokens[first:last]
        if self._types is not None and texts.types is not None:
            self._types[at:end] = texts.types[first:last]
        self._set.write(self._labels, self.count, texts.targets[index])
        self._ends.append(end)

    def finish(self) -> MicroBatch:
        """The micro-batch, see :class:`pyllm.train.Data`."""
        starts = padded_starts(self._ends, len(self._tokens), self._longest, self._sequences)
        if self._types is None:
            return self._tokens, self._labels, starts
        return self._tokens, self._labels, starts, self._types


class LabelledData(Mixture["_LabelledFile"]):
    """Endless micro-batches of `tokens` tokens from files of labelled texts.

    `context` is the longest text. `weights` are shares of the tokens that each file gives; they are normalised.
    Default: by size. `seed` is that of the order. With `types`, micro-batches have token types.
    """

    def __init__(
        self,
        files: Sequence[LabelledTexts],
        labels: LabelSet,
        *,
        context: int,
        tokens: int,
        types: bool,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if problems := mixture_problems(files, weights, context):
            raise ConfigError(listed("data", problems))
        made = [_LabelledFile(texts, context, file_seed(seed, i)) for i, texts in enumerate(files)]
        super().__init__(made, weights)
        self.labels, self.context, self.tokens, self.types = labels, context, tokens, types
        mean = min(file.total / file.count() for file in made)
        self.padding = -(-tokens // context)  # sequences that it may need
        self.sequences = most_sequences(tokens, mean) + self.padding
        meaning = [labels.problem.value, *labels.names]
        self._identify(FORMAT, "labels", meaning, context, tokens, types, seed, self._weights)

    def writer(self) -> _Writer:
        """Of a micro-batch."""
        return _Writer(self.labels, self.tokens, self.sequences, self.context, self.types)

    def next_batch(self) -> MicroBatch:
        """Tokens [T], labels as :class:`pyllm.train.head_loss.HeadLoss` takes them, starts [B + 1], and types [T]."""
        writer = self.writer()
        while writer.count < self.sequences - self.padding:
            room = writer.room
            taken = self._take(lambda file, index: n if (n := file.length(index)) <= room else 0)  # noqa: B023
            if taken is None:
                break
            file, index = taken
            writer.add(file.texts, index)
        return writer.finish()


class _LabelledFile(File):
    """The texts of a file."""

    def __init__(self, texts: LabelledTexts, context: int, seed: int) -> None:
        super().__init__(texts.name, texts.key, seed, shuffle=True)
        self.texts = texts
        if texts.cut:
            self.notes.append(
                f"{self.name}: {texts.cut} texts are longer than the context of {context} tokens and are cut"
            )

    @property
    def total(self) -> int:
        """Tokens."""
        return int((self.texts.ends - self.texts.begins).sum())

    def count(self) -> int:
        """Texts."""
        return len(self.texts.begins)

    def length(self, index: int) -> int:
        """Tokens of a text."""
        return int(self.texts.ends[index] - self.texts.begins[index])


class HeldOutTexts:
    """Micro-batches of the shape of `like`, which hold each text of the files once, in order: `batches` of them.

    In those that follow, nothing counts.
    """

    def __init__(self, files: Sequence[LabelledTexts], like: LabelledData) -> None:
        self._like, self._at = like, 0
        self._chosen: list[list[tuple[LabelledTexts, int]]] = []
        room = most = 0
        for texts in files:
            for index, length in enumerate((texts.ends - texts.begins).tolist()):
                if length > room or most == 0:
                    self._chosen.append([])
                    room, most = like.tokens, like.sequences - like.padding
                self._chosen[-1].append((texts, index))
                room, most = room - length, most - 1

    @property
    def batches(self) -> int:
        """Micro-batches that hold texts."""
        return len(self._chosen)

    def next_batch(self) -> MicroBatch:
        """See :meth:`LabelledData.next_batch`."""
        writer = self._like.writer()
        for texts, index in self._chosen[self._at] if self._at < len(self._chosen) else ():
            writer.add(texts, index)
        self._at += 1
        return writer.finish()

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.Data`."""
        return {"held_out": self._at}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.Data`."""
        if "held_out" not in state:
            raise DataError("the state is not one of held-out labelled texts")
        self._at = state["held_out"]

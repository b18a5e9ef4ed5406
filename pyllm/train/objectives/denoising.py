"""Texts that an encoder reads damaged and a decoder restores: span corruption (T5, Raffel et al. 2020,
https://arxiv.org/abs/1910.10683, section 3.1.4) and text infilling with sentences in another order (BART, Lewis et al.
2019, https://arxiv.org/abs/1910.13461, section 2.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pyllm.errors import ConfigError, DataError
from pyllm.ops_training import IGNORED_LABEL
from pyllm.train.objectives.spans import partition, spread
from pyllm.train.pairs import PairBatch, PairForm, PairWriter, padding_sequences
from pyllm.train.report import I32, Data


class Denoising(ABC):
    """Micro-batches of pairs made of texts: a damaged text, and what the decoder writes of it. How a text is damaged is
    a function of `seed` and the micro-batch's number.

    Args:
        data: micro-batches of texts, whose labels are -100 where there is only padding.
        form: special tokens of pairs.
        context: longest sequence of `data`.
        share: of a text that is damaged.
        mean_span: of what is damaged in one place.
        seed: of what is damaged.
    """

    def __init__(self, data: Data, form: PairForm, *, context: int, share: float, mean_span: float, seed: int) -> None:
        if not 0 < share < 1:
            raise ConfigError(f"mask_share: expected 0 < value < 1, got {share}")
        if not 1 <= mean_span <= 1000:
            raise ConfigError(f"mean_span: expected 1 <= value <= 1000, got {mean_span}")
        self._data, self._form, self._share, self._mean_span, self._seed = data, form, share, mean_span, seed
        self._position = 0
        state = data.state()
        tokens, _, starts, *_ = data.next_batch()
        data.load_state(state)
        texts = len(starts) - 1
        self._longest = context + max(form.around_source, form.around_target)
        self._shape = self.shape(len(tokens), texts)
        self._sequences = texts + padding_sequences(*self._shape, self._longest)

    @abstractmethod
    def shape(self, tokens: int, texts: int) -> tuple[int, int]:
        """Most tokens of sources and of targets that become of `texts` texts with so many tokens together."""

    @abstractmethod
    def damage(self, text: I32, rng: np.random.Generator) -> tuple[I32, I32]:
        """The text of a source and that of its target."""

    def next_batch(self) -> PairBatch:
        """See :meth:`pyllm.train.pairs.PairedData.next_batch`."""
        tokens, counted, starts, *_ = self._data.next_batch()
        rng = np.random.Generator(np.random.PCG64([self._seed, self._position]))
        self._position += 1
        form = self._form
        writer = PairWriter(form, *self._shape, self._sequences, self._longest)
        for first, end in pairwise(starts.tolist()):
            if (counted[first:end] == IGNORED_LABEL).all():
                continue  # padding
            text = form.unended(form.unbegun(tokens[first:end]))
            if len(text) >= 2:  # else nothing would be left to restore it from
                source, target = self.damage(text, rng)
                writer.add(form.source(source), form.target(target))
        return writer.finish()

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.Data`."""
        return {"damaged": self._position, "kind": self._kind, "data": self._data.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.Data`."""
        if state.get("kind") != self._kind:
            raise DataError(
                f"the run damaged texts by {state.get('kind')} (how, share, mean span, seed), now it is {self._kind}"
            )
        self._data.load_state(state["data"])
        self._position = state["damaged"]

    @property
    def _kind(self) -> list[Any]:
        return [type(self).__name__, self._share, self._mean_span, self._seed]


def check_sentinels(sentinels: Sequence[int]) -> None:
    """Raise `ConfigError` where there are none."""
    if not sentinels:
        raise ConfigError(
            "objective spans: expected a tokenizer with sentinels, <extra_id_0> and so on, found none: add them "
            "(train-tokenizer --sentinels 100), or train with another objective"
        )


class CorruptedSpans(Denoising):
    """T5's: `share` of a text's tokens are taken out in spans, a sentinel standing for each, and the decoder writes
    each sentinel and what it stands for.

    Texts begin with a token that stays and end with one that was taken out; all ways to cut both kinds into so many
    spans are as likely. There are as many spans as make them `mean_span` long, at most as many as `sentinels`, which
    are taken in order.
    """

    def __init__(self, data: Data, form: PairForm, sentinels: Sequence[int], **options: Any) -> None:
        check_sentinels(sentinels)
        self._sentinels = np.array(sentinels, np.int32)
        super().__init__(data, form, **options)

    def shape(self, tokens: int, texts: int) -> tuple[int, int]:
        """Of n tokens share * n / mean_span become spans; what is rounded is less than two tokens a text."""
        spans = self._share / self._mean_span
        form = self._form
        source = int(tokens * (1 - self._share + spans)) + texts * (form.around_source + 2)
        return source, int(tokens * (self._share + spans)) + texts * (form.around_target + 2)

    def damage(self, text: I32, rng: np.random.Generator) -> tuple[I32, I32]:
        """See :meth:`Denoising.damage`."""
        found = text[np.isin(text, self._sentinels)]
        if len(found):
            raise DataError(f"objective spans: a text holds a sentinel (id {found[0]}) already")
        taken = min(max(round(self._share * len(text)), 1), len(text) - 1)
        kept = len(text) - taken
        count = min(max(round(taken / self._mean_span), 1), taken, kept, len(self._sentinels))
        source, target, at = [], [], 0
        for stay, go, sentinel in zip(
            partition(kept, count, rng), partition(taken, count, rng), self._sentinels[:count, None], strict=True
        ):
            source += [text[at : at + stay], sentinel]
            target += [sentinel, text[at + stay : at + stay + go]]
            at += stay + go
        return np.concatenate(source), np.concatenate(target)


class InfilledText(Denoising):
    """BART's: sentences are put in another order, then `share` of the words is taken out in spans, a mask standing for
    each, and the decoder writes the text as it was.

    Spans have a number of words by Poisson's distribution, with a mean of `mean_span`; one of none is a mask between
    two words. No two touch. In a text of one word, as in scripts without spaces, each token is taken for a word; at
    least one word is kept.

    Args:
        mask: the token that stands for a span.
        ends: tokens that end a sentence.
        begins: tokens that begin a word; empty: each does.
    """

    def __init__(
        self, data: Data, form: PairForm, mask: int, ends: Collection[int], begins: Collection[int], **options: Any
    ) -> None:
        self._mask = mask
        self._ends, self._begins = (np.array(sorted(ids), np.int32) for ids in (ends, begins))
        super().__init__(data, form, **options)

    def shape(self, tokens: int, texts: int) -> tuple[int, int]:
        """A source is never longer than its text."""
        return tokens + texts * self._form.around_source, tokens + texts * self._form.around_target

    def damage(self, text: I32, rng: np.random.Generator) -> tuple[I32, I32]:
        """See :meth:`Denoising.damage`."""
        if (text == self._mask).any():
            raise DataError(f"objective denoise: a text holds a mask (id {self._mask}) already")
        words = self._words(self._permuted(text, rng))
        wanted, sizes = min(max(1, round(self._share * len(words))), len(words) - 1), list[int]()
        while sum(sizes) < wanted:
            sizes.append(min(int(rng.poisson(self._mean_span)), wanted - sum(sizes)))
        most = min(wanted, len(words) - wanted + 1)  # masks: the source is no longer than the text, and no two touch
        while len(sizes) > most and 0 in sizes:
            sizes.remove(0)
        source, at = [], 0
        for first, end in spread(sizes, len(words), rng):
            source += [*words[at:first], np.array([self._mask], np.int32)]
            at = end
        return np.concatenate([*source, *words[at:]]), text

    def _permuted(self, text: I32, rng: np.random.Generator) -> I32:
        """The text's sentences in another order."""
        sentences = np.split(text, np.flatnonzero(np.isin(text[:-1], self._ends)) + 1)
        return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])

    def _words(self, text: I32) -> list[I32]:
        begins = np.flatnonzero(np.isin(text[1:], self._begins)) + 1
        return np.split(text, begins if len(begins) else len(text))

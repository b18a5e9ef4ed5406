"""Texts that an encoder reads damaged and a decoder restores: span corruption (T5, Raffel et al. 2020,
https://arxiv.org/abs/1910.10683, section 3.1.4) and text infilling with sentences in another order (BART, Lewis et al.
2019, https://arxiv.org/abs/1910.13461, section 2.2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from pyllm.errors import ConfigError, DataError
from pyllm.ops_training import IGNORED_LABEL
from pyllm.train.objectives.spans import partition, spread
from pyllm.train.pairs import JoinedWriter, PairForm, PairWriter, padding_sequences
from pyllm.train.report import I32, Data, MicroBatch

PROBED = 4  # micro-batches of texts that tell how long sources and targets become

Pair: TypeAlias = "tuple[I32, I32]"  # source and target


class Denoising(ABC):
    """Micro-batches of pairs made of texts: a damaged text, and what the decoder writes of it; where `form` is that of
    a model without an encoder, it reads both. How a text is damaged is a function of `seed`, of the number of the
    micro-batch of texts that it comes in, and of its place there.

    Micro-batches have room for what becomes of as many tokens of texts as those of `data` hold, by the first of them.
    Pairs that find none come in the next.

    Args:
        data: micro-batches of texts, whose labels are -100 where there is only padding.
        form: special tokens of pairs.
        context: longest source and longest target, or both together; texts of `data` must be shorter by what they grow.
        seed: of what is damaged.
        like: other data, whose shape the micro-batches get.

    Raises `DataError` where no text can be damaged, or one holds what stands for what was taken out.
    """

    def __init__(self, data: Data, form: PairForm, *, context: int, seed: int, like: Denoising | None = None) -> None:
        self._data, self._form, self._seed = data, form, seed
        self._longest = context
        self._taken = 0  # micro-batches of texts
        self._before = data.state()  # where the data stood before the last of them
        self._shape: tuple[int, ...]  # tokens of sources and of targets, or of both together
        self._most: int  # pairs of a micro-batch, and its sequences, of which some may be padding
        self._sequences: int
        self._left: dict[int, Pair] = {}  # its pairs that are still to come, by the places of their texts
        if like is not None:
            self._shape, self._most, self._sequences = like._shape, like._most, like._sequences
            return
        probed = [data.next_batch() for _ in range(PROBED)]
        data.load_state(self._before)
        self._shape = self._expected(probed)
        self._most = len(probed[0][2]) - 1
        self._sequences = self._most + padding_sequences(self._longest, *self._shape)

    @property
    @abstractmethod
    def how(self) -> list[Any]:
        """What decides how texts are damaged, as JSON."""

    @abstractmethod
    def damage(self, text: I32, rng: np.random.Generator) -> Pair:
        """The text of a source and that of its target."""

    def next_batch(self) -> MicroBatch:
        """See :meth:`pyllm.train.pairs.PairedData.next_batch`; three arrays where sources and targets are together."""
        writer = self._writer()
        while writer.count < self._most:
            if not self._left:
                self._before = self._data.state()
                self._left = self._damaged(self._data.next_batch(), self._taken)
                self._taken += 1
            place = next((place for place, pair in self._left.items() if writer.fits(*pair)), None)
            if place is None:
                break
            writer.add(*self._left.pop(place))
        return writer.finish()

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.Data`."""
        begun = bool(self._left)
        data = self._before if begun else self._data.state()
        return {"damaged": self._taken - begun, "left": list(self._left), "kind": self._kind, "data": data}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.Data`."""
        if state.get("kind") != self._kind:
            raise DataError(
                f"data: the run damaged its texts by {state.get('kind')} (how, and the seed), now it is {self._kind}"
            )
        self._data.load_state(state["data"])
        self._taken, self._before, self._left = state["damaged"], state["data"], {}
        if state["left"]:
            pairs = self._damaged(self._data.next_batch(), self._taken)
            self._left = {place: pairs[place] for place in state["left"]}
            self._taken += 1

    @property
    def _kind(self) -> list[Any]:
        return [type(self).__name__, *self.how, self._seed]

    def _damaged(self, batch: MicroBatch, number: int) -> dict[int, Pair]:
        """The pairs of a micro-batch of texts, by the places of these, but for texts too short to be damaged."""
        tokens, counted, starts, *_ = batch
        rng = np.random.Generator(np.random.PCG64([self._seed, number]))
        form, pairs = self._form, dict[int, Pair]()
        for place, (first, end) in enumerate(pairwise(starts.tolist())):
            if (counted[first:end] == IGNORED_LABEL).all():
                continue  # padding
            text = form.unended(form.unbegun(tokens[first:end]))
            if len(text) >= 2:  # else nothing would be left to restore it from
                source, target = self.damage(text, rng)
                pairs[place] = pair = form.source(source), form.target(target)
                if max(self._lengths(pair)) > self._longest:
                    raise DataError(
                        f"data: expected texts that become no longer than the context of {self._longest}, one of "
                        f"{len(text)} tokens became {max(self._lengths(pair))}: give shorter ones"
                    )
        return pairs

    def _lengths(self, pair: Pair) -> tuple[int, ...]:
        """Tokens of source and target, or of both together."""
        source, target = map(len, pair)
        return (source + target - 1,) if self._form.start is None else (source, target)

    def _writer(self) -> PairWriter | JoinedWriter:
        if self._form.start is None:
            return JoinedWriter(self._shape[0], self._sequences, self._longest)
        source, target = self._shape
        return PairWriter(self._form, source, target, self._sequences, self._longest)

    def _expected(self, batches: Sequence[MicroBatch]) -> tuple[int, ...]:
        """Tokens of sources and of targets, or of both, that become of a micro-batch full of texts like these."""
        made, given = np.zeros(1 if self._form.start is None else 2), 0
        for number, batch in enumerate(batches):
            pairs = self._damaged(batch, number)
            given += sum(int(batch[2][place + 1] - batch[2][place]) for place in pairs)
            made += np.sum([self._lengths(pair) for pair in pairs.values()], axis=0) if pairs else 0
        if given == 0:
            raise DataError("data: expected texts of at least two tokens, as one is hidden and one kept, found none")
        return tuple(max(int(count), self._longest) for count in np.ceil(made * len(batches[0][0]) / given))


def check_sentinels(sentinels: Sequence[int], objective: str) -> None:
    """Raise `ConfigError` where there are none."""
    if not sentinels:
        raise ConfigError(
            f"objective {objective}: expected a tokenizer with sentinels, <extra_id_0> and so on, found none: add them "
            "(train-tokenizer --sentinels 100), or train with another objective"
        )


def check_amounts(share: float, mean_span: float) -> None:
    """Raise `ConfigError` for a share of a text, or a mean length of what is taken out in one place, that cannot be."""
    if not 0 < share < 1:
        raise ConfigError(f"mask_share: expected 0 < value < 1, got {share}")
    if not 1 <= mean_span <= 1000:
        raise ConfigError(f"mean_span: expected 1 <= value <= 1000, got {mean_span}")


class CorruptedSpans(Denoising):
    """T5's: `share` of a text's tokens are taken out in spans, a sentinel standing for each, and the decoder writes
    each sentinel and what it stands for.

    Texts begin with a token that stays and end with one that was taken out; all ways to cut both kinds into so many
    spans are as likely. There are as many spans as make them `mean_span` long, at most as many as `sentinels`, which
    are taken in order.
    """

    def __init__(
        self,
        data: Data,
        form: PairForm,
        sentinels: Sequence[int],
        *,
        share: float,
        mean_span: float,
        **options: Any,
    ) -> None:
        check_sentinels(sentinels, "spans")
        check_amounts(share, mean_span)
        self._sentinels, self._share, self._mean_span = np.array(sentinels, np.int32), share, mean_span
        super().__init__(data, form, **options)

    @property
    def how(self) -> list[Any]:
        """See :attr:`Denoising.how`."""
        return [self._share, self._mean_span]

    def damage(self, text: I32, rng: np.random.Generator) -> Pair:
        """See :meth:`Denoising.damage`."""
        return corrupted(text, self._sentinels, self._share, self._mean_span, rng)


def corrupted(text: I32, sentinels: I32, share: float, mean_span: float, rng: np.random.Generator) -> Pair:
    """What is left of a text, with sentinels, and what was taken out, each behind its sentinel."""
    refuse_sentinels(text, sentinels)
    taken, count = tokens_taken(len(text), share), spans_of(len(text), share, mean_span, len(sentinels))
    kept = len(text) - taken
    source, target, at = [], [], 0
    for stay, go, sentinel in zip(
        partition(kept, count, rng), partition(taken, count, rng), sentinels[:count, None], strict=True
    ):
        source += [text[at : at + stay], sentinel]
        target += [sentinel, text[at + stay : at + stay + go]]
        at += stay + go
    return np.concatenate(source), np.concatenate(target)


def tokens_taken(length: int, share: float) -> int:
    """How many tokens are this share of a text: at least one, and not all."""
    return min(max(round(share * length), 1), length - 1)


def spans_of(length: int, share: float, mean_span: float, sentinels: int) -> int:
    """In how many spans this share of a text is taken out."""
    taken = tokens_taken(length, share)
    return min(max(round(taken / mean_span), 1), taken, length - taken, sentinels)


def refuse_sentinels(text: I32, sentinels: I32) -> None:
    """Raise `DataError` for a text that holds a sentinel."""
    found = text[np.isin(text, sentinels)]
    if len(found):
        raise DataError(f"data: a text holds a sentinel (id {found[0]}) already: take it out of the document")


class InfilledText(Denoising):
    """BART's: sentences are put in another order, then `share` of the words is taken out in spans, a mask standing for
    each, and the decoder writes the text as it was.

    Spans have a number of words by Poisson's distribution, with a mean of `mean_span`; one of none is a mask between
    two words. No two touch. In a text of one word, as in scripts without spaces, each token is taken for a word; at
    least one word is kept. `random_share` of the masks become any of `ordinary` tokens instead, as in the command that
    BART's authors gave (https://github.com/facebookresearch/fairseq/issues/1899: a share of 0.1, and spans of 3.5
    words; the paper has none, and 3).

    Args:
        mask: the token that stands for a span.
        ends: tokens that end a sentence.
        begins: tokens that begin a word; empty: each does.
        random_share: of the masks.
        ordinary: tokens that may stand in their place.
    """

    def __init__(
        self,
        data: Data,
        form: PairForm,
        mask: int,
        ends: Collection[int],
        begins: Collection[int],
        *,
        share: float,
        mean_span: float,
        random_share: float = 0.0,
        ordinary: Sequence[int] = (),
        **options: Any,
    ) -> None:
        check_amounts(share, mean_span)
        if not 0 <= random_share < 1:
            raise ConfigError(f"random_share: expected 0 <= value < 1, got {random_share}")
        self._mask, self._share, self._mean_span = mask, share, mean_span
        self._random_share, self._ordinary = random_share, np.array(ordinary, np.int32)
        self._ends, self._begins = (np.array(sorted(ids), np.int32) for ids in (ends, begins))
        super().__init__(data, form, **options)

    @property
    def how(self) -> list[Any]:
        """See :attr:`Denoising.how`."""
        return [self._share, self._mean_span, self._random_share]

    def damage(self, text: I32, rng: np.random.Generator) -> Pair:
        """See :meth:`Denoising.damage`."""
        if (text == self._mask).any():
            raise DataError(f"data: a text holds a mask (id {self._mask}) already: take it out of the document")
        words = self._words(self._permuted(text, rng))
        wanted, sizes = min(max(1, round(self._share * len(words))), len(words) - 1), list[int]()
        while sum(sizes) < wanted:
            sizes.append(min(int(rng.poisson(self._mean_span)), wanted - sum(sizes)))
        most = min(wanted, len(words) - wanted + 1)  # masks: the source is no longer than the text, and no two touch
        while len(sizes) > most and 0 in sizes:
            sizes.remove(0)
        source, at = [], 0
        for first, end in spread(sizes, len(words), rng):
            random = self._random_share > 0 and rng.random() < self._random_share
            mark = rng.choice(self._ordinary) if random else self._mask
            source += [*words[at:first], np.array([mark], np.int32)]
            at = end
        return np.concatenate([*source, *words[at:]]), text

    def _permuted(self, text: I32, rng: np.random.Generator) -> I32:
        """The text's sentences in another order."""
        sentences = np.split(text, np.flatnonzero(np.isin(text[:-1], self._ends)) + 1)
        return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])

    def _words(self, text: I32) -> list[I32]:
        begins = np.flatnonzero(np.isin(text[1:], self._begins)) + 1
        return np.split(text, begins if len(begins) else len(text))

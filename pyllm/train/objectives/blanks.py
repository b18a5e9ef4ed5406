"""Autoregressive blank infilling (Du et al. 2022, https://arxiv.org/abs/2103.10360, sections 2.1 and A.1)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from pyllm.errors import ConfigError, DataError
from pyllm.ops_training import IGNORED_LABEL
from pyllm.prefix import PrefixSpec
from pyllm.train.objectives.spans import spread
from pyllm.train.report import I32, Data, MicroBatch

SHARE = 0.15  # of a text's tokens that are blanked
MEAN_SPAN, LONGEST_SPAN = 3, 39  # tokens of a blank: by Poisson's distribution, at least 1


class BlankedTokens:
    """Micro-batches in which spans of each text are blanked, to be filled behind it; only what fills them counts.

    A text becomes its tokens with a mask for each span, then the spans in random order, a start token before each. They
    are predicted with an end token behind each. What is blanked is a function of `seed` and the micro-batch's number.

    Args:
        data: micro-batches of texts.
        rule: start token and masks of the model, which fills one blank a text, or several.
        end: the token behind a span.
        context: longest sequence of `data`.
        positions: of the model: no sequence may become longer.
        seed: of what is blanked.
    """

    def __init__(
        self, data: Data, rule: PrefixSpec | None, end: int | None, *, context: int, positions: int, seed: int
    ) -> None:
        if rule is None or rule.start_id is None or end is None:
            raise ConfigError("objective blanks: expected a model that fills blanks, with an end token, such as GLM")
        self._data, self._rule, self._start, self._end = data, rule, rule.start_id, end
        self._seed, self._position = seed, 0
        state = data.state()
        tokens, _, starts, *_ = data.next_batch()
        data.load_state(state)
        texts = len(starts) - 1
        longest = context + 2 * _most_spans(rule, context)
        if longest > positions:
            raise ConfigError(
                f"context: {context} tokens and the blanks behind them may become {longest}, and the model has "
                f"{positions} positions: expected a shorter one"
            )
        self.tokens = len(tokens) + 2 * (int(SHARE * len(tokens) / 2) + texts)  # with start tokens and masks
        self.sequences = texts + -(-self.tokens // context)
        self._context = context

    def next_batch(self) -> MicroBatch:
        """Tokens, labels and first positions [T], and starts [B + 1], see :class:`pyllm.train.Data`."""
        given, counted, bounds, *_ = self._data.next_batch()
        rng = np.random.Generator(np.random.PCG64([self._seed, self._position]))
        self._position += 1
        tokens = np.zeros(self.tokens, np.int32)
        labels = np.full(self.tokens, IGNORED_LABEL, np.int32)
        positions = np.zeros(self.tokens, np.int32)
        starts = [0]
        for first, end in pairwise(bounds.tolist()):
            if not (counted[first:end] != IGNORED_LABEL).any():
                continue  # padding
            at = starts[-1]
            parts = self._blank(given[first:end], rng)
            starts.append(at + len(parts[0]))
            for array, part in zip((tokens, labels, positions), parts, strict=True):
                array[at : starts[-1]] = part
        while starts[-1] < self.tokens:  # padding, in sequences that do not exceed the context
            size = min(self._context, self.tokens - starts[-1])
            positions[starts[-1] : starts[-1] + size] = np.arange(size)
            starts.append(starts[-1] + size)
        starts += [self.tokens] * (self.sequences + 1 - len(starts))
        return tokens, labels, np.array(starts, np.int32), positions

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.Data`."""
        return {"blanked": self._position, "seed": self._seed, "data": self._data.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.Data`."""
        if "blanked" not in state or state.get("seed") != self._seed:
            raise DataError(f"the run blanked its texts with seed {state.get('seed')}, now it is {self._seed}")
        self._position = state["blanked"]
        self._data.load_state(state["data"])

    def _blank(self, text: I32, rng: np.random.Generator) -> tuple[I32, I32, I32]:
        """Tokens, labels and first positions of a text with spans blanked."""
        start, mask = self._start, self._rule.mask_ids[-1][-1]
        reserved = reserved_ids(self._rule)
        if np.isin(text, reserved).any():
            raise DataError(f"objective blanks: a text holds a start token or a mask (ids {reserved}) already")
        spans = self._spans(len(text), rng)
        kept: list[int] = []
        places, end = [], 0
        for begin, stop in spans:
            kept += text[end:begin].tolist()
            places.append(len(kept))
            kept.append(mask)
            end = stop
        kept += text[end:].tolist()
        tokens, labels, positions = kept.copy(), [IGNORED_LABEL] * len(kept), list(range(len(kept)))
        for index in rng.permutation(len(spans)).tolist():
            span = text[slice(*spans[index])].tolist()
            tokens += [start, *span]
            labels += [*span, self._end]
            positions += [places[index]] * (len(span) + 1)
        return np.array(tokens, np.int32), np.array(labels, np.int32), np.array(positions, np.int32)

    def _spans(self, length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """First token and end of each span of a text, in order; no two touch."""
        wanted = max(1, round(SHARE * length))
        sizes: list[int] = []
        while sum(sizes) < wanted and len(sizes) < _most_spans(self._rule, length):
            drawn = int(np.clip(rng.poisson(MEAN_SPAN), 1, LONGEST_SPAN))
            sizes.append(min(drawn, wanted - sum(sizes)))
        return spread(sizes, length, rng)


def reserved_ids(rule: PrefixSpec) -> list[int]:
    """Tokens that no text may hold: start token and masks of a model that fills blanks."""
    start = [] if rule.start_id is None else [rule.start_id]
    return [*start, *(mask for group in rule.mask_ids for mask in group)]


def _most_spans(rule: PrefixSpec, tokens: int) -> int:
    """Of a text: as many as there are where spans have two tokens; fewer are common."""
    return 1 if not rule.restarts else int(SHARE * tokens / 2) + 1

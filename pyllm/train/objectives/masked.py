"""Masked language modelling (BERT, https://arxiv.org/abs/1810.04805, section 3.1) and the detection of replaced tokens
(ELECTRA, https://arxiv.org/abs/2003.10555)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import ConfigError, DataError
from pyllm.ops_training import IGNORED_LABEL
from pyllm.train.report import I32, Data

RULES = ("bert", "bernoulli")
MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens that become the mask, or any token; others stay

# Masked tokens [T], starts [B + 1], chosen places [n] and a seed of what is drawn -> tokens [n]
Propose = Callable[[I32, I32, NDArray[np.intp], int], I32]


class MaskedTokens:
    """Micro-batches in which some tokens are hidden, and only those count; see :class:`pyllm.train.Data`.

    Args:
        data: micro-batches whose labels are their own tokens, -100 for those that are not to be chosen.
        mask: the token that hides others.
        special: tokens that are never chosen, such as [CLS] and [SEP].
        vocab_size: random tokens are drawn from it.
        share: of the tokens that is chosen.
        rule: "bert" chooses max(1, round(share * length)) tokens of each sequence, "bernoulli" each token by itself.
        seed: of what is chosen, together with the micro-batch's number.
    """

    def __init__(
        self,
        data: Data,
        *,
        mask: int,
        special: Collection[int],
        vocab_size: int,
        share: float = 0.15,
        rule: str = "bert",
        seed: int = 0,
    ) -> None:
        if rule not in RULES:
            raise ConfigError(f"mask_rule: expected {' or '.join(RULES)}, got {rule!r}")
        if not 0 < share < 1:
            raise ConfigError(f"mask_share: expected 0 < value < 1, got {share}")
        self._data, self._mask, self._vocab_size = data, mask, vocab_size
        self._special = np.array(sorted({*special, mask}), np.int32)
        self._share, self._rule, self._seed = share, rule, seed
        self.position = 0

    def next_batch(self) -> tuple[I32, I32, I32]:
        """Tokens with some hidden [T], labels [T] that are -100 elsewhere, and starts [B + 1]."""
        hidden, aims, starts, _ = self.next_choice()
        return hidden, aims, starts

    def next_choice(self) -> tuple[I32, I32, I32, NDArray[np.bool_]]:
        """The same, and which tokens might have been chosen [T]: all but special ones and padding."""
        tokens, labels, starts, *_ = self._data.next_batch()
        rng = np.random.Generator(np.random.PCG64([self._seed, self.position]))
        self.position += 1
        eligible = (labels != IGNORED_LABEL) & ~np.isin(tokens, self._special)
        chosen = self._choose(eligible, starts, rng)
        hidden, aims = tokens.copy(), np.full_like(labels, IGNORED_LABEL)
        aims[chosen] = tokens[chosen]
        how = rng.random(len(chosen))
        hidden[chosen[how < MASKED]] = self._mask
        random = chosen[(how >= MASKED) & (how < MASKED + RANDOM)]
        hidden[random] = rng.integers(0, self._vocab_size, len(random), dtype=np.int32)
        return hidden, aims, starts, eligible

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.Data`."""
        kind = [self._rule, self._share, self._seed]
        return {"masked": self.position, "kind": kind, "data": self._data.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.Data`."""
        kind = [self._rule, self._share, self._seed]
        if state.get("kind") != kind:
            raise DataError(f"the run masked tokens by {state.get('kind')} (rule, share, seed), now it is {kind}")
        self._data.load_state(state["data"])
        self.position = state["masked"]

    def _choose(self, eligible: NDArray[np.bool_], starts: I32, rng: np.random.Generator) -> NDArray[np.intp]:
        """Places, rising."""
        if self._rule == "bernoulli":
            return np.flatnonzero(eligible & (rng.random(len(eligible)) < self._share))
        found = []
        for first, end in pairwise(starts.tolist()):
            places = first + np.flatnonzero(eligible[first:end])
            count = min(max(1, round(self._share * (end - first))), len(places))
            found.append(np.sort(rng.permutation(places)[:count]))
        return np.concatenate(found) if found else np.zeros(0, np.intp)


class ReplacedTokens:
    """Micro-batches in which chosen tokens are replaced, and every token's label is 1 where it was and 0 elsewhere.

    `masked` chooses them, and `propose` gives the tokens that stand in their place, drawn from a generator that sees
    the masked text; one that it guesses right is not a replacement. What is drawn is a function of `seed` and the
    micro-batch's number. Labels are float32 [T, 1], NaN for special tokens and padding. A run goes on only with the
    generator of the same `key`.
    """

    def __init__(self, masked: MaskedTokens, propose: Propose, seed: int = 0, key: str = "") -> None:
        self._masked, self._propose, self._seed, self._key = masked, propose, seed, key

    def next_batch(self) -> tuple[I32, NDArray[np.float32], I32]:
        """Tokens with some replaced [T], labels [T, 1] and starts [B + 1]."""
        seed = np.random.SeedSequence([self._seed, self._masked.position, 1]).generate_state(1, np.uint64)
        hidden, aims, starts, eligible = self._masked.next_choice()
        chosen = np.flatnonzero(aims != IGNORED_LABEL)
        tokens = hidden.copy()
        tokens[chosen] = self._propose(hidden, starts, chosen, int(seed[0]))
        labels = np.where(eligible, np.float32(0), np.float32(np.nan))
        labels[chosen] = tokens[chosen] != aims[chosen]
        return tokens, labels[:, None], starts

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.Data`."""
        return {**self._masked.state(), "generator": self._key}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.Data`."""
        if state.get("generator") != self._key:
            raise DataError(
                "generator: the run's tokens were replaced by another one (config.json or weights differ): go on with "
                "that, or begin a new run"
            )
        self._masked.load_state(state)

"""Objectives of encoders: which tokens are hidden or replaced, and what their labels are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from pyllm.errors import ConfigError, DataError
from pyllm.train.head_loss import IGNORED
from pyllm.train.objectives.masked import MaskedTokens, ReplacedTokens

SPECIAL, MASK, VOCAB = (0, 2, 3), 4, 500


class Texts:
    """Micro-batches of texts between 2 and 3, and padding of 0 that does not count; a function of their number."""

    def __init__(self) -> None:
        self.position = 0

    def next_batch(self) -> Any:
        rng = np.random.default_rng(self.position)
        self.position += 1
        starts = np.array([0, 40, 40, 43, 700, 720], np.int32)
        tokens = rng.integers(5, VOCAB, 720).astype(np.int32)
        for first, end in pairwise(starts[:-1]):
            if first < end:
                tokens[first], tokens[end - 1] = 2, 3
        tokens[700:] = 0
        labels = tokens.copy()
        labels[700:] = IGNORED
        return tokens, labels, starts

    def state(self) -> Any:
        return {"position": self.position}

    def load_state(self, state: Any) -> None:
        self.position = state["position"]


def masked(**options: Any) -> MaskedTokens:
    return MaskedTokens(Texts(), mask=MASK, vocab_size=VOCAB, **{"special": SPECIAL, **options})


@pytest.mark.parametrize("rule", ["bert", "bernoulli"])
def test_what_is_hidden(rule: str) -> None:
    data, plain = masked(rule=rule, seed=3), Texts()
    chosen, kinds = 0, np.zeros(3)
    for _ in range(40):
        tokens, _, starts = plain.next_batch()
        hidden, labels, same = data.next_batch()
        assert np.array_equal(starts, same)
        counted = labels != IGNORED
        assert np.array_equal(labels[counted], tokens[counted])
        assert not np.isin(tokens[counted], SPECIAL).any()
        assert not counted[700:].any()
        assert np.array_equal(hidden[~counted], tokens[~counted])
        if rule == "bert":
            numbers = [int(counted[first:end].sum()) for first, end in pairwise(starts)]
            assert numbers == [6, 0, 1, round(0.15 * 657), 0]
        chosen += int(counted.sum())
        kept, hid = hidden[counted] == tokens[counted], hidden[counted] == MASK
        kinds += [hid.sum(), kept.sum(), (~hid & ~kept).sum()]
    assert chosen == pytest.approx(40 * 0.15 * 700, rel=0.05)
    np.testing.assert_allclose(kinds / chosen, [0.8, 0.1, 0.1], atol=0.02)


def test_masking_goes_on_where_it_stood() -> None:
    data = masked(seed=1)
    data.next_batch()
    state, after = data.state(), data.next_batch()
    other = masked(seed=1)
    other.load_state(state)
    for one, two in zip(after, other.next_batch(), strict=True):
        assert np.array_equal(one, two)
    with pytest.raises(DataError, match="the run masked tokens by"):
        masked(seed=2).load_state(state)
    with pytest.raises(ConfigError, match="mask_rule: expected bert or bernoulli, got 'all'"):
        masked(rule="all")
    with pytest.raises(ConfigError, match="mask_share: expected 0 < value < 1, got 1"):
        masked(share=1)


@pytest.mark.parametrize("special", [SPECIAL, SPECIAL[1:]])
def test_what_is_replaced(special: tuple[int, ...]) -> None:
    """Labels are 1 where a token is another than it was, 0 elsewhere, and nothing at special tokens and padding, which
    may be an ordinary token."""

    def propose(hidden: Any, places: Any) -> Any:
        seen.append(hidden.copy())
        given = np.full(len(places), 7, np.int32)
        given[::2] = originals[-1][places][::2]  # guessed right
        return given

    originals: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    data, plain = ReplacedTokens(masked(seed=5, special=special), propose), Texts()
    for _ in range(3):
        tokens, _, _ = plain.next_batch()
        originals.append(tokens)
        replaced, labels, _ = data.next_batch()
        assert (seen[-1] == MASK).any()
        assert labels.shape == (720, 1) and labels.dtype == np.float32
        ordinary = ~np.isin(tokens, SPECIAL)
        assert np.array_equal(labels[ordinary, 0], replaced[ordinary] != tokens[ordinary])
        assert np.isnan(labels[~ordinary]).all()
        assert MASK not in replaced
        assert labels[ordinary].sum() > 20
    state = data.state()
    assert state == masked(seed=5).state() | {"masked": 3, "data": {"position": 3}}
    data.load_state(state)

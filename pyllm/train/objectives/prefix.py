"""Prefix language modelling (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.2.1)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from pyllm.errors import DataError
from pyllm.ops_training import IGNORED_LABEL
from pyllm.train.report import I32, Data


class SplitTokens:
    """Micro-batches in which each sequence is split at random: only what is behind the split counts.

    The split is drawn evenly from all that leave a token before and behind it, as a function of `seed` and of the
    micro-batch's number.
    """

    def __init__(self, data: Data, seed: int) -> None:
        self._data, self._seed, self._position = data, seed, 0

    def next_batch(self) -> tuple[I32, I32, I32]:
        """See :class:`pyllm.train.Data`."""
        tokens, labels, starts, *_ = self._data.next_batch()
        rng = np.random.Generator(np.random.PCG64([self._seed, self._position]))
        self._position += 1
        labels = labels.copy()
        for first, end in pairwise(starts.tolist()):
            if first < end:
                labels[first : first + int(rng.integers(end - first))] = IGNORED_LABEL
        return tokens, labels, starts

    def state(self) -> dict[str, Any]:
        """See :class:`pyllm.train.Data`."""
        return {"split": self._position, "seed": self._seed, "data": self._data.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`pyllm.train.Data`."""
        if "split" not in state or state.get("seed") != self._seed:
            raise DataError(f"the run split its texts with seed {state.get('seed')}, now it is {self._seed}")
        self._position = state["split"]
        self._data.load_state(state["data"])

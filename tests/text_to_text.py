"""What tests of sources and targets share: the special tokens of pairs, files of pairs, and pairs of micro-batches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from pyllm.train.head_loss import IGNORED
from pyllm.train.pairs import PairForm
from pyllm.train.token_store import TokenStore

FORM = PairForm(start=9, end=2, before=(1,), behind=(2,))


def store_of(pairs: list[tuple[list[int], list[int]]]) -> TokenStore:
    """As they are written: a start token, the source, the target, an end token."""
    tokens, answers, ends = [], [], []
    for source, target in pairs:
        tokens += [1, *source, *target, 2]
        answers += [0] * (1 + len(source)) + [1] * (len(target) + 1)
        ends.append(len(tokens))
    return TokenStore(np.array(tokens, np.uint16), np.array(ends), np.array(answers, np.uint8), True, "key", "pairs")


def taken_apart(batch: Any) -> list[tuple[list[int], list[int]]]:
    """Texts of source and target of each pair that counts, after a look at what the decoder is given."""
    tokens, labels, starts, source, bounds = (array.tolist() for array in batch)
    found = []
    for (first, end), (begin, stop) in zip(pairwise(starts), pairwise(bounds), strict=True):
        if end == first or labels[first] == IGNORED:
            assert set(labels[first:end]) <= {IGNORED}
            continue
        assert tokens[first:end] == [9, *labels[first : end - 1]]
        assert labels[first] == 1 and labels[end - 1] == 2 and source[begin] == 1 and source[stop - 1] == 2
        found.append((source[begin + 1 : stop - 1], labels[first + 1 : end - 1]))
    return found

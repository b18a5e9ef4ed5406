"""Where spans lie in a text that is to be restored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spread(sizes: Sequence[int], length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """First and end of spans of these sizes among `length` places, in order; no two touch. Those that find no place are
    left out."""
    between = length - sum(sizes)  # places that stay
    gaps = np.sort(rng.choice(between + 1, min(len(sizes), between + 1), replace=False)).tolist()
    spans, before = [], 0
    for gap, size in zip(gaps, sizes, strict=False):
        spans.append((gap + before, gap + before + size))
        before += size
    return spans


def partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Sizes of `parts` parts, each at least 1, that add up to `total`; all ways to do so are as likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return [int(size) for size in np.diff([0, *cuts, total])]

"""Biases of attention scores by the distance from query to key, as data and as the numbers that kernels take.

Sizes: H heads. A distance is j - i for key j and query i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyllm.errors import require

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Alibi:
    """Linear biases (Press et al., arXiv:2108.12409): a head adds slope * (j - i) to the score of query i and key j."""

    max_bias: float = 8.0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(math.isfinite(self.max_bias) and self.max_bias > 0, "ALiBi's largest bias", "a finite number above 0",
                self.max_bias)  # fmt: skip

    def slopes(self, heads: int) -> Floats:
        """float32 [H]: 2^(-max_bias k / n), k = 1 .. n, for n heads, a power of two.

        Where H is none, n is the one below, and the slopes of 2n heads at odd k follow.
        """
        n = 1 << (heads.bit_length() - 1)
        powers = [k / n for k in range(1, n + 1)] + [k / (2 * n) for k in range(1, 2 * (heads - n), 2)]
        return np.exp2(-self.max_bias * np.array(powers)).astype(np.float32)


@dataclass(frozen=True)
class Buckets:
    """Learned biases (Raffel et al., arXiv:1910.10683): each head has one for every bucket of distances.

    Small distances have a bucket each, larger ones share buckets that grow with the distance up to `max_distance`, and
    the last is of all beyond. In a decoder buckets are those of earlier keys; an encoder has one half of them for each
    side. The weights are one slot, relative_bias.weight [H, count], which all layers share.
    """

    count: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.count >= 4 and self.count % 2 == 0, "buckets of distances", "an even number from 4 on", self.count)
        require(self.max_distance > self.count // 2, "largest distance of a bucket",
                f"more than half of the {self.count} buckets", self.max_distance)  # fmt: skip

    def of_distances(self, two_sided: bool) -> npt.NDArray[np.int32]:
        """int32 [2 * max_distance + 1]: the bucket of each distance from -max_distance to max_distance."""
        distances = np.arange(-self.max_distance, self.max_distance + 1)
        side = self.count // 2 if two_sided else self.count
        first = side * (distances > 0) if two_sided else np.zeros_like(distances)
        far = np.abs(distances) if two_sided else np.maximum(-distances, 0)
        exact = side // 2
        growth = np.log(np.maximum(far, exact) / exact) / math.log(self.max_distance / exact)
        shared = np.minimum(exact + (growth * (side - exact)).astype(np.int64), side - 1)
        return (first + np.where(far < exact, far, shared)).astype(np.int32)

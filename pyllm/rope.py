"""Rotary position embedding as data: its kinds, and the frequencies that each gives.

Sizes: R rotated channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from pyllm.errors import require

Floats = npt.NDArray[np.float32]


class RopeKind(str, Enum):
    """How rotary frequencies are stretched to longer contexts; the values are those of Hugging Face configs."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of the first `dim` channels of a head, pair k being channels (k, k + dim/2).

    With two `sections` the first half of the pairs turns by a token's first position, the second half by its second,
    with the same frequencies. `float16` rounds frequencies, as some checkpoints store them.
    `factor`, `original_max_positions` and what follows are parameters of the scaling kinds; a kind ignores those that
    it does not use. `original_max_positions` is the context of pretraining, before the context was stretched to
    `max_positions`; None means that the two are equal.
    """

    dim: int
    theta: float = 10000.0
    kind: RopeKind = RopeKind.DEFAULT
    max_positions: int = 2048
    original_max_positions: int | None = None
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole channels
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    attention_factor: float | None = None  # yarn, longrope: given instead of derived
    short_factor: tuple[float, ...] = ()  # longrope, one per pair
    long_factor: tuple[float, ...] = ()  # longrope, one per pair
    sections: int = 1
    float16: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        require(self.dim > 0 and self.dim % 2 == 0, "rotated channels of a head", "a positive even number", self.dim)
        require(1 < self.theta <= 1e18, "rope theta", "above 1 and at most 1e18", self.theta)
        require(self.max_positions > 0, "rope max_positions", "at least 1", self.max_positions)
        require(self.pretrained_positions > 0, "rope original_max_positions", "at least 1", self.pretrained_positions)
        require(0 < self.factor <= 1e6, "rope factor", "above 0 and at most 1e6", self.factor)
        if self.kind is RopeKind.DYNAMIC:
            require(self.dim > 2, "rotated channels of a head under dynamic scaling", "at least 4", self.dim)
            require(self.factor >= 1, "factor of dynamic rope scaling", "at least 1", self.factor)
        if self.kind is RopeKind.LLAMA3:
            require(0 < self.low_freq_factor < self.high_freq_factor < math.inf,
                     "llama3 rope (low_freq_factor, high_freq_factor)", "0 < low < high",
                     (self.low_freq_factor, self.high_freq_factor))  # fmt: skip
        if self.kind is RopeKind.YARN:
            require(0 < self.beta_slow <= self.beta_fast < math.inf, "yarn rope (beta_slow, beta_fast)",
                     "0 < slow <= fast", (self.beta_slow, self.beta_fast))  # fmt: skip
        if self.kind is RopeKind.LONGROPE:
            for name in ("short_factor", "long_factor"):
                factors: tuple[float, ...] = getattr(self, name)
                require(len(factors) == self.dim // 2, f"length of longrope {name}", str(self.dim // 2), len(factors))
                require(all(0 < f < math.inf for f in factors), f"longrope {name}", "finite numbers above 0", factors)
            require(self.attention_factor is not None or self.factor <= 1 or self.pretrained_positions > 1,
                     "longrope original_max_positions", "at least 2", self.pretrained_positions)  # fmt: skip
        plain = self.kind is RopeKind.DEFAULT or (self.sections == 1 and not self.float16)
        require(plain and self.sections in (1, 2) and self.dim % (2 * self.sections) == 0, "rope sections",
                "1, or 2 of an even number of channels each, without scaling", self.sections)  # fmt: skip
        if self.attention_factor is not None:
            require(0 <= self.attention_factor < math.inf, "rope attention_factor", "a finite number, not negative",
                     self.attention_factor)  # fmt: skip

    @property
    def pretrained_positions(self) -> int:
        """The context of pretraining, in tokens."""
        return self.max_positions if self.original_max_positions is None else self.original_max_positions

    @property
    def stretched_positions(self) -> int:
        """The longest context that the scaling serves, in tokens: that of pretraining times the factor."""
        if self.kind in (RopeKind.LINEAR, RopeKind.DYNAMIC):
            return max(self.max_positions, int(self.max_positions * self.factor))
        if self.kind is RopeKind.YARN:
            return max(self.max_positions, int(self.pretrained_positions * self.factor))
        return self.max_positions

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied by (scores get its square)."""
        if self.attention_factor is not None and self.kind in (RopeKind.YARN, RopeKind.LONGROPE):
            return self.attention_factor
        if self.kind is RopeKind.YARN:
            if self.mscale and self.mscale_all_dim:
                return _yarn_magnitude(self.factor, self.mscale) / _yarn_magnitude(self.factor, self.mscale_all_dim)
            return _yarn_magnitude(self.factor, 1.0)
        if self.kind is RopeKind.LONGROPE and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.pretrained_positions))
        return 1.0

    def length_class(self, length: int) -> Hashable:
        """Two lengths of one class have the same `inv_freq`: the key to cache it under."""
        if self.kind is RopeKind.DYNAMIC:
            return max(length, self.max_positions)
        if self.kind is RopeKind.LONGROPE:
            return length > self.pretrained_positions
        return None

    def inv_freq(self, length: int) -> Floats:
        """Angle per position of each pair of a section, float32 [R/2/sections], while a sequence is `length` long.

        Powers are rounded once from float64; every other step is float32, in the order of Hugging Face transformers,
        so that angles agree with it at large positions. Only `dynamic` and `longrope` depend on the length: keys that
        are cached already keep the rotation of the length they were computed at.
        """
        if self.kind is RopeKind.DYNAMIC:
            return _inverse(_powers(self._dynamic_theta(length), self.dim))
        if self.kind is RopeKind.LONGROPE:
            stretch = self.long_factor if length > self.pretrained_positions else self.short_factor
            return _inverse(np.asarray(stretch, np.float32) * _powers(self.theta, self.dim))
        if self.kind is RopeKind.YARN:
            return self._yarn_inv_freq()
        inv_freq = _inverse(_powers(self.theta, self.dim // self.sections))
        if self.float16:
            inv_freq = inv_freq.astype(np.float16).astype(np.float32)
        if self.kind is RopeKind.LINEAR:
            stretched: Floats = inv_freq / np.float32(self.factor)
            return stretched
        if self.kind is RopeKind.LLAMA3:
            return self._llama3_inv_freq(inv_freq)
        return inv_freq

    def _dynamic_theta(self, length: int) -> float:
        """NTK-aware base: long waves are stretched by the excess over the trained length, short ones hardly."""
        exponent = self.dim / (self.dim - 2)
        if length <= self.max_positions:
            return float(self.theta * (self.factor - (self.factor - 1)) ** exponent)
        excess = np.float32(self.factor) * np.float32(length) / np.float32(self.max_positions)
        grown = np.float32(float(excess - np.float32(self.factor - 1)) ** exponent)
        return float(np.float32(self.theta) * grown)

    def _llama3_inv_freq(self, inv_freq: Floats) -> Floats:
        """Long waves are divided by the factor, short ones kept, those between are interpolated."""
        length = self.pretrained_positions
        wavelength = np.float32(2 * math.pi) / inv_freq
        is_long = wavelength > np.float32(length / self.low_freq_factor)
        is_short = wavelength < np.float32(length / self.high_freq_factor)
        span = np.float32(self.high_freq_factor - self.low_freq_factor)
        smooth = (np.float32(length) / wavelength - np.float32(self.low_freq_factor)) / span
        between = (np.float32(1) - smooth) * inv_freq / np.float32(self.factor) + smooth * inv_freq
        return np.where(is_long, inv_freq / np.float32(self.factor), np.where(is_short, inv_freq, between))

    def _yarn_inv_freq(self) -> Floats:
        """YaRN (Peng et al. 2023): a linear ramp over channels from unscaled to fully interpolated frequencies."""

        def channel(rotations: float) -> float:  # the channel that turns this often over the pretrained context
            context = self.pretrained_positions / (rotations * 2 * math.pi)
            return self.dim * math.log(context) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        width = high - low if high != low else 0.001
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
        powers = _powers(self.theta, self.dim)
        kept = np.float32(1) - ramp
        interpolated = _inverse(np.float32(self.factor) * powers)
        mixed: Floats = interpolated * (np.float32(1) - kept) + _inverse(powers) * kept
        return mixed


def _powers(theta: float, dim: int) -> Floats:
    """theta^(2k/R) for k < R/2: the exponent rounded to float32, then the power."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers: npt.NDArray[np.float64] = np.power(float(np.float32(theta)), exponent.astype(np.float64))
    return powers.astype(np.float32)


def _inverse(values: Floats) -> Floats:
    inverse: Floats = np.float32(1) / values
    return inverse


def _yarn_magnitude(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0
